"""Regular files into content: whole small ones, cuts of large ones, holes left out.

A small file is read straight into the block that it becomes a part of. A file that changes while it is read is read
again once, then kept and flagged.
"""

import os
import stat
from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

from backupfs.chunking.cutter import CutSizes, Cutter
from backupfs.codec.keys import keyed_hash
from backupfs.ids import ChunkId
from backupfs.localfs import reading
from backupfs.repository.writer import ChunkSaver
from backupfs.snapshots.content import (
    CHUNK,
    HOLE,
    INLINE_MARK,
    MOST_INLINE,
    SINGLE_MARK,
    Content,
    ContentBuilder,
)
from backupfs.snapshots.node import CHANGED_WHILE_READ, Xattrs
from backupfs.usecases.events import FileChanged, Report

# A file of the kernel that says no size ends well before this; one that does not (pagemap) would be read for hours.
_MOST_UNSIZED = 64 << 20
_UNSIZED_STEP = 64 << 10


class FileRead(NamedTuple):
    """A regular file as it was read."""

    content: Content
    status: os.stat_result  # of the moment it was read
    size: int  # of the content
    flags: int
    xattrs: Xattrs


class FileStorer:
    """Reads files and saves their chunks. Belongs to one scanning process."""

    def __init__(
        self,
        id_key: bytes,
        cut_seed: int,
        sizes: CutSizes,
        data: ChunkSaver,
        save_tree: Callable[[bytes], ChunkId],
        report: Report,
        unsized: Container[int] = (),
    ) -> None:
        """Take the parts.

        id_key, cut_seed: name chunks and key the cutter.
        save_tree: stores a list page.
        unsized: devices whose files are read to their end where they say a size of 0.
        """
        self._id_key = id_key
        self._cutter = Cutter(sizes, cut_seed)
        self._most_single = sizes.avg_size
        self._data = data
        self._save_tree = save_tree
        self._report = report
        self._unsized = unsized
        self._linked: dict[tuple[int, int, int], Content] = {}  # (device, inode, ctime_ns) of hardlinked files

    def store_stream(self, read_into: Callable[[memoryview], int]) -> tuple[Content, int]:
        """Save a stream; return (content, size)."""
        builder = ContentBuilder(self._save_tree)
        self.add_stream(builder, read_into)
        return builder.finish(), builder.length

    def add_stream(self, builder: ContentBuilder, read_into: Callable[[memoryview], int]) -> None:
        """Save a stream as the next part of a content."""
        self._add_pieces(builder, self._cutter.cut(read_into))

    def store(self, name: bytes, dir_fd: int, path: bytes, status: os.stat_result) -> FileRead:
        """Save a regular file of an open directory. Raises: OSError."""
        fd = reading.open_file(name, dir_fd)
        try:
            if status.st_size == 0 and status.st_dev in self._unsized:
                content, size = self.store_stream(_unsized_reader(fd))
                return FileRead(content, status, size, 0, reading.read_xattrs(fd))
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
                    builder = ContentBuilder(self._save_tree)
                    self._add_range(builder, fd, 0, status.st_size)
                    # The recorded size is that of the bytes that were read, or the content would not add up to it.
                    content, size = builder.finish(), builder.length
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
            if size <= MOST_INLINE:
                data = os.pread(fd, size, 0)
                return INLINE_MARK + data, len(data) == size
            chunk_id = self._read_chunk(fd, 0, size)
            return (SINGLE_MARK + chunk_id, True) if chunk_id is not None else (b"", False)
        builder = ContentBuilder(self._save_tree)
        position = 0
        for start, end in reading.data_ranges(fd, size):
            if start > position:
                builder.add([start - position, HOLE])
            self._add_range(builder, fd, start, end)
            position = end
        if position < size:
            builder.add([size - position, HOLE])
        if builder.length != size:
            return b"", False
        return builder.finish(), True

    def _read_chunk(self, fd: int, start: int, length: int) -> ChunkId | None:
        """Save a range of a file as one chunk; None if the file does not give it all."""
        room = self._data.room(length)
        if os.preadv(fd, [room], start) != length:
            return None
        chunk_id = ChunkId(keyed_hash(self._id_key, room))
        self._data.keep(chunk_id, length)
        return chunk_id

    def _add_range(self, builder: ContentBuilder, fd: int, start: int, end: int) -> None:
        if end - start <= self._most_single:
            chunk_id = self._read_chunk(fd, start, end - start)
            if chunk_id is not None:
                builder.add([end - start, CHUNK, chunk_id])
                return
        self._add_pieces(builder, self._cutter.cut(reading.range_reader(fd, start, end)))

    def _add_pieces(self, builder: ContentBuilder, pieces: Iterator[memoryview]) -> None:
        for piece in pieces:
            chunk_id = ChunkId(keyed_hash(self._id_key, piece))
            self._data.save(chunk_id, piece)
            builder.add([len(piece), CHUNK, chunk_id])


def _unsized_reader(fd: int) -> Callable[[memoryview], int]:
    left, held = _MOST_UNSIZED, memoryview(b"")

    def read_into(buffer: memoryview) -> int:
        nonlocal left, held
        if not held:
            # Some files of the kernel give whole records alone, to whoever asks for a multiple of them.
            held = memoryview(os.read(fd, _UNSIZED_STEP))
            left -= len(held)
            if left < 0:
                raise OSError(0, f"it says a size of 0 and gives more than {_MOST_UNSIZED >> 20} MiB")
        count = min(len(buffer), len(held))
        buffer[:count], held = held[:count], held[count:]
        return count

    return read_into


def _is_same(before: os.stat_result, after: os.stat_result) -> bool:
    return (
        before.st_size == after.st_size
        and before.st_mtime_ns == after.st_mtime_ns
        and before.st_ctime_ns == after.st_ctime_ns
        and before.st_ino == after.st_ino
    )
