"""Write one file, or a directory as a tar, to a stream: for scripts, and for hosts without FUSE."""

import logging
import os
import stat
import struct
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import BinaryIO

from backupfs.errors import UsageError, shown
from backupfs.ids import ChunkId
from backupfs.repository.repository import Repository
from backupfs.snapshots.content import CHUNK, HOLE, Piece, pieces
from backupfs.snapshots.node import NANOSECONDS, Node
from backupfs.snapshots.snapshot import Snapshot
from backupfs.snapshots.volumes import Volume, extents_of
from backupfs.snapshots.walk import find_path, walk
from backupfs.stores.together import threads

log = logging.getLogger(__name__)

_AHEAD = 4  # chunks being fetched while one is written
_ZEROS = bytes(1 << 20)
_KINDS = {
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFREG: tarfile.REGTYPE,
}
_ACLS = {b"system.posix_acl_access": "SCHILY.acl.access", b"system.posix_acl_default": "SCHILY.acl.default"}
# As the kernel keeps them: a version, then (tag, rights, id) each. Source: linux/posix_acl_xattr.h.
_ACL_TAGS = {1: "user", 2: "user", 4: "group", 8: "group", 16: "mask", 32: "other"}
_ACL_NUMBERED = (2, 8)
_ACL_RIGHTS = ((4, "r"), (2, "w"), (1, "x"))


def dump(repository: Repository, snapshot: Snapshot, path: bytes, output: BinaryIO) -> None:
    """Write the file at `path`, or the directory there as a tar (pax, with xattrs and hardlinks), to `output`.

    Runs in a thread of its own. Raises: PathNotFound; UsageError for a special file; DamagedObject; OSError.
    """
    node = find_path(snapshot, path, repository.trees.load)
    if node.is_file:
        for part in read_file(repository, node, snapshot.volumes):
            output.write(part)
    elif node.is_directory:
        _dump_tar(repository, snapshot, node, output)
    else:
        raise UsageError(f"{shown(path)} is neither a file nor a directory")
    output.flush()


def read_file(repository: Repository, node: Node, volumes: Sequence[Volume] = ()) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file in order, holes as zeros. Raises: DamagedObject; StoreError."""
    with threads(_AHEAD) as pool:
        waiting: deque[tuple[Piece, Future[memoryview] | None]] = deque()
        load = repository.trees.load
        for piece in pieces(node.content, node.size, 0, node.size, load, extents_of(volumes, load)):
            loading = pool.submit(repository.data.load, ChunkId(piece.source)) if piece.kind == CHUNK else None
            waiting.append((piece, loading))
            if len(waiting) > _AHEAD:
                yield from _bytes_of(*waiting.popleft())
        while waiting:
            yield from _bytes_of(*waiting.popleft())


def _bytes_of(piece: Piece, loading: "Future[memoryview] | None") -> Iterator[bytes | memoryview]:
    if piece.kind == HOLE:
        for start in range(0, piece.length, len(_ZEROS)):
            yield _ZEROS[: min(len(_ZEROS), piece.length - start)]
        return
    source = memoryview(piece.source) if loading is None else loading.result()
    yield piece.plain(source)


class _Source:
    """The bytes of a file as tarfile reads them: whole runs, at most what is asked for."""

    def __init__(self, parts: Iterator[bytes | memoryview]) -> None:
        self._parts = parts
        self._part: bytes | memoryview = b""

    def read(self, size: int = 0, /) -> bytes:
        """Return `size` bytes, fewer only at the end."""
        taken = []
        while size > 0:
            if not self._part:
                following = next(self._parts, None)
                if following is None:
                    break
                self._part = following
            taken.append(bytes(self._part[:size]))
            self._part = self._part[len(taken[-1]) :]
            size -= len(taken[-1])
        return b"".join(taken)


def _dump_tar(repository: Repository, snapshot: Snapshot, top: Node, output: BinaryIO) -> None:
    linked: dict[tuple[int, int], str] = {}
    with tarfile.open(
        mode="w|", fileobj=output, format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        # Without the top itself: tar would give its mode and owner to the folder that somebody unpacks it in.
        for path, node in walk(top, b"", repository.trees.load):
            if node.mode & 0o170000 not in _KINDS:
                continue  # tar has no sockets
            member = _member(node, "." + _text(path))
            if node.is_hardlinked:
                first = linked.setdefault((node.filesystem, node.inode), member.name)
                if first != member.name:
                    member.type, member.linkname, member.size = tarfile.LNKTYPE, first, 0
                    archive.addfile(member)
                    continue
            if member.isreg():
                archive.addfile(member, _Source(read_file(repository, node, snapshot.volumes)))
            else:
                archive.addfile(member)


def _member(node: Node, name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.mode = node.mode & 0o7777
    member.uid, member.gid = node.uid, node.gid
    member.uname = _text(node.owner)
    member.gname = _text(node.group)
    member.mtime = node.mtime_s
    # tarfile would write a float; the text keeps every nanosecond.
    seconds, part = divmod(abs(node.mtime_ns), NANOSECONDS)
    member.pax_headers = {"mtime": f"{'-' if node.mtime_ns < 0 else ''}{seconds}.{part:09d}"}
    for key, value in node.xattrs:
        try:
            # As GNU tar writes it: the keyword ends at the first sign of equality.
            keyword = key.decode().replace("%", "%25").replace("=", "%3D")
            member.pax_headers[f"SCHILY.xattr.{keyword}"] = _text(value)
        except UnicodeDecodeError:
            log.warning("%s: a tar cannot hold its attribute %s", shown(os.fsencode(name)), shown(key))
        # `tar --acls` knows them as text only, and takes away those that it does not find.
        if key in _ACLS:
            member.pax_headers[_ACLS[key]] = _acl_text(value)
    member.type = _KINDS[node.mode & 0o170000]
    if member.type == tarfile.REGTYPE:
        member.size = node.size
    elif member.type == tarfile.SYMTYPE and isinstance(node.content, bytes):
        member.linkname = _text(node.content)
    elif member.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        member.devmajor, member.devminor = node.device
    return member


def _acl_text(value: bytes) -> str:
    """Return an ACL as acl(5) has it in its short form, with numbers."""
    entries = []
    for tag, rights, number in struct.iter_unpack("<HHI", value[4 : 4 + (len(value) - 4) // 8 * 8]):
        whose = number if tag in _ACL_NUMBERED else ""
        letters = "".join(letter if rights & bit else "-" for bit, letter in _ACL_RIGHTS)
        entries.append(f"{_ACL_TAGS.get(tag, 'other')}:{whose}:{letters}")
    return ",".join(entries)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
