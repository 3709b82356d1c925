"""Writing what one range of a pack holds: as a process that does nothing else gets it, does it and tells of it.

Neighbouring files, and mostly a directory, are in one range. A `Work` is plain values: the directories that the range
is for, down from the target, and for each chunk the files and the pieces of files that it is.
Nothing but the target is touched here: the stored bytes were fetched before.
"""

import errno
import mmap
import os
from dataclasses import dataclass, field

from backupfs.codec.sectors import SectorCipher
from backupfs.errors import DamagedObject
from backupfs.forked import Line
from backupfs.ids import ChunkId
from backupfs.localfs.content import write_at, write_sparsely
from backupfs.localfs.directories import Directory
from backupfs.localfs.fatal import is_fatal
from backupfs.localfs.metadata import Metadata
from backupfs.localfs.writing import Target
from backupfs.repository.chunks import ChunkReader
from backupfs.repository.fetch import PackRange
from backupfs.repository.pack import PackRef
from backupfs.snapshots.content import CHUNK, Piece
from backupfs.usecases.restore_items import Item, PieceUse, Use

# (number of the directory above, -1 for the target itself; name; whether it gives what is made in it a group or an ACL;
# identity if it is known; those of the names of files here that something stands under).
DirectoryRow = tuple[int, bytes, bool, tuple[int, int] | None, list[bytes]]
# A whole file: (directory, name, size, metadata).
FileRow = tuple[int, bytes, int, tuple[object, ...]]
# A piece of a file: (directory, temporary name, offset in the file, offset in the chunk, length, cipher if it is
# encrypted, position in what is).
PieceRow = tuple[int, bytes, int, int, int, SectorCipher | None, int]
ChunkRow = tuple[ChunkId, int, int, list[FileRow | PieceRow]]  # offset in the block, length
BlockRow = tuple[int, int, list[ChunkRow]]  # offset in the pack, stored length


@dataclass(slots=True)
class Work:
    """A range and what is to be made of it."""

    stored: int | bytes  # the slot of shared memory that its bytes are in; or the bytes, where they are too many
    start: int  # of the range in the pack
    length: int
    pack: PackRef
    directories: list[DirectoryRow]
    blocks: list[BlockRow]


@dataclass(slots=True)
class Written:
    """What became of a range; numbers are those of blocks, chunks and uses in the work."""

    bad: list[tuple[int, int, str]] = field(default_factory=list)  # (block, chunk, why it cannot be read)
    failed: list[tuple[int, int, int, str]] = field(default_factory=list)  # (block, chunk, use, why it is not there)
    problems: list[tuple[bytes, str]] = field(default_factory=list)  # (path, what could not be set)
    owners_kept: bool = False


@dataclass(slots=True)
class Failed:
    """The process cannot go on: the whole restore ends with this error."""

    error: Exception


def work_of(wanted: PackRange[Use], stored: int | bytes) -> Work:
    """Return the work that a range is."""
    numbers: dict[Directory, int] = {}
    directories: list[DirectoryRow] = []

    def number_of(directory: Directory) -> int:
        missing: list[Directory] = []
        above: Directory | None = directory
        while above is not None and above not in numbers:
            missing.append(above)
            above = above.parent
        for below in reversed(missing):
            parent = -1 if below.parent is None else numbers[below.parent]
            numbers[below] = len(directories)
            directories.append((parent, below.name, below.inherits, below.identity, []))
        return numbers[directory]

    blocks: list[BlockRow] = []
    for block in wanted.blocks:
        chunks: list[ChunkRow] = []
        for chunk in block.chunks:
            uses: list[FileRow | PieceRow] = []
            for use in chunk.uses:
                item = use if isinstance(use, Item) else use.item
                number = numbers.get(item.directory)
                if number is None:
                    number = number_of(item.directory)
                if use is item:
                    if item.name in item.directory.names:
                        directories[number][4].append(item.name)
                    uses.append((number, item.name, item.size, tuple(item.metadata)))
                else:
                    assert isinstance(use, PieceUse)
                    _, length, _, offset, cipher, position = use.piece
                    uses.append((number, item.temporary, use.at, offset, length, cipher, position))
            chunks.append((chunk.chunk_id, chunk.offset, chunk.length, uses))
        blocks.append((block.offset, block.stored_length, chunks))
    return Work(stored, wanted.start, wanted.length, wanted.pack, directories, blocks)


class RangeWriter:
    """Does the work of a process that writes."""

    def __init__(self, reader: ChunkReader, target: Target, number: int, shared: "SharedRanges", sparse: bool) -> None:
        """Take the parts.

        number: of this process among those that write.
        sparse: make holes of long runs of zeros.
        """
        self._reader = reader
        self._target = target.for_another_process(number, self._problem)
        self._shared = shared
        self._sparse = sparse
        self._written = Written()
        self._piece: tuple[int, bytes] = (-1, b"")  # the file that pieces are written into just now
        self._piece_fd = -1

    def run(self, line: Line) -> None:
        """Do what comes, until there is no more."""
        while True:
            work = line.receive()
            assert isinstance(work, Work)
            written = self.write(work)
            if self._shared.stopped:
                return
            line.send(written)

    def write(self, work: Work) -> Written:
        """Write what a range holds. Raises: SourceError if the target takes no more."""
        written = self._written = Written()
        stored = self._shared.view(work.stored, work.length)
        directories = self._directories(work)
        try:
            for block_number, (offset, stored_length, chunks) in enumerate(work.blocks):
                if self._shared.stopped:
                    break
                at = offset - work.start
                try:
                    plain = memoryview(self._reader.open_block(work.pack, stored[at : at + stored_length], offset))
                except DamagedObject as error:
                    written.bad += [(block_number, number, str(error)) for number in range(len(chunks))]
                    continue
                for chunk_number, (chunk_id, start, length, uses) in enumerate(chunks):
                    data = plain[start : start + length]
                    try:
                        self._reader.check(chunk_id, data, work.pack, offset)
                    except DamagedObject as error:
                        written.bad.append((block_number, chunk_number, str(error)))
                        continue
                    for use_number, use in enumerate(uses):
                        try:
                            if len(use) == 4:
                                self._write_file(directories[use[0]], use, data)
                            else:
                                self._write_piece(directories[use[0]], use, data)
                        except OSError as error:
                            if is_fatal(error):
                                raise self._target.full(error) from error
                            written.failed.append(
                                (block_number, chunk_number, use_number, error.strerror or str(error))
                            )
        finally:
            self._close_piece()
            self._target.close_directories()
        written.owners_kept = self._target.owners_kept
        return written

    def _directories(self, work: Work) -> list[Directory]:
        directories: list[Directory] = []
        for parent, name, inherits, identity, standing in work.directories:
            if parent < 0:
                directories.append(self._target.root)
                continue
            directory = Directory(directories[parent], name)
            directory.inherits = inherits
            directory.identity = identity
            directory.names = set(standing)
            directories.append(directory)
        return directories

    def _write_file(self, directory: Directory, row: FileRow, data: memoryview) -> None:
        _, name, size, values = row
        if len(data) != size:
            raise OSError(errno.EIO, "its chunk is not as long as the snapshot says")
        metadata = Metadata(*values)  # type: ignore[arg-type]
        if not self._sparse:
            self._target.write_file(directory, name, data, metadata)
            return
        temporary = self._target.temporary_name()
        fd = self._target.create(directory, temporary)
        try:
            try:
                os.ftruncate(fd, size)
                write_sparsely(fd, data, 0)
            except BaseException:
                os.close(fd)
                raise
            self._target.finish_file(fd, directory, temporary, name, metadata)
        except BaseException:
            self._target.remove_temporary(directory, temporary)
            raise

    def _write_piece(self, directory: Directory, row: PieceRow, data: memoryview) -> None:
        number, temporary, at, offset, length, cipher, position = row
        try:
            part = Piece(CHUNK, length, b"", offset, cipher, position).plain(data)
        except DamagedObject as error:
            raise OSError(errno.EIO, str(error)) from error
        if self._piece != (number, temporary):
            self._close_piece()
            self._piece_fd = self._target.reopen(directory, temporary)
            self._piece = (number, temporary)
        if self._sparse:
            write_sparsely(self._piece_fd, part, at)
        else:
            write_at(self._piece_fd, part, at)

    def _close_piece(self) -> None:
        if self._piece_fd >= 0:
            os.close(self._piece_fd)
        self._piece, self._piece_fd = (-1, b""), -1

    def _problem(self, path: bytes, reason: str) -> None:
        self._written.problems.append((path, reason))


class SharedRanges:
    """Memory of equal slots that ranges are fetched into by one process and read from by others.

    Made before the others are forked. Who may use a slot is agreed on elsewhere.
    """

    def __init__(self, count: int, size: int) -> None:
        """Make the memory; the kernel provides a page of it when it is first written to."""
        self.count = count
        self.size = size
        self._memory = memoryview(mmap.mmap(-1, mmap.PAGESIZE + count * size))

    @property
    def stopped(self) -> bool:
        """Tell whether nobody wants the rest of the work."""
        return self._memory[0] != 0

    def stop(self) -> None:
        """Let every process end before its next block."""
        self._memory[0] = 1

    def put(self, slot: int, data: bytes) -> int | bytes:
        """Return how to find some bytes: the slot they were copied to, or themselves where they are too many."""
        if len(data) > self.size:
            return data
        start = mmap.PAGESIZE + slot * self.size
        self._memory[start : start + len(data)] = data
        return slot

    def view(self, place: int | bytes, length: int) -> memoryview:
        """Return bytes that were put."""
        if isinstance(place, bytes):
            return memoryview(place)
        start = mmap.PAGESIZE + place * self.size
        return self._memory[start : start + length]
