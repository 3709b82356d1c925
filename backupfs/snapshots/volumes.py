"""The volumes of an image: its disks, and what is made of them. Extents of files refer to volumes.

A volume is a record
    [name, 0, size, data, content]                         a disk; content as in a node, without extents
    [name, 1, size, data, [[length, volume, offset], …]]   ranges of volumes before it in the table, in order
    [name, 2, size, data, stripe, [[volume, offset], …]]   so many ranges of one length, dealt out stripe by stripe
    [name, 3, size, data, content]                         content as in a node, with extents of volumes before it
    [name, 4, size, data, volume, offset, cipher, sector, first, key]   sectors of a volume before it, decrypted
where data is the number of bytes that are not in holes.
A slice of a disk is a volume of one range. None refers to a volume at or behind itself, so no reading goes in circles.
Pure. Source: docs/format.rst, "Volumes".
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, cast

from backupfs.codec.records import Field
from backupfs.codec.sectors import AES_XTS_PLAIN64, BLOCK, KEY_SIZES, SECTOR_SIZES, SectorCipher
from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId
from backupfs.snapshots.content import EXTENT, HOLE, INLINE, Content, Extents, Piece, no_volumes, pieces

DISK, RANGES, STRIPES, MAPPED, CRYPT = range(5)

_ZEROS = bytes(1 << 16)

Range = tuple[int, int, int]  # (length, volume, offset)


@dataclass(frozen=True, slots=True)
class Volume:
    """Bytes that extents refer to."""

    name: str
    kind: int
    size: int
    data_size: int  # bytes that are in no hole
    content: Content = b""  # of a disk, and of what is mapped
    ranges: tuple[Range, ...] = ()  # of others
    stripe: int = 0  # bytes that lie together in one of the ranges
    cipher: SectorCipher | None = field(default=None, repr=False)  # of what is encrypted, in one range


class Ranges:
    """Ranges of volumes, one behind the other."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        """Take the ranges, in order."""
        self.ranges = tuple(ranges)
        self._ends = list(accumulate(length for length, _, _ in ranges))

    @property
    def size(self) -> int:
        """The bytes of them all."""
        return self._ends[-1] if self._ends else 0

    def bases(self) -> Iterator[Range]:
        """Yield the ranges."""
        yield from self.ranges

    def parts(self, start: int, length: int) -> Iterator[Range]:
        """Yield the ranges that a range of them all is made of, in order; none behind the end."""
        at = bisect_right(self._ends, start)
        while length > 0 and at < len(self.ranges):
            _, volume, offset = self.ranges[at]
            end = self._ends[at]
            count = min(length, end - start)
            yield count, volume, offset + self.ranges[at][0] - (end - start)
            start, length, at = start + count, length - count, at + 1


class Stripes:
    """Ranges of one length that take turns, a stripe each."""

    def __init__(self, stripe: int, legs: Sequence[Range]) -> None:
        """Take the ranges in the order of their turns; their length is a multiple of the stripe."""
        self.stripe = stripe
        self.legs = tuple(legs)

    @property
    def size(self) -> int:
        """The bytes of all ranges."""
        return self.legs[0][0] * len(self.legs)

    def bases(self) -> Iterator[Range]:
        """Yield the ranges."""
        yield from self.legs

    def parts(self, start: int, length: int) -> Iterator[Range]:
        """Yield the ranges that a range of the whole is made of, in order."""
        for count, leg, offset in self._turns(start, length):
            _, volume, base = self.legs[leg]
            yield count, volume, base + offset

    def _turns(self, start: int, length: int) -> Iterator[Range]:
        """Yield (length, number of the leg, offset in it)."""
        while length > 0:
            turn, within = divmod(start, self.stripe)
            row, leg = divmod(turn, len(self.legs))
            count = min(length, self.stripe - within)
            yield count, leg, row * self.stripe + within
            start, length = start + count, length - count

    def pieces(self, extents: Extents, start: int, length: int) -> Iterator[Piece]:
        """Yield the pieces of a range of the whole. What is asked of a leg is asked once, not for each stripe."""
        first: dict[int, int] = {}
        end: dict[int, int] = {}
        stripes = list(self._turns(start, min(length, self.stripe * len(self.legs))))
        tail = max(start, start + length - self.stripe * len(self.legs))
        for _, leg, offset in stripes:
            first.setdefault(leg, offset)
        for count, leg, offset in self._turns(tail, start + length - tail):
            end[leg] = offset + count
        runs = {
            leg: _Run(extents(self.legs[leg][1], self.legs[leg][2] + low, end[leg] - low)) for leg, low in first.items()
        }
        for count, leg, _ in self._turns(start, length):
            yield from runs[leg].take(count)


def decrypted(cipher: SectorCipher, start: int, found: Iterator[Piece]) -> Iterator[Piece]:
    """Yield the pieces of an encrypted volume from a place on, given those of what it lies on."""
    for piece in found:
        if piece.cipher is not None:
            raise DamagedObject("a volume is damaged: it is encrypted twice")
        if piece.kind != HOLE:
            yield piece._replace(cipher=cipher, position=start)
            start += piece.length
            continue
        # What was never written is no zeros when it is decrypted.
        end = start + piece.length
        while start < end:
            within = start % BLOCK
            count = min(end - start, len(_ZEROS) - BLOCK)
            yield Piece(INLINE, count, _ZEROS, within, cipher, start)
            start += count


class _Run:
    """Pieces that are taken in portions."""

    def __init__(self, found: Iterator[Piece]) -> None:
        self._found = found
        self._rest: Piece | None = None

    def take(self, length: int) -> Iterator[Piece]:
        """Yield the next pieces, of so many bytes."""
        while length > 0:
            piece, self._rest = self._rest or next(self._found, None), None
            if piece is None:
                raise DamagedObject("a volume is damaged: a range of it ends too soon")
            if piece.length > length:
                self._rest = piece.cut(length, piece.length - length)
                piece = piece.cut(0, length)
            length -= piece.length
            yield piece


def encode_volume(volume: Volume) -> list[Field]:
    """Return the record of a volume."""
    record: list[Field] = [volume.name, volume.kind, volume.size, volume.data_size]
    if volume.kind in (DISK, MAPPED):
        return [*record, cast("Field", volume.content)]
    if volume.kind == RANGES:
        return [*record, [list(one) for one in volume.ranges]]
    if volume.cipher is not None:
        [(_, base, offset)] = volume.ranges
        key, sector, first = volume.cipher
        return [*record, base, offset, AES_XTS_PLAIN64, sector, first, key]
    return [*record, volume.stripe, [[base, offset] for _, base, offset in volume.ranges]]


def decode_volumes(records: Sequence[Field], what: str) -> tuple[Volume, ...]:
    """Return the table of volumes. Raises: DamagedObject."""
    volumes: list[Volume] = []
    for record in records:
        match record:
            case [str(name), int(kind), int(size), int(data), *arguments] if 0 <= data <= size:
                volumes.append(_decoded(name, kind, size, data, arguments, volumes, what))
            case _:
                raise DamagedObject(f"{what} is damaged: a volume is of no known kind")
    return tuple(volumes)


def _decoded(
    name: str, kind: int, size: int, data: int, arguments: list[Field], before: list[Volume], what: str
) -> Volume:
    match arguments:
        case [(bytes() | list()) as content] if kind in (DISK, MAPPED):
            return Volume(name, kind, size, data, cast("Content", content))
        case [list(ranges)] if kind == RANGES:
            return Volume(name, kind, size, data, b"", _ranges_of(ranges, size, before, what))
        case [int(stripe), list(legs)] if (
            kind == STRIPES and stripe > 0 and size > 0 and legs and size % (len(legs) * stripe) == 0
        ):
            length = size // len(legs)
            ranges = [[length, *leg] if isinstance(leg, list) else leg for leg in legs]
            return Volume(name, kind, size, data, b"", _ranges_of(ranges, size, before, what), stripe)
        case [int(base), int(offset), str(cipher), int(sector), int(first), bytes(key)] if kind == CRYPT:
            if (
                cipher != AES_XTS_PLAIN64 or sector not in SECTOR_SIZES or len(key) not in KEY_SIZES
                or size % sector or key[: len(key) // 2] == key[len(key) // 2 :] or not 0 <= first < 1 << 64
            ):  # fmt: skip
                raise DamagedObject(f"{what} is damaged: a volume is encrypted in no known way")
            place = _ranges_of([[size, base, offset]], size, before, what)
            return Volume(name, kind, size, data, b"", place, 0, SectorCipher(key, sector, first))
    raise DamagedObject(f"{what} is damaged: a volume is of no known kind")


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


def extents_of(
    volumes: Sequence[Volume], load: Callable[[ChunkId], bytes | memoryview], of_disk: Extents | None = None
) -> Extents:
    """Return what `pieces` asks for the pieces of extents.

    load: gives list pages. of_disk: gives the pieces of disks; None: what they are made of.
    """
    made: dict[int, Ranges | Stripes] = {}

    def extents_before(top: int) -> Extents:
        """Return what gives extents of the volumes before one."""

        def extents(number: int, offset: int, length: int) -> Iterator[Piece]:
            if not 0 <= number < top or offset < 0 or offset + length > volumes[number].size:
                raise DamagedObject("a file's content is damaged: an extent lies outside of its volume")
            volume = volumes[number]
            if volume.kind == DISK and of_disk is not None:
                yield from of_disk(number, offset, length)
                return
            if volume.kind in (DISK, MAPPED):
                before = extents_before(number) if volume.kind == MAPPED else no_volumes
                yield from pieces(volume.content, volume.size, offset, length, load, before)
                return
            if volume.cipher is not None:
                [(_, base, start)] = volume.ranges
                yield from decrypted(volume.cipher, offset, extents(base, start + offset, length))
                return
            parts = made.get(number)
            if parts is None:
                parts = made[number] = (
                    Ranges(volume.ranges) if volume.kind == RANGES else Stripes(volume.stripe, volume.ranges)
                )
            if isinstance(parts, Stripes):
                yield from parts.pieces(extents, offset, length)
                return
            for size, base, start in parts.parts(offset, length):
                yield from extents(base, start, size)

        return extents

    return extents_before(len(volumes))


class Place(NamedTuple):
    """Where some bytes of a volume lie."""

    disk: int | None  # the number of a disk's volume; None: nowhere, they read as zeros and cannot be written
    offset: int
    length: int
    cipher: SectorCipher | None = None  # they are encrypted there; what is nowhere, too, is then zeros decrypted
    position: int = 0  # in what is encrypted


def places_of(
    volumes: Sequence[Volume], load: Callable[[ChunkId], bytes | memoryview]
) -> Callable[[int, int, int], Iterator[Place]]:
    """Return what gives the places of (volume, offset, length) on disks, in order. load: gives list pages."""

    def on_disk(number: int, offset: int, length: int) -> Iterator[Piece]:
        yield Piece(EXTENT, length, number.to_bytes(8, "big"), offset)

    extents = extents_of(volumes, load, on_disk)

    def places(number: int, offset: int, length: int) -> Iterator[Place]:
        for piece in extents(number, offset, length):
            disk = int.from_bytes(piece.source, "big") if piece.kind == EXTENT else None
            yield Place(disk, piece.offset, piece.length, piece.cipher, piece.position)

    return places


def keys_of(volumes: Sequence[Volume]) -> tuple[bytes, ...]:
    """Return the keys of the volumes that are encrypted."""
    return tuple(volume.cipher.key for volume in volumes if volume.cipher is not None)


def bases_of(volume: Volume) -> set[int]:
    """Return the numbers of the volumes that one lies on in fixed ranges; none for a disk, and for what is mapped."""
    return {base for _, base, _ in volume.ranges}


def is_name_of_copy(name: str) -> bool:
    """Tell whether a logical volume is a copy of a mirror: LVM keeps these names for them."""
    return "_rimage_" in name or "_mimage_" in name


def shared_volumes(volumes: Sequence[Volume]) -> set[int]:
    """Return the volumes that cannot be changed alone: of a mirror, or of a thin pool, whose blocks others may have."""
    found: set[int] = set()
    for number, volume in enumerate(volumes):
        # What is striped over such names is RAID0, which has each byte once.
        over_shared = volume.kind != STRIPES and bases_of(volume) & found
        if volume.kind == MAPPED or is_name_of_copy(volume.name) or over_shared:
            found.add(number)
    return found
