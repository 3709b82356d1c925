"""Content against a naive model: any byte of any file, through any number of list pages."""

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backupfs.codec.records import encode_record
from backupfs.codec.sealing import hash_object
from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId
from backupfs.snapshots.content import (
    CHUNK,
    EXTENT,
    HOLE,
    INLINE,
    INLINE_MARK,
    LIST,
    SINGLE_MARK,
    Content,
    Extents,
    Piece,
    Segment,
    encode_content,
    pieces,
)
from tests.builders import noise


class Pages:
    """Tree chunks in a dictionary, and how many were asked for."""

    def __init__(self) -> None:
        self.saved: dict[ChunkId, bytes] = {}
        self.loads = 0

    def save(self, data: bytes) -> ChunkId:
        chunk_id = ChunkId(hash_object(data))
        self.saved[chunk_id] = data
        return chunk_id

    def load(self, chunk_id: ChunkId) -> bytes:
        self.loads += 1
        return self.saved[chunk_id]


# A drawn segment: its kind and length. The chunk's content follows from its number.
drawn_segments = st.lists(
    st.tuples(st.sampled_from([HOLE, CHUNK, CHUNK, CHUNK, EXTENT, INLINE]), st.integers(1, 40)), max_size=60
)


def chunk_bytes(number: int, length: int) -> bytes:
    return noise(number, length)


def built(drawn: list[tuple[int, int]], times: int) -> tuple[list[Segment], bytes, dict[bytes, bytes]]:
    """Return (segments, the bytes they stand for, chunk id → bytes); extents stand for their offset's bytes."""
    segments: list[Segment] = []
    plain, chunks = b"", {}
    for number, (kind, length) in enumerate(drawn * times):
        data = chunk_bytes(number, length)
        match kind:
            case 0:
                segments.append([length, HOLE])
                plain += bytes(length)
                continue
            case 1:
                chunk_id = hash_object(data)
                chunks[chunk_id] = data
                segments.append([length, CHUNK, chunk_id])
            case 2:
                segments.append([length, EXTENT, 1, len(plain)])
            case 3:
                segments.append([length, INLINE, data])
        plain += data
    return segments, plain, chunks


def read(asked: Iterator[Piece], chunks: dict[bytes, bytes]) -> bytes:
    found = b""
    for piece in asked:
        assert piece.length > 0
        match piece.kind:
            case 0:
                found += bytes(piece.length)
            case 1:
                found += chunks[piece.source][piece.offset :][: piece.length]
            case 3:
                found += piece.source[piece.offset :][: piece.length]
            case _:
                raise AssertionError(piece)
    return found


def volume_of(plain: bytes) -> Extents:
    """Return the one volume, of which a file's bytes are at the same offset as in the file."""

    def extents(volume: int, offset: int, length: int) -> Iterator[Piece]:
        assert volume == 1
        yield Piece(INLINE, length, plain[offset : offset + length], 0)

    return extents


@given(drawn_segments, st.sampled_from([1, 1, 3, 30]), st.data())
@settings(max_examples=100)
def test_any_range_gives_the_bytes_of_the_model(drawn: list[tuple[int, int]], times: int, data: st.DataObject) -> None:
    segments, plain, chunks = built(drawn, times)
    pages = Pages()
    content = encode_content(segments, pages.save)
    size = len(plain)
    volume = volume_of(plain)
    assert read(pieces(content, size, 0, size, pages.load, volume), chunks) == plain
    for _ in range(5):
        start = data.draw(st.integers(0, size + 5))
        length = data.draw(st.integers(0, size + 5))
        asked = pieces(content, size, start, length, pages.load, volume)
        assert read(asked, chunks) == plain[start : start + length]


def many_chunks(count: int) -> list[Segment]:
    return [[10, CHUNK, hash_object(b"%d" % number)] for number in range(count)]


def test_one_byte_of_a_huge_file_asks_for_few_pages() -> None:
    pages = Pages()
    content = encode_content(many_chunks(100_000), pages.save)
    assert isinstance(content, list)
    assert len(content) <= 16
    assert len(pages.saved) > 300
    (piece,) = pieces(content, 1_000_000, 543_217, 1, pages.load)
    assert piece == Piece(CHUNK, 1, hash_object(b"54321"), 7)
    assert pages.loads <= 3


def test_an_edit_in_a_huge_file_writes_few_pages() -> None:
    pages = Pages()
    segments = many_chunks(50_000)
    encode_content(segments, pages.save)
    before = set(pages.saved)
    edited = [*segments[:25_000], [10, CHUNK, hash_object(b"inserted")], *segments[25_001:]]
    encode_content(edited, pages.save)
    assert len(pages.saved.keys() - before) <= 5
    shifted = [*segments[:25_000], [10, CHUNK, hash_object(b"inserted")], *segments[25_000:]]
    before = set(pages.saved)
    encode_content(shifted, pages.save)
    assert len(pages.saved.keys() - before) <= 8


def test_short_forms_are_used_where_they_fit() -> None:
    pages = Pages()
    chunk_id = hash_object(b"x")
    assert encode_content([], pages.save) == b""
    assert encode_content([[5, CHUNK, chunk_id]], pages.save) == SINGLE_MARK + chunk_id
    assert encode_content([[5, HOLE]], pages.save) == [[5, HOLE]]
    assert len(encode_content(many_chunks(16), pages.save)) == 16
    assert not pages.saved
    assert [segment[1] for segment in encode_content(many_chunks(17), pages.save)] == [LIST]  # type: ignore[index]


def test_encoding_is_deterministic() -> None:
    first, second = Pages(), Pages()
    assert encode_content(many_chunks(3000), first.save) == encode_content(many_chunks(3000), second.save)
    assert first.saved == second.saved


A_CHUNK = hash_object(b"x")


def saved_page(record: list) -> Callable[[ChunkId], bytes]:  # type: ignore[type-arg]
    return lambda _chunk_id: encode_record(record)


@pytest.mark.parametrize(
    ("content", "page"),
    [
        (b"", []),
        (b"\x01short", []),
        (b"\x02" + bytes(32), []),
        (INLINE_MARK + b"four", []),
        ([[4, CHUNK, A_CHUNK]], []),
        ([[6, CHUNK, A_CHUNK]], []),
        ([[5, CHUNK]], []),
        ([[5, CHUNK, 7]], []),
        ([[5, 9, A_CHUNK]], []),
        ([[-1, HOLE], [6, HOLE]], []),
        (["x"], []),
        ([[]], []),
        ([[5, INLINE, b"four"]], []),
        ([[5, EXTENT, 1]], []),
        ([[5, LIST, A_CHUNK]], [[4, HOLE]]),
        ([[5, LIST, A_CHUNK]], [[6, HOLE]]),
        ([[5, LIST, A_CHUNK]], ["x"]),
        ([[5, LIST, A_CHUNK]], [[5, LIST, A_CHUNK]]),
    ],
)
def test_content_that_does_not_make_up_the_file_is_damage(content: Content, page: list) -> None:  # type: ignore[type-arg]
    with pytest.raises(DamagedObject):
        list(pieces(content, 5, 0, 5, saved_page(page)))


@given(st.integers(0, 3000), st.integers(0, 5))
@settings(max_examples=60)
def test_list_pages_made_on_the_way_are_those_of_the_whole_list(count: int, kind: int) -> None:
    """The definition of docs/format.rst: as long as there are more than 16 segments, they go into pages."""
    segments: list[Segment] = many_chunks(count)
    if kind == 0:
        segments = [[7, HOLE] for _ in segments]
    pages = Pages()

    def paged(left: list[Segment]) -> Iterator[Segment]:
        page: list[Segment] = []
        for number, segment in enumerate(left):
            page.append(segment)
            cuts = segment[1] in (CHUNK, LIST) and segment[2][0] & 0x7F == 0  # type: ignore[index]
            if len(page) == 512 or (len(page) >= 32 and cuts) or number == len(left) - 1:
                yield [sum(part[0] for part in page), LIST, pages.save(encode_record(page))]  # type: ignore[misc]
                page = []

    expected = segments
    while len(expected) > 16:
        expected = list(paged(expected))
    found = encode_content(segments, pages.save)
    if count == 0 or (count == 1 and kind):
        expected = found  # these have forms of their own
    assert found == expected
