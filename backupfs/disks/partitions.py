"""Partition tables: GPT, from either copy, and MBR with its chain of logical partitions.

What a table says is checked against the size of the disk and for going in circles; what cannot be true is left out.
Source: UEFI 2.10, chapter 5; for MBR, what Linux reads (block/partitions/msdos.c).
"""

import struct
import uuid
import zlib
from collections.abc import Callable
from typing import NamedTuple

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


def partitions_of(read: Read, size: int) -> list[Partition]:
    """Return the partitions of a disk by number; none where there is no table.

    read: of the disk. size: its bytes.
    """
    boot = read(0, 512)
    is_mbr = len(boot) == 512 and boot[510:] == b"\x55\xaa"
    if not is_mbr or _PROTECTIVE in {entry[2] for entry in _MBR_ENTRY.iter_unpack(boot[_MBR_ENTRIES:510])}:
        for sector in _SECTORS:
            for place in (sector, size - sector):
                found = _read_gpt(read, size, sector, place)
                if found is not None:
                    return found
    return _read_mbr(read, size, boot) if is_mbr and _is_table(boot) else []


def _read_gpt(read: Read, size: int, sector: int, place: int) -> list[Partition] | None:
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
    found = []
    for number in range(count):
        kind, _, first, last, _, label = _GPT_ENTRY.unpack_from(entries, number * entry_size)
        if kind == bytes(16) or last < first or (last + 1) * sector > size:
            continue
        text = label.decode("utf-16-le", "replace").partition("\0")[0]
        found.append(
            Partition(number + 1, first * sector, (last + 1 - first) * sector, text, str(uuid.UUID(bytes_le=kind)))
        )
    return found


def _is_table(boot: bytes) -> bool:
    """Tell a table from the boot sector of a file system, which ends in the same two bytes."""
    entries = list(_MBR_ENTRY.iter_unpack(boot[_MBR_ENTRIES:510]))
    return all(entry[0] in (0, 0x80) for entry in entries) and any(entry[2] and entry[5] for entry in entries)


def _read_mbr(read: Read, size: int, boot: bytes) -> list[Partition]:
    found: list[Partition] = []
    for number, (_, _, kind, _, start, length) in enumerate(_MBR_ENTRY.iter_unpack(boot[_MBR_ENTRIES:510]), 1):
        if not kind or not length or (start + length) * 512 > size:
            continue
        if kind in _EXTENDED:
            found += _logical(read, size, start)
        else:
            found.append(Partition(number, start * 512, length * 512, "", f"{kind:02x}"))
    return sorted(found)


def _logical(read: Read, size: int, first: int) -> list[Partition]:
    found: list[Partition] = []
    seen = set()
    at = first
    while at not in seen and len(found) < _MOST_LOGICAL:
        seen.add(at)
        table = read(at * 512, 512)
        if len(table) < 512 or table[510:] != b"\x55\xaa":
            break
        following = None
        for _, _, kind, _, start, length in list(_MBR_ENTRY.iter_unpack(table[_MBR_ENTRIES:510]))[:2]:
            if kind in _EXTENDED:
                following = first + start
            elif kind and length and (at + start + length) * 512 <= size:
                found.append(Partition(5 + len(found), (at + start) * 512, length * 512, "", f"{kind:02x}"))
        if following is None:
            break
        at = following
    return found


def partition_name(disk: str, number: int) -> str:
    """Return what Linux calls a partition: vda1, nvme0n1p1."""
    return f"{disk}p{number}" if disk[-1].isdigit() else f"{disk}{number}"
