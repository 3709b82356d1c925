"""Giving a file a name that was free, without taking it from another one.

Names that differ may be one name to a target: FAT, exFAT and NTFS take `A` for `a`. What is renamed there would replace
what was written a moment before, without a word.
"""

import ctypes
import errno
import os

_NO_REPLACE = 1  # RENAME_NOREPLACE
_TAKEN = "something else has this name: perhaps the target takes two names of the snapshot for one"

# Absent in C libraries that are old.
_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def rename_to_free(old: bytes, new: bytes, dir_fd: int) -> None:
    """Rename a file in an open directory. Raises: FileExistsError if something has the new name; OSError.

    What has it may be the same file again, which another restore put there meanwhile: that is replaced.
    """
    number = errno.ENOSYS
    if _renameat2 is not None:
        if _renameat2(dir_fd, old, dir_fd, new, _NO_REPLACE) == 0:
            return
        number = ctypes.get_errno()
    # Some file systems cannot do both at once: NFS, FUSE of old.
    if number not in (errno.EEXIST, errno.ENOSYS, errno.EINVAL):
        raise OSError(number, os.strerror(number))
    if not _is_free(new, dir_fd) and not _is_same(old, new, dir_fd):
        raise FileExistsError(errno.EEXIST, _TAKEN)
    os.rename(old, new, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)


def _is_free(name: bytes, dir_fd: int) -> bool:
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return True
    return False


def _is_same(old: bytes, new: bytes, dir_fd: int) -> bool:
    one, other = (os.stat(name, dir_fd=dir_fd, follow_symlinks=False) for name in (old, new))
    if (one.st_mode, one.st_size, one.st_mtime_ns) != (other.st_mode, other.st_size, other.st_mtime_ns):
        return False
    return os.fsdecode(new) in os.listdir(dir_fd)
