"""The files that a disk in a format of virtual machines is made of: found, checked and opened before qemu sees any.

Who wrote a disk chose the names in it: of a backing file, of a file for the data, of extents. qemu would follow them
anywhere, over the network too. So they are read here, each is opened only where it may lie, and qemu is told which
descriptors to read instead of names: it opens what was checked and follows nothing by itself.
Source: qemu's docs/interop/qcow2.txt and block/vmdk.c; VMware's "Virtual Disk Format 5.0". (In VHD, VHDX and VDI qemu
follows no names.)
"""

import contextlib
import fcntl
import json
import os
import re
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from backupfs.disks.headers import VHD_FOOTER, VHD_MARK, read_vhd, snapshots_in_qcow2, tables_end
from backupfs.errors import SourceError, shown

RAW = "raw"
# What users say, and what qemu calls it.
FORMATS = {
    "raw": RAW, "qcow2": "qcow2", "vmdk": "vmdk", "vhd": "vpc", "vpc": "vpc", "vhdx": "vhdx", "vdi": "vdi",
}  # fmt: skip

# What the names of files end in that are disks as they are, whatever these begin with: a guest writes that itself.
_RAW_ENDINGS = (b".raw", b".img", b".dd", b".iso")
# What the names of files in a format end in.
ENDINGS = {
    "qcow2": (b".qcow2", b".qcow"), "vmdk": (b".vmdk",), "vpc": (b".vhd", b".vpc"), "vhdx": (b".vhdx",),
    "vdi": (b".vdi",),
}  # fmt: skip
# What stands at an offset in the file, by qemu's names.
_MAGICS = (
    (0, b"QFI\xfb", "qcow2"), (0, b"KDMV", "vmdk"), (0, b"COWD", "vmdk"), (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"), (0x40, b"\x7f\x10\xda\xbe", "vdi"), (0, VHD_MARK, "vpc"),
)  # fmt: skip

_MOST_FILES = 64  # in a chain; each costs qemu some memory
_MOST_EXTENTS = 512  # of a VMDK, 1 TiB in files of 2 GiB; each is a descriptor
_LOWEST_FD = 16  # below are those that a process is told about by their numbers
_MOST_NAME = 1023  # bytes; qemu's own limit
_DATA_FILE = 1 << 2  # of qcow2's incompatible features
_BACKING_FORMAT, _DATA_FILE_NAME = 0xE2792ACA, 0x44415441  # qcow2's header extensions
_NO_END = 1 << 64
_TEXT_INSIDE = 20 << 9  # bytes of a VMDK with text and data that qemu looks through
_MOST_DESCRIPTOR = 1 << 16  # bytes of a VMDK's text; some hundred extents
_EXTENT = re.compile(rb'[ \t]*(RW)[ \t]+(\d{1,15})[ \t]+([A-Z]{1,10})[ \t]+"([^"]{1,511})"(?:[ \t]+(\d{1,15}))?\s*')
_PARENT = re.compile(rb'parentFileNameHint="([^"]*)"')
_PARENT_ID, _NO_PARENT = re.compile(rb"^[ \t]*parentCID[ \t]*=[ \t]*(\w{1,8})", re.M), b"ffffffff"
_KEPT = re.compile(rb'(version|CID|parentCID|createType)="?(\w{1,40})"?\s*')

Node = dict[str, object]  # as qemu's BlockdevOptions, to be written as JSON


@dataclass(slots=True)
class _Layer:
    """A file of a chain of backing files."""

    path: bytes
    node: Node
    data: list[tuple[int, int]]  # (end in the layer's disk, descriptor) of the files that hold its bytes, in order


def looks_like(fd: int) -> str:
    """Return the format that a file begins or ends like, by qemu's name; raw for all else."""
    size = os.fstat(fd).st_size
    for offset, magic, form in _MAGICS:
        if os.pread(fd, len(magic), offset) == magic:
            return form
    return "vpc" if size > VHD_FOOTER and os.pread(fd, 8, size - VHD_FOOTER) == VHD_MARK else RAW


def is_raw_by_name(path: bytes) -> bool:
    """Tell whether a file's name says that it is a disk as it is."""
    return path.lower().endswith(_RAW_ENDINGS)


class Chain:
    """The open files of one disk. They stay the same files, whatever becomes of their names."""

    def __init__(self, path: bytes, form: str, folders: Sequence[bytes] = ()) -> None:
        """Open a file and all that it names.

        form: of the file, by qemu's name. folders: where files may lie beside its own folder, and below.
        Raises: SourceError for what is not a plain file where it may be, and for one that names itself.
        """
        own = (os.path.dirname(path), os.path.dirname(os.path.realpath(path)))
        self._folders = [os.path.realpath(folder) for folder in (*own, *folders)]
        self._top = path
        self._fds: list[int] = []
        self.size = 0  # that the top file says the disk has, where qemu may take another
        self.paths: list[bytes] = []  # of all files, the top one first
        self._names: dict[int, bytes] = {}
        self._layers: list[_Layer] = []
        self._remarks: list[str] = []
        try:
            self._node = self._opened(path, form, set())
        except OSError as error:
            self.close()
            raise SourceError(f"the disk {shown(path)} cannot be opened: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """What to give to qemu as the name of a file, in a process that has the descriptors."""
        return "json:" + json.dumps(self._node)

    @property
    def layers(self) -> list[tuple[bytes, str]]:
        """The files that are over each other, the top one first: their paths, and the name of each alone for qemu."""
        return [
            (
                layer.path,
                "json:" + json.dumps({**layer.node, "backing": None} if "backing" in layer.node else layer.node),
            )
            for layer in self._layers
            if layer.node["driver"] != RAW
        ]

    @property
    def remarks(self) -> tuple[str, ...]:
        """Name the files, if there are several, and say what else a user should know of them."""
        if len(self.paths) == 1:
            return tuple(self._remarks)
        made_of = f"the disk {shown(self._top)} is made of {', '.join(shown(path) for path in self.paths)}"
        return (made_of, *self._remarks)

    def require_whole(self, depth: int, start: int, place: int, length: int) -> None:
        """Require that a file holds what it is said to hold.

        depth: of the layer, 0 for the top one. start: in the disk. place: in the file with its bytes.
        Raises: SourceError if the file is cut short.
        """
        if depth < len(self._layers):
            fd = next((fd for end, fd in self._layers[depth].data if start < end), -1)
            if fd >= 0:
                self._require_size(fd, place + length)

    def pass_on(self) -> None:
        """Let the program that this process becomes have the descriptors."""
        for fd in self._fds:
            os.set_inheritable(fd, True)

    def named(self, words: bytes) -> str:
        """Return what qemu said, with the names of files in it."""
        for path, name in [(self._top, self.name), *self.layers]:
            words = words.replace(name.encode(), path)
        for fd in sorted(self._names, reverse=True):
            words = words.replace(_place(fd).encode(), self._names[fd])
        return shown(words)

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.pop())

    # One file, and what it names.

    def _opened(self, path: bytes, form: str, above: set[tuple[int, int]]) -> Node:
        """Open a file of the chain and those below it; return what to tell qemu.

        above: the files that lead to it.
        """
        fd = self._open(path)
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) in above:
            raise SourceError(
                f"the disk {shown(self._top)} cannot be opened: {shown(path)} names itself as its backing file, "
                "straight or through others, so it has no end"
            )
        if len(above) == _MOST_FILES:
            raise SourceError(
                f"the disk {shown(self._top)} cannot be opened: its chain has more than {_MOST_FILES} files: join some "
                "with `qemu-img commit`"
            )
        above = above | {(status.st_dev, status.st_ino)}
        form = form or self._form_without_words(fd, path)
        node: Node = {"driver": form, "file": _file(fd)}
        layer = _Layer(path, node, [(_NO_END, fd)])
        self._layers.append(layer)
        self._require_size(fd, tables_end(fd, form))
        if form == "qcow2":
            backing, backing_form, data = _names_in_qcow2(fd, path)
            if data is not None:
                data_fd = self._open(self._place_of(data, path, "data file"))
                node["data-file"] = _file(data_fd)
                layer.data = [(_NO_END, data_fd)]
            if path == self._top and (count := snapshots_in_qcow2(fd)):
                self._remarks.append(
                    f"the disk {shown(path)} has {count:,} snapshots in its file, which are left out: what is stored "
                    "is the disk as it is now"
                )
        elif form == "vmdk":
            backing, backing_form = self._vmdk(fd, path, layer), "vmdk"
        else:
            if form == "vpc":
                self._vhd(fd, path, node)
            return node
        # Said even if there is none: then qemu looks for none.
        node["backing"] = None
        if backing:
            if backing_form not in ("", *FORMATS.values()):
                raise SourceError(
                    f"the disk {shown(self._top)} cannot be opened: {shown(path)} says that its backing file is in the "
                    f"format {shown(backing_form)}, which is none of {', '.join(FORMATS)}"
                )
            node["backing"] = self._opened(self._place_of(backing, path, "backing file"), backing_form, above)
        return node

    def _open(self, path: bytes) -> int:
        """Open a plain file where one may lie."""
        # Before it is opened, as opening a device may do something; and what was opened, as names may have changed.
        self._require_allowed(path, os.path.realpath(path))
        try:
            self._require_plain(path, os.stat(path).st_mode)
            # A pipe would wait for a writer.
            first = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(
                f"the disk {shown(self._top)} cannot be opened: {shown(path)}, which it is made of: {error.strerror}"
            ) from error
        fd = self._keep(first, path)
        self._require_allowed(path, os.readlink(os.fsencode(_place(fd))))
        self._require_plain(path, os.fstat(fd).st_mode)
        if path not in self.paths:
            self.paths.append(path)
        return fd

    def _keep(self, fd: int, path: bytes) -> int:
        """Take a descriptor; return what it is from now on."""
        try:
            kept = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LOWEST_FD)
        finally:
            os.close(fd)
        self._fds.append(kept)
        self._names[kept] = path
        return kept

    def _require_size(self, fd: int, size: int) -> None:
        missing = size - os.fstat(fd).st_size
        if missing > 0:
            path = self._names[fd]
            what = "it" if path == self._top else f"{shown(path)}, which it is made of,"
            raise SourceError(
                f"the disk {shown(self._top)} cannot be read: {what} is cut short: {missing:,} bytes of it are "
                "missing, if its tables are right; copy it again"
            )

    def _require_allowed(self, path: bytes, real: bytes) -> None:
        # The user named the top one.
        if path != self._top and not any(_is_below(real, folder) for folder in self._folders):
            raise SourceError(
                f"the disk {shown(self._top)} names the file {shown(real)}, which is not beside it: --backing-folder "
                f"{shown(os.path.dirname(real))} allows that, if you know who made the disk"
            )

    def _require_plain(self, path: bytes, mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise SourceError(f"the disk {shown(self._top)} names {shown(path)}, which is no plain file: {_REMEDY}")

    def _place_of(self, name: bytes, path: bytes, what: str) -> bytes:
        """Return the path that a name in a file means, as qemu does."""
        if b":" in name.partition(b"/")[0] or b"\0" in name:
            raise SourceError(
                f"the disk {shown(self._top)} cannot be opened: the {what} of {shown(path)} is {shown(name)}, "
                f"which is no plain file: {_REMEDY}"
            )
        return os.path.join(os.path.dirname(path), name)

    def _form_without_words(self, fd: int, path: bytes) -> str:
        """Return the format of a backing file when what names it does not say."""
        form = looks_like(fd)
        if form != RAW and is_raw_by_name(path):
            raise SourceError(
                f"the disk {shown(self._top)} cannot be opened: it does not say in which format its backing file "
                f"{shown(path)} is, whose name says raw and whose beginning {form}: say it with "
                f"`qemu-img rebase -u -F FORMAT -b {shown(path)}` on the file above"
            )
        if form != RAW and not path.lower().endswith(ENDINGS[form]):
            self._remarks.append(
                f"{shown(path)}, which the disk {shown(self._top)} is made of, is read as {form} because it begins "
                "like one, as nothing says its format: if it is a raw disk, whose guest could write that, say so with "
                f"`qemu-img rebase -u -F raw -b {shown(path)}` on the file above"
            )
        return form

    # VHD.

    def _vhd(self, fd: int, path: bytes, node: Node) -> None:
        """Have the size be the one that a VHD says. Raises: SourceError for one that is not the whole disk."""
        footer = read_vhd(fd)
        if footer is None:
            return  # qemu refuses it
        if footer.needs_parent:
            raise SourceError(
                f"the disk {shown(self._top)} cannot be read: {shown(path)} is a differencing VHD, which has only what "
                "changed since its parent: merge it into that, or convert it, with the program that made it"
            )
        # By cylinders, as qemu would have it of makers that it does not know, the disk's end is left out.
        node["force_size_calc"] = "current_size"
        if path == self._top:
            self.size = footer.size

    # VMDK.

    def _vmdk(self, fd: int, path: bytes, layer: _Layer) -> bytes:
        """Open the extents of a VMDK; return the name of its parent, if it has one."""
        if os.pread(fd, 4, 0) in (b"KDMV", b"COWD"):
            text = self._text_inside(fd, path)
        else:
            text = os.pread(fd, _MOST_DESCRIPTOR + 1, 0)
            if len(text) > _MOST_DESCRIPTOR:
                raise SourceError(f"the disk {shown(path)} cannot be opened: it is no VMDK, or its text is too long")
            layer.data = []
            layer.node["file"] = _file(self._written_anew(text, path, layer))
        parent, parent_id = _PARENT.search(text), _PARENT_ID.search(text)
        if not (parent and parent[1]) and parent_id and parent_id[1].lower() != _NO_PARENT:
            raise SourceError(
                f"the disk {shown(self._top)} cannot be read: {shown(path)} is a VMDK that has only what changed "
                "since its parent, which it does not name: merge it into that, or convert it, with the program that "
                "made it"
            )
        return parent[1] if parent is not None else b""

    def _text_inside(self, fd: int, path: bytes) -> bytes:
        """Return the text that describes a VMDK with its data in the same file."""
        header = os.pread(fd, 44, 0)
        if header[:4] != b"KDMV" or len(header) < 44:
            return b""
        capacity, _, place = struct.unpack_from("<QQQ", header, 12)
        if capacity == 0:
            raise SourceError(
                f"the disk {shown(self._top)} cannot be opened: {shown(path)} is a VMDK whose data is in other files, "
                f"and whose text is not one of its own: {_REMEDY}"
            )
        # Offsets that a file cannot have are for qemu to complain of.
        return os.pread(fd, _TEXT_INSIDE, place << 9) if 0 < place < 1 << 53 else b""

    def _written_anew(self, text: bytes, path: bytes, layer: _Layer) -> int:
        """Return a descriptor of the text of a VMDK, written anew to name descriptors instead of files."""
        lines, count, end = [b"# Disk DescriptorFile"], 0, 0
        for line in text.splitlines():
            extent, kept = _EXTENT.fullmatch(line), _KEPT.fullmatch(line)
            if kept is not None:
                quote = b'"' if kept[1] == b"createType" else b""
                lines.append(kept[1] + b"=" + quote + kept[2] + quote)
            elif line.split()[:1] in ([b"RW"], [b"RDONLY"], [b"NOACCESS"]):
                count += 1
                # qemu would leave such a one out, and what follows would move.
                if extent is None or count > _MOST_EXTENTS:
                    raise SourceError(
                        f"the disk {shown(path)} cannot be opened: its extent `{shown(line)}` is none that qemu reads"
                    )
                fd = self._open(self._place_of(extent[4], path, "extent"))
                size = int(extent[2]) << 9
                layer.data.append((end := end + size, fd))
                # What begins a flat extent a guest wrote.
                if extent[3] not in (b"FLAT", b"VMFS"):
                    self._text_inside(fd, self._names[fd])
                    self._require_size(fd, tables_end(fd, "vmdk"))
                else:
                    self._require_size(fd, (int(extent[5] or 0) << 9) + size)
                words = [extent[1], extent[2], extent[3], b'"' + _place(fd).encode() + b'"']
                lines.append(b" ".join(words + ([extent[5]] if extent[5] else [])))
        if not count:
            raise SourceError(f"the disk {shown(path)} cannot be opened: it is a VMDK without data")
        fd = self._keep(os.memfd_create("vmdk", os.MFD_CLOEXEC), path)
        written = b"\n".join(lines) + b"\n"
        os.pwrite(fd, written.ljust(-(-len(written) // 512) * 512, b"\n"), 0)
        return fd


_REMEDY = "copy the disk with `qemu-img convert`, if you know who made it, and give the copy"


def _names_in_qcow2(fd: int, path: bytes) -> tuple[bytes, str, bytes | None]:
    """Return (backing file, its format, data file or None) as a qcow2 names them; of a garbled one, nothing."""
    header = os.pread(fd, 104, 0)
    if len(header) < 72 or header[:4] != b"QFI\xfb":
        return b"", "", None
    version, place, length = struct.unpack_from(">IQI", header, 4)
    features, start = 0, 72
    if version == 3 and len(header) == 104:
        features, start = struct.unpack_from(">Q", header, 72)[0], struct.unpack_from(">I", header, 100)[0]
    backing = os.pread(fd, length, place) if 0 < length <= _MOST_NAME and 0 < place < 1 << 31 else b""
    found: dict[int, bytes] = {}
    with contextlib.suppress(struct.error):
        # The header and all of its extensions are within the first cluster, of 2 MiB at most.
        while start < 2 << 20:
            kind, size = struct.unpack(">II", os.pread(fd, 8, start))
            if kind == 0 or size > 1 << 20:
                break
            if kind in (_BACKING_FORMAT, _DATA_FILE_NAME):
                found[kind] = os.pread(fd, min(size, _MOST_NAME), start + 8)
            start += 8 + (size + 7) // 8 * 8
    data = found.get(_DATA_FILE_NAME) if features & _DATA_FILE else None
    if features & _DATA_FILE and not data:
        raise SourceError(
            f"the disk {shown(path)} cannot be opened: its data is in another file, which it does not name"
        )
    return backing, found.get(_BACKING_FORMAT, b"").decode("latin-1"), data


def _place(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _file(fd: int) -> Node:
    return {"driver": "file", "filename": _place(fd)}


def _is_below(path: bytes, folder: bytes) -> bool:
    return path.startswith(folder.rstrip(b"/") + b"/")
