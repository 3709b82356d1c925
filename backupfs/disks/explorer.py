"""File systems by fs-explorer, an optional library: btrfs, NTFS, FAT, exFAT, ISO 9660, squashfs and others.

What is used of it is no documented interface, so its version is pinned in setup.cfg.
"""

import importlib
import importlib.util
import os
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from backupfs.disks import explorer_btrfs as btrfs
from backupfs.disks import explorer_ntfs as ntfs
from backupfs.disks.filesystem import READ, Entry, Extent, Filesystem, Read, Unreadable, append_extent
from backupfs.disks.free_space_ntfs import is_unmounted

# Drivers of file systems, by the names that users know.
_FORMS = {
    "btrfs": "btrfs", "ntfs": "ntfs", "fat": "vfat", "exfat": "exfat", "iso9660": "iso9660",
    "squashfs": "squashfs", "udf": "udf", "hfsplus": "hfsplus",
}  # fmt: skip
_STEP = 1 << 20
_TYPES = {
    "FILE": stat.S_IFREG, "DIR": stat.S_IFDIR, "SYMLINK": stat.S_IFLNK, "CHAR_DEVICE": stat.S_IFCHR,
    "BLOCK_DEVICE": stat.S_IFBLK, "FIFO": stat.S_IFIFO, "SOCKET": stat.S_IFSOCK,
}  # fmt: skip
_STARTS = ("cluster", "dir_id")  # where a directory begins, in what the library refers to it by
_MODES = {stat.S_IFDIR: 0o755, stat.S_IFLNK: 0o777}


def is_installed() -> bool:
    """Tell whether the library is there."""
    return importlib.util.find_spec("fs_explorer") is not None


def load() -> None:
    """Load all of the library, if it is there: once it is confined, a process can load nothing native."""
    if is_installed():
        # What the system has is looked for with other programs, and loaded late; what comes with it is as good.
        os.environ.setdefault("FS_EXPLORER_NO_SYSTEM_CODECS", "1")
        importlib.import_module("fs_explorer.detect").drivers()
        importlib.import_module("fs_explorer.native").info()


def open_filesystem(read: Read, size: int) -> Filesystem | None:
    """Return the file system in a volume; None if there is none that the library knows. Raises: anything."""
    if not is_installed():
        return None
    # The package's attribute of this name is a function.
    detect = importlib.import_module("fs_explorer.detect")
    tree = importlib.import_module("fs_explorer.tree")
    cache = importlib.import_module("fs_explorer.io.cache")
    stats = importlib.import_module("fs_explorer.io.stats")
    volume = _volume(read, size)
    found = detect.detect(volume)
    if found is None:
        return None
    name = found.driver.__module__.rpartition("fs_explorer.filesystems.")[2].split(".")[0]
    # A format of virtual machines in a volume is nothing to open: it may name files of this host.
    if name not in _FORMS:
        return None
    context = tree.Context(cache=cache.Cache(), stats=stats.Stats())
    is_btrfs = name == "btrfs"
    layer = btrfs.open_tree(volume, context) if is_btrfs else found.driver.open(volume, context, found.hint)
    if not isinstance(layer, tree.Tree):
        return None
    is_clean = not layer.sb.log_root if is_btrfs else name != "ntfs" or is_unmounted(read, size)
    return _ExplorerFilesystem(layer, getattr(layer, "format", "") or _FORMS[name], is_clean)


def _volume(read: Read, size: int) -> Any:
    source = importlib.import_module("fs_explorer.io.source")

    class Volume(source.RandomAccess):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.size = size

        def read_at(self, offset: int, length: int) -> bytes:
            return read(offset, max(0, min(length, size - offset)))

        def physical_ranges(self, offset: int, length: int) -> list[tuple[int, int, int]]:
            if offset + length > size:
                # The library would make zeros of it.
                raise Unreadable("it lies behind the end of the disk, which is cut short")
            return [(0, offset, length)] if length > 0 else []

    return Volume()


class _ExplorerFilesystem:
    """Adapts a tree of the library."""

    def __init__(self, tree: Any, form: str, is_clean: bool) -> None:
        self._tree = tree
        self.form = form
        self._opened: tuple[Entry, Any, list[Extent]] | None = None
        self.remarks: tuple[str, ...] = (
            () if is_clean else ("it was not unmounted: files are shown as of before its journal is replayed",)
        )

    def top(self) -> Entry:
        node = self._tree.root()
        # The library does not look at the top of NTFS.
        return self._entry(node if node.statted else self._tree.stat(node))

    def entries(self, directory: Entry) -> Iterator[Entry]:
        if isinstance(directory.handle, _Empty):
            return
        try:
            nodes = list(self._tree.children(directory.handle))
        except Exception:
            # One that is garbled must not hide the others.
            nodes = self._tree.children(directory.handle, stat=False)
        for node in nodes:
            try:
                if self._is_elsewhere(node, directory):
                    yield _empty_directory(node, directory)
                    continue
                yield self._entry(node if node.statted else self._tree.stat(node))
            except Exception as error:
                yield Entry(os.fsencode(node.name), 0, problem=str(error) or type(error).__name__)

    def _is_elsewhere(self, node: Any, directory: Entry) -> bool:
        """Tell whether a node is a subvolume of btrfs that is shown in another directory."""
        place = node.extra.get(btrfs.PLACE)
        return place is not None and place != (directory.handle.ref, os.fsencode(node.name))

    def identity(self, directory: Entry) -> object:
        if isinstance(directory.handle, _Empty):
            return directory.handle
        # Those of FAT, exFAT and ISO 9660 have no numbers, or not each its own: they are known by where they begin.
        for name in _STARTS:
            start: object = getattr(directory.handle.ref, name, None)
            if start:
                return start
        return self._tree.identity(directory.handle) or object()

    def _entry(self, node: Any) -> Entry:
        kind = _TYPES.get(node.type.name)
        if kind is None:
            raise Unreadable(f"it is of a kind that is not known ({node.type.name})")
        mode = kind | stat.S_IMODE(node.mode) if node.mode is not None else kind | _MODES.get(kind, 0o644)
        target = b""
        if kind == stat.S_IFLNK:
            target = os.fsencode(self._tree.readlink(node) or "")
        mtime_ns = node.mtime_ns or 0
        return Entry(
            os.fsencode(node.name), mode, node.uid or 0, node.gid or 0, node.nlink or 1, node.inode or 0,
            node.size or 0, mtime_ns, node.ctime_ns if node.ctime_ns is not None else mtime_ns, target,
            node.extra.get("rdev") or (0, 0), node,
        )  # fmt: skip

    def xattrs(self, entry: Entry) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        if isinstance(entry.handle, _Empty):
            return found
        if self.form == "ntfs":
            return ntfs.attributes(self._tree, entry)
        for name, value in self._tree.xattrs(entry.handle).items():
            key = os.fsencode(name)
            if b"." in key:
                found.append((key, bytes(value)))
        return sorted(found)

    def extents(self, file: Entry) -> list[Extent] | None:
        return self._open(file)[1] if file.size else []

    def data(self, file: Entry) -> Iterator[bytes]:
        source, extents = self._open(file)
        start = 0
        for length, place in extents:
            at, start = start, start + length
            while place == READ and at < start:
                part = source.read_at(at, min(_STEP, start - at))
                if not part:
                    raise Unreadable(f"it ends at {at} instead of {file.size}")
                yield bytes(part)
                at += len(part)

    def _open(self, file: Entry) -> tuple[Any, list[Extent]]:
        """Return what gives a file's bytes, and its extents; the last one is kept, as it is asked for twice."""
        if self._opened is None or self._opened[0] is not file:
            source = self._tree.open_file(file.handle)
            found: list[Extent] = []
            for length, place in self._parts(source, file):
                append_extent(found, length, place)
            append_extent(found, file.size - sum(length for length, _ in found), None)
            self._opened = file, source, found
        return self._opened[1], self._opened[2]

    def _parts(self, source: Any, file: Entry) -> Iterator[Extent]:
        """Yield where the bytes of a file lie; what is missing at its end is a hole."""
        if self.form == "ntfs" and (compressed := ntfs.compressed_data(self._tree, file.handle)) is not None:
            yield from ntfs.parts_of_compressed(self._tree, compressed, file.size)
            return
        ranges = source.data_ranges()
        if hasattr(source, "extents"):
            # Those of one file may be of different kinds: compressed ones, ones in a tree, and what lies as it is.
            for _, length, extent in source._pieces(0, min(file.size, source.size)):
                if extent is None or extent.ra is None:
                    yield length, None
                else:
                    yield from _physical(extent.ra, extent.roff, length)
        elif ranges is not None:
            at = 0
            for start, length in ranges:
                length = min(length, file.size - start)
                if start < at or length <= 0:
                    break
                yield start - at, None
                yield from _physical(source, start, length)
                at = start + length
        else:
            yield from _physical(source, 0, file.size)


def _physical(source: Any, offset: int, length: int) -> Iterator[Extent]:
    """Yield where a range of what the library reads lies in the volume; READ if it has another form there."""
    ranges = source.physical_ranges(offset, length)
    if ranges is None:
        yield length, READ
        return
    for descriptor, place, count in ranges:
        count = min(count, length)
        length -= count
        yield count, None if descriptor is None else place
    # The library makes zeros of what is missing.
    yield length, None


class _Empty(NamedTuple):
    """A directory that stands for a subvolume which is elsewhere, or is gone."""

    directory: tuple[int, int]
    name: str


def _empty_directory(node: Any, directory: Entry) -> Entry:
    """Return what the kernel shows in the place of a subvolume that is elsewhere; of its times it shows the present."""
    return Entry(
        os.fsencode(node.name), stat.S_IFDIR | 0o755, directory.uid, directory.gid, 1, btrfs.EMPTY_INODE, 0,
        directory.mtime_ns, directory.ctime_ns, handle=_Empty(directory.handle.ref, node.name),
    )  # fmt: skip
