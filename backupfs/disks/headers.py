"""What files with disks in them say of themselves that qemu goes by otherwise, or not at all.

Where a table is cut off, it reads zeros; what the tables name is not looked at here, as `qemu-img map` says where that
lies (nbd.py). Of a VHD it takes the size from another field, depending on who made it, and never asks for a parent.
Source: qemu's docs/interop/qcow2.txt, block/vmdk.c, block/vpc.c; VMware's "Virtual Disk Format 5.0"; Microsoft's
"Virtual Hard Disk Image Format Specification".
"""

import os
import struct
from dataclasses import dataclass

_SECTOR = 512
_MOST_TABLE = 32 << 20  # bytes of a table of tables; qemu refuses larger ones
_QCOW2_OFFSET = (1 << 56) - (1 << 9)  # of an entry that names a table
_IN_FOOTER = (1 << 64) - 1  # a VMDK's first table is named at its end
_VMDK3_ENTRIES = 4096  # of each second table


VHD_FOOTER = 512  # at the end of a file; one of fixed size has it only there
VHD_MARK = b"conectix"
_DIFFERENCING = 4


@dataclass(frozen=True, slots=True)
class VhdFooter:
    """What a VHD says it is."""

    size: int  # of the disk
    needs_parent: bool


def read_vhd(fd: int) -> VhdFooter | None:
    """Return the footer of a VHD, or the copy at its beginning, where that is; None if it has neither."""
    for place in (0, os.fstat(fd).st_size - VHD_FOOTER):
        footer = os.pread(fd, VHD_FOOTER, max(0, place))
        if footer.startswith(VHD_MARK) and len(footer) == VHD_FOOTER:
            size, _, kind = struct.unpack_from(">QII", footer, 48)
            return VhdFooter(size // _SECTOR * _SECTOR, kind == _DIFFERENCING)
    return None


def snapshots_in_qcow2(fd: int) -> int:
    """Return how many snapshots a qcow2 has inside."""
    header = os.pread(fd, 64, 0)
    return int.from_bytes(header[60:64], "big")


def tables_end(fd: int, form: str) -> int:
    """Return where the last table ends by which data is found in a file; 0 where qemu itself misses what is cut off."""
    try:
        if form == "qcow2":
            return _qcow2_end(fd)
        return _vmdk_end(fd) if form == "vmdk" else 0
    except struct.error:
        return 0  # a header that is not whole, which qemu refuses


def _qcow2_end(fd: int) -> int:
    header = os.pread(fd, 48, 0)
    (bits,) = struct.unpack_from(">I", header, 20)
    count, place = struct.unpack_from(">IQ", header, 36)
    if not 9 <= bits <= 21 or place >= 1 << 62:
        return 0
    return _end(fd, place, count, ">Q", _QCOW2_OFFSET, 1, 1 << bits)


def _vmdk_end(fd: int) -> int:
    header = os.pread(fd, 64, 0)
    if header[:4] == b"COWD":
        place, count = struct.unpack_from("<II", header, 20)
        return _end(fd, place * _SECTOR, count, "<I", (1 << 32) - 1, _SECTOR, 4 * _VMDK3_ENTRIES)
    if header[:4] != b"KDMV":
        return 0
    if struct.unpack_from("<Q", header, 56)[0] == _IN_FOOTER:
        header = os.pread(fd, 64, max(0, os.fstat(fd).st_size - 2 * _SECTOR))
    capacity, grain = struct.unpack_from("<QQ", header, 12)
    entries, _, place = struct.unpack_from("<IQQ", header, 44)
    if not 0 < entries * grain < 1 << 40 or place >= 1 << 53:
        return 0
    count = -(-capacity // (entries * grain))
    return _end(fd, place * _SECTOR, count, "<I", (1 << 32) - 1, _SECTOR, 4 * entries)


def _end(fd: int, place: int, count: int, entry: str, mask: int, unit: int, length: int) -> int:
    """Return where a table of tables ends, or the last of those that it names.

    entry: how the place of a table is written, in `unit` bytes. length: of each table.
    """
    size = count * struct.calcsize(entry)
    if size > _MOST_TABLE:
        return 0
    data = os.pread(fd, size, place)
    if len(data) < size:
        return place + size
    last = max((number & mask for (number,) in struct.iter_unpack(entry, data)), default=0)
    # Zero, and one in a VMDK, stand for a table of zeros.
    return max(place + size, last * unit + length if last > 1 else 0)
