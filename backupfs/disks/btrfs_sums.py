"""The checksums of btrfs, of all kinds that there are.

Source: btrfs-progs' kernel-shared/uapi/btrfs_tree.h (btrfs_csum_type) and Linux's fs/btrfs/disk-io.c.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import zstandard

from backupfs.disks.crc32c import SEED, crc32c
from backupfs.disks.filesystem import Unreadable

_ROOM = 32  # of a sum, at the start of what has one in its head
# zstd ends what it packs with the lower half of its XXH64, which is hard to have elsewhere.
_ZSTD = zstandard.ZstdCompressor(
    compression_params=zstandard.ZstdCompressionParameters(
        compression_level=-100, window_log=10, write_checksum=True, threads=0
    )
)


class Sums(NamedTuple):
    """The sums of one file system."""

    size: int  # bytes of one in the tree of sums
    of: Callable[[bytes], bytes]  # what a sum begins with

    def is_whole(self, block: bytes) -> bool:
        """Tell whether what has its sum in its head is what was written."""
        return block.startswith(self.of(block[_ROOM:]))


def sums_of(superblock: bytes) -> Sums:
    """Return the sums that a superblock tells of. Raises: Unreadable."""
    kind = int.from_bytes(superblock[196:198], "little")
    if kind >= len(_KINDS):
        raise Unreadable(f"its checksums are of a kind that is not known ({kind})")
    return _KINDS[kind]


def _crc32c(data: bytes) -> bytes:
    return (crc32c(SEED, data) ^ SEED).to_bytes(4, "little")


def _xxhash(data: bytes) -> bytes:
    return _ZSTD.compress(data)[-4:]


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _blake2b(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


_KINDS = (Sums(4, _crc32c), Sums(8, _xxhash), Sums(32, _sha256), Sums(32, _blake2b))
