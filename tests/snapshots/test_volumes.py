"""The table of volumes: records, and the bytes that an extent means."""

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.codec.records import decode_record, encode_record
from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId
from backupfs.snapshots.content import CHUNK, EXTENT, HOLE, Content, Piece, pieces
from backupfs.snapshots.volumes import (
    DISK,
    MAPPED,
    RANGES,
    STRIPES,
    Stripes,
    Volume,
    decode_volumes,
    encode_volume,
    extents_of,
)

CHUNK_SIZE = 64


def nothing_to_load(chunk_id: ChunkId) -> bytes:
    raise AssertionError(chunk_id)


def disk_of(chooser: random.Random, chunks: int) -> tuple[Volume, bytes, dict[bytes, bytes]]:
    """Return a disk of some chunks and holes, its bytes, and the chunks."""
    content: Content = []
    plain, known = b"", {}
    for _ in range(chunks):
        length = chooser.randrange(1, CHUNK_SIZE)
        if chooser.random() < 0.3:
            content.append([length, HOLE])  # type: ignore[union-attr]
            plain += bytes(length)
            continue
        chunk = chooser.randbytes(length)
        chunk_id = chooser.randbytes(32)
        known[chunk_id] = chunk
        content.append([length, CHUNK, chunk_id])  # type: ignore[union-attr]
        plain += chunk
    return Volume("vda", DISK, len(plain), 0, content), plain, known


@given(st.integers(0, 1 << 32))
def test_an_extent_means_the_bytes_of_its_volume(seed: int) -> None:
    chooser = random.Random(seed)
    disk, plain, known = disk_of(chooser, chooser.randrange(1, 9))
    volumes, bytes_of = [disk], [plain]
    for number in range(1, chooser.randrange(2, 6)):
        ranges = []
        kind = chooser.choice([RANGES, STRIPES, MAPPED])
        if kind == STRIPES:
            stripe, count, rows = chooser.randrange(1, 9), chooser.randrange(1, 4), chooser.randrange(1, 5)
            bases = [base for base in range(number) if len(bytes_of[base]) >= stripe * rows]
            if bases:
                length = stripe * rows
                for base in chooser.choices(bases, k=count):
                    ranges.append((length, base, chooser.randrange(len(bytes_of[base]) - length + 1)))
                legs = [bytes_of[base][start : start + length] for length, base, start in ranges]
                made = b"".join(
                    leg[row * stripe : (row + 1) * stripe] for row in range(rows) for leg in legs
                )  # fmt: skip
                volumes.append(Volume(f"v{number}", STRIPES, len(made), 0, b"", tuple(ranges), stripe))
                bytes_of.append(made)
                continue
        for _ in range(chooser.randrange(1, 4)):
            base = chooser.randrange(number)
            start = chooser.randrange(len(bytes_of[base]))
            ranges.append((chooser.randrange(1, len(bytes_of[base]) - start + 1), base, start))
        made = b"".join(bytes_of[base][start : start + length] for length, base, start in ranges)
        if kind == MAPPED:
            segments: Content = [[7, HOLE], *([length, EXTENT, base, start] for length, base, start in ranges)]
            made = bytes(7) + made
            volumes.append(Volume(f"v{number}", MAPPED, len(made), 0, segments))
        else:
            volumes.append(Volume(f"v{number}", RANGES, len(made), 0, b"", tuple(ranges)))
        bytes_of.append(made)
    volumes = list(decode_volumes(decode_record(encode_record([encode_volume(one) for one in volumes]), ""), ""))
    extents = extents_of(volumes, nothing_to_load)
    for number, wanted in enumerate(bytes_of):
        start = chooser.randrange(len(wanted))
        length = chooser.randrange(1, len(wanted) - start + 1)
        content: Content = [[length, EXTENT, number, start]]
        found = b""
        for piece in pieces(content, length, 0, length, nothing_to_load, extents):
            source = bytes(piece.offset + piece.length) if piece.kind == HOLE else known[piece.source]
            found += source[piece.offset : piece.offset + piece.length]
        assert found == wanted[start : start + length]


@pytest.mark.parametrize(
    "record",
    [
        ["a", 9, 5, 5, b""],
        ["a", 0, 5, 6, b""],
        ["a", 0, -1, -1, b""],
        ["a", 1, 5, 5, [[5, 0, 8]]],  # ends behind the end
        ["a", 1, 5, 5, [[5, 1, 0]]],  # itself
        ["a", 1, 5, 5, [[5, -1, 0]]],
        ["a", 1, 5, 5, [[4, 0, 0]]],  # too short
        ["a", 1, 5, 5, [[0, 0, 0], [5, 0, 0]]],
        ["a", 1, 5, 5, 3],
        ["a", 2, 8, 8, 2, [[0, 0], [0, 7]]],  # ends behind the end
        ["a", 2, 8, 8, 2, [[0, 0], [1, 0]]],
        ["a", 2, 8, 8, 0, [[0, 0], [0, 1]]],
        ["a", 2, 8, 8, 3, [[0, 0], [0, 1]]],
        ["a", 2, 8, 8, 2, []],
        ["a", 2, 8, 8, 2, [0, 1]],
        ["a", 3, 5, 5, 7],
        ["a", 4, 512, 0, 0, 0, "aes-xts-plain64", 512, 0, bytes(range(64))],  # ends behind the end
        "a",
    ],
)
def test_what_is_no_volume_is_damage(record: object) -> None:
    disk = encode_volume(Volume("vda", DISK, 10, 10, b""))
    with pytest.raises(DamagedObject):
        decode_volumes([disk, record], "the snapshot")  # type: ignore[list-item]


@pytest.mark.parametrize("extent", [(1, 0, 5), (-1, 0, 5), (0, 6, 5), (0, -1, 5)])
def test_an_extent_outside_of_its_volume_is_damage(extent: tuple[int, int, int]) -> None:
    volumes = [Volume("vda", DISK, 10, 10, [[10, HOLE]])]
    with pytest.raises(DamagedObject, match="outside"):
        list(extents_of(volumes, nothing_to_load)(*extent))


def test_an_extent_in_a_snapshot_without_volumes_is_damage() -> None:
    with pytest.raises(DamagedObject, match="does not have"):
        list(pieces([[5, EXTENT, 0, 0]], 5, 0, 5, nothing_to_load))


def test_what_is_mapped_refers_to_volumes_before_it_only() -> None:
    disk = Volume("vda", DISK, 10, 10, [[10, HOLE]])
    for number in (1, 2, -1):
        volumes = [disk, Volume("thin", MAPPED, 5, 5, [[5, EXTENT, number, 0]])]
        with pytest.raises(DamagedObject, match="outside"):
            list(extents_of(volumes, nothing_to_load)(1, 0, 5))


def test_a_leg_of_stripes_is_looked_up_once_for_all_of_them() -> None:
    asked = []

    def legs(volume: int, offset: int, length: int) -> Iterator[Piece]:
        asked.append((volume, offset, length))
        yield Piece(HOLE, length, b"", 0)

    found = list(Stripes(4, [(4000, 1, 0), (4000, 2, 100)]).pieces(legs, 10, 3000))
    assert sum(piece.length for piece in found) == 3000
    assert asked == [(1, 6, 1500), (2, 104, 1500)]


WRAPPED = ["c", 4, 4096, 4096, 0, 512, "aes-xts-plain64", 4096, 0, bytes(range(64))]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (4, 1), (5, 513), (5, -512), (6, "aes-cbc-essiv:sha256"), (7, 511), (7, 8192), (8, -1), (8, 1 << 64),
        (9, bytes(range(48))), (9, bytes(64)), (9, "key"), (2, 512), (2, 0),
    ],
)  # fmt: skip
def test_what_is_encrypted_in_no_known_way_is_damage(place: int, value: object) -> None:
    disk = encode_volume(Volume("vda", DISK, 4608, 0, [[4608, HOLE]]))
    [_, volume] = decode_volumes([disk, WRAPPED], "it")  # type: ignore[list-item]
    assert encode_volume(volume) == WRAPPED
    changed = [value if at == place else field for at, field in enumerate(WRAPPED)]
    with pytest.raises(DamagedObject):
        decode_volumes([disk, changed], "it")  # type: ignore[list-item]


def test_a_block_of_what_is_encrypted_in_two_chunks_is_damage_and_never_other_bytes() -> None:
    chunk = bytes(range(256)) * 18
    segments: Content = [[520, CHUNK, b"1" * 32], [4088, CHUNK, b"2" * 32]]
    disk = encode_volume(Volume("vda", DISK, 4608, 0, segments))
    volumes = decode_volumes([disk, WRAPPED], "it")  # type: ignore[list-item]
    found = list(extents_of(volumes, nothing_to_load)(1, 0, 4096))
    assert [piece.length for piece in found] == [8, 4088]
    for piece in found:
        with pytest.raises(DamagedObject, match="not in one chunk"):
            piece.plain(chunk[:520] if piece.length == 8 else chunk[520:])


def test_what_is_encrypted_twice_is_damage() -> None:
    disk = encode_volume(Volume("vda", DISK, 4608, 0, [[4608, HOLE]]))
    again = ["d", 4, 4096, 0, 1, 0, *WRAPPED[6:]]
    volumes = decode_volumes([disk, WRAPPED, again], "it")  # type: ignore[list-item]
    with pytest.raises(DamagedObject, match="twice"):
        list(extents_of(volumes, nothing_to_load)(2, 0, 4096))
