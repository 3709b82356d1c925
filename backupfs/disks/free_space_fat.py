"""The free space of FAT12, FAT16 and FAT32: clusters whose entry in the table is 0.

Source: Microsoft's "FAT: General Overview of On-Disk Format", 1.03; Linux's fs/fat/inode.c for the mark of a mount.
"""

import struct
import sys
from array import array
from collections.abc import Iterator

from backupfs.disks.filesystem import Read, Unreadable

_STEP = 3 << 18  # of the table; whole entries of 12, 16 and 32 bits
_MOST_12, _MOST_16 = 4085, 65525
_MOUNTED = 1


def free_ranges(read: Read, size: int) -> Iterator[tuple[int, int]] | None:
    """Return the free ranges; None if it is no FAT. Raises: Unreadable."""
    boot = read(0, 512)
    if boot[510:] != b"\x55\xaa" or boot[:1] not in (b"\xeb", b"\xe9"):
        return None
    if not (boot[54:57] == b"FAT" or boot[82:87] == b"FAT32"):
        return None
    sector, per_cluster, reserved, tables, roots, sectors, _, table = struct.unpack_from("<HBHBHHBH", boot, 11)
    is_32 = table == 0
    table = table or struct.unpack_from("<I", boot, 36)[0]
    sectors = sectors or struct.unpack_from("<I", boot, 32)[0]
    if sector not in (512, 1024, 2048, 4096) or not per_cluster or not reserved or not tables or not table:
        raise Unreadable("its boot sector makes no sense")
    first = reserved + tables * table + -(-roots * 32 // sector)
    if not first < sectors <= size // sector:
        raise Unreadable("its boot sector makes no sense, or it is larger than its volume")
    clusters = (sectors - first) // per_cluster
    bits = 32 if is_32 else 12 if clusters < _MOST_12 else 16
    if (clusters + 2) * bits > table * sector * 8 or (not is_32 and clusters >= _MOST_16):
        raise Unreadable("its table is too small")
    flags = struct.unpack_from("<H", boot, 40)[0] if is_32 else 0
    # Without copies one of the tables is in use.
    active = flags & 15 if flags & 0x80 else 0
    if active >= tables:
        raise Unreadable("its boot sector makes no sense")
    entries = _entries(read, (reserved + active * table) * sector, clusters + 2, bits)
    head = [next(entries), next(entries)]
    clean = {12: 0, 16: 0xC000, 32: 0x0C000000}[bits]
    if boot[65 if is_32 else 37] & _MOUNTED or head[1] & clean != clean:
        raise Unreadable("it was not unmounted")
    return _free(entries, first * sector, per_cluster * sector, clusters)


def _free(entries: Iterator[int], start: int, cluster: int, clusters: int) -> Iterator[tuple[int, int]]:
    run = -1
    number = -1
    for number, entry in enumerate(entries):
        if entry and run >= 0:
            yield start + run * cluster, start + number * cluster
            run = -1
        elif not entry and run < 0:
            run = number
    if number + 1 != clusters:
        raise Unreadable("its table is cut short")
    if run >= 0:
        yield start + run * cluster, start + clusters * cluster


def _entries(read: Read, place: int, count: int, bits: int) -> Iterator[int]:
    """Yield entries of the table; of 32 bits the upper four mean nothing."""
    for at in range(0, -(-count * bits // 8), _STEP):
        length = min(_STEP, -(-count * bits // 8) - at)
        data = read(place + at, length)
        if len(data) != length:
            raise Unreadable("its table is behind the end of the volume")
        first = at * 8 // bits
        most = min(count - first, _STEP * 8 // bits)
        if bits == 12:
            data += b"\0\0"
            for number in range(most):
                pair = int.from_bytes(data[number * 3 // 2 : number * 3 // 2 + 2], "little")
                yield pair >> 4 if number % 2 else pair & 0xFFF
            continue
        entries = array("H" if bits == 16 else "I", data[: most * bits // 8])
        if sys.byteorder == "big":
            entries.byteswap()
        yield from entries if bits == 16 else (entry & 0x0FFFFFFF for entry in entries)
