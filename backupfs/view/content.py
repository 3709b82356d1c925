"""Reading files from chunks in memory, and deciding what to read ahead. Belongs to the trio thread."""

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

from backupfs.codec.records import decode_record
from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId
from backupfs.snapshots.content import (
    CHUNK,
    EXTENT,
    HOLE,
    LIST,
    SINGLE_MARK,
    Content,
    Extents,
    Piece,
    Segment,
    pieces,
)
from backupfs.snapshots.volumes import Volume, extents_of
from backupfs.view.loading import Loader, NotCached

# A large file is looked at in windows of this many bytes: some 16 chunks, found again without decoding a list page.
WINDOW_SIZE = 16 << 20
_MOST_PIECES = 4096

# The kernel's own read-ahead asks out of order by no more than this.
_SEQUENTIAL_SLACK = 2 << 20

# Files of one directory that are read one soon after the other are being copied: the blocks behind are wanted next.
_NEIGHBOURS = 64

_BLOCK = 512
# A file of more list pages than this (about 40 GB) shows its list pages as full of data, unlooked.
_MOST_LISTS_COUNTED = 256


class _Window(NamedTuple):
    starts: list[int]
    pieces: list[Piece]


class _LargeRead:
    """What is known of a large file while it is open."""

    __slots__ = ("ahead_until", "count", "expected", "extents", "windows")

    def __init__(self, extents: Extents) -> None:
        self.extents = extents
        self.windows: OrderedDict[int, _Window] = OrderedDict()
        self.count = 0  # pieces in all windows
        self.expected = -1
        self.ahead_until = 0


class FileReader:
    """Assembles the bytes of files."""

    def __init__(self, loader: Loader) -> None:
        """Take the parts."""
        self._loader = loader
        self._large: dict[int, _LargeRead] = {}
        self._last_small = 0
        self._behind: deque[object] = deque(maxlen=4)  # blocks behind which was read ahead already

    def close(self, inode: int) -> None:
        """Forget what is known of an open file."""
        self._large.pop(inode, None)

    def read(
        self, inode: int, content: Content, size: int, offset: int, length: int, volumes: Sequence[Volume]
    ) -> bytes | memoryview:
        """Return the bytes [offset, offset + length) of a file, as far as it goes.

        volumes: of the snapshot, for files that lie in them.
        Raises: NotCached; DamagedObject.
        """
        if isinstance(content, list):
            return self._read_large(inode, content, size, offset, length, volumes)
        end = min(offset + length, size)
        if offset >= end:
            return b""
        if len(content) == 33 and content[:1] == SINGLE_MARK:
            return self._read_single(inode, ChunkId(content[1:]), size, offset, end)
        [piece] = pieces(content, size, offset, length, self._loader.tree)
        return piece.source[piece.offset : piece.offset + piece.length]

    def _read_single(self, inode: int, chunk_id: ChunkId, size: int, offset: int, end: int) -> memoryview:
        chunk = self._loader.data(chunk_id)
        if len(chunk) != size:
            raise DamagedObject("a file's content is damaged: its chunk is not as long as the file")
        # The buffer behind a chunk is its block: a new one tells that a reader has moved on.
        block = chunk.obj
        if 0 < inode - self._last_small <= _NEIGHBOURS and not any(block is known for known in self._behind):
            self._behind.append(block)
            self._loader.read_ahead(chunk_id)
        self._last_small = inode
        return chunk[offset:end]

    def _read_large(
        self, inode: int, content: list[Segment], size: int, offset: int, length: int, volumes: Sequence[Volume]
    ) -> bytes | memoryview:
        state = self._large.get(inode)
        if state is None:
            state = self._large[inode] = _LargeRead(extents_of(volumes, self._loader.tree))
        found = self._pieces(state, content, size, offset, min(offset + length, size))
        chunks = iter(self._loader.all_data([ChunkId(piece.source) for piece in found if piece.kind == CHUNK]))
        if state.expected >= 0 and abs(offset - state.expected) <= _SEQUENTIAL_SLACK and length > 4096:
            self._read_ahead(state, content, size, offset + length)
        state.expected = offset + length
        if len(found) == 1 and found[0].kind == CHUNK:
            return found[0].plain(next(chunks))
        parts: list[bytes | memoryview] = []
        for piece in found:
            if piece.kind == CHUNK:
                parts.append(piece.plain(next(chunks)))
            elif piece.kind == HOLE:
                parts.append(bytes(piece.length))
            else:
                parts.append(piece.plain(piece.source))
        return b"".join(parts)

    def _pieces(self, state: _LargeRead, content: Content, size: int, start: int, end: int) -> list[Piece]:
        """Return the pieces of [start, end), clipped to it."""
        found: list[Piece] = []
        while start < end:
            number = start // WINDOW_SIZE
            window = state.windows.get(number)
            if window is None:
                window = self._window(state, content, size, number)
            position = bisect_right(window.starts, start) - 1
            while start < end and position < len(window.pieces):
                piece = window.pieces[position]
                inner = start - window.starts[position]
                count = min(piece.length - inner, end - start)
                found.append(piece if count == piece.length else piece.cut(inner, count))
                start += count
                position += 1
        return found

    def _window(self, state: _LargeRead, content: Content, size: int, number: int) -> _Window:
        start = number * WINDOW_SIZE
        made = _Window([], [])
        for piece in pieces(content, size, start, WINDOW_SIZE, self._loader.tree, state.extents):
            made.starts.append(start)
            made.pieces.append(piece)
            start += piece.length
        if start != min((number + 1) * WINDOW_SIZE, size):
            raise DamagedObject("a file's content is damaged: its segments do not add up to its size")
        state.windows[number] = made
        state.count += len(made.pieces)
        while state.count > _MOST_PIECES and len(state.windows) > 1:
            _, old = state.windows.popitem(last=False)
            state.count -= len(old.pieces)
        return made

    def _read_ahead(self, state: _LargeRead, content: Content, size: int, start: int) -> None:
        # In steps of half the distance, so that not every request looks.
        distance = self._loader.far_ahead
        if start <= state.ahead_until - distance // 2 and state.ahead_until <= start + 2 * distance:
            return
        end = state.ahead_until = min(start + distance, size)
        try:
            ahead = self._pieces(state, content, size, start, end)
        except (NotCached, DamagedObject):
            # Of the next window, whose first read fetches its list page, and tells if that is damaged.
            number = start // WINDOW_SIZE
            if number not in state.windows:
                return
            ahead = self._pieces(state, content, size, start, min(end, (number + 1) * WINDOW_SIZE))
        self._loader.prefetch([ChunkId(piece.source) for piece in ahead if piece.kind == CHUNK])


def stored_blocks(content: Content, size: int, loader: Loader, volumes: Sequence[Volume]) -> int:
    """Return how many 512-byte blocks a file takes up: holes take none, as far as they are its own or a whole volume's.

    Raises: NotCached for list pages; DamagedObject.
    """
    if not isinstance(content, list):
        return (size + _BLOCK - 1) // _BLOCK
    for number, volume in enumerate(volumes):
        if content in (volume.content, [[volume.size, EXTENT, number, 0]]):
            return (volume.data_size + _BLOCK - 1) // _BLOCK
    data = _data_size(content, loader, [_MOST_LISTS_COUNTED])
    return (min(data, size) + _BLOCK - 1) // _BLOCK


def _data_size(segments: list[Segment], loader: Loader, budget: list[int]) -> int:
    total = 0
    for segment in segments:
        length, kind = segment[0], segment[1]
        if not isinstance(length, int) or length < 0:
            raise DamagedObject("a file's content is damaged: a segment is malformed")
        if kind == LIST and budget[0] > 0 and isinstance(segment[2], bytes):
            budget[0] -= 1
            page = decode_record(loader.tree(ChunkId(segment[2])), "a list page")
            total += _data_size(page, loader, budget)  # type: ignore[arg-type]
        elif kind != HOLE:
            total += length
    return total
