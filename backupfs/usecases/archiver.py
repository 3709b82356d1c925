"""Walk, compare with the parent, read what changed, build trees: the one thread of a backup that touches sources.

The walk goes by descriptors and keeps no recursion of Python's: each directory is a generator that yields the
directories below it, so depth is bounded by memory alone. Files of a directory come before its directories, so they
are neighbours in blocks. An entry whose stat row equals the parent's is reused and opened by nobody; a run of entries
that equals a whole page of the parent costs one comparison of bytes.
"""

import os
import stat
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from backupfs.chunking.cutter import CutSizes, Cutter
from backupfs.codec.keys import keyed_hash
from backupfs.codec.records import encode_record
from backupfs.errors import BackupfsError
from backupfs.ids import ChunkId
from backupfs.localfs import mounts, reading
from backupfs.localfs.selection import Selection
from backupfs.repository.writer import ChunkSaver
from backupfs.snapshots.content import (
    CHUNK,
    HOLE,
    INLINE_MARK,
    MOST_INLINE,
    SINGLE_MARK,
    Content,
    Segment,
    encode_content,
)
from backupfs.snapshots.node import CHANGED_WHILE_READ, NANOSECONDS, RACY, STAT_ROW, Xattrs, encode_device
from backupfs.snapshots.tree import LeafPage, TreeBuilder, find_node, leaf_pages
from backupfs.usecases.events import FileChanged, FileSkipped, LeftOut, Report

# As many entries are looked at before any of them is read; it bounds memory in directories of a million entries.
SLICE = 4096
# From this depth on a directory's descriptor is closed while the walk is below it, and reopened by way of `..`.
_MOST_OPEN = 128
# Xattrs beyond this go to a chunk of their own.
_MOST_XATTRS = 4096
# A time this close to the look may hide a later change within the same tick of the file system's clock.
_TICK_NS = 10 * 10**6
_FAT_TICK_NS = 2 * 10**9
_COARSE = frozenset({"vfat", "msdos", "exfat"})

Load = Callable[[ChunkId], bytes | memoryview]


@dataclass(slots=True)
class Counts:
    """What the walk has seen; written by its thread, read by any."""

    files: int = 0
    directories: int = 0
    size: int = 0
    files_new: int = 0
    files_changed: int = 0
    files_unchanged: int = 0
    files_skipped: int = 0
    has_xattrs: bool = False
    current: bytes = b""


@dataclass(frozen=True, slots=True)
class ArchiverKeys:
    """Keys that name chunks and cut pages and files."""

    data_id: bytes
    tree_id: bytes
    page_cuts: bytes
    file_cut_seed: int


class Archiver:
    """Turns sources into trees. Belongs to one thread; `counts` may be read and `stop` set by others."""

    def __init__(
        self,
        keys: ArchiverKeys,
        sizes: CutSizes,
        data: ChunkSaver,
        trees: ChunkSaver,
        load_tree: Load,
        selection: Selection,
        report: Report,
    ) -> None:
        """Take the parts.

        load_tree: gives tree chunks of the parent snapshot.
        report: takes events, in the walk's thread.
        """
        self._keys = keys
        self._cutter = Cutter(sizes, keys.file_cut_seed)
        self._most_single = sizes.avg_size
        self._data = data
        self._trees = trees
        self._load = load_tree
        self.selection = selection
        self._report = report
        self._linked: dict[tuple[int, int, int], Content] = {}  # (device, inode, ctime_ns) of hardlinked files
        self._ordinals: dict[int, int] = {}
        self._current_owners: dict[object, bool] = {}
        self._coarse_devices = {os.makedev(*mount.device) for mount in mounts.read_mounts() if mount.fstype in _COARSE}
        self.counts = Counts()
        self.stop = threading.Event()

    def archive(self, sources: list[bytes], parent: ChunkId | None) -> "Root":
        """Store everything below the sources and return `/`.

        sources: absolute, normalised, none below another.
        parent: root tree to compare with.
        """
        status = os.stat(b"/")
        row = _row_of(status, status.st_size) if sources == [b"/"] else _row_on_the_way(status)
        tree, xattrs, _ = _run(self._from_root(b"/", sources, parent))
        saved = self.save_xattrs(xattrs)
        self._data.flush()
        self._trees.flush()
        return Root(tree, row, reading.owner_name(status.st_uid), reading.group_name(status.st_gid), saved)

    def archive_stream(self, path: bytes, read_into: Callable[[memoryview], int], time_ns: int) -> "Root":
        """Store one file whose bytes come from a stream and return `/`.

        path: where it stands in the snapshot. time_ns: its modification time.
        """
        segments = [self._save_piece(piece) for piece in self._cutter.cut(read_into)]
        size = sum(segment[0] for segment in segments if isinstance(segment[0], int))
        content = encode_content(segments, self.save_tree)
        times = (time_ns // NANOSECONDS, time_ns % NANOSECONDS) * 2
        row = STAT_ROW.pack(stat.S_IFREG | 0o600, os.getuid(), os.getgid(), 1, 0, size, *times)
        for name in reversed(path.split(b"/")[1:]):
            builder = self._builder()
            self._add(builder, name, row, content)
            content = builder.finish()
            row = STAT_ROW.pack(stat.S_IFDIR | 0o755, os.getuid(), os.getgid(), 1, 0, 0, 0, 0, 0, 0)
        self.counts.files = self.counts.files_new = 1
        self.counts.size = size
        self._data.flush()
        self._trees.flush()
        assert isinstance(content, bytes)
        return Root(ChunkId(content), row, reading.owner_name(os.getuid()), reading.group_name(os.getgid()), ())

    # Above the sources: directories that are only on the way.

    def _from_root(self, path: bytes, sources: list[bytes], parent: ChunkId | None) -> "Walk":
        if sources == [path]:
            directory = _OpenDirectory(reading.open_directory(path, None))
            return (yield self.directory(directory, path, parent, os.fstat(directory.fd).st_dev, None))
        prefix = path if path.endswith(b"/") else path + b"/"
        below: dict[bytes, list[bytes]] = {}
        for source in sources:
            below.setdefault(source[len(prefix) :].split(b"/", 1)[0], []).append(source)
        builder = self._builder()
        for name, inner in sorted(below.items()):
            child = prefix + name
            if inner == [child]:
                yield from self._source(builder, child, name, parent)
                continue
            node = find_node(parent, name, self._load) if parent is not None else None
            parent_tree = (
                ChunkId(node.content)
                if node is not None and isinstance(node.content, bytes) and node.is_directory
                else None
            )
            tree, _, _ = yield self._from_root(child, inner, parent_tree)
            self._add(builder, name, _row_on_the_way(os.stat(child)), tree)
        return builder.finish(), (), None

    def _source(self, builder: TreeBuilder, path: bytes, name: bytes, parent: ChunkId | None) -> "Steps":
        """Add a source itself to the directory above it."""
        page = None
        if parent is not None:
            page = next(leaf_pages(parent, self._load, name), None)
        above = os.path.dirname(path)
        directory = _OpenDirectory(os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            part = _Part(self, directory, above, os.lstat(path).st_dev, [name], page, time.time_ns(), is_source=True)
            yield from part.walk()
            part.add_to(builder)
        finally:
            directory.close()

    # At and below the sources.

    def directory(
        self,
        directory: "_OpenDirectory",
        path: bytes,
        parent: ChunkId | None,
        device: int,
        above: os.stat_result | None,
    ) -> "Walk":
        """Store an open directory, which is closed at the end; return (tree, xattrs, descriptor of the one above).

        above: the directory above, when the walk closed it and wants it back.
        """
        if self.stop.is_set():
            raise Stopped
        try:
            counts = self.counts
            counts.directories += 1
            counts.current = path
            looked_ns = time.time_ns()
            xattrs = reading.read_xattrs(directory.fd)
            names: list[bytes] = []
            reason = self.selection.marked(directory.fd) if path not in self.selection.sources else None
            if reason is not None:
                self._report(LeftOut(path, reason))
            else:
                names = [os.fsencode(name) for name in os.listdir(directory.fd)]
                names.sort()
            builder = self._builder()
            reused = 0  # pages of the parent that stand unchanged, not yet in the builder
            changed = False
            for page, part_names in self._paired(names, parent):
                part = _Part(self, directory, path, device, part_names, page, looked_ns)
                yield from part.walk()
                if not changed and part.same_as_page:
                    reused += 1
                    continue
                if not changed:
                    changed = True
                    self._replay(builder, parent, reused)
                part.add_to(builder)
            tree = parent if not changed and parent is not None else builder.finish()
            return tree, xattrs, _reopen_above(directory.fd, above)
        finally:
            directory.close()

    def _paired(self, names: list[bytes], parent: ChunkId | None) -> Iterator[tuple[LeafPage | None, list[bytes]]]:
        """Yield (page of the parent, names in its range), so that a page is compared as a whole."""
        if parent is None:
            for start in range(0, len(names), SLICE):
                yield None, names[start : start + SLICE]
            return
        pages = leaf_pages(parent, self._load)
        page = next(pages)
        start = 0
        while True:
            following = next(pages, None)
            end = bisect_left(names, following.names[0], start) if following is not None else len(names)
            if end - start <= SLICE:
                yield page, names[start:end]
            else:
                for at in range(start, end, SLICE):
                    yield page, names[at : min(at + SLICE, end)]
            if following is None:
                return
            page, start = following, end

    def _replay(self, builder: TreeBuilder, parent: ChunkId | None, count: int) -> None:
        if count == 0 or parent is None:
            return
        for number, page in enumerate(leaf_pages(parent, self._load)):
            if number == count:
                return
            xattrs, filesystems = page.sparse_columns
            owners, groups = dict(page.owners), dict(page.groups)
            for at, name in enumerate(page.names):
                row = page.row(at)
                _, uid, gid = STAT_ROW.unpack(row)[:3]
                builder.add(
                    name,
                    row,
                    page.contents[at],
                    page.flag(at),
                    xattrs.get(at, ()),
                    filesystems.get(at, 0),
                    (uid, owners.get(uid, b"")),
                    (gid, groups.get(gid, b"")),
                )

    def empty_tree(self) -> ChunkId:
        """Return the tree of a directory with nothing in it."""
        return self._builder().finish()

    def _builder(self) -> TreeBuilder:
        return TreeBuilder(self._keys.page_cuts, self.save_tree)

    def _add(self, builder: TreeBuilder, name: bytes, row: bytes, content: Content) -> None:
        _, uid, gid, *_ = STAT_ROW.unpack(row)
        builder.add(name, row, content, 0, (), 0, (uid, reading.owner_name(uid)), (gid, reading.group_name(gid)))

    def save_tree(self, data: bytes) -> ChunkId:
        """Store a tree chunk and return its id."""
        chunk_id = ChunkId(keyed_hash(self._keys.tree_id, data))
        self._trees.save(chunk_id, data)
        return chunk_id

    def save_xattrs(self, xattrs: Xattrs) -> "Xattrs | bytes":
        """Return xattrs as a node holds them: themselves, or the id of a chunk."""
        if not xattrs:
            return ()
        self.counts.has_xattrs = True
        if sum(len(name) + len(value) + 4 for name, value in xattrs) <= _MOST_XATTRS:
            return xattrs
        return self.save_tree(encode_record([list(pair) for pair in xattrs]))

    def ordinal(self, device: int) -> int:
        """Return the number of a file system within this snapshot, counted as the walk meets them."""
        return self._ordinals.setdefault(device, len(self._ordinals))

    def owners_are_current(self, page: LeafPage) -> bool:
        """Tell whether the names of owners in a page are still those of this machine."""
        key = (page.owners, page.groups)
        known = self._current_owners.get(key)
        if known is None:
            known = all(reading.owner_name(uid) == name for uid, name in page.owners) and all(
                reading.group_name(gid) == name for gid, name in page.groups
            )
            self._current_owners[key] = known
        return known

    def is_racy(self, status: os.stat_result, looked_ns: int) -> bool:
        """Tell whether a later change could leave the same times."""
        tick = _FAT_TICK_NS if status.st_dev in self._coarse_devices else _TICK_NS
        return max(status.st_mtime_ns, status.st_ctime_ns) >= looked_ns - tick

    def skip(self, path: bytes, error: OSError) -> None:
        """Report that something could not be read."""
        self.counts.files_skipped += 1
        self._report(FileSkipped(path, error.strerror or str(error)))

    def leave_out(self, path: bytes, reason: str) -> None:
        """Report a directory whose content is left out on purpose."""
        self._report(LeftOut(path, reason))

    # Files.

    def read_file(self, name: bytes, dir_fd: int, path: bytes, status: os.stat_result) -> "FileRead":
        """Read a regular file into chunks.

        A file that changes while it is read is read again once, then kept and flagged. Raises: OSError.
        """
        fd = reading.open_file(name, dir_fd)
        try:
            linked = (status.st_dev, status.st_ino, status.st_ctime_ns) if status.st_nlink > 1 else None
            if linked is not None and linked in self._linked:
                return FileRead(self._linked[linked], status, status.st_size, 0, reading.read_xattrs(fd))
            content, complete = self._read_content(fd, status)
            after = os.fstat(fd)
            size, flags = after.st_size, 0
            if not complete or not _is_same(status, after):
                if not stat.S_ISREG(after.st_mode):
                    raise OSError(0, "it became something else while it was read")
                status = after
                content, complete = self._read_content(fd, status)
                after = os.fstat(fd)
                if not complete or not _is_same(status, after):
                    flags = CHANGED_WHILE_READ
                    self._report(FileChanged(path))
                    segments = self._segments_of_range(fd, 0, status.st_size)
                    # The recorded size is that of the bytes that were read, or the content would not add up to it.
                    size = sum(segment[0] for segment in segments if isinstance(segment[0], int))
                    content = encode_content(segments, self.save_tree)
            elif linked is not None:
                self._linked[linked] = content
            return FileRead(content, status, size, flags, reading.read_xattrs(fd))
        finally:
            os.close(fd)

    def _read_content(self, fd: int, status: os.stat_result) -> tuple[Content, bool]:
        """Return (content, whether the file gave all its bytes)."""
        size = status.st_size
        if size == 0:
            return b"", True
        if size <= self._most_single and status.st_blocks * 512 >= size:
            data = os.read(fd, size) if os.lseek(fd, 0, os.SEEK_SET) == 0 else b""
            if len(data) != size:
                return b"", False
            return self._whole(data), True
        segments: list[Segment] = []
        position = 0
        for start, end in reading.data_ranges(fd, size):
            if start > position:
                segments.append([start - position, HOLE])
            segments += self._segments_of_range(fd, start, end)
            position = end
        if position < size:
            segments.append([size - position, HOLE])
        length = sum(segment[0] for segment in segments if isinstance(segment[0], int))
        if length != size:
            return b"", False
        return encode_content(segments, self.save_tree), True

    def _whole(self, data: bytes) -> Content:
        if len(data) <= MOST_INLINE:
            return INLINE_MARK + data
        chunk_id = ChunkId(keyed_hash(self._keys.data_id, data))
        self._data.save(chunk_id, data)
        return SINGLE_MARK + chunk_id

    def _segments_of_range(self, fd: int, start: int, end: int) -> list[Segment]:
        segments: list[Segment] = []
        if end - start <= self._most_single:
            data = os.pread(fd, end - start, start)
            pieces: Iterator[bytes] = iter([data] if data else [])
        else:
            pieces = self._cutter.cut(reading.range_reader(fd, start, end))
        segments += [self._save_piece(piece) for piece in pieces]
        return segments

    def _save_piece(self, piece: bytes) -> Segment:
        if self.stop.is_set():
            raise Stopped
        chunk_id = ChunkId(keyed_hash(self._keys.data_id, piece))
        self._data.save(chunk_id, piece)
        return [len(piece), CHUNK, chunk_id]


class Stopped(BackupfsError):
    """The walk was asked to stop."""


@dataclass(frozen=True, slots=True)
class FileRead:
    """A regular file as it was read."""

    content: Content
    status: os.stat_result  # of the moment it was read
    size: int  # of the content
    flags: int
    xattrs: Xattrs


@dataclass(frozen=True, slots=True)
class Root:
    """`/` as it was stored: the one directory that is in none."""

    tree: ChunkId
    row: bytes
    owner: bytes
    group: bytes
    xattrs: Xattrs | bytes


class _OpenDirectory:
    """A descriptor that may be closed for a while."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


# What a directory's generator yields (another one, to be run) and returns: tree, xattrs, descriptor of the one above.
Result = tuple[ChunkId, Xattrs, int | None]
Walk = Generator["Walk", Result, Result]
Steps = Generator[Walk, Result, None]


def _run(walk: Walk) -> Result:
    """Run a generator and those it yields, as if they called each other, without Python's stack."""
    stack = [walk]
    result: Result | None = None
    raised: BaseException | None = None
    try:
        while stack:
            try:
                deeper = stack[-1].send(result) if raised is None else stack[-1].throw(raised)  # type: ignore[arg-type]
            except StopIteration as end:
                stack.pop()
                result, raised = end.value, None
            except BaseException as error:
                stack.pop()
                result, raised = None, error
            else:
                stack.append(deeper)
                result, raised = None, None
    finally:
        while stack:
            stack.pop().close()
    if raised is not None:
        raise raised
    assert result is not None
    return result


class _Part:
    """A run of entries of one directory: looked at, compared with one page of the parent, read where they changed."""

    def __init__(
        self,
        archiver: Archiver,
        directory: _OpenDirectory,
        path: bytes,
        device: int,
        names: list[bytes],
        page: LeafPage | None,
        looked_ns: int,
        is_source: bool = False,
    ) -> None:
        self._archiver = archiver
        self._directory = directory
        self._path = path
        self._prefix = path if path.endswith(b"/") else path + b"/"
        self._device = device
        self._names = names
        self._page = page
        self._looked_ns = looked_ns
        self._is_source = is_source
        self.same_as_page = False
        self._statuses: list[os.stat_result] = []
        self._rows: list[bytes] = []
        self._contents: list[Content] = []
        self._flags: bytearray = bytearray()
        self._xattrs: dict[int, Xattrs | bytes] = {}
        self._filesystems: dict[int, int] = {}

    def walk(self) -> Steps:
        """Look at every entry, read what is new, go through the directories."""
        directories = self._look()
        page = self._page
        if (
            page is not None
            and not page.flags
            and page.names == self._names
            and page.rows == b"".join(self._rows)
            and page.sparse_columns[1] == self._filesystems
            and self._archiver.owners_are_current(page)
        ):
            self._take_page(page, len(directories))
            for position in directories:
                content = page.contents[position]
                tree, _ = yield from self._below(position, ChunkId(content) if isinstance(content, bytes) else None)
                if tree != content:
                    if self.same_as_page:
                        self._contents = list(page.contents)
                        self.same_as_page = False
                    self._contents[position] = tree
        else:
            known = self._compare(directories)
            for position in directories:
                tree, xattrs = yield from self._below(position, known.get(position))
                self._contents[position] = tree
                saved = self._archiver.save_xattrs(xattrs)
                if saved:
                    self._xattrs[position] = saved

    def add_to(self, builder: TreeBuilder) -> None:
        """Give the entries to the builder of the directory's tree."""
        for position, name in enumerate(self._names):
            status = self._statuses[position]
            builder.add(
                name,
                self._rows[position],
                self._contents[position],
                self._flags[position],
                self._xattrs.get(position, ()),
                self._filesystems.get(position, 0),
                (status.st_uid, reading.owner_name(status.st_uid)),
                (status.st_gid, reading.group_name(status.st_gid)),
            )

    def _look(self) -> list[int]:
        """Stat every entry and leave out what is not wanted; return the positions of directories."""
        archiver, fd = self._archiver, self._directory.fd
        statuses, rows = self._statuses, self._rows
        directories: list[int] = []
        missing: set[bytes] = set()
        status_of, pack, second = os.stat, STAT_ROW.pack, NANOSECONDS
        size = 0
        for name in self._names:
            try:
                status = status_of(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                missing.add(name)  # it was deleted since the directory was listed
                continue
            except OSError as error:
                missing.add(name)
                archiver.skip(self._prefix + name, error)
                continue
            mode, inode, device, links, uid, gid, length = status[:7]
            mtime_ns, ctime_ns = status.st_mtime_ns, status.st_ctime_ns
            kind = mode & 0o170000
            if kind == 0o40000:
                directories.append(len(statuses))
            else:
                if kind == 0o100000:
                    size += length
                if links > 1:
                    ordinal = archiver.ordinal(device)
                    if ordinal:
                        self._filesystems[len(statuses)] = ordinal
            rows.append(
                pack(
                    mode,
                    uid,
                    gid,
                    links,
                    inode,
                    length,
                    mtime_ns // second,
                    mtime_ns % second,
                    ctime_ns // second,
                    ctime_ns % second,
                )
            )
            statuses.append(status)
        if missing:
            self._names = [name for name in self._names if name not in missing]
        if archiver.selection.asks or archiver.selection.own:
            left_out = self._left_out(directories)
            if left_out:
                self._drop(left_out)
                directories = [at for at, status in enumerate(statuses) if stat.S_ISDIR(status.st_mode)]
                size = sum(status.st_size for status in statuses if stat.S_ISREG(status.st_mode))
        archiver.counts.size += size
        archiver.counts.files += len(statuses) - len(directories)
        return directories

    def _left_out(self, directories: list[int]) -> set[int]:
        selection = self._archiver.selection
        dropped: set[int] = set()
        for at in directories:
            status = self._statuses[at]
            if selection.is_own(status.st_dev, status.st_ino):
                self._archiver.leave_out(self._prefix + self._names[at], "the repository or the cache itself")
                dropped.add(at)
        if selection.asks and not self._is_source:
            among = set(directories)
            names = self._names
            others = [name for at, name in enumerate(names) if at not in among]
            sizes = {
                names[at]: status.st_size for at, status in enumerate(self._statuses) if stat.S_ISREG(status.st_mode)
            }
            reasons = selection.left_out(self._path, [names[at] for at in directories], others, sizes)
            if reasons:
                for at, name in enumerate(names):
                    if name in reasons:
                        dropped.add(at)
                        self._archiver.leave_out(self._prefix + name, reasons[name])
        return dropped

    def _drop(self, positions: set[int]) -> None:
        kept = [at for at in range(len(self._names)) if at not in positions]
        self._filesystems = {new: self._filesystems[at] for new, at in enumerate(kept) if at in self._filesystems}
        self._names = [self._names[at] for at in kept]
        self._statuses[:] = [self._statuses[at] for at in kept]
        self._rows[:] = [self._rows[at] for at in kept]

    def _take_page(self, page: LeafPage, directories: int) -> None:
        self.same_as_page = True
        self._contents = page.contents
        self._flags = bytearray(len(self._names))
        self._xattrs = page.sparse_columns[0]
        counts = self._archiver.counts
        counts.files_unchanged += len(self._names) - directories
        if self._xattrs:
            counts.has_xattrs = True

    def _compare(self, directories: list[int]) -> dict[int, ChunkId]:
        """Reuse or read every entry that is no directory; return the parent's trees of directories by position."""
        page, archiver, counts = self._page, self._archiver, self._archiver.counts
        positions = {name: at for at, name in enumerate(page.names)} if page is not None else {}
        page_xattrs = page.sparse_columns[0] if page is not None else {}
        trees: dict[int, ChunkId] = {}
        count = len(self._names)
        self._contents = [b""] * count
        self._flags = bytearray(count)
        dropped: set[int] = set()
        among = set(directories)
        for at, name in enumerate(self._names):
            old = positions.get(name)
            if at in among:
                if old is not None and page is not None and _mode_of(page.row(old)) & 0o170000 == 0o40000:
                    content = page.contents[old]
                    if isinstance(content, bytes):
                        trees[at] = ChunkId(content)
                continue
            if old is not None and page is not None and page.row(old) == self._rows[at] and not page.flag(old):
                counts.files_unchanged += 1
                self._contents[at] = page.contents[old]
                xattrs = page_xattrs.get(old)
                if xattrs:
                    counts.has_xattrs = True
                    self._xattrs[at] = xattrs
                continue
            try:
                self._read(at, name)
            except OSError as error:
                archiver.skip(self._prefix + name, error)
                dropped.add(at)
                continue
            if old is None:
                counts.files_new += 1
            else:
                counts.files_changed += 1
        if dropped:
            trees = self._drop_unread(dropped, directories, trees)
        return trees

    def _drop_unread(self, dropped: set[int], directories: list[int], trees: dict[int, ChunkId]) -> dict[int, ChunkId]:
        kept = [at for at in range(len(self._names)) if at not in dropped]
        moved = {at: new for new, at in enumerate(kept)}
        self._contents = [self._contents[at] for at in kept]
        self._flags = bytearray(self._flags[at] for at in kept)
        self._xattrs = {moved[at]: xattrs for at, xattrs in self._xattrs.items() if at in moved}
        self._drop(dropped)
        directories[:] = [moved[at] for at in directories]
        return {moved[at]: tree for at, tree in trees.items()}

    def _read(self, at: int, name: bytes) -> None:
        archiver, status = self._archiver, self._statuses[at]
        kind = status.st_mode & 0o170000
        xattrs: Xattrs
        if kind == 0o100000:
            if status.st_size > 1 << 20:
                archiver.counts.current = self._prefix + name
            found = archiver.read_file(name, self._directory.fd, self._prefix + name, status)
            if found.status is not status or found.size != status.st_size:
                self._statuses[at] = found.status
                self._rows[at] = _row_of(found.status, found.size)
            self._contents[at] = found.content
            self._flags[at] = found.flags | (RACY if archiver.is_racy(found.status, self._looked_ns) else 0)
            xattrs = found.xattrs
        else:
            if kind == 0o120000:
                self._contents[at] = os.readlink(name, dir_fd=self._directory.fd)
            elif kind in (0o20000, 0o60000):
                self._contents[at] = encode_device(os.major(status.st_rdev), os.minor(status.st_rdev))
            try:
                xattrs = reading.read_xattrs(reading.path_in(self._directory.fd, name), follow=False)
            except FileNotFoundError:
                xattrs = ()  # no /proc: links and devices go without
        if xattrs:
            self._xattrs[at] = archiver.save_xattrs(xattrs)

    def _below(self, at: int, parent: ChunkId | None) -> Generator[Walk, Result, tuple[ChunkId, Xattrs]]:
        """Store the directory at a position; return (tree, xattrs). One that cannot be read is stored empty."""
        archiver, name, status = self._archiver, self._names[at], self._statuses[at]
        path = self._prefix + name
        try:
            below = _OpenDirectory(reading.open_directory(name, self._directory.fd))
            reason = archiver.selection.not_entered(path, status.st_dev, self._device)
            if reason is not None:
                archiver.leave_out(path, reason)
                archiver.counts.directories += 1
                try:
                    return archiver.empty_tree(), reading.read_xattrs(below.fd)
                finally:
                    below.close()
            above = None
            if not self._is_source and self._path.count(b"/") >= _MOST_OPEN:
                above = os.fstat(self._directory.fd)
                self._directory.close()
            tree, xattrs, reopened = yield archiver.directory(below, path, parent, status.st_dev, above)
            if reopened is not None:
                self._directory.fd = reopened
            return tree, xattrs
        except OSError as error:
            if self._directory.fd < 0:
                raise  # the way back is lost: the directory above reports it
            archiver.skip(path, error)
            return archiver.empty_tree(), ()


def _reopen_above(fd: int, above: os.stat_result | None) -> int | None:
    if above is None:
        return None
    reopened = os.open(b"..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    found = os.fstat(reopened)
    if (found.st_dev, found.st_ino) != (above.st_dev, above.st_ino):
        os.close(reopened)
        raise OSError(0, "a directory was moved while the backup was in it")
    return reopened


def _is_same(before: os.stat_result, after: os.stat_result) -> bool:
    return (
        before.st_size == after.st_size
        and before.st_mtime_ns == after.st_mtime_ns
        and before.st_ctime_ns == after.st_ctime_ns
        and before.st_ino == after.st_ino
    )


def _row_of(status: os.stat_result, size: int) -> bytes:
    return STAT_ROW.pack(
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_nlink,
        status.st_ino,
        size,
        status.st_mtime_ns // NANOSECONDS,
        status.st_mtime_ns % NANOSECONDS,
        status.st_ctime_ns // NANOSECONDS,
        status.st_ctime_ns % NANOSECONDS,
    )


def _row_on_the_way(status: os.stat_result) -> bytes:
    # A directory above the sources is none: what changes in it by itself is not recorded.
    return STAT_ROW.pack(status.st_mode, status.st_uid, status.st_gid, 1, 0, 0, 0, 0, 0, 0)


def _mode_of(row: bytes) -> int:
    return int.from_bytes(row[:4], "little")
