"""How disks are divided: partitions, and logical volumes over them. Volumes are numbered as in a snapshot's table."""

from dataclasses import dataclass

from backupfs.disks.lvm import NotLvm, PhysicalVolume, logical_volumes, read_physical_volume
from backupfs.disks.partitions import partition_name, partitions_of
from backupfs.disks.source import DiskSource
from backupfs.errors import shown

Range = tuple[int, int, int]  # (length, volume or disk, offset)


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A volume that is made of others."""

    name: str
    ranges: tuple[Range, ...]  # of volumes with lower numbers
    on_disks: tuple[Range, ...]  # the same, of disks

    @property
    def size(self) -> int:
        """Its bytes."""
        return sum(length for length, _, _ in self.ranges)


@dataclass(frozen=True, slots=True)
class Layout:
    """What some disks are divided into."""

    volumes: tuple[LaidOut, ...]  # their numbers follow those of the disks
    undivided: tuple[int, ...]  # numbers of volumes, disks included, that may hold a file system
    remarks: tuple[str, ...]


def read_layout(disks: list[DiskSource]) -> Layout:
    """Find partitions and logical volumes. Raises: SourceError."""
    volumes: list[LaidOut] = []
    divided: set[int] = set()
    remarks: list[str] = []
    for number, source in enumerate(disks):
        for part in partitions_of(source.read, source.size):
            divided.add(number)
            place = ((part.length, number, part.start),)
            volumes.append(LaidOut(partition_name(source.name, part.number), place, place))
    members: dict[str, int] = {}
    physical: list[PhysicalVolume] = []
    for number in range(len(disks) + len(volumes)):
        if number in divided:
            continue
        try:
            member = read_physical_volume(VolumeReader(disks, on_disks(disks, volumes, number)).read)
        except NotLvm as error:
            divided.add(number)
            remarks.append(f"{_name_of(disks, volumes, number)}: {error}")
            continue
        if member is not None:
            divided.add(number)
            members[member.uuid] = number
            physical.append(member)
    found, left_out = logical_volumes(physical)
    remarks += left_out
    for volume in found:
        ranges = tuple((length, members[uuid], offset) for length, uuid, offset in volume.ranges)
        laid: list[Range] = []
        for length, number, offset in ranges:
            laid += cut(on_disks(disks, volumes, number), offset, length)
        name = f"{volume.group}-{volume.name}"
        if sum(length for length, _, _ in laid) != sum(length for length, _, _ in ranges):
            remarks.append(f"the logical volume {shown(name)} is not shown: it goes beyond its disks")
            continue
        volumes.append(LaidOut(name, ranges, tuple(laid)))
    undivided = tuple(number for number in range(len(disks) + len(volumes)) if number not in divided)
    return Layout(tuple(volumes), undivided, tuple(remarks))


def on_disks(disks: list[DiskSource], volumes: "list[LaidOut] | tuple[LaidOut, ...]", number: int) -> tuple[Range, ...]:
    """Return where the bytes of a volume are, in terms of disks."""
    if number < len(disks):
        return ((disks[number].size, number, 0),)
    return volumes[number - len(disks)].on_disks


def _name_of(disks: list[DiskSource], volumes: list[LaidOut], number: int) -> str:
    return disks[number].name if number < len(disks) else volumes[number - len(disks)].name


def cut(ranges: tuple[Range, ...], start: int, length: int) -> list[Range]:
    """Return the part of ranges that begins at a place of them all; shorter where they end."""
    found: list[Range] = []
    position = 0
    for size, number, offset in ranges:
        low, high = max(start, position), min(start + length, position + size)
        if low < high:
            found.append((high - low, number, offset + low - position))
        position += size
    return found


class VolumeReader:
    """Reads a volume that lies on disks."""

    def __init__(self, disks: list[DiskSource], ranges: tuple[Range, ...]) -> None:
        """Take the parts."""
        self._disks = disks
        self._ranges = ranges

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes, fewer at the end. Raises: SourceError."""
        parts = cut(self._ranges, offset, length)
        return b"".join(self._disks[number].read(start, size) for size, number, start in parts)

    def descriptors(self) -> list[int]:
        """Return what a process must keep open to read it."""
        numbers = sorted({number for _, number, _ in self._ranges})
        return [fd for number in numbers for fd in self._disks[number].descriptors()]
