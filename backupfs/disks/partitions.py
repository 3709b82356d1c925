"""Partition tables: GPT, from either copy, and MBR with its chain of logical partitions.

What a table says is checked against the size of the disk and for going in circles; what cannot be true is left out.
Source: UEFI 2.10, chapter 5; for MBR, what Linux reads (block/partitions/msdos.c).
"""

import struct
import uuid
import zlib
from collections.abc import Callable
from typing import NamedTuple

from backupfs.disks.superblocks import fixed_form_of, form_of, is_swap
from backupfs.disks.unread import unread_form

Read = Callable[[int, int], bytes]  # (offset, length) → bytes, fewer at the end of the disk

_SECTORS = (512, 4096)
_GPT_SIGNATURE = b"EFI PART"
# signature, revision, header size, header crc, reserved, own lba, other lba, first usable, last usable, disk guid,
# lba of the entries, their number, their size, their crc
_GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
_MOST_ENTRIES = 1024
_MBR_ENTRIES = 446
_MBR_ENTRY = struct.Struct("<B3sB3sII")
_EXTENDED = frozenset({0x05, 0x0F, 0x85})
_PROTECTIVE = 0xEE
_MOST_LOGICAL = 256
_MOST_NAMED = 8
_LUKS, _LVM = b"LUKS\xba\xbe", b"LABELONE"


class Partition(NamedTuple):
    """A part of a disk."""

    number: int  # as Linux counts
    start: int  # bytes
    length: int
    label: str  # of a GPT entry
    kind: str = ""  # the GUID of a GPT entry's type, or two hexadecimal digits

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.length


class Table(NamedTuple):
    """What a disk says of its partitions."""

    partitions: list[Partition]  # by number
    is_there: bool  # one may have no partitions
    damage: str = ""  # why partitions may be missing


_NO_TABLE = Table([], is_there=False)
_LOST = "the partition table is damaged: no copy of the GPT is whole, so no partitions are shown"


def read_table(read: Read, size: int, sector: int = 0) -> Table:
    """Return the partition table of a disk.

    read: of the disk. size: its bytes. sector: its bytes, in which an MBR counts and which it does not name; 0: what
    fits what is there.
    """
    boot = read(0, 512)
    is_mbr = len(boot) == 512 and boot[510:] == b"\x55\xaa"
    is_protective = is_mbr and _PROTECTIVE in {entry[2] for entry in _MBR_ENTRY.iter_unpack(boot[_MBR_ENTRIES:510])}
    if not is_mbr and form_of(read):
        # What the disk had before it was made one file system: the copy at its end often stays.
        return _NO_TABLE
    if not is_mbr or is_protective:
        places = [(sector, place) for sector in _SECTORS for place in (sector, size - sector)]
        for one, place in places:
            found = _read_gpt(read, size, one, place)
            if found is not None:
                return found
        if is_protective or any(read(place, 8) == _GPT_SIGNATURE for _, place in places if place > 0):
            # Of what an MBR protects with one entry, its other entries tell some at most.
            others = _read_mbr(read, size, boot, sector) if is_protective and _is_table(boot) else _NO_TABLE
            return Table([one for one in others.partitions if one.kind != f"{_PROTECTIVE:02x}"], True, _LOST)
    return _read_mbr(read, size, boot, sector) if is_mbr and _is_table(boot) else _NO_TABLE


def partitions_of(read: Read, size: int, sector: int = 0) -> list[Partition]:
    """Return the partitions of a disk by number; none where there is no table. Takes the same as `read_table`."""
    return read_table(read, size, sector).partitions


def _read_gpt(read: Read, size: int, sector: int, place: int) -> Table | None:
    """Return what one copy of a GPT says; None if it is none, or damaged."""
    block = read(place, sector) if 0 < place <= size - sector else b""
    if block[:8] != _GPT_SIGNATURE:
        return None
    (_, _, header_size, crc, _, _, _, _, _, _, entries_lba, count, entry_size, entries_crc) = _GPT_HEADER.unpack_from(
        block
    )
    if not _GPT_HEADER.size <= header_size <= sector or not 128 <= entry_size <= 4096 or count > _MOST_ENTRIES:
        return None
    header = bytearray(block[:header_size])
    header[16:20] = bytes(4)
    entries = read(entries_lba * sector, count * entry_size)
    if zlib.crc32(header) != crc or zlib.crc32(entries) != entries_crc:
        return None
    found: list[Partition] = []
    outside: list[int] = []
    for number in range(count):
        kind, _, first, last, _, label = _GPT_ENTRY.unpack_from(entries, number * entry_size)
        if kind == bytes(16):
            continue
        if last < first or (last + 1) * sector > size:
            outside.append(number + 1)
            continue
        text = label.decode("utf-16-le", "replace").partition("\0")[0]
        found.append(
            Partition(number + 1, first * sector, (last + 1 - first) * sector, text, str(uuid.UUID(bytes_le=kind)))
        )
    return Table(found, True, _outside(outside))


def _outside(numbers: list[int]) -> str:
    if not numbers:
        return ""
    named = ", ".join(map(str, numbers[:_MOST_NAMED])) + (" and others" if len(numbers) > _MOST_NAMED else "")
    return f"the partition table is damaged, or the disk cut short: {named} of its partitions lie beyond its end"


def _is_table(boot: bytes) -> bool:
    """Tell a table from the boot sector of a file system, which ends in the same two bytes."""
    entries = list(_MBR_ENTRY.iter_unpack(boot[_MBR_ENTRIES:510]))
    return all(entry[0] in (0, 0x80) for entry in entries) and any(entry[2] and entry[5] for entry in entries)


def _read_mbr(read: Read, size: int, boot: bytes, sector: int) -> Table:
    if sector:
        return _read_counted(read, size, boot, sector)
    found, large = (_read_counted(read, size, boot, one) for one in _SECTORS)
    # Read in the larger sectors all lies elsewhere, and mostly beyond the end.
    is_large = large.partitions and not large.damage and _holds_some(read, large) and not _holds_some(read, found)
    return large if is_large else found


def _holds_some(read: Read, table: Table) -> bool:
    """Tell whether something that is known begins where a partition does."""

    def begins(part: Partition) -> bool:
        def inside(offset: int, length: int) -> bytes:
            return read(part.start + offset, max(0, min(length, part.length - offset)))

        is_volume = inside(0, 6) == _LUKS or any(inside(512 * at, 8) == _LVM for at in range(4))
        is_known = form_of(inside) or fixed_form_of(inside) or unread_form(inside)
        return is_volume or bool(is_known) or is_swap(inside)

    return any(begins(part) for part in table.partitions)


def _read_counted(read: Read, size: int, boot: bytes, sector: int) -> Table:
    found: list[Partition] = []
    outside: list[int] = []
    is_whole = True
    for number, (_, _, kind, _, start, length) in enumerate(_MBR_ENTRY.iter_unpack(boot[_MBR_ENTRIES:510]), 1):
        if not kind or not length:
            continue
        if (start + length) * sector > size:
            outside.append(number)
        elif kind in _EXTENDED:
            logical, is_whole = _logical(read, size, start, sector)
            found += logical
        else:
            found.append(Partition(number, start * sector, length * sector, "", f"{kind:02x}"))
    damage = _outside(outside)
    if not damage and not is_whole:
        damage = "the partition table is damaged: its chain of logical partitions breaks off"
    return Table(sorted(found), True, damage)


def _logical(read: Read, size: int, first: int, sector: int) -> tuple[list[Partition], bool]:
    """Return the logical partitions, and whether the chain of them is whole."""
    found: list[Partition] = []
    is_inside = True
    seen = set()
    at = first
    while at not in seen and len(found) < _MOST_LOGICAL:
        seen.add(at)
        table = read(at * sector, 512)
        if len(table) < 512 or table[510:] != b"\x55\xaa":
            # One that was never filled has no first table.
            return found, at == first and not table.strip(b"\0")
        following = None
        for _, _, kind, _, start, length in list(_MBR_ENTRY.iter_unpack(table[_MBR_ENTRIES:510]))[:2]:
            if kind in _EXTENDED:
                following = first + start
            elif kind and length and (at + start + length) * sector <= size:
                place = (at + start) * sector
                found.append(Partition(5 + len(found), place, length * sector, "", f"{kind:02x}"))
            elif kind and length:
                is_inside = False
        if following is None:
            return found, is_inside
        at = following
    return found, False


def partition_name(disk: str, number: int) -> str:
    """Return what Linux calls a partition: vda1, nvme0n1p1."""
    return f"{disk}p{number}" if disk[-1].isdigit() else f"{disk}{number}"
