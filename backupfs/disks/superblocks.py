"""What file systems say who they are with, and the copies that they keep of it.

Where the first one is gone a copy proves that there was a file system; a copy counts only where it says itself that it
belongs. What is read is hostile, and all looking is bounded.
Source: Linux's fs/ext4/ext4.h, xfs_format.h and btrfs_tree.h; for where XFS has its groups mkfs.xfs
(calc_default_ag_geometry); Microsoft's specifications of FAT and exFAT; blkid's probes for swap.
"""

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from backupfs.disks.filesystem import Read

EXT, XFS, BTRFS, NTFS, EXFAT, FAT = "ext2/3/4", "XFS", "btrfs", "NTFS", "exFAT", "FAT"

# Where each has its mark; the first one that fits names it.
_MARKS = (
    (EXT, 0x438, b"\x53\xef"), (XFS, 0, b"XFSB"), (BTRFS, 0x10040, b"_BHRfS_M"), (NTFS, 3, b"NTFS    "),
    (EXFAT, 3, b"EXFAT   "), (FAT, 82, b"FAT32   "), (FAT, 54, b"FAT16   "), (FAT, 54, b"FAT12   "),
)  # fmt: skip
# What is made once, with all that is in it, and is neither checked nor changed.
_FIXED_MARKS = (("squashfs", 0, b"hsqs"), ("ISO 9660", 0x8001, b"CD001"))
_SWAP_PAGES = (4096, 8192, 16384, 65536)
_SWAP_MARKS = (b"SWAPSPACE2", b"SWAP-SPACE")
_BLOCK_SIZES = tuple(1 << bits for bits in range(9, 17))
_EXT_GROUPS = tuple((size, size * 8) for size in (4096, 2048, 1024))  # block sizes, with the blocks of a group
_BTRFS_COPIES = (64 << 20, 256 << 30)
_MOST_XFS_GROUPS = 64
_MIB = 1 << 20
_MOST_MIB = 4096  # steps of one, where XFS is smaller than its volume or has grown; half a minute on a slow disk
_FAT_SECTORS = 1024  # in which both tables of FAT12 and FAT16 begin
_FAT_STARTS = (b"\xf8\xff\xff", b"\xf0\xff\xff")


class Copy(NamedTuple):
    """What is left of a file system that has lost its superblock."""

    form: str
    place: int  # bytes from the start of the volume
    what: str = "a copy"

    @property
    def words(self) -> str:
        """What to tell of it."""
        return f"its superblock is damaged, {self.what} is at byte {self.place:,}"


def form_of(read: Read) -> str:
    """Return what file system a volume says that it holds; empty if none of those that can be checked."""
    return next((form for form, place, mark in _MARKS if read(place, len(mark)) == mark), "")


def fixed_form_of(read: Read) -> str:
    """Return the same of those that nothing is ever written to."""
    return next((form for form, place, mark in _FIXED_MARKS if read(place, len(mark)) == mark), "")


def is_swap(read: Read) -> bool:
    """Tell whether a volume is swap space; one with a hibernated system is another thing."""
    return any(read(page - 10, 10) in _SWAP_MARKS for page in _SWAP_PAGES)


def copy_in(read: Read, size: int) -> Copy | None:
    """Return the copy of a superblock in a volume that has lost its own; None if there is none."""
    for look in _LOOKS:
        found = next(look(read, size), None)
        if found is not None:
            return found
    return None


def copy_of_ext(read: Read, size: int) -> Copy | None:
    """Return the copy of a superblock of ext2, ext3 or ext4; None if there is none where it should be."""
    return next(_copies_of_ext(read, size), None)


def copy_of_xfs(read: Read, size: int) -> Copy | None:
    """Return the same of XFS."""
    return next(_copies_of_xfs(read, size), None)


def _copies_of_ext(read: Read, _size: int) -> Iterator[Copy]:
    for block_size, per_group in _EXT_GROUPS:
        start = (per_group + (block_size == 1024)) * block_size
        block = read(start, 1024)
        if len(block) < 1024 or block[0x38:0x3A] != b"\x53\xef":
            continue
        first, log_block = struct.unpack_from("<II", block, 0x14)
        (blocks,), (group,) = struct.unpack_from("<I", block, 0x20), struct.unpack_from("<H", block, 0x5A)
        if log_block <= 6 and group and (first + blocks * group) * (1024 << log_block) == start:
            yield Copy(EXT, start)


def _copies_of_xfs(read: Read, size: int) -> Iterator[Copy]:
    likely = (
        -(-(size // block) // count) * block * number
        for count in range(2, _MOST_XFS_GROUPS + 1) for block in _BLOCK_SIZES for number in (1, 2)
    )  # fmt: skip
    places = dict.fromkeys(place for place in likely if 0 < place < size)
    for candidates in (places, range(_MIB, min(size, _MOST_MIB * _MIB), _MIB)):
        for place in candidates:
            block = read(place, 512)
            if len(block) < 512 or block[:4] != b"XFSB":
                continue
            (block_size,) = struct.unpack_from(">I", block, 4)
            group, groups = struct.unpack_from(">II", block, 84)
            group *= block_size
            if block_size in _BLOCK_SIZES and group and place % group == 0 and place // group < groups:
                yield Copy(XFS, place)


def _copies_of_btrfs(read: Read, _size: int) -> Iterator[Copy]:
    for place in _BTRFS_COPIES:
        block = read(place + 0x30, 24)
        if block[16:] == b"_BHRfS_M" and int.from_bytes(block[:8], "little") == place:
            yield Copy(BTRFS, place)


def _copies_in_boot_sectors(read: Read, size: int) -> Iterator[Copy]:
    sizes = (512, 4096)
    places = [(NTFS, size - sector, 3, b"NTFS    ") for sector in sizes]
    places += [(EXFAT, 12 * sector, 3, b"EXFAT   ") for sector in sizes]
    places += [(FAT, 6 * sector, 82, b"FAT32   ") for sector in sizes]
    for form, place, at, mark in places:
        block = read(place, 512) if place >= 0 else b""
        if block[at : at + len(mark)] == mark and block[510:] == b"\x55\xaa":
            yield Copy(form, place)


def _tables_of_fat(read: Read, size: int) -> Iterator[Copy]:
    """Yield where the table of FAT12 or FAT16 is, which have no copy of their boot sector: the table is there twice."""
    start = read(0, min(size, _FAT_SECTORS * 512))
    seen: dict[bytes, int] = {}
    for place in range(512, len(start) - 511, 512):
        if start[place : place + 3] in _FAT_STARTS:
            sector = start[place : place + 512]
            if sector in seen:
                yield Copy(FAT, seen[sector], "a file allocation table")
            seen[sector] = place


_LOOKS: tuple[Callable[[Read, int], Iterator[Copy]], ...] = (
    _copies_of_ext, _copies_of_btrfs, _copies_in_boot_sectors, _tables_of_fat, _copies_of_xfs,
)  # fmt: skip
