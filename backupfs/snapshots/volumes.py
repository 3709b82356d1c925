"""The volumes of an image: its disks, and what is made of them. Extents of files refer to volumes.

A volume is a record
    [name, 0, size, data, content]                         a disk; content as in a node, without extents
    [name, 1, size, data, [[length, volume, offset], …]]   ranges of volumes before it in the table, in order
where data is the number of bytes that are not in holes.
A slice of a disk is a volume of one range. None refers to a volume at or behind itself, so no reading goes in circles.
Pure. Source: docs/format.rst, "Volumes".
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from backupfs.codec.records import Field
from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId
from backupfs.snapshots.content import Content, Extents, Piece, pieces

DISK, RANGES = range(2)

Range = tuple[int, int, int]  # (length, volume, offset)


@dataclass(frozen=True, slots=True)
class Volume:
    """Bytes that extents refer to."""

    name: str
    kind: int
    size: int
    data_size: int  # bytes that are in no hole
    content: Content = b""  # of a disk
    ranges: tuple[Range, ...] = ()  # of others


def encode_volume(volume: Volume) -> list[Field]:
    """Return the record of a volume."""
    if volume.kind == DISK:
        return [volume.name, DISK, volume.size, volume.data_size, cast("Field", volume.content)]
    return [volume.name, RANGES, volume.size, volume.data_size, [list(one) for one in volume.ranges]]


def decode_volumes(records: Sequence[Field], what: str) -> tuple[Volume, ...]:
    """Return the table of volumes. Raises: DamagedObject."""
    volumes: list[Volume] = []
    for record in records:
        match record:
            case [str(name), int(kind), int(size), int(data), (bytes() | list()) as content] if (
                kind == DISK and 0 <= data <= size
            ):
                volumes.append(Volume(name, kind, size, data, cast("Content", content)))
            case [str(name), int(kind), int(size), int(data), list(ranges)] if kind == RANGES and 0 <= data <= size:
                volumes.append(Volume(name, kind, size, data, b"", _ranges_of(ranges, size, volumes, what)))
            case _:
                raise DamagedObject(f"{what} is damaged: a volume is of no known kind")
    return tuple(volumes)


def _ranges_of(ranges: list[Field], size: int, before: list[Volume], what: str) -> tuple[Range, ...]:
    found: list[Range] = []
    for one in ranges:
        match one:
            case [int(length), int(volume), int(offset)] if (
                0 <= volume < len(before) and length > 0 and offset >= 0 and offset + length <= before[volume].size
            ):
                found.append((length, volume, offset))
            case _:
                raise DamagedObject(f"{what} is damaged: a volume has a range of nothing")
    if sum(length for length, _, _ in found) != size:
        raise DamagedObject(f"{what} is damaged: the ranges of a volume do not add up to its size")
    return tuple(found)


def extents_of(volumes: Sequence[Volume], load: Callable[[ChunkId], bytes | memoryview]) -> Extents:
    """Return what `pieces` asks for the pieces of extents.

    load: gives list pages.
    """

    def extents(number: int, offset: int, length: int) -> Iterator[Piece]:
        if not 0 <= number < len(volumes) or offset < 0 or offset + length > volumes[number].size:
            raise DamagedObject("a file's content is damaged: an extent lies outside of its volume")
        volume = volumes[number]
        if volume.kind == DISK:
            yield from pieces(volume.content, volume.size, offset, length, load)
            return
        position = 0
        for size, base, start in volume.ranges:
            low, high = max(offset, position), min(offset + length, position + size)
            if low < high:
                yield from extents(base, start + low - position, high - low)
            position += size

    return extents


class Place(NamedTuple):
    """Where some bytes of a volume lie."""

    disk: int | None  # the number of a disk's volume; None: nowhere, they read as zeros and cannot be written
    offset: int
    length: int


def places_of(volumes: Sequence[Volume], number: int, offset: int, length: int) -> Iterator[Place]:
    """Yield where the bytes [offset, offset + length) of a volume lie on disks, in order."""
    volume = volumes[number]
    if volume.kind == DISK:
        if length:
            yield Place(number, offset, length)
        return
    position = 0
    for size, base, start in volume.ranges:
        low, high = max(offset, position), min(offset + length, position + size)
        if low < high:
            yield from places_of(volumes, base, start + low - position, high - low)
        position += size


def bases_of(volume: Volume) -> set[int]:
    """Return the numbers of the volumes that one is made of; none for a disk."""
    return {base for _, base, _ in volume.ranges}
