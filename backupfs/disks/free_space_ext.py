"""The free space of ext2, ext3 and ext4, with clusters too.

Source: Linux's fs/ext4/ext4.h and balloc.c, and its Documentation/filesystems/ext4.
"""

import struct
from collections.abc import Iterator

from backupfs.disks.bitmaps import clear_runs
from backupfs.disks.filesystem import Read, Unreadable
from backupfs.disks.ranges import joined, without

_MAGIC = 0xEF53
_STATE_VALID, _STATE_ERRORS = 1, 2
_COMPAT_SPARSE_SUPER2 = 0x200
_RECOVER, _64BIT = 0x4, 0x80
# Those that say nothing else of where things are: filetype, extents, 64bit, mmp, flex_bg, ea_inode, dirdata, csum_seed,
# largedir, inline_data, encrypt, casefold.
_INCOMPAT_KNOWN = 0x2 | 0x40 | _64BIT | 0x100 | 0x200 | 0x400 | 0x1000 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000
_SPARSE_SUPER, _GDT_CSUM, _BIGALLOC, _METADATA_CSUM = 0x1, 0x10, 0x200, 0x400
# Beside those: large_file, btree_dir, huge_file, dir_nlink, extra_isize, quota, readonly, project, verity.
_RO_COMPAT_KNOWN = _SPARSE_SUPER | 0x2 | 0x4 | 0x8 | _GDT_CSUM | 0x20 | 0x40 | 0x100 | _BIGALLOC | _METADATA_CSUM
_RO_COMPAT_KNOWN |= 0x1000 | 0x2000 | 0x8000
_BLOCK_UNINIT = 0x2
_MOST_GROUPS = 1 << 22


def free_ranges(read: Read, size: int) -> Iterator[tuple[int, int]] | None:
    """Return the free ranges; None if it is no ext. Raises: Unreadable."""
    block = read(1024, 1024)
    if len(block) < 1024 or struct.unpack_from("<H", block, 0x38)[0] != _MAGIC:
        return None
    return _Ext(read, size, block).free()


class _Ext:
    def __init__(self, read: Read, size: int, block: bytes) -> None:
        self._read = read
        inodes, blocks = struct.unpack_from("<II", block)
        first, log_block, log_cluster, self._per_group, per_group_clusters, inodes_per_group = struct.unpack_from(
            "<IIIIII", block, 0x14
        )
        (state,) = struct.unpack_from("<H", block, 0x3A)
        (revision,), (inode_size,) = struct.unpack_from("<I", block, 0x4C), struct.unpack_from("<H", block, 0x58)
        compat, incompat, ro_compat = struct.unpack_from("<III", block, 0x5C) if revision else (0, 0, 0)
        if incompat & _RECOVER or not state & _STATE_VALID or struct.unpack_from("<I", block, 0xE8)[0]:
            raise Unreadable("it was not unmounted")
        if state & _STATE_ERRORS:
            raise Unreadable("the kernel found errors in it")
        unknown = incompat & ~_INCOMPAT_KNOWN, ro_compat & ~_RO_COMPAT_KNOWN
        if any(unknown):
            raise Unreadable(f"it has features that are not known here ({unknown[0]:#x}, {unknown[1]:#x})")
        has_clusters = bool(ro_compat & _BIGALLOC)
        if incompat & _64BIT:
            blocks |= struct.unpack_from("<I", block, 0x150)[0] << 32
            (self._row,) = struct.unpack_from("<H", block, 0xFE)
        else:
            self._row = 32
        if log_block > 6 or log_cluster > 30 or (has_clusters and log_cluster < log_block):
            raise Unreadable("its superblock makes no sense")
        self._block_size = 1024 << log_block
        self._blocks, self._first = blocks, first
        self._ratio = 1 << (log_cluster - log_block) if has_clusters else 1
        self._per_group_clusters = per_group_clusters if has_clusters else self._per_group
        self._inode_blocks = -(-inodes_per_group * (inode_size if revision else 128) // self._block_size)
        self._is_lazy = bool(ro_compat & (_GDT_CSUM | _METADATA_CSUM))
        sane = (
            0 <= first <= 1
            and first < blocks <= size // self._block_size
            and 0 < self._per_group_clusters <= self._block_size * 8
            and self._per_group == self._per_group_clusters * self._ratio
            and 32 <= self._row <= 1024
            and inodes
            and inodes_per_group
        )
        if not sane:
            raise Unreadable("its superblock makes no sense, or it is larger than its volume")
        self._groups = -(-(blocks - first) // self._per_group)
        if self._groups > _MOST_GROUPS:
            raise Unreadable("it has more groups than are believed")
        self._table_blocks = -(-self._groups * self._row // self._block_size)
        self._reserved = struct.unpack_from("<H", block, 0xCE)[0] if revision else 0
        self._is_sparse = bool(ro_compat & _SPARSE_SUPER) or bool(compat & _COMPAT_SPARSE_SUPER2)
        self._copies = set(struct.unpack_from("<II", block, 0x24C)) if compat & _COMPAT_SPARSE_SUPER2 else set()

    def free(self) -> Iterator[tuple[int, int]]:
        """Yield the free ranges."""
        # The superblock is in the block of byte 1,024; with clusters of small blocks that is not the first one.
        superblock = 1024 // self._block_size
        table = self._blocks_at(superblock + 1, self._table_blocks)
        groups = []
        metadata: list[tuple[int, int]] = [(0, superblock + 1 + self._table_blocks + self._reserved)]
        for group in range(self._groups):
            row = table[group * self._row : (group + 1) * self._row]
            places = list(struct.unpack_from("<III", row))
            if self._row >= 64:
                places = [
                    low | high << 32 for low, high in zip(places, struct.unpack_from("<III", row, 32), strict=True)
                ]
            (flags,) = struct.unpack_from("<H", row, 18)
            bitmap, inode_bitmap, inode_table = places
            groups.append((bitmap, bool(self._is_lazy and flags & _BLOCK_UNINIT)))
            # Whatever bitmaps say: these are never free.
            metadata += ((bitmap, bitmap + 1), (inode_bitmap, inode_bitmap + 1))
            metadata.append((inode_table, inode_table + self._inode_blocks))
            if self._has_copy(group):  # of the superblock and the table
                start = self._first + group * self._per_group
                metadata.append((start, start + 1 + self._table_blocks + self._reserved))
        kept = joined((start * self._block_size, end * self._block_size) for start, end in metadata)
        return without(joined(self._unused(groups)), kept)

    def _unused(self, groups: list[tuple[int, bool]]) -> Iterator[tuple[int, int]]:
        for group, (bitmap, is_unused) in enumerate(groups):
            start = self._first + group * self._per_group
            end = min(start + self._per_group, self._blocks)
            count = -(-(end - start) // self._ratio)
            bits = bytes(self._block_size) if is_unused else self._blocks_at(bitmap, 1)
            for low, high in clear_runs(bits, count):
                yield (
                    (start + low * self._ratio) * self._block_size,
                    min(start + high * self._ratio, end) * self._block_size,
                )

    def _has_copy(self, group: int) -> bool:
        """Tell whether a group begins with a copy of the superblock and the table of groups, or may do so."""
        if group <= 1 or not self._is_sparse or group in self._copies:
            return True
        for base in (3, 5, 7):
            power = base
            while power < group:
                power *= base
            if power == group:
                return True
        return False

    def _blocks_at(self, block: int, count: int) -> bytes:
        length = count * self._block_size
        data = self._read(block * self._block_size, length) if block + count <= self._blocks else b""
        if len(data) != length:
            raise Unreadable("it refers to what is behind its end")
        return data
