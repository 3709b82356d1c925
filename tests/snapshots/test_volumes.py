"""The table of volumes: records, and the bytes that an extent means."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.codec.records import decode_record, encode_record
from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId
from backupfs.snapshots.content import CHUNK, EXTENT, HOLE, Content, pieces
from backupfs.snapshots.volumes import DISK, RANGES, Volume, decode_volumes, encode_volume, extents_of

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
    for number in range(1, chooser.randrange(2, 5)):
        ranges = []
        for _ in range(chooser.randrange(1, 4)):
            base = chooser.randrange(number)
            start = chooser.randrange(len(bytes_of[base]))
            ranges.append((chooser.randrange(1, len(bytes_of[base]) - start + 1), base, start))
        made = b"".join(bytes_of[base][start : start + length] for length, base, start in ranges)
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
        ["a", 2, 5, 5, b""],
        ["a", 0, 5, 6, b""],
        ["a", 0, -1, -1, b""],
        ["a", 1, 5, 5, [[5, 0, 8]]],  # ends behind the end
        ["a", 1, 5, 5, [[5, 1, 0]]],  # itself
        ["a", 1, 5, 5, [[5, -1, 0]]],
        ["a", 1, 5, 5, [[4, 0, 0]]],  # too short
        ["a", 1, 5, 5, [[0, 0, 0], [5, 0, 0]]],
        ["a", 1, 5, 5, 3],
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
