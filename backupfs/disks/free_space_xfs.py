"""The free space of XFS: the trees of free extents, one in each group, by block number.

Source: as in xfs.py; fs/xfs/libxfs/xfs_alloc_btree.c of Linux.
"""

import struct
from collections.abc import Iterator

from backupfs.disks.filesystem import Read, Unreadable
from backupfs.disks.ranges import joined, without
from backupfs.disks.xfs import open_xfs

_GROUP_MAGIC = b"XAGF"
_MAGICS = {b"ABTB": 16, b"AB3B": 56}  # with the sizes of their headers
_MOST_DEPTH = 9
_RO_COMPAT_KNOWN = 0xF  # finobt, rmapbt, reflink, inobtcount
_HEADERS = 4  # sectors at the start of a group


def free_ranges(read: Read, size: int) -> Iterator[tuple[int, int]] | None:
    """Return the free ranges; None if it is no XFS. Raises: Unreadable."""
    filesystem = open_xfs(read, size)
    if filesystem is None:
        return None
    if filesystem.remarks:
        raise Unreadable("it was not unmounted")
    block = read(0, 512)
    (block_size,) = struct.unpack_from(">I", block, 4)
    (blocks,) = struct.unpack_from(">Q", block, 8)
    group_blocks, groups = struct.unpack_from(">II", block, 84)
    version, sector = struct.unpack_from(">HH", block, 100)
    if version & 0xF == 5 and struct.unpack_from(">I", block, 212)[0] & ~_RO_COMPAT_KNOWN:
        raise Unreadable("it has features that are not known here")
    if not 512 <= sector <= 32768 or not (groups - 1) * group_blocks < blocks <= size // block_size:
        raise Unreadable("its superblock makes no sense, or it is larger than its volume")
    return _free(read, block_size, blocks, group_blocks, groups, sector)


def _free(
    read: Read, block_size: int, blocks: int, group_blocks: int, groups: int, sector: int
) -> Iterator[tuple[int, int]]:
    for group in range(groups):
        start = group * group_blocks
        length = min(group_blocks, blocks - start)
        header = read(start * block_size + sector, 64)
        if header[:4] != _GROUP_MAGIC or struct.unpack_from(">II", header, 8) != (group, length):
            raise Unreadable(f"the header of its group {group} makes no sense")
        (root,) = struct.unpack_from(">I", header, 16)
        (levels,) = struct.unpack_from(">I", header, 28)
        found = joined(_extents(read, block_size, start, length, root, levels))
        # Whatever a tree says: these are never free.
        kept = [(0, -(-_HEADERS * sector // block_size))]
        for low, high in without(found, kept):
            yield (start + low) * block_size, (start + high) * block_size


def _extents(read: Read, block_size: int, start: int, length: int, root: int, levels: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of free extents of a group, in its blocks."""
    if not 0 < levels <= _MOST_DEPTH:
        raise Unreadable("a tree of free extents makes no sense")
    stack = [(root, levels - 1)]
    seen: set[int] = set()
    while stack:
        number, wanted = stack.pop()
        if number in seen or not 0 < number < length:
            raise Unreadable("a tree of free extents goes in circles, or out of its group")
        seen.add(number)
        data = read((start + number) * block_size, block_size)
        header = _MAGICS.get(data[:4])
        if header is None or len(data) != block_size:
            raise Unreadable("a block of a tree of free extents is none")
        level, records = struct.unpack_from(">HH", data, 4)
        most = (block_size - header) // (12 if level else 8)
        if level != wanted or records > most:
            raise Unreadable("a block of a tree of free extents makes no sense")
        if level:
            pointers = struct.unpack_from(f">{records}I", data, header + most * 8)
            stack += ((pointer, level - 1) for pointer in pointers)
            continue
        for at in range(records):
            first, count = struct.unpack_from(">II", data, header + at * 8)
            if first + count > length:
                raise Unreadable("a free extent goes beyond its group")
            yield first, first + count
