"""Reading the files of this machine: by descriptor and name, so that no path is too long and no symlink is followed."""

import errno
import grp
import os
import pwd
from collections.abc import Callable, Iterator
from functools import lru_cache

# Without O_NONBLOCK the opening of a fifo that took a file's place would wait for a writer for ever.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
# How a directory is opened: never by way of a symlink.
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Only root and the owner may ask not to touch the access time.
_NO_ATIME = os.O_NOATIME if hasattr(os, "O_NOATIME") and os.geteuid() == 0 else 0
FILE_FLAGS = _FLAGS | _NO_ATIME


def open_file(name: bytes, dir_fd: int) -> int:
    """Open a regular file for reading. Raises: OSError."""
    return os.open(name, FILE_FLAGS, dir_fd=dir_fd)


def open_directory(name: bytes, dir_fd: int | None) -> int:
    """Open a directory; not through a symlink. Raises: OSError."""
    return os.open(name, DIRECTORY_FLAGS | _NO_ATIME, dir_fd=dir_fd)


def list_names(fd: int) -> list[bytes]:
    """Return the names in an open directory in byte order. Raises: OSError."""
    listed = os.listdir(fd)
    # Encoded in one go: Python lists a descriptor as text, and a call for each name would cost more than the listing.
    return sorted(os.fsencode("\0".join(listed)).split(b"\0")) if listed else []


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the runs of data in a file, in order; what is between them are holes.

    A file system that cannot tell gives one run.
    """
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            yield position, size
            return
        if start >= size:
            return
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, end
        position = end


def range_reader(fd: int, start: int, end: int) -> Callable[[memoryview], int]:
    """Return a function that fills a buffer with the next bytes of [start, end) and returns how many it gave."""
    position = start

    def read_into(buffer: memoryview) -> int:
        nonlocal position
        wanted = min(len(buffer), end - position)
        count = os.preadv(fd, [buffer[:wanted]], position) if wanted else 0
        position += count
        return count

    return read_into


def read_xattrs(target: int | bytes, follow: bool = True) -> tuple[tuple[bytes, bytes], ...]:
    """Return the extended attributes that the caller may read, in order of names, ACLs and capabilities among them.

    target: a descriptor, or the path of something that cannot be opened.
    A file system without them gives none. Raises: OSError.
    """
    try:
        names = os.listxattr(target, follow_symlinks=follow)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EPERM):
            return ()
        raise
    if not names:
        return ()
    found = []
    for name in names:
        try:
            found.append((os.fsencode(name), os.getxattr(target, name, follow_symlinks=follow)))
        except OSError as error:
            # It went away since, or is not for this user (trusted.*, security.* of others).
            if error.errno not in (errno.ENODATA, errno.EPERM, errno.EACCES, errno.ENOTSUP):
                raise
    return tuple(sorted(found))


def path_in(dir_fd: int, name: bytes) -> bytes:
    """Return a short path of an entry of an open directory, for calls that take no descriptor."""
    return b"/proc/self/fd/%d/%s" % (dir_fd, name)


@lru_cache(maxsize=4096)
def owner_name(uid: int) -> bytes:
    """Return a user's name, or nothing."""
    try:
        return os.fsencode(pwd.getpwuid(uid).pw_name)
    except (KeyError, OverflowError):
        return b""


@lru_cache(maxsize=4096)
def group_name(gid: int) -> bytes:
    """Return a group's name, or nothing."""
    try:
        return os.fsencode(grp.getgrgid(gid).gr_name)
    except (KeyError, OverflowError):
        return b""
