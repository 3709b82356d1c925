"""How disks are divided: partitions, and logical volumes over them. Volumes are numbered as in a snapshot's table."""

from collections.abc import Iterator
from dataclasses import dataclass

from backupfs.disks.filesystem import Unreadable
from backupfs.disks.logical import add_groups
from backupfs.disks.lvm import NotLvm, PhysicalVolume, read_physical_volume
from backupfs.disks.partitions import partition_name, partitions_of
from backupfs.disks.source import DiskSource
from backupfs.disks.table import LaidOut, VolumeReader, VolumeTable
from backupfs.disks.thin import Thin
from backupfs.snapshots.volumes import Range, Ranges

# How often what was found is looked into again: a physical volume may lie in a logical one.
_MOST_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """What some disks are divided into."""

    table: VolumeTable
    undivided: tuple[int, ...]  # numbers of volumes, disks included, that may hold a file system
    remarks: tuple[str, ...]

    @property
    def volumes(self) -> list[LaidOut]:
        """What is made of the disks; the numbers follow those of the disks."""
        return self.table.volumes

    def reader(self, number: int) -> VolumeReader:
        """Return what reads a volume."""
        return VolumeReader(self.table, number)

    def counted(self, number: int) -> Iterator[tuple[Range, bool]]:
        """Yield ranges that hold the bytes of a volume, and whether each is one of a disk."""
        made_of = self.table.made_of(number)
        for length, base, start in made_of.bases() if made_of is not None else ():
            found = self.table.on_one_disk(length, base, start)
            yield found or (length, base, start), found is not None

    def own_data_size(self, number: int) -> int | None:
        """Return how many bytes of a volume are in no hole, where it says so itself."""
        made_of = self.table.made_of(number)
        return made_of.mapped if isinstance(made_of, Thin) else None


def read_layout(disks: list[DiskSource]) -> Layout:
    """Find partitions and logical volumes. Raises: SourceError."""
    table = VolumeTable(disks)
    divided: set[int] = set()
    remarks: list[str] = []
    for number, source in enumerate(disks):
        for part in partitions_of(source.read, source.size):
            divided.add(number)
            table.add(partition_name(source.name, part.number), Ranges([(part.length, number, part.start)]))
    members: list[tuple[int, PhysicalVolume]] = []
    groups: set[str] = set()
    looked_at = 0
    for _ in range(_MOST_ROUNDS):
        first, looked_at = looked_at, len(table)
        for number in range(first, looked_at):
            if number in divided or not _is_shown(table, number):
                continue
            try:
                member = read_physical_volume(VolumeReader(table, number).read)
            except (NotLvm, Unreadable) as error:
                divided.add(number)
                remarks.append(f"{table.name(number)}: {error}")
                continue
            if member is not None:
                divided.add(number)
                members.append((number, member))
        remarks += add_groups(table, members, groups)
    undivided = tuple(number for number in range(len(table)) if number not in divided and _is_shown(table, number))
    return Layout(table, undivided, tuple(remarks))


def _is_shown(table: VolumeTable, number: int) -> bool:
    return number < len(table.disks) or table.volumes[number - len(table.disks)].is_shown
