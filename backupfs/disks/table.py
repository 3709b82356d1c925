"""Volumes that are found on disks, and reading them. They are numbered as in a snapshot's table: disks come first."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from backupfs.codec.sectors import BLOCK, SectorCipher, decrypt
from backupfs.disks.filesystem import Unreadable
from backupfs.disks.source import DiskSource
from backupfs.snapshots.volumes import Range, Ranges

_MOST_RANGES = 1 << 20


class Parts(Protocol):
    """How a volume is made of others."""

    @property
    def size(self) -> int:
        """Its bytes."""

    def parts(self, start: int, length: int) -> Iterator[Range]:
        """Yield the ranges of volumes that a range is made of, in order; of volume -1 are zeros."""

    def bases(self) -> Iterator[Range]:
        """Yield (length, volume, offset) of all that it may be made of, in no order."""


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A volume that is made of others, which have lower numbers."""

    name: str
    made_of: Parts
    is_shown: bool = True  # to users; others are there for volumes that are made of them

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.made_of.size


class Decrypted:
    """What is encrypted in a range of another volume, as plain bytes."""

    def __init__(self, place: Range, cipher: SectorCipher) -> None:
        """Take the parts. The range has whole sectors."""
        self.place = place
        self.cipher = cipher

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.place[0]

    def bases(self) -> Iterator[Range]:
        """Yield the range."""
        yield self.place

    def parts(self, start: int, length: int) -> Iterator[Range]:
        """Yield the range of what is encrypted."""
        _, volume, offset = self.place
        yield length, volume, offset + start

    def read(self, table: "VolumeTable", start: int, length: int) -> bytes:
        """Return plain bytes. Raises: SourceError; Unreadable."""
        low, high = start - start % BLOCK, start + length + -(start + length) % BLOCK
        [(_, volume, offset)] = self.parts(low, high - low)
        sealed = table.read(volume, offset, high - low)
        if len(sealed) < high - low:
            raise Unreadable("what is encrypted ends too soon")
        return decrypt(self.cipher, low, sealed)[start - low : start - low + length]


class VolumeTable:
    """Disks, and what was found on them so far."""

    def __init__(self, disks: list[DiskSource]) -> None:
        """Begin with the disks."""
        self.disks = disks
        self.volumes: list[LaidOut] = []
        self._names = {source.name for source in disks}

    def __len__(self) -> int:
        return len(self.disks) + len(self.volumes)

    def add(self, name: str, made_of: Parts, is_shown: bool = True) -> int:
        """Add a volume and return its number.

        name: another is taken if there is one of this name. Raises: ValueError if it is made of what is not there.
        """
        number = len(self)
        for length, base, offset in made_of.bases():
            if not 0 <= base < number or length < 0 or offset < 0 or offset + length > self.size(base):
                raise ValueError("it goes beyond what it lies on")
        self.volumes.append(LaidOut(self._unique(name) if is_shown else name, made_of, is_shown))
        return number

    def show(self, number: int) -> None:
        """Show a volume to users that was added without."""
        volume = self.volumes[number - len(self.disks)]
        if not volume.is_shown:
            shown = LaidOut(self._unique(volume.name), volume.made_of)
            self.volumes[number - len(self.disks)] = shown

    def _unique(self, name: str) -> str:
        found, count = name, 1
        while found in self._names:
            count += 1
            found = f"{name}~{count}"
        self._names.add(found)
        return found

    def made_of(self, number: int) -> Parts | None:
        """Return what a volume is made of; None for a disk."""
        return None if number < len(self.disks) else self.volumes[number - len(self.disks)].made_of

    def size(self, number: int) -> int:
        """Return the bytes of a volume."""
        return (self.disks[number] if number < len(self.disks) else self.volumes[number - len(self.disks)]).size

    def name(self, number: int) -> str:
        """Return the name of a volume."""
        return (self.disks[number] if number < len(self.disks) else self.volumes[number - len(self.disks)]).name

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Return bytes of a volume, fewer at its end. Raises: SourceError; Unreadable."""
        length = min(length, self.size(number) - offset)
        made_of = self.made_of(number)
        if length <= 0:
            return b""
        if made_of is None:
            return self.disks[number].read(offset, length)
        if isinstance(made_of, Decrypted):
            return made_of.read(self, offset, length)
        found = [
            bytes(count) if base < 0 else self.read(base, start, count)
            for count, base, start in made_of.parts(offset, length)
        ]
        return found[0] if len(found) == 1 else b"".join(found)

    def below(self, number: int) -> set[int]:
        """Return the numbers of all volumes that one is made of, itself too."""
        found, left = {number}, [number]
        while left:
            made_of = self.made_of(left.pop())
            for base in {base for _, base, _ in made_of.bases()} if made_of is not None else ():
                if base not in found:
                    found.add(base)
                    left.append(base)
        return found

    def on_disks(self, number: int) -> tuple[Range, ...]:
        """Return where the bytes of a volume are on disks, in order.

        None are returned for one whose bytes lie scattered (in stripes, in a pool) or are others there (encrypted).
        """
        found: list[Range] = []
        left = [(self.size(number), number, 0)]
        while left:
            length, number, start = left.pop()
            made_of = self.made_of(number)
            if made_of is None:
                found.append((length, number, start))
            elif isinstance(made_of, Ranges):
                left += reversed(list(made_of.parts(start, length)))
            else:
                return ()
            if len(left) + len(found) > _MOST_RANGES:
                return ()
        return tuple(found)

    def on_one_disk(self, length: int, number: int, start: int) -> Range | None:
        """Return where a range is, if it lies on a disk in one piece, and that is seen at once."""
        while True:
            made_of = self.made_of(number)
            if made_of is None:
                return length, number, start
            if not isinstance(made_of, Ranges) or len(made_of.ranges) != 1:
                return None
            [(_, number, offset)] = made_of.ranges
            start += offset


class VolumeReader:
    """Reads one volume."""

    def __init__(self, table: VolumeTable, number: int) -> None:
        """Take the parts."""
        self._table = table
        self._number = number

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes, fewer at the end. Raises: SourceError; Unreadable."""
        return self._table.read(self._number, offset, length)

    def descriptors(self) -> list[int]:
        """Return what a process must keep open to read it."""
        disks = self._table.disks
        numbers = sorted(number for number in self._table.below(self._number) if number < len(disks))
        return [fd for number in numbers for fd in disks[number].descriptors()]
