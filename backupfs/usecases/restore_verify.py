"""Reading back what was restored, and comparing it with the snapshot: bytes by their chunk ids, and the metadata."""

import errno
import os
import stat
from collections.abc import Callable, Iterator

from backupfs.errors import DamagedObject, shown
from backupfs.ids import ChunkId
from backupfs.localfs.content import write_out
from backupfs.localfs.directories import Directory
from backupfs.localfs.fatal import is_fatal
from backupfs.localfs.metadata import Metadata, foreign_xattrs
from backupfs.repository.chunks import ChunkReader
from backupfs.snapshots.content import CHUNK, HOLE, Content, Extents, pieces
from backupfs.snapshots.node import STAT_ROW, Node
from backupfs.snapshots.tree import LeafPage
from backupfs.snapshots.walk import tree_of
from backupfs.usecases.events import FileSkipped, Remark, Report
from backupfs.usecases.restore_files import Restorer
from backupfs.usecases.restore_items import device_of
from backupfs.usecases.restore_walk import PAUSE, Load, Place, Traversal

_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_HOLE_STEP = 4 << 20


class Differs(Exception):
    """What stands in the target is not what the snapshot says; the message says in what."""


class Verifier:
    """Visits what a restorer marked as done. One thread at a time, the target's."""

    def __init__(
        self,
        restorer: Restorer,
        traversal: Traversal,
        load: Load,
        extents: Extents,
        reader: ChunkReader,
        report: Report,
    ) -> None:
        self._restorer = restorer
        self._target = restorer.target
        self._traversal = traversal
        self._load = load
        self._extents = extents
        self._reader = reader
        self._report = report
        self.unreadable = 0
        self._written_out: set[int] = set()  # devices: reading back what only memory holds would prove little
        self._files: dict[tuple[int, int], tuple[int, int]] = {}  # hardlinked: (file system, inode) there → here

    def sync(self) -> None:
        """Have the target written out; other file systems below it follow as they are met."""
        fd = self._target.fd(self._target.root)
        self._write_out(fd, os.fstat(fd).st_dev)

    def _write_out(self, fd: int, device: int) -> None:
        if device not in self._written_out:
            self._written_out.add(device)
            write_out(fd)

    def start(self, node: Node) -> Iterator[None]:
        """Return the walk that compares everything below a node, or the node itself."""
        start = self._traversal.start(node)
        start.directory = self._target.root
        if node.is_directory:
            return self._traversal.walk(self, start, tree_of(node))
        return self._traversal.one(self, start, node)

    def directory(self, place: Place) -> bool:
        """Compare a directory; go in wherever the restore went."""
        if place.number in self._restorer.blocked:
            return False
        if self._restorer.outcome.is_done(place.number):
            directory = self._directory_of(place)
            self._compared(directory, b"", lambda: self._compare_directory(directory, place.metadata))
        return True

    def _directory_of(self, place: Place) -> Directory:
        missing: list[Place] = []
        above: Place | None = place
        while above is not None and above.directory is None:
            missing.append(above)
            above = above.parent
        for below in reversed(missing):
            assert below.parent is not None
            below.directory = Directory(below.parent.directory, below.name)
        assert place.directory is not None
        return place.directory

    def page(self, place: Place, page: LeafPage, positions: list[int], first: int) -> Iterator[None]:
        """Compare the files of a page."""
        for number, at in enumerate(positions, first):
            if number % PAUSE == 0:
                yield None
            if self._restorer.outcome.is_done(number):
                yield from self._file(self._directory_of(place), page, at)

    def left(self, place: Place, complete: bool) -> None:  # noqa: ARG002
        """Let the directory go."""
        directory = place.directory
        if directory is not None and directory.parent is not None:
            directory.metadata = None
            self._target.finish_directory(directory)

    def damaged(self, place: Place, name: bytes, error: DamagedObject) -> None:
        """Pass over what the restore has told already."""

    def _file(self, directory: Directory, page: LeafPage, at: int) -> Iterator[None]:
        name = page.names[at]
        problem: str | None = ""
        try:
            metadata = self._traversal.metadata(page, at)
            _, _, _, nlink, inode, size, *_ = STAT_ROW.unpack(page.row(at))
            if stat.S_ISREG(metadata.mode):
                fd = os.open(name, _READ_FLAGS, dir_fd=self._target.fd(directory))
                try:
                    status = os.fstat(fd)
                    self._compare_metadata(status, metadata, fd)
                    if status.st_size != size:
                        raise Differs(f"it has {status.st_size} bytes instead of {size}")
                    self._write_out(fd, status.st_dev)
                    # Pages that are written out are dropped, so that the bytes come from the disk.
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    yield from self._compare_content(fd, page.contents[at], size)
                finally:
                    os.close(fd)
            else:
                status = self._compare_special(directory, name, metadata, page.contents[at])
            if nlink > 1 and inode:
                here = (status.st_dev, status.st_ino)
                if self._files.setdefault((page.filesystem(at), inode), here) != here:
                    raise Differs("it is not the same file as its other names")
        except Differs as error:
            problem = str(error)
        except DamagedObject as error:
            problem = str(error)
        except OSError as error:
            if is_fatal(error):
                raise self._target.full(error) from error
            problem = self._unread(error)
        self._note(directory, name, problem)

    def _compared(self, directory: Directory, name: bytes, compare: Callable[[], None]) -> None:
        problem: str | None = ""
        try:
            compare()
        except Differs as error:
            problem = str(error)
        except OSError as error:
            problem = self._unread(error)
        self._note(directory, name, problem)

    def _unread(self, error: OSError) -> str | None:
        """Return the problem that an error is; None for what only root may read, being restored as it was."""
        if error.errno == errno.EACCES and not self._target.is_root_user:
            self.unreadable += 1
            return None
        return f"it cannot be read: {error.strerror}"

    def _note(self, directory: Directory, name: bytes, problem: str | None) -> None:
        counts = self._restorer.outcome.counts
        if problem is None:
            return
        if not problem:
            counts.verified += 1
            return
        path = self._target.path_of(directory, name)
        if path not in self._restorer.outcome.told:
            counts.errors += 1
            self._report(FileSkipped(path, f"it does not read back as restored: {problem}"))

    def finish(self) -> None:
        """Tell what could not be compared."""
        if self.unreadable:
            modes = "their modes keep this user from reading them"
            self._report(Remark(f"{self.unreadable} entries were not verified: {modes}"))

    def _compare_directory(self, directory: Directory, metadata: Metadata | None) -> None:
        assert metadata is not None
        fd = self._target.fd(directory)
        self._compare_metadata(os.fstat(fd), metadata, fd)

    def _compare_special(
        self, directory: Directory, name: bytes, metadata: Metadata, content: Content
    ) -> os.stat_result:
        above = self._target.fd(directory)
        status = os.stat(name, dir_fd=above, follow_symlinks=False)
        self._compare_metadata(status, metadata, b"/proc/self/fd/%d/%s" % (above, name))
        if stat.S_ISLNK(metadata.mode) and os.readlink(name, dir_fd=above) != content:
            raise Differs("the link leads elsewhere")
        is_device = stat.S_ISCHR(metadata.mode) or stat.S_ISBLK(metadata.mode)
        if is_device and (os.major(status.st_rdev), os.minor(status.st_rdev)) != device_of(content):
            raise Differs("its device numbers differ")
        return status

    def _compare_metadata(self, status: os.stat_result, metadata: Metadata, at: int | bytes) -> None:
        if stat.S_IFMT(status.st_mode) != stat.S_IFMT(metadata.mode):
            raise Differs("it is of another type")
        if self._target.is_root_user and (status.st_uid, status.st_gid) != (metadata.owner, metadata.group):
            raise Differs("its owner differs")
        # Set-id bits are not given to files of another owner.
        compared = 0o7777 if self._target.is_root_user else 0o1777
        found_mode, mode = status.st_mode & compared, metadata.mode & compared
        if not stat.S_ISLNK(metadata.mode) and found_mode != mode:
            raise Differs(f"its mode is {found_mode:o} instead of {mode:o}")
        if metadata.mtime_ns is not None and status.st_mtime_ns != metadata.mtime_ns:
            raise Differs("its time differs")
        follow = isinstance(at, int)
        for name, value in metadata.xattrs:
            try:
                found = os.getxattr(at, name, follow_symlinks=follow)
            except OSError as error:
                if error.errno not in (errno.ENODATA, errno.ENOTSUP, errno.EPERM, errno.EACCES):
                    raise
                raise Differs(f"it lacks the attribute {name.decode('utf-8', 'replace')}") from error
            if found != value:
                raise Differs(f"its attribute {name.decode('utf-8', 'replace')} differs")
        if foreign := foreign_xattrs(at, metadata.xattrs):
            raise Differs(f"it has the attribute {shown(foreign[0])}, which the snapshot does not have")

    def _compare_content(self, fd: int, content: Content, size: int) -> Iterator[None]:
        at = 0
        for piece in pieces(content, size, 0, size, self._load, self._extents):
            if piece.kind == HOLE:
                yield from self._compare_hole(fd, at, at + piece.length)
            else:
                found = os.pread(fd, piece.length, at)
                if piece.cipher is not None:
                    source = self._reader.load(ChunkId(piece.source)) if piece.kind == CHUNK else piece.source
                    if piece.plain(source) != found:
                        raise Differs(f"its bytes from {at} on differ")
                elif piece.kind == CHUNK:
                    if self._reader.chunk_id(found) != piece.source and not self._is_part(
                        piece.source, piece.offset, found
                    ):
                        raise Differs(f"its bytes from {at} on differ")
                elif found != piece.source[piece.offset : piece.offset + piece.length]:
                    raise Differs(f"its bytes from {at} on differ")
            at += piece.length
            if piece.length > PAUSE << 10:
                yield None

    def _is_part(self, chunk_id: bytes, offset: int, found: bytes) -> bool:
        """Tell whether bytes are a part of a chunk; a segment need not use all of it."""
        chunk = self._reader.load(ChunkId(chunk_id))
        return len(chunk) != len(found) and chunk[offset : offset + len(found)] == found

    def _compare_hole(self, fd: int, start: int, end: int) -> Iterator[None]:
        while start < end:
            try:
                start = os.lseek(fd, start, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            if start >= end:
                return
            length = min(_HOLE_STEP, end - start)
            if os.pread(fd, length, start).strip(b"\0"):
                raise Differs(f"its bytes from {start} on should be zeros")
            start += length
            yield None
