"""Writing what a snapshot holds below a target: the half of a restore that touches the target.

Directories and whatever needs no chunks are made during the walk; files with chunks are noted as wanted, and other
processes write them when their bytes come, in any order. Threading: one thread at a time.
"""

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator

from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId
from backupfs.localfs.content import write_at
from backupfs.localfs.directories import Directory
from backupfs.localfs.fatal import is_fatal
from backupfs.localfs.metadata import Metadata
from backupfs.repository.chunks import ChunkReader
from backupfs.repository.fetch import PackRange, WantedChunk, give_up, plan_ranges
from backupfs.snapshots.content import CHUNK, HOLE, INLINE_MARK, SINGLE_MARK, Content, Extents, Piece, pieces
from backupfs.snapshots.node import NANOSECONDS, STAT_ROW
from backupfs.snapshots.tree import LeafPage
from backupfs.usecases.events import Report
from backupfs.usecases.restore_existing import ExistingFiles, LinkKey
from backupfs.usecases.restore_items import (
    NEVER,
    Blocked,
    Item,
    PieceUse,
    RestoreOptions,
    State,
    Use,
    device_of,
)
from backupfs.usecases.restore_outcome import Outcome
from backupfs.usecases.restore_range import Written
from backupfs.usecases.restore_walk import PAUSE, Load, Place, Traversal

# A window of the walk, in files and pieces of files: what is wanted in it is read in the order of the packs. What files
# of different windows have in common is read for each, so it is as large as memory allows.
_MOST_WANTED = 30_000
# What a window must have before it is read because there is nothing else to do.
_LEAST_WANTED = 1000
_LEAST_WANTED_BYTES = 64 << 20
# How long the walk may keep the target to itself while written ranges wait for it.
_SLICE_S = 0.02
_PIECES_PER_PAUSE = 256


class Restorer:
    """Writes below one target."""

    def __init__(
        self,
        outcome: Outcome,
        traversal: Traversal,
        load: Load,
        extents: Extents,
        reader: ChunkReader,
        options: RestoreOptions,
        report: Report,
    ) -> None:
        """Take the parts.

        load: gives tree chunks. reader: gives data chunks. extents: of the snapshot's volumes.
        report: takes events, in the threads that call.
        """
        self._extents = extents
        target = outcome.target
        self.target = target
        self._traversal = traversal
        self._load = load
        self._reader = reader
        self._options = options
        self._wanted: dict[ChunkId, WantedChunk[Use]] = {}
        self._window_count = self._window_bytes = 0
        self._retry: list[WantedChunk[Use]] = []
        self._links: dict[LinkKey, Item] = {}
        self.blocked: set[int] = set()  # numbers of directories that were not entered
        self.stop = threading.Event()
        self.outcome = outcome
        self._existing = ExistingFiles(target, options, outcome.counts, self._links, report, traversal.keeps)

    # The walk, as its visitor.

    def begin(self, start: Place, metadata: Metadata | None) -> None:
        """Take the target itself as the directory that the walk starts from.

        metadata: what a target that this run made gets; one that was there is left as it is.
        """
        start.directory = self.target.root
        if not self.target.root.existed and not self._options.dry_run:
            self.target.root.metadata = metadata
        if self.target.root.existed:
            self._ask_names(start, metadata)

    def _ask_names(self, place: Place, metadata: Metadata | None) -> None:
        """Have the names of a directory collected, if something may have to be deleted in it."""
        # A directory that was only on the way to a source was not backed up itself: the snapshot does not say what is
        # in it.
        if self._options.delete and metadata is not None and metadata.mtime_ns is not None:
            place.seen = set()

    def directory(self, place: Place) -> bool:
        """Make or open a directory, unless it may turn out that nothing in it is wanted."""
        # Now, though it may be opened later: what is left out of any page would be deleted.
        self._ask_names(place, place.metadata)
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
                self.outcome.failed(self.target.path_of(parent, below.name), error)
            except Blocked as error:
                self.outcome.skip(self.target.path_of(parent, below.name), str(error))
            if below.directory is None:
                place.blocked = below.blocked = True
                return None
        return place.directory

    def _make_directory(self, parent: Directory, place: Place) -> Directory:
        target, name, metadata = self.target, place.name, place.metadata
        assert metadata is not None
        dry = self._options.dry_run
        directory: Directory | None = None
        stands = False  # something that is no directory
        if name in parent.names:
            status = target.status(parent, name)
            if status is not None and stat.S_ISDIR(status.st_mode):
                directory = place.standing or target.open_existing(parent, name)
                # One that was only on the way to a source was not backed up itself.
                if self._options.overwrite != NEVER and metadata.mtime_ns is not None:
                    if directory.foreign:
                        self.outcome.skip(target.path_of(directory), os.strerror(errno.EPERM))
                    elif not dry:
                        directory.metadata = metadata
            elif status is not None:
                if not self._existing.may_replace(status, metadata):
                    raise Blocked(
                        f"something that is no directory stands in its place and --overwrite {self._options.overwrite} "
                        "keeps it; nothing below was restored"
                    )
                stands = True
        if directory is None:
            _require_open(parent)
            if dry:
                directory = Directory(parent, name)
            elif stands:
                directory = target.replace_by_directory(parent, name)
            else:
                directory = target.make_directory(parent, name)
            directory.metadata = None if dry else metadata
            self.outcome.counts.directories += 1
        directory.ordinal = place.number
        parent.pending += 1
        self.outcome.counts.current = name
        if not directory.existed:
            place.seen = None
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
            name, item = names[at], None
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
                        self.outcome.mark(number)
                    continue
                _require_open(directory)
                if key is not None and self._is_link(item, key, nlink):
                    continue
                content = item.content
                if size and mode & 0o170000 == 0o100000 and type(content) is bytes and not dry and not item.make_way:
                    self._restore_small(item, content)
                else:
                    yield from self._restore(item)
            except (OSError, DamagedObject, Blocked) as error:
                self._tell_failure(directory, name, error)
                if item is not None:
                    # The next name of the same file is its first.
                    item.state = State.FAILED
            if number % PAUSE == 0:
                yield None

    def left(self, place: Place, complete: bool) -> None:
        """Delete what does not belong there, if that was asked for, and let the directory go."""
        # A page that cannot be read may hold any name.
        if place.seen is not None and complete:
            directory = place.directory or self._standing(place)
            if directory is not None and place.is_incomplete:
                if not place.seen.issuperset(directory.names):
                    self.outcome.undeleted.append(self.target.path_of(directory))
            elif directory is not None:
                for name, error, in_part in self._existing.delete_others(directory, place.seen):
                    what = "not all of it could be deleted: " if in_part else "it could not be deleted: "
                    self.outcome.failed(self.target.path_of(directory, name), error, what)
        place.seen = None
        if place.directory is not None:
            self.outcome.release(place.directory)
        elif place.standing is not None:
            self.target.finish_directory(place.standing)

    def _standing(self, place: Place) -> Directory | None:
        """Return a directory of the target that nothing was restored into, or None; none is made for this."""
        missing: list[Place] = []
        above: Place | None = place
        while above is not None and (above.directory or above.standing) is None:
            if above.blocked:
                return None
            missing.append(above)
            above = above.parent
        for below in reversed(missing):
            assert below.parent is not None
            parent = below.parent.directory or below.parent.standing
            assert parent is not None
            try:
                status = self.target.status(parent, below.name) if below.name in parent.names else None
                if status is None or not stat.S_ISDIR(status.st_mode):
                    return None
                below.standing = self.target.open_existing(parent, below.name)
            except OSError as error:
                below.blocked = True
                self.outcome.failed(self.target.path_of(parent, below.name), error)
                return None
        return place.standing

    def damaged(self, place: Place, name: bytes, error: DamagedObject) -> None:
        """Tell that the snapshot itself cannot be read at a place."""
        path = self.target.path.rstrip(b"/") + place.path + (b"/" + name if name else b"")
        self.outcome.skip(path or b"/", str(error), is_damage=True)

    def _tell_failure(self, directory: Directory, name: bytes, error: OSError | DamagedObject | Blocked) -> None:
        path = self.target.path_of(directory, name)
        if isinstance(error, OSError):
            self.outcome.failed(path, error)
        else:
            self.outcome.skip(path, str(error), is_damage=isinstance(error, DamagedObject))

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
            return self.outcome.link(first, item, self._options.dry_run)
        item.directory.pending += 1
        first.links.append(item)
        return True

    def _restore(self, item: Item) -> Iterator[None]:
        """Make a file, or note what is needed for it. Raises: OSError; DamagedObject."""
        kind = stat.S_IFMT(item.metadata.mode)
        content = item.content
        self._window_count += 1
        if kind != stat.S_IFREG:
            if not isinstance(content, bytes) or (kind == stat.S_IFLNK and (not content or b"\0" in content)):
                raise DamagedObject("the snapshot holds an impossible link")
            self._make_special(item, kind, content)
            self.outcome.finished(item, 0)
        elif self._options.dry_run:
            self.outcome.finished(item, item.size)
        elif item.make_way is not None or not isinstance(content, bytes):
            # Finished here and by a rename of its own, not by whoever writes it.
            yield from self._start_large(item)
        else:
            self._restore_small(item, content)

    def _restore_small(self, item: Item, content: bytes) -> None:
        """Make a file of no bytes or those in the node, or note the one chunk it needs."""
        if content[:1] == SINGLE_MARK and len(content) == 33 and item.size:
            item.directory.pending += 1
            item.content = b""
            self._window_count += 1
            self._window_bytes += item.size
            self._want(ChunkId(content[1:])).uses.append(item)
            return
        data = content[1:] if content[:1] == INLINE_MARK else content
        if len(data) != item.size or (content and content[:1] != INLINE_MARK):
            raise DamagedObject("a file's content is damaged: it is not of any known form")
        self.target.write_file(item.directory, item.name, data, item.metadata)
        self.outcome.finished(item, item.size)

    def _make_special(self, item: Item, kind: int, content: bytes) -> None:
        device = (0, 0)
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            device = device_of(content)
            if not self.target.is_root_user:
                raise OSError(errno.EPERM, "only root can make a device file")
        if not self._options.dry_run:
            self.target.make_special(item.directory, item.name, item.metadata, content, device, item.make_way)

    def _start_large(self, item: Item) -> Iterator[None]:
        """Create a file of more than one piece and note what is wanted for it."""
        content, item.content = item.content, b""
        temporary = self.target.temporary_name()
        fd = self.target.create(item.directory, temporary)
        self.outcome.begin(item, temporary)
        try:
            # Nothing is written into holes: they stay what a longer file has by itself.
            os.ftruncate(fd, item.size)
            for number, placed in enumerate(_placed(content, item.size, self._load, self._extents)):
                if number % _PIECES_PER_PAUSE == _PIECES_PER_PAUSE - 1 or self.is_full:
                    yield None
                at, piece = placed
                if item.failure:
                    break
                if piece.kind == HOLE:
                    continue
                if piece.kind == CHUNK:
                    self._want(ChunkId(piece.source)).uses.append(PieceUse(item, at, piece))
                    item.remaining += 1
                    self._window_count += 1
                    self._window_bytes += piece.length
                else:
                    write_at(fd, piece.plain(piece.source), at)
        except OSError as error:
            if is_fatal(error):
                raise self.target.full(error) from error
            self.outcome.fail(item, error.strerror or str(error))
        except DamagedObject as error:
            self.outcome.fail(item, str(error), is_damage=True)
        finally:
            os.close(fd)
        self.outcome.piece_done(item)

    def _want(self, chunk_id: ChunkId) -> WantedChunk[Use]:
        wanted = self._wanted.get(chunk_id)
        if wanted is None:
            wanted = self._wanted[chunk_id] = WantedChunk(chunk_id)
        return wanted

    # Windows.

    @property
    def is_full(self) -> bool:
        """Tell whether no more may be wanted before it is read."""
        return self._window_count >= _MOST_WANTED

    @property
    def is_enough(self) -> bool:
        """Tell whether reading what is wanted is worth it, if nothing else is to be read."""
        return self._window_count >= _LEAST_WANTED or self._window_bytes >= _LEAST_WANTED_BYTES

    def advance(self, walk: Iterator[None]) -> bool:
        """Go on with the walk for a moment; return whether it may have more to come."""
        end = time.monotonic() + _SLICE_S
        return any(self.is_full or self.stop.is_set() or time.monotonic() > end for _ in walk)

    def take_window(self) -> list[PackRange[Use]]:
        """Return what to read for everything that was noted since."""
        wanted, self._wanted = self._wanted, {}
        self._window_count = self._window_bytes = 0
        ranges, lost = plan_ranges(self._reader, wanted.values())
        self._retry += lost
        return ranges

    def take_retries(self) -> list[PackRange[Use]]:
        """Return what to read for everything that could not be read or linked; give up what has no copy left.

        Called when nothing else is under way. An empty list ends the restore.
        """
        while self._retry or self.outcome.late:
            late, self.outcome.late = self.outcome.late, []
            for item in late:
                try:
                    for _ in self._restore(item):
                        pass
                except (OSError, DamagedObject) as error:
                    item.failure, item.is_damaged = str(error), isinstance(error, DamagedObject)
                    self._tell_failure(item.directory, item.name, error)
                    self.outcome.give_up_name(item)
                self.outcome.release(item.directory)
            wanted = [*self._retry, *self._wanted.values()]
            self._retry, self._wanted = [], {}
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
            self.outcome.fail(item, reason, is_damage=True)
            self.outcome.piece_done(item)

    def give_up_chunks(self, chunks: list[WantedChunk[Use]]) -> None:
        """Note chunks that could not be fetched, to be tried in another place."""
        self._retry += chunks

    def settle(self, wanted: PackRange[Use], written: Written) -> None:
        """Finish the files that are whole now, and note the chunks of a range that were not good."""
        for path, reason in written.problems:
            self.outcome.problem(path, reason)
        self.outcome.owners_kept |= written.owners_kept
        bad = {(block, chunk): reason for block, chunk, reason in written.bad}
        for block_number, chunk_number, use_number, reason in written.failed:
            wanted.blocks[block_number].chunks[chunk_number].uses[use_number].error = reason
        piece_done = self.outcome.piece_done
        for block_number, block in enumerate(wanted.blocks):
            for chunk_number, chunk in enumerate(block.chunks):
                if bad and (block_number, chunk_number) in bad:
                    # What comes over a network may have been garbled on its way.
                    if not self._reader.is_far or chunk.is_second_try:
                        give_up(block, [chunk], bad[block_number, chunk_number])
                    chunk.is_second_try = True
                    self._retry.append(chunk)
                    continue
                for use in chunk.uses:
                    item = use if isinstance(use, Item) else use.item
                    if use.error:
                        self.outcome.fail(item, use.error)
                    piece_done(item)


def _require_open(directory: Directory) -> None:
    """Raise what making something in a directory would, as far as a dry run knows."""
    if directory.closed:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


Placed = tuple[int, Piece]  # with its offset in the file


def _placed(
    content: Content, size: int, load: Callable[[ChunkId], bytes | memoryview], extents: Extents
) -> Iterator[Placed]:
    at = 0
    for piece in pieces(content, size, 0, size, load, extents):
        yield at, piece
        at += piece.length
