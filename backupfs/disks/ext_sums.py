"""The checksums in ext2, ext3 and ext4: of what each is, and whether it is right.

A file system has those that its features say; what has none is taken as it is. Blocks of directories are the exception:
where there should be a sum and no room was left for one, the kernel refuses the block, and so is it here.
Source: Linux's Documentation/filesystems/ext4/checksums.rst; fs/ext4/super.c, inode.c, extents.c and xattr.c, and
namei.c for directories (ext4_dirblock_csum_verify, ext4_dx_csum_verify, __ext4_read_dirblock).
"""

import struct

from backupfs.disks.crc32c import SEED, crc32c
from backupfs.disks.filesystem import Unreadable

_METADATA, _OF_GROUPS, _HAS_SEED = 0x400, 0x10, 0x2000
_SUM_OF_SUPERBLOCK, _SUM_OF_GROUP = 0x3FC, 0x1E
_PLAIN_INODE = 128
_INDEXED = 0x10  # in the second byte of the flags
_TAIL = b"\0\0\0\0\x0c\0\0\xde"  # of a block with names, before its sum
_INDEX, _INDEX_OF_ROOT = 8, 32  # where the entries of an index begin: behind an empty name, or behind `.` and `..`


def is_superblock_right(superblock: bytes, ro_compat: int) -> bool:
    """Tell whether a superblock has the right sum."""
    if not ro_compat & _METADATA:
        return True
    return crc32c(SEED, superblock[:_SUM_OF_SUPERBLOCK]) == _number_at(superblock, _SUM_OF_SUPERBLOCK)


class Sums:
    """Compares what is in one file system with its checksums."""

    def __init__(self, superblock: bytes, incompat: int, ro_compat: int) -> None:
        """Take the superblock, which is right, and its features."""
        self._uuid = superblock[0x68:0x78]
        self._has_groups = bool(ro_compat & _OF_GROUPS)
        self._seed: int | None = None  # None: there are no sums but those of groups
        if ro_compat & _METADATA:
            self._seed = _number_at(superblock, 0x270) if incompat & _HAS_SEED else crc32c(SEED, self._uuid)

    def is_group_right(self, group: int, descriptor: bytes) -> bool:
        """Tell whether the descriptor of a group has the right sum."""
        before, stored, after = descriptor[:_SUM_OF_GROUP], descriptor[_SUM_OF_GROUP:32], descriptor[32:]
        if self._seed is not None:
            found = crc32c(self._seed, group.to_bytes(4, "little") + before + b"\0\0" + after) & 0xFFFF
        elif self._has_groups:
            found = _crc16(self._uuid + group.to_bytes(4, "little") + before + after)
        else:
            return True
        return found.to_bytes(2, "little") == stored

    def require_inode(self, number: int, raw: bytes) -> None:
        """Raises: Unreadable when an inode has a wrong sum."""
        # One that is not in use may never have been written.
        if self._seed is None or raw[26:28] == b"\0\0":
            return
        data = number.to_bytes(4, "little") + raw[0x64:0x68] + raw[:0x7C] + b"\0\0" + raw[0x7E:0x80]
        wanted, mask = raw[0x7C] | raw[0x7D] << 8, 0xFFFF
        if len(raw) > _PLAIN_INODE:
            if raw[0x80] | raw[0x81] << 8 >= 4:
                wanted, mask = wanted | raw[0x82] << 16 | raw[0x83] << 24, SEED
                data += raw[0x80:0x82] + b"\0\0" + raw[0x84:]
            else:
                data += raw[0x80:]
        if crc32c(self._seed, data) & mask != wanted:
            raise Unreadable(f"its inode {number} has a wrong checksum")

    def require_extents(self, number: int, raw: bytes, block: bytes) -> None:
        """Raises: Unreadable when a block of an inode's tree of extents has a wrong sum. raw: the inode."""
        if self._seed is None:
            return
        end = 12 + 12 * int.from_bytes(block[4:6], "little")
        if crc32c(_begun(self._seed, number, raw), block[:end]).to_bytes(4, "little") != block[end : end + 4]:
            raise Unreadable("a block of its tree of extents has a wrong checksum")

    def require_attributes(self, place: int, block: bytes) -> None:
        """Raises: Unreadable when a block of attributes has a wrong sum. place: of the block in the file system."""
        if self._seed is None:
            return
        found = crc32c(self._seed, place.to_bytes(8, "little") + block[:16] + bytes(4) + block[20:])
        if found != _number_at(block, 16):
            raise Unreadable("the block of its attributes has a wrong checksum")

    def fault_in_directory(self, number: int, raw: bytes, place: int, block: bytes) -> str:
        """Return what is wrong with the sum of a block of a directory; empty if nothing is.

        raw: the directory's inode. place: of the block in the directory.
        """
        if self._seed is None:
            return ""
        begun = _begun(self._seed, number, raw)
        # Its end does not tell what a block is: the root of an index was a block with names once, and the kernel leaves
        # the tail of that in it, all but the sum.
        if raw[0x21] & _INDEXED and not place:
            return _fault_in_index(begun, block, _INDEX_OF_ROOT)
        if raw[0x21] & _INDEXED and _is_spanned(block):
            return "" if _was_emptied(block) else _fault_in_index(begun, block, _INDEX)
        if block[-12:-4] != _TAIL:
            return "a block of it has no checksum, which `e2fsck -D` mends"
        is_right = crc32c(begun, block[:-12]) == _number_at(block, len(block) - 4)
        return "" if is_right else "a block of it has a wrong checksum"


def _fault_in_index(begun: int, block: bytes, start: int) -> str:
    """Return what is wrong with the sum of a block of an index, which is over those entries only that are in use."""
    room, used = struct.unpack_from("<HH", block, start)
    tail = start + room * 8
    if tail + 8 > len(block):
        return "a block of its index has no checksum"
    found = crc32c(crc32c(begun, block[: start + used * 8]), block[tail : tail + 4] + bytes(4))
    return "" if found == _number_at(block, tail + 4) else "a block of its index has a wrong checksum"


def _is_spanned(block: bytes) -> bool:
    """Tell whether an entry without an inode takes all of a block of a directory, as in those of an index."""
    length = block[4] | block[5] << 8
    return block[:4] == bytes(4) and (length == len(block) or (len(block) == 65536 and length in (0, 65535)))


def _was_emptied(block: bytes) -> bool:
    """Tell whether such a block had names, all of which are gone, and is none of an index.

    Where tune2fs gave a file system its sums it left them without, and the kernel takes them for what they are. Older
    kernels leave the name in an entry that they remove; one of an index has none, and says how many there is room for.
    """
    room = (len(block) - _INDEX - 8) // 8
    has_name, entries = block[6:8] != bytes(2), _number_at(block, _INDEX)
    return (has_name or not entries) and entries & 0xFFFF != room and block[-12:-4] != _TAIL


def _begun(seed: int, number: int, raw: bytes) -> int:
    """Return the sum that those of an inode's blocks go on from: no other inode, and none before it, has the same."""
    return crc32c(seed, number.to_bytes(4, "little") + raw[0x64:0x68])


def _number_at(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def _crc16(data: bytes) -> int:
    """Return the sum of groups before there was metadata_csum. Source: Linux's lib/crc/crc16.c."""
    crc = 0xFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc
