"""The free space of a file system: bytes of its volume that hold nothing that it would ever read.

The readers see hostile input, and run where those of files do. When in doubt, a byte is not free: what a reader does
not know, whatever was not unmounted, and what a reader cannot follow is in use as a whole. The ranges are proven before
they are used (usecases/image_free.py).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from backupfs.disks import free_space_btrfs, free_space_ext, free_space_fat, free_space_ntfs, free_space_xfs
from backupfs.disks.filesystem import Read

Ranges = Iterator[tuple[int, int]]


class FreeSpace(NamedTuple):
    """A file system whose free space can be told."""

    form: str
    ranges: Ranges  # (start, end) in the volume, in any order; raises Unreadable


# Each gives the free ranges, or None where the volume holds another file system, or raises Unreadable.
_READERS: tuple[tuple[str, Callable[[Read, int], Ranges | None]], ...] = (
    ("ext4", free_space_ext.free_ranges),
    ("xfs", free_space_xfs.free_ranges),
    ("btrfs", free_space_btrfs.free_ranges),
    ("ntfs", free_space_ntfs.free_ranges),
    ("vfat", free_space_fat.free_ranges),
)


def find_free_space(read: Read, size: int) -> FreeSpace | None:
    """Return the free space of the file system in a volume; None if there is none that is known. Raises: Unreadable."""
    for form, reader in _READERS:
        ranges = reader(read, size)
        if ranges is not None:
            return FreeSpace(form, ranges)
    return None
