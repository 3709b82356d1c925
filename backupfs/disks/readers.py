"""What reads file systems: our own readers, and for what these do not know the library's."""

from backupfs.disks import explorer, ext, xfs
from backupfs.disks.filesystem import Filesystem, Read


def open_filesystem(read: Read, size: int) -> Filesystem | None:
    """Return the file system in a volume; None if it holds none that is known. Raises: anything."""
    return ext.open_ext(read, size) or xfs.open_xfs(read, size) or explorer.open_filesystem(read, size)
