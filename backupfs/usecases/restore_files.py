"""Writing what a snapshot holds below a target: the half of a restore that touches the target.

Directories and whatever needs no chunks are made during the walk; files with chunks are noted as wanted and written
when their bytes come, in any order. A directory gets its metadata when everything in it is done.
Threading: one thread at a time, but for `decode`, which any thread may call for blocks that were planned.
"""

import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId
from backupfs.localfs.exclude import Pattern
from backupfs.localfs.writing import Directory, Metadata, Target, is_fatal, write_at, write_sparsely
from backupfs.repository.chunks import ChunkReader
from backupfs.repository.fetch import PackRange, WantedBlock, WantedChunk, decode_block, plan_ranges
from backupfs.snapshots.content import CHUNK, EXTENT, HOLE, INLINE_MARK, SINGLE_MARK, Content, pieces
from backupfs.snapshots.node import NANOSECONDS, STAT_ROW
from backupfs.snapshots.tree import LeafPage
from backupfs.usecases.events import FileSkipped, Remark, Report
from backupfs.usecases.restore_walk import PAUSE, Load, Place, Traversal

log = logging.getLogger(__name__)

ALWAYS, IF_CHANGED, IF_NEWER, NEVER = "always", "if-changed", "if-newer", "never"
OVERWRITE = (ALWAYS, IF_CHANGED, IF_NEWER, NEVER)
BY_NAME, BY_NUMBER = "name", "number"

# A window of the walk: what is wanted in it is read in the order of the packs.
_WINDOW_FILES = 20_000
_WINDOW_BYTES = 256 << 20
# How long the walk may keep the target to itself while blocks wait to be written.
_SLICE_S = 0.02
# Up to here a file is written by the target's own thread at once; beyond, by whatever thread decodes its block.
_SMALL = 64 << 10
# Descriptors of large files under way; the others are opened for each piece.
_MOST_OPEN_FILES = 256
_PIECES_PER_PAUSE = 256


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """What a user can say about a restore."""

    overwrite: str = ALWAYS  # or IF_CHANGED (size or mtime differ), IF_NEWER (than what is there), NEVER
    include: tuple[Pattern, ...] = ()  # over paths from the restored directory on, which is their `/`
    exclude: tuple[Pattern, ...] = ()
    delete: bool = False  # remove what the snapshot does not have, in directories that were restored
    dry_run: bool = False
    verify: bool = False  # read everything back afterwards
    sparse: bool = False  # make holes of long runs of zeros, too; holes of the source are always holes
    owner: str = BY_NAME  # the ids of the names where this machine has them; or BY_NUMBER
    own_folders: tuple[bytes, ...] = ()  # paths of the repository and the cache, never deleted


@dataclass(slots=True)
class Counts:
    """What was done so far; written by one thread, read by any."""

    files: int = 0  # written, or linked, or made
    directories: int = 0
    size: int = 0  # bytes of the files written, holes included
    unchanged: int = 0  # files left as they were, by the rule of `overwrite`
    unchanged_size: int = 0
    deleted: int = 0
    verified: int = 0
    errors: int = 0  # paths that are not, or not wholly, as in the snapshot
    damaged: int = 0  # of those, the ones for which the repository lacks good bytes
    current: bytes = b""


class _State(Enum):
    WAITING = 0
    DONE = 1
    FAILED = 2


class Item:
    """A file that is not written yet, or that others are links to."""

    __slots__ = (
        "content", "directory", "failure", "fd", "links", "metadata", "name", "number", "remaining", "size", "state",
        "temporary", "unseen",
    )  # fmt: skip

    def __init__(
        self, directory: Directory, name: bytes, metadata: Metadata, content: Content, size: int, number: int
    ) -> None:
        self.directory = directory
        self.name = name
        self.metadata = metadata
        self.content = content
        self.size = size
        self.number = number
        self.temporary = b""  # its name until it is whole; empty for small files, which are written at once
        self.fd = -1
        self.remaining = 1  # pieces that are not written, and 1 while the walk adds more
        self.failure = ""
        self.state = _State.WAITING
        self.links: list[Item] = []  # other names, to be made when this one is there
        self.unseen = 0  # names of the same file that the walk may still meet


class PieceUse:
    """A part of a chunk that belongs at an offset of a large file."""

    __slots__ = ("at", "error", "item", "length", "offset", "written")

    def __init__(self, item: Item, at: int, offset: int, length: int) -> None:
        self.item = item
        self.at = at
        self.offset = offset  # in the chunk
        self.length = length
        self.written = False
        self.error: OSError | None = None


Use = Item | PieceUse
Decoded = list[tuple[WantedChunk[Use], memoryview]]


class Blocked(Exception):
    """Something stands in the way that the rule of `overwrite` keeps."""


class Restorer:
    """Writes below one target."""

    def __init__(
        self,
        target: Target,
        traversal: Traversal,
        load: Load,
        reader: ChunkReader,
        options: RestoreOptions,
        report: Report,
    ) -> None:
        """Take the parts.

        load: gives tree chunks. reader: gives data chunks.
        report: takes events, in the threads that call.
        """
        self.target = target
        self._traversal = traversal
        self._load = load
        self._reader = reader
        self._options = options
        self._report = report
        self._wanted: dict[ChunkId, WantedChunk[Use]] = {}
        self._window_files = self._window_bytes = 0
        self._retry: list[WantedChunk[Use]] = []
        self._late: list[Item] = []
        self._links: dict[tuple[int, int], Item] = {}
        self._unfinished: set[Item] = set()  # with a temporary file
        self._open_files = 0
        self._own_folders = _paths_below(target.path, options.own_folders) if options.delete else ()
        self._done = bytearray()  # a bit for each number of the walk
        self.blocked: set[int] = set()  # numbers of directories that were not entered
        self.told: set[bytes] = set()  # paths that are there, but not with everything
        self.counts = Counts()
        self.stop = threading.Event()

    # The walk, as its visitor.

    def begin(self, start: Place, metadata: Metadata | None) -> None:
        """Take the target itself as the directory that the walk starts from.

        metadata: what a target that this run made gets; one that was there is left as it is.
        """
        start.directory = self.target.root
        if not self.target.root.existed and not self._options.dry_run:
            self.target.root.metadata = metadata
        start.seen = set() if self._options.delete and self.target.root.existed and metadata is not None else None

    def directory(self, place: Place) -> bool:
        """Make or open a directory, unless it may turn out that nothing in it is wanted."""
        if not place.included or self._directory_of(place) is not None:
            return True
        self.blocked.add(place.number)
        return False

    def _directory_of(self, place: Place) -> Directory | None:
        """Return the directory to write into, made now if it is not there; None if that cannot be."""
        missing: list[Place] = []
        above: Place | None = place
        while above is not None and above.directory is None:
            if above.blocked:
                return None
            missing.append(above)
            above = above.parent
        for below in reversed(missing):
            parent = below.parent.directory if below.parent is not None else None
            assert parent is not None
            try:
                below.directory = self._make_directory(parent, below)
            except OSError as error:
                self._failed(self.target.path_of(parent, below.name), error)
            except Blocked as error:
                self._skip(self.target.path_of(parent, below.name), str(error))
            if below.directory is None:
                place.blocked = below.blocked = True
                return None
        return place.directory

    def _make_directory(self, parent: Directory, place: Place) -> Directory:
        target, name, metadata = self.target, place.name, place.metadata
        assert metadata is not None
        dry = self._options.dry_run
        directory: Directory | None = None
        if name in parent.names:
            status = target.status(parent, name)
            if status is not None and stat.S_ISDIR(status.st_mode):
                directory = target.open_existing(parent, name)
                # One that was only on the way to a source was not backed up itself.
                if not dry and self._options.overwrite != NEVER and metadata.mtime_ns is not None:
                    directory.metadata = metadata
            elif status is not None:
                if not self._may_replace(status, metadata):
                    raise Blocked(
                        f"something that is no directory stands in its place and --overwrite {self._options.overwrite} "
                        "keeps it; nothing below was restored"
                    )
                if not dry:
                    target.unlink(parent, name)
        if directory is None:
            directory = Directory(parent, name) if dry else target.make_directory(parent, name)
            directory.metadata = None if dry else metadata
            self.counts.directories += 1
        directory.ordinal = place.number
        parent.pending += 1
        self.counts.current = name
        if self._options.delete and directory.existed:
            place.seen = set()
        return directory

    def page(self, place: Place, page: LeafPage, positions: list[int], first: int) -> Iterator[None]:
        """Make what needs no chunks, note what does."""
        directory = self._directory_of(place)
        if directory is None:
            return
        owners, groups = self._traversal.local_ids(page)
        names, contents, xattrs = page.names, page.contents, page.sparse_columns[0]
        dry = self._options.dry_run
        unpack, row_size = STAT_ROW.unpack_from, STAT_ROW.size
        for number, at in enumerate(positions, first):
            name = names[at]
            mode, uid, gid, nlink, inode, size, seconds, part, _, _ = unpack(page.rows, at * row_size)
            try:
                if xattrs and at in xattrs:
                    metadata = self._traversal.metadata(page, at)
                else:
                    metadata = Metadata(mode, owners.get(uid, uid), groups.get(gid, gid), seconds * NANOSECONDS + part)
                item = Item(directory, name, metadata, contents[at], size, number)
                key = (page.filesystem(at), inode) if nlink > 1 and inode else None
                if name in directory.names and self._keeps_existing(item, key):
                    continue
                if key is not None and self._is_link(item, key, nlink):
                    continue
                content = item.content
                if 0 < size <= _SMALL and mode & 0o170000 == 0o100000 and type(content) is bytes and not dry:
                    self._restore_small(item, content)
                else:
                    yield from self._restore(item)
            except OSError as error:
                self._failed(self.target.path_of(directory, name), error)
            except DamagedObject as error:
                self.damaged(place, name, error)
            except Blocked as error:
                self._skip(self.target.path_of(directory, name), str(error))
            if number % PAUSE == 0:
                yield None

    def left(self, place: Place, complete: bool) -> None:
        """Delete what does not belong there, if that was asked for, and let the directory go."""
        directory = place.directory
        if directory is None:
            return
        # A page that cannot be read may hold any name.
        if place.seen is not None and complete:
            self._delete_others(place, directory)
        place.seen = None
        self._release(directory)

    def damaged(self, place: Place, name: bytes, error: DamagedObject) -> None:
        """Tell that the snapshot itself cannot be read at a place."""
        path = self.target.path.rstrip(b"/") + place.path + (b"/" + name if name else b"")
        self._skip(path or b"/", str(error), is_damage=True)

    def _delete_others(self, place: Place, directory: Directory) -> None:
        path, seen = place.path, place.seen or set()
        for name in sorted(name for name in directory.names if name not in seen):
            try:
                if self._options.dry_run:
                    status = self.target.status(directory, name)
                    if status is not None and not self._keeps(path + b"/" + name, stat.S_ISDIR(status.st_mode)):
                        self.counts.deleted += 1
                else:
                    self.counts.deleted += self.target.remove_tree(directory, name, self._keeps)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._failed(self.target.path_of(directory, name), error, "it could not be deleted: ")

    def _keeps(self, path: bytes, is_directory: bool) -> bool:
        return path in self._own_folders or self._traversal.keeps(path, is_directory)

    # Existing files.

    def _may_replace(self, status: os.stat_result, metadata: Metadata) -> bool:
        overwrite = self._options.overwrite
        if overwrite == IF_NEWER:
            return metadata.mtime_ns is not None and metadata.mtime_ns > status.st_mtime_ns
        return overwrite != NEVER

    def _keeps_existing(self, item: Item, key: tuple[int, int] | None) -> bool:
        """Decide about what stands under the item's name; whatever has to go is gone or can be renamed over."""
        target, metadata, directory, name = self.target, item.metadata, item.directory, item.name
        status = target.status(directory, name)
        if status is None:
            return False
        is_directory = stat.S_ISDIR(status.st_mode)
        if not self._may_replace(status, metadata):
            if is_directory:
                raise Blocked(f"a directory stands in its place and --overwrite {self._options.overwrite} keeps it")
            self.counts.unchanged += 1
            self.counts.unchanged_size += item.size if stat.S_ISREG(metadata.mode) else 0
            return True
        if is_directory:
            if not self._options.dry_run:
                self._clear_directory(directory, name)
            return False
        if self._options.overwrite != IF_CHANGED or not self._is_unchanged(item, status, key):
            return False
        if not self._options.dry_run:
            target.mend(directory, name, status, metadata)
            self._mark(item.number)
        if key is not None and key not in self._links:
            item.state = _State.DONE
            item.content = b""
            self._links[key] = item
        self.counts.unchanged += 1
        self.counts.unchanged_size += item.size if stat.S_ISREG(metadata.mode) else 0
        return True

    def _clear_directory(self, directory: Directory, name: bytes) -> None:
        try:
            self.target.remove_empty(directory, name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not self._options.delete:
                raise Blocked("a directory that is not empty stands in its place; --delete removes it") from error
            self.counts.deleted += self.target.remove_tree(directory, name, self._keeps)
            if self.target.status(directory, name) is not None:
                raise Blocked("a directory stands in its place that holds what is excluded") from error

    def _is_unchanged(self, item: Item, status: os.stat_result, key: tuple[int, int] | None) -> bool:
        metadata, content = item.metadata, item.content
        if stat.S_IFMT(status.st_mode) != stat.S_IFMT(metadata.mode) or status.st_mtime_ns != metadata.mtime_ns:
            return False
        if stat.S_ISREG(metadata.mode) and status.st_size != item.size:
            return False
        if stat.S_ISLNK(metadata.mode) and self.target.read_link(item.directory, item.name) != content:
            return False
        if stat.S_ISCHR(metadata.mode) or stat.S_ISBLK(metadata.mode):
            device = device_of(content)
            if (os.major(status.st_rdev), os.minor(status.st_rdev)) != device:
                return False
        first = self._links.get(key) if key is not None else None
        if first is None:
            return True
        # A name of a hardlinked file must be a name of that very file.
        other = self.target.status(first.directory, first.name) if first.state is _State.DONE else None
        return other is not None and (other.st_dev, other.st_ino) == (status.st_dev, status.st_ino)

    # Files.

    def _is_link(self, item: Item, key: tuple[int, int], nlink: int) -> bool:
        """Make a link to a name that was restored before, or note it for later; False for the first name."""
        first = self._links.get(key)
        if first is None or first.state is _State.FAILED:
            item.unseen = nlink - 1
            self._links[key] = item
            return False
        first.unseen -= 1
        if first.unseen == 0:
            del self._links[key]
        if first.state is _State.DONE:
            return self._link(first, item)
        item.directory.pending += 1
        first.links.append(item)
        return True

    def _link(self, first: Item, item: Item) -> bool:
        """Give a restored file another name; False if it has to be a file of its own. Raises: OSError."""
        if not self._options.dry_run:
            try:
                self.target.link(first.directory, first.name, item.directory, item.name)
            except OSError as error:
                if is_fatal(error):
                    raise
                log.info("a hardlink could not be made, a copy is restored instead: %s", error)
                return False
            self._mark(item.number)
        self.counts.files += 1
        return True

    def _restore(self, item: Item) -> Iterator[None]:
        """Make a file, or note what is needed for it. Raises: OSError; DamagedObject."""
        kind = stat.S_IFMT(item.metadata.mode)
        content = item.content
        self._window_files += 1
        if kind != stat.S_IFREG:
            if not isinstance(content, bytes) or (kind == stat.S_IFLNK and (not content or b"\0" in content)):
                raise DamagedObject("the snapshot holds an impossible link")
            if not self._options.dry_run:
                self._make_special(item, kind, content)
            self._finished(item, 0)
        elif self._options.dry_run:
            self._finished(item, item.size)
        elif not isinstance(content, bytes):
            yield from self._start_large(item)
        elif content[:1] == SINGLE_MARK and len(content) == 33 and item.size:
            if item.size > _SMALL:
                yield from self._start_large(item)
            else:
                self._restore_small(item, content)
        else:
            self._restore_small(item, content)

    def _restore_small(self, item: Item, content: bytes) -> None:
        """Make a file of no bytes or those in the node, or note the one chunk it needs."""
        if content[:1] == SINGLE_MARK and len(content) == 33 and item.size:
            item.directory.pending += 1
            item.content = b""
            self._window_files += 1
            self._window_bytes += item.size
            chunk_id = ChunkId(content[1:])
            wanted = self._wanted.get(chunk_id)
            if wanted is None:
                wanted = self._wanted[chunk_id] = WantedChunk(chunk_id)
            wanted.uses.append(item)
            return
        data = content[1:] if content[:1] == INLINE_MARK else content
        if len(data) != item.size or (content and content[:1] != INLINE_MARK):
            raise DamagedObject("a file's content is damaged: it is not of any known form")
        self.target.write_file(item.directory, item.name, data, item.metadata)
        self._finished(item, item.size)

    def _make_special(self, item: Item, kind: int, content: bytes) -> None:
        device = (0, 0)
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            device = device_of(content)
            if not self.target.is_root_user:
                raise OSError(errno.EPERM, "only root can make a device file")
        self.target.make_special(item.directory, item.name, item.metadata, content, device)

    def _start_large(self, item: Item) -> Iterator[None]:
        """Create a file of more than one piece and note what is wanted for it."""
        content, item.content = item.content, b""
        item.temporary = self.target.temporary_name()
        item.fd = self.target.create(item.directory, item.temporary)
        self._unfinished.add(item)
        self._open_files += 1
        item.directory.pending += 1
        try:
            # Nothing is written into holes: they stay what a longer file has by itself.
            os.ftruncate(item.fd, item.size)
            if self._open_files > _MOST_OPEN_FILES:
                # Now, as later another thread may be writing into it.
                self._close_file(item)
            for number, piece in enumerate(_placed(content, item.size, self._load)):
                if number % _PIECES_PER_PAUSE == _PIECES_PER_PAUSE - 1 or self.is_full:
                    yield None
                at, kind, length, source, offset = piece
                if item.failure:
                    break
                if kind == HOLE:
                    continue
                if kind == EXTENT:
                    raise OSError(errno.ENOTSUP, "its bytes are in a disk of an image: read it through a mount")
                if kind == CHUNK:
                    chunk_id = ChunkId(source)
                    wanted = self._wanted.get(chunk_id)
                    if wanted is None:
                        wanted = self._wanted[chunk_id] = WantedChunk(chunk_id)
                    wanted.uses.append(PieceUse(item, at, offset, length))
                    item.remaining += 1
                    self._window_bytes += length
                else:
                    self._write_piece(item, source[offset : offset + length], at)
        except OSError as error:
            if is_fatal(error):
                raise self.target.full(error) from error
            self._fail(item, error.strerror or str(error))
        except DamagedObject as error:
            self._fail(item, str(error), is_damage=True)
        self._piece_done(item)

    def _write_piece(self, item: Item, data: bytes | memoryview, at: int) -> None:
        if item.fd >= 0:
            write_at(item.fd, data, at)
            return
        fd = self.target.reopen(item.directory, item.temporary)
        try:
            write_at(fd, data, at)
        finally:
            os.close(fd)

    def _close_file(self, item: Item) -> None:
        if item.fd >= 0:
            os.close(item.fd)
            item.fd = -1
            self._open_files -= 1

    # Windows.

    @property
    def is_full(self) -> bool:
        """Tell whether enough is wanted to be read."""
        return self._window_files >= _WINDOW_FILES or self._window_bytes >= _WINDOW_BYTES

    def advance(self, walk: Iterator[None]) -> bool:
        """Go on with the walk for a moment; return whether it may have more to come."""
        end = time.monotonic() + _SLICE_S
        return any(self.is_full or self.stop.is_set() or time.monotonic() > end for _ in walk)

    def take_window(self) -> list[PackRange[Use]]:
        """Return what to read for everything that was noted since."""
        wanted, self._wanted = self._wanted, {}
        self._window_files = self._window_bytes = 0
        ranges, lost = plan_ranges(self._reader, wanted.values())
        self._retry += lost
        return ranges

    def take_retries(self) -> list[PackRange[Use]]:
        """Return what to read for everything that could not be read or linked; give up what has no copy left.

        Called when nothing else is under way. An empty list ends the restore.
        """
        while self._retry or self._late:
            late, self._late = self._late, []
            for item in late:
                try:
                    for _ in self._restore(item):
                        pass
                except OSError as error:
                    self._failed(self.target.path_of(item.directory, item.name), error)
                except DamagedObject as error:
                    self._skip(self.target.path_of(item.directory, item.name), str(error), is_damage=True)
                self._release(item.directory)
            wanted = [*self._retry, *self._wanted.values()]
            self._retry, self._wanted = [], {}
            if any(chunk.failures for chunk in wanted):
                # Another client may have repacked since the index was read, or a segment of it is lost.
                self._reader.index.refresh()
                self._reader.index.rebuild_from_packs()
            ranges, lost = plan_ranges(self._reader, wanted)
            for chunk in lost:
                self._lose(chunk)
            if ranges:
                return ranges
        return []

    def _lose(self, chunk: WantedChunk[Use]) -> None:
        reason = "; ".join(dict.fromkeys(chunk.failures))
        for use in chunk.uses:
            item = use if isinstance(use, Item) else use.item
            self._fail(item, reason, is_damage=True)
            self._piece_done(item)

    def decode(self, wanted: PackRange[Use], stored: memoryview, block: WantedBlock[Use]) -> Decoded:
        """Take a block apart, and write what belongs into open files; safe in any thread."""
        good = decode_block(self._reader, wanted, stored, block)
        for chunk, data in good:
            for use in chunk.uses:
                if isinstance(use, PieceUse) and use.item.fd >= 0 and not use.item.failure:
                    try:
                        self._write_use(use, use.item.fd, data)
                    except OSError as error:
                        use.error = error
                    use.written = True
        return good

    def _write_use(self, use: PieceUse, fd: int, data: memoryview) -> None:
        part = data[use.offset : use.offset + use.length]
        if len(part) != use.length:
            raise OSError(errno.EIO, "a file's content is damaged: a chunk is shorter than the snapshot says")
        if self._options.sparse:
            write_sparsely(fd, part, use.at)
        else:
            write_at(fd, part, use.at)

    def store(self, batch: list[tuple[WantedBlock[Use], Decoded]]) -> None:
        """Write what blocks hold, and finish the files that are whole then."""
        target = self.target
        for block, decoded in batch:
            if len(decoded) != len(block.chunks):
                got = {id(chunk) for chunk, _ in decoded}
                self._retry += [chunk for chunk in block.chunks if id(chunk) not in got]
            for chunk, data in decoded:
                for use in chunk.uses:
                    if isinstance(use, PieceUse):
                        self._store_piece(use, data)
                        continue
                    try:
                        if len(data) != use.size:
                            raise OSError(errno.EIO, "its chunk is not as long as the snapshot says")
                        target.write_file(use.directory, use.name, data, use.metadata)
                    except OSError as error:
                        if is_fatal(error):
                            raise target.full(error) from error
                        self._fail(use, error.strerror or str(error))
                    self._piece_done(use)

    def _store_piece(self, use: PieceUse, data: memoryview) -> None:
        item, error = use.item, use.error
        if not use.written and not item.failure:
            try:
                fd = self.target.reopen(item.directory, item.temporary)
                try:
                    self._write_use(use, fd, data)
                finally:
                    os.close(fd)
            except OSError as failed:
                error = failed
        if error is not None:
            if is_fatal(error):
                raise self.target.full(error) from error
            self._fail(item, error.strerror or str(error))
        self._piece_done(item)

    # The ends of things.

    def _fail(self, item: Item, reason: str, is_damage: bool = False) -> None:
        """Give a file up; told once, its temporary goes when no thread can be writing to it."""
        if not item.failure:
            item.failure = reason
            self._skip(self.target.path_of(item.directory, item.name), reason, is_damage)

    def _piece_done(self, item: Item) -> None:
        item.remaining -= 1
        if item.remaining:
            return
        if item.temporary:
            self._unfinished.discard(item)
            try:
                if item.failure:
                    self._close_file(item)
                    self.target.remove_temporary(item.directory, item.temporary)
                else:
                    self._finish_large(item)
            except OSError as error:
                self.target.remove_temporary(item.directory, item.temporary)
                if is_fatal(error):
                    raise self.target.full(error) from error
                self._fail(item, error.strerror or str(error))
        directory = item.directory
        if item.failure:
            item.state = _State.FAILED
            for link in item.links:
                self._fail(link, item.failure, is_damage=True)
                link.state = _State.FAILED
                self._release(link.directory)
        else:
            self._finished(item, item.size)
        self._release(directory)

    def _finish_large(self, item: Item) -> None:
        fd = item.fd
        if fd < 0:
            fd = self.target.reopen(item.directory, item.temporary)
        else:
            item.fd = -1
            self._open_files -= 1
        self.target.finish_file(fd, item.directory, item.temporary, item.name, item.metadata)

    def _finished(self, item: Item, size: int) -> None:
        """Count a file that is there, and give it its other names."""
        item.state = _State.DONE
        item.content = b""
        self.counts.files += 1
        self.counts.size += size
        self._mark(item.number)
        links, item.links = item.links, []
        for link in links:
            try:
                if not self._link(item, link):
                    self._late.append(link)
                    continue  # its directory is released when it is there
            except OSError as error:
                self._failed(self.target.path_of(link.directory, link.name), error)
            self._release(link.directory)

    def _release(self, directory: Directory) -> None:
        """Note that one thing in a directory is done; finish it, and those above, when it was the last."""
        above: Directory | None = directory
        while above is not None:
            above.pending -= 1
            if above.pending:
                return
            try:
                self.target.finish_directory(above)
                if above.parent is not None and above.metadata is not None:
                    self._mark(above.ordinal)
            except OSError as error:
                self._failed(self.target.path_of(above), error)
            above = above.parent

    def _mark(self, number: int) -> None:
        at = number >> 3
        if at >= len(self._done):
            self._done.extend(bytes(at + 4096 - len(self._done)))
        self._done[at] |= 1 << (number & 7)

    def is_done(self, number: int) -> bool:
        """Tell whether the entry of this number of the walk is as in the snapshot."""
        return number >> 3 < len(self._done) and bool(self._done[number >> 3] >> (number & 7) & 1)

    def clean_up(self) -> None:
        """Remove what an interrupted run left under temporary names, and close everything."""
        for item in self._unfinished:
            self._close_file(item)
            self.target.remove_temporary(item.directory, item.temporary)
        self._unfinished.clear()
        self.target.close()

    def problem(self, path: bytes, reason: str) -> None:
        """Take what could not be set on a file that is otherwise there."""
        self.told.add(path)
        self._skip(path, reason)

    def _failed(self, path: bytes, error: OSError, prefix: str = "") -> None:
        if is_fatal(error):
            raise self.target.full(error) from error
        self._skip(path, prefix + (error.strerror or str(error)))

    def _skip(self, path: bytes, reason: str, is_damage: bool = False) -> None:
        self.counts.errors += 1
        self.counts.damaged += is_damage
        self._report(FileSkipped(path, reason))

    def remarks(self) -> Iterator[Remark]:
        """Yield what is worth saying once at the end."""
        if self.target.owners_kept:
            yield Remark("only root can give files to their owners: they belong to the user who restored them")


Placed = tuple[int, int, int, bytes, int]  # offset in the file, kind, length, source, offset in the source


def _placed(content: Content, size: int, load: Callable[[ChunkId], bytes | memoryview]) -> Iterator[Placed]:
    at = 0
    for piece in pieces(content, size, 0, size, load):
        yield at, piece.kind, piece.length, piece.source, piece.offset
        at += piece.length


def device_of(content: Content) -> tuple[int, int]:
    """Return the (major, minor) of a device. Raises: DamagedObject."""
    if not isinstance(content, bytes) or len(content) != 8:
        raise DamagedObject("the snapshot holds a device without numbers")
    return int.from_bytes(content[:4], "little"), int.from_bytes(content[4:], "little")


def _paths_below(target: bytes, folders: tuple[bytes, ...]) -> frozenset[bytes]:
    """Return where folders lie below the target, with a leading slash."""
    top = os.path.realpath(target).rstrip(b"/") + b"/"
    return frozenset(
        b"/" + real[len(top) :] for real in (os.path.realpath(folder) for folder in folders) if real.startswith(top)
    )
