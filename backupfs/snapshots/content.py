"""What a file's bytes are made of: one grammar for files and disks.

In a node, content is one of
    b""                     nothing: an empty file, or no file at all
    b"\\x01" + chunk id      one chunk, as long as the file
    b"\\x03" + bytes         the bytes themselves, at most 512
    [segment, …]            ordered segments, each [length, kind, …]:
        [length, 0]                   a hole, reads as zeros
        [length, 1, chunk id]
        [length, 2, volume, offset]   an extent of a disk's volume
        [length, 3, bytes]
        [length, 4, chunk id]         a list page: a tree chunk, the record [segment, …]
Every segment says its length, so a byte far inside is found without reading what is before it.
Pure. Source: docs/format.rst, "Content".
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from backupfs.codec.records import Field, decode_record, encode_record
from backupfs.codec.sectors import BLOCK, SectorCipher, decrypt
from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId

HOLE, CHUNK, EXTENT, INLINE, LIST = range(5)

SINGLE_MARK = b"\x01"
INLINE_MARK = b"\x03"
MOST_INLINE = 512

Segment = list[Field]
Content = bytes | list[Segment]

# A node lists this many segments itself; more go to list pages of 32 to 512, cut where a chunk's id says so, so that
# an edit in a large file writes one page again and not all.
_MOST_IN_NODE = 16
_LEAST_IN_PAGE, _MOST_IN_PAGE = 32, 512
_CUT_MASK = 0x7F
_MOST_LEVELS = 8


class Piece(NamedTuple):
    """A run of bytes of one kind, as a reader needs it."""

    kind: int  # HOLE, CHUNK or INLINE
    length: int
    source: bytes  # the chunk's id, or the inline bytes; empty for a hole
    offset: int  # in the chunk or the inline bytes
    cipher: SectorCipher | None = None  # these are encrypted; a hole never is
    position: int = 0  # in the encrypted volume

    def cut(self, start: int, length: int) -> "Piece":
        """Return a part of it."""
        return self._replace(length=length, offset=self.offset + start, position=self.position + start)

    def plain(self, source: bytes | memoryview) -> bytes | memoryview:
        """Return its bytes, those of a hole apart.

        source: all of the chunk, or the inline bytes.
        Raises: DamagedObject if it has less.
        """
        if self.cipher is None:
            if self.offset == 0 and self.length == len(source):
                return source
            part = source[self.offset : self.offset + self.length]
            if len(part) != self.length:
                raise DamagedObject("a file's content is damaged: a chunk is shorter than its segment")
            return part
        before, behind = self.position % BLOCK, -(self.position + self.length) % BLOCK
        start, end = self.offset - before, self.offset + self.length + behind
        part = source[max(0, start) : end]
        if start < 0 or len(part) != end - start:
            raise DamagedObject("a file's content is damaged: a block of an encrypted volume is not in one chunk")
        return memoryview(decrypt(self.cipher, self.position - before, part))[before : before + self.length]


# (volume, offset, length) → what these bytes of a volume are made of.
Extents = Callable[[int, int, int], Iterator[Piece]]


def no_volumes(_volume: int, _offset: int, _length: int) -> Iterator[Piece]:
    """Stand for the volumes of a snapshot that has none. Raises: DamagedObject."""
    raise DamagedObject("a file's content is damaged: it refers to a disk that the snapshot does not have")


class ContentBuilder:
    """Takes the segments of one file in order; memory is that of a page a level, however many there are."""

    def __init__(self, save: Callable[[bytes], ChunkId]) -> None:
        """Take the parts.

        save: stores a list page as a tree chunk and returns its id.
        """
        self._save = save
        self._levels: list[list[Segment]] = [[]]  # of each level the page that is open; the file's segments are level 0
        self.length = 0  # bytes of all segments

    def add(self, segment: Segment) -> None:
        """Take the next segment."""
        self.length += _int_of(segment[0])
        self._add(0, segment)

    def _add(self, level: int, segment: Segment) -> None:
        page = self._levels[level]
        page.append(segment)
        last = segment[2] if segment[1] in (CHUNK, LIST) else None
        cut_here = isinstance(last, bytes) and last[0] & _CUT_MASK == 0
        if len(page) >= _MOST_IN_PAGE or (len(page) >= _LEAST_IN_PAGE and cut_here):
            self._close(level)

    def _close(self, level: int) -> None:
        page, self._levels[level] = self._levels[level], []
        if level + 1 == len(self._levels):
            self._levels.append([])
        self._add(level + 1, [sum(_int_of(segment[0]) for segment in page), LIST, self._save(encode_record(page))])

    def finish(self) -> Content:
        """Return the shortest form of all that was added."""
        level = 0
        while level + 1 < len(self._levels) or len(self._levels[level]) > _MOST_IN_NODE:
            # Where a page of a level was closed, all of the level goes into pages.
            if self._levels[level]:
                self._close(level)
            level += 1
        segments = self._levels[level]
        if not segments:
            return b""
        if len(segments) == 1 and segments[0][1] == CHUNK:
            return SINGLE_MARK + _bytes_of(segments[0][2])
        return segments


def encode_content(segments: Iterable[Segment], save: Callable[[bytes], ChunkId]) -> Content:
    """Return the shortest form of some segments. save: as for `ContentBuilder`."""
    builder = ContentBuilder(save)
    for segment in segments:
        builder.add(segment)
    return builder.finish()


def pieces(
    content: Content,
    size: int,
    start: int,
    length: int,
    load: Callable[[ChunkId], bytes | memoryview],
    extents: Extents = no_volumes,
) -> Iterator[Piece]:
    """Yield what the bytes [start, start + length) of a file are made of, clipped to the file's size.

    load: gives a list page; only those that the range touches are asked for.
    extents: gives the pieces of the snapshot's volumes.
    Raises: DamagedObject if the segments are no content or do not add up to the size.
    """
    end = min(start + length, size)
    if start >= end:
        return
    if isinstance(content, list):
        yield from _pieces_of(content, size, start, end, load, extents, 0)
    elif content[:1] == SINGLE_MARK and len(content) == 33:
        yield Piece(CHUNK, end - start, content[1:], start)
    elif content[:1] == INLINE_MARK and len(content) - 1 == size:
        yield Piece(INLINE, end - start, content[1:], start)
    else:
        raise DamagedObject("a file's content is damaged: it is not of any known form")


def _pieces_of(
    segments: list[Segment],
    size: int,
    start: int,
    end: int,
    load: Callable[[ChunkId], bytes | memoryview],
    extents: Extents,
    level: int,
) -> Iterator[Piece]:
    if level > _MOST_LEVELS:
        raise DamagedObject("a file's content is damaged: its list pages go too deep")
    position = 0
    for segment in segments:
        match segment:
            case [int(length), int(kind), *arguments] if length >= 0:
                pass
            case _:
                raise DamagedObject("a file's content is damaged: a segment is malformed")
        low, high = max(start, position), min(end, position + length)
        if low < high:
            inner, count = low - position, high - low
            match kind, arguments:
                case 0, []:
                    yield Piece(HOLE, count, b"", 0)
                case 1, [bytes(chunk_id)]:
                    yield Piece(CHUNK, count, chunk_id, inner)
                case 2, [int(volume), int(offset)]:
                    yield from extents(volume, offset + inner, count)
                case 3, [bytes(data)] if len(data) == length:
                    yield Piece(INLINE, count, data, inner)
                case 4, [bytes(page_id)]:
                    page = decode_record(load(ChunkId(page_id)), "a list page")
                    yield from _pieces_of(page, length, inner, inner + count, load, extents, level + 1)  # type: ignore[arg-type]
                case _:
                    raise DamagedObject("a file's content is damaged: a segment is of no known kind")
        position += length
        if position > size:
            break
        if position >= end:
            return
    if position != size:
        raise DamagedObject("a file's content is damaged: its segments do not add up to its size")


def _bytes_of(field: Field) -> bytes:
    assert isinstance(field, bytes)
    return field


def _int_of(field: Field) -> int:
    assert isinstance(field, int)
    return field
