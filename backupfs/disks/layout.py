"""How disks are divided: partitions, what is encrypted in them, and logical volumes over them.

Volumes are numbered as in a snapshot's table.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from backupfs.disks.filesystem import Unreadable
from backupfs.disks.logical import add_groups, lacks_of
from backupfs.disks.luks import NotOpened, open_luks, read_luks
from backupfs.disks.lvm import NotLvm, PhysicalVolume, read_physical_volume
from backupfs.disks.partitions import partition_name, read_table
from backupfs.disks.source import DiskSource
from backupfs.disks.table import Decrypted, LaidOut, VolumeReader, VolumeTable
from backupfs.disks.thin import Thin
from backupfs.disks.unread import unread_form
from backupfs.snapshots.volumes import Range, Ranges

# How often what was found is looked into again: a physical volume may lie in a logical one.
_MOST_ROUNDS = 4
_ISO_PLACE, _ISO_MARK = (0x8001, 5), b"CD001"
# Types of partitions without files: BIOS boot, Microsoft reserved, PReP boot (MBR: 41), Linux swap (MBR: 82).
_PLAIN_KINDS = frozenset({
    "21686148-6449-6e6f-744e-656564454649", "e3c9e316-0b5c-4db8-817d-f92df00215ae",
    "9e1a2d38-c612-4316-aa26-8b49521e5a8b", "41", "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f", "82",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """What some disks are divided into."""

    table: VolumeTable
    undivided: tuple[int, ...]  # numbers of volumes, disks included, that may hold a file system
    remarks: tuple[str, ...]  # what is not shown, and why
    problems: tuple[tuple[str, str], ...] = ()  # (volume, reason): the same, where something is damaged or was wrong
    plain: frozenset[int] = frozenset()  # numbers of volumes in which nobody expects a file system

    @property
    def lacks(self) -> tuple[str, ...]:
        """All that is not shown of volumes as wholes."""
        return (*self.remarks, *(f"{name}: {reason}" for name, reason in self.problems))

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
        if isinstance(made_of, Decrypted):
            return made_of.size  # of what is zeros on the disk, too, something is made
        return made_of.mapped if isinstance(made_of, Thin) else None


def read_layout(disks: list[DiskSource], passphrases: Sequence[bytes] = (), keys: Sequence[bytes] = ()) -> Layout:
    """Find partitions, encrypted volumes and logical volumes.

    passphrases: to open encrypted volumes with, each any of them. keys: the same, of such volumes themselves.
    Raises: SourceError.
    """
    table = VolumeTable(disks)
    divided: set[int] = set()
    remarks: list[str] = []
    problems: list[tuple[str, str]] = []
    plain: set[int] = set()
    for number, source in enumerate(disks):
        problems += [(source.name, problem) for problem in source.problems]
        parted = read_table(source.read, source.size, source.sector)
        for part in parted.partitions:
            divided.add(number)
            added = table.add(partition_name(source.name, part.number), Ranges([(part.length, number, part.start)]))
            if part.kind in _PLAIN_KINDS:
                plain.add(added)
        if parted.damage:
            problems.append((source.name, parted.damage))
        if parted.is_there:
            plain.add(number)
            # An image of a CD may have a table, too.
            if source.read(*_ISO_PLACE) != _ISO_MARK:
                divided.add(number)
    members: list[tuple[int, PhysicalVolume]] = []
    groups: set[str] = set()
    used: set[bytes] = set()
    closed: list[tuple[str, str]] = []
    number = 0
    for _ in range(_MOST_ROUNDS):
        while number < len(table):
            if number not in divided and _is_shown(table, number):
                try:
                    if _open_encrypted(table, number, passphrases, keys, used):
                        divided.add(number)
                    elif (member := read_physical_volume(VolumeReader(table, number).read)) is not None:
                        divided.add(number)
                        members.append((number, member))
                    elif form := unread_form(VolumeReader(table, number).read):
                        divided.add(number)
                        remarks.append(f"{table.name(number)}: {form}")
                except NotOpened as error:
                    divided.add(number)
                    closed.append((table.name(number), str(error)))
                except NotLvm as error:
                    divided.add(number)
                    problems.append((table.name(number), str(error)))
                except Unreadable as error:
                    divided.add(number)
                    remarks.append(f"{table.name(number)}: {error}")
            number += 1
        remarks += add_groups(table, members, groups)
    lacks, lost = lacks_of(members)
    remarks += [f"{table.name(at)}: {reason}" for at, reason in lacks]
    problems += [(table.name(at), reason) for at, reason in lost]
    # Where each passphrase opened something, none was given for the others.
    if used.issuperset(passphrases):
        remarks += [f"{name}: {reason}" for name, reason in closed]
    else:
        problems += closed
    undivided = tuple(number for number in range(len(table)) if number not in divided and _is_shown(table, number))
    return Layout(table, undivided, tuple(remarks), tuple(problems), frozenset(plain))


def _open_encrypted(
    table: VolumeTable, number: int, passphrases: Sequence[bytes], keys: Sequence[bytes], used: set[bytes]
) -> bool:
    """Add what is in a volume if it is encrypted; tell whether it is. Raises: Unreadable if it cannot be opened."""
    reader = VolumeReader(table, number)
    header = read_luks(reader.read, table.size(number))
    if header is None:
        return False
    if any(isinstance(table.made_of(below), Decrypted) for below in table.below(number)):
        raise Unreadable("it is encrypted twice, which is not read")
    cipher = open_luks(reader.read, header, passphrases, keys, used)
    table.add(f"{table.name(number)}_crypt", Decrypted((header.size, number, header.start), cipher))
    return True


def _is_shown(table: VolumeTable, number: int) -> bool:
    return number < len(table.disks) or table.volumes[number - len(table.disks)].is_shown
