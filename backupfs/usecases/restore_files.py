"""Writing what a snapshot holds below a target: the half of a restore that touches the target.

Directories and whatever needs no chunks are made during the walk; files with chunks are noted as wanted and written
when their bytes come, in any order. A directory gets its metadata when everything in it is done.
Threading: one thread at a time, but for `write`, which any thread may call for ranges that were planned. What it writes
has an unfinished directory, and nobody else looks at it before `settle`.
"""

import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator

from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId
from backupfs.localfs.writing import Directory, Metadata, Target, is_fatal, write_at, write_sparsely
from backupfs.repository.chunks import ChunkReader
from backupfs.repository.fetch import PackRange, WantedChunk, decode_block, plan_ranges
from backupfs.snapshots.content import CHUNK, EXTENT, HOLE, INLINE_MARK, SINGLE_MARK, Content, pieces
from backupfs.snapshots.node import NANOSECONDS, STAT_ROW
from backupfs.snapshots.tree import LeafPage
from backupfs.usecases.events import FileSkipped, Remark, Report
from backupfs.usecases.restore_existing import ExistingFiles, LinkKey
from backupfs.usecases.restore_items import (
    NEVER,
    Blocked,
    Counts,
    Item,
    PieceUse,
    RestoreOptions,
    State,
    Use,
    device_of,
)
from backupfs.usecases.restore_walk import PAUSE, Load, Place, Traversal

log = logging.getLogger(__name__)

# A window of the walk: what is wanted in it is read in the order of the packs.
_WINDOW_FILES = 20_000
_WINDOW_BYTES = 256 << 20
# How long the walk may keep the target to itself while blocks wait to be written.
_SLICE_S = 0.02
# Up to here a file is made when its one chunk is there; beyond, during the walk, so that pieces can come in any order.
_SMALL = 64 << 10
# Descriptors of large files under way; the others are opened for each piece.
_MOST_OPEN_FILES = 256
_PIECES_PER_PAUSE = 256


Written = list[WantedChunk[Use]]


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
        self._links: dict[LinkKey, Item] = {}
        self._unfinished: set[Item] = set()  # with a temporary file
        self._open_files = 0
        self._done = bytearray()  # a bit for each number of the walk
        self.blocked: set[int] = set()  # numbers of directories that were not entered
        self.told: set[bytes] = set()  # paths that are there, but not with everything
        self.owners_kept = False  # by a target of another thread
        self.counts = Counts()
        self.stop = threading.Event()
        self._telling = threading.Lock()
        self._existing = ExistingFiles(target, options, self.counts, self._links, report, traversal.keeps)

    # The walk, as its visitor.

    def begin(self, start: Place, metadata: Metadata | None) -> None:
        """Take the target itself as the directory that the walk starts from.

        metadata: what a target that this run made gets; one that was there is left as it is.
        """
        start.directory = self.target.root
        if not self.target.root.existed and not self._options.dry_run:
            self.target.root.metadata = metadata
        start.seen = set() if self._deletes_in(self.target.root, metadata) else None

    def _deletes_in(self, directory: Directory, metadata: Metadata | None) -> bool:
        # A directory that was only on the way to a source was not backed up itself: the snapshot does not say what is
        # in it.
        was_backed_up = metadata is not None and metadata.mtime_ns is not None
        return self._options.delete and directory.existed and was_backed_up

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
                if not self._existing.may_replace(status, metadata):
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
        if self._deletes_in(directory, metadata):
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
                if name in directory.names and self._existing.keeps(item, key):
                    if item.state is State.DONE:
                        self._mark(number)
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
            for name, error in self._existing.delete_others(directory, place.seen):
                self._failed(self.target.path_of(directory, name), error, "it could not be deleted: ")
        place.seen = None
        self._release(directory)

    def damaged(self, place: Place, name: bytes, error: DamagedObject) -> None:
        """Tell that the snapshot itself cannot be read at a place."""
        path = self.target.path.rstrip(b"/") + place.path + (b"/" + name if name else b"")
        self._skip(path or b"/", str(error), is_damage=True)

    # Files.

    def _is_link(self, item: Item, key: LinkKey, nlink: int) -> bool:
        """Make a link to a name that was restored before, or note it for later; False for the first name."""
        first = self._links.get(key)
        if first is None or first.state is State.FAILED:
            item.unseen = nlink - 1
            self._links[key] = item
            return False
        first.unseen -= 1
        if first.unseen == 0:
            del self._links[key]
        if first.state is State.DONE:
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

    def write(self, target: Target, wanted: PackRange[Use], stored: memoryview) -> Written:
        """Write what a range holds; safe in any thread that has a target of its own. Return the chunks that were good.

        Errors are left with the uses, for `settle`. Raises: SourceError if the target takes no more.
        """
        written: Written = []
        for block in wanted.blocks:
            if self.stop.is_set():
                break
            for chunk, data in decode_block(self._reader, wanted, stored, block):
                for use in chunk.uses:
                    try:
                        if isinstance(use, Item):
                            if len(data) != use.size:
                                raise OSError(errno.EIO, "its chunk is not as long as the snapshot says")
                            target.write_file(use.directory, use.name, data, use.metadata)
                        elif not use.item.failure:
                            self._write_piece_of(target, use, data)
                    except OSError as error:
                        if is_fatal(error):
                            raise target.full(error) from error
                        use.error = error
                written.append(chunk)
        return written

    def _write_piece_of(self, target: Target, use: PieceUse, data: memoryview) -> None:
        part = data[use.offset : use.offset + use.length]
        if len(part) != use.length:
            raise OSError(errno.EIO, "a file's content is damaged: a chunk is shorter than the snapshot says")
        item = use.item
        fd = item.fd if item.fd >= 0 else target.reopen(item.directory, item.temporary)
        try:
            if self._options.sparse:
                write_sparsely(fd, part, use.at)
            else:
                write_at(fd, part, use.at)
        finally:
            if item.fd < 0:
                os.close(fd)

    def settle(self, wanted: PackRange[Use], written: Written) -> None:
        """Finish the files that are whole now, and note the chunks of a range that were not good."""
        for chunk in written:
            for use in chunk.uses:
                item = use if isinstance(use, Item) else use.item
                if use.error is not None:
                    self._fail(item, use.error.strerror or str(use.error))
                self._piece_done(item)
        good = {id(chunk) for chunk in written}
        self._retry += [chunk for block in wanted.blocks for chunk in block.chunks if id(chunk) not in good]

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
            item.state = State.FAILED
            for link in item.links:
                self._fail(link, item.failure, is_damage=True)
                link.state = State.FAILED
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
        item.state = State.DONE
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
        # The threads that write tell of attributes that could not be set.
        with self._telling:
            self.counts.errors += 1
            self.counts.damaged += is_damage
            self._report(FileSkipped(path, reason))

    def remarks(self) -> Iterator[Remark]:
        """Yield what is worth saying once at the end."""
        if self.target.owners_kept or self.owners_kept:
            yield Remark("only root can give files to their owners: they belong to the user who restored them")


Placed = tuple[int, int, int, bytes, int]  # offset in the file, kind, length, source, offset in the source


def _placed(content: Content, size: int, load: Callable[[ChunkId], bytes | memoryview]) -> Iterator[Placed]:
    at = 0
    for piece in pieces(content, size, 0, size, load):
        yield at, piece.kind, piece.length, piece.source, piece.offset
        at += piece.length
