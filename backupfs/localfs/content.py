"""Writing the bytes of a file at an offset, with or without its long runs of zeros, and out to the disk."""

import ctypes
import os


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes at an offset. Raises: OSError."""
    with memoryview(data) as view:
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:] if done else view, offset + done)


def write_sparsely(fd: int, data: bytes | memoryview, offset: int, least_hole: int = 8 << 10) -> None:
    """Write bytes at an offset of a new file, leaving out long runs of zeros.

    The caller sets the file's length: a run at the end leaves no trace. Raises: OSError.
    """
    plain = bytes(data)
    zeros = bytes(least_hole)
    start = 0
    while True:
        at = plain.find(zeros, start)
        if at < 0:
            write_at(fd, memoryview(plain)[start:], offset + start)
            return
        write_at(fd, memoryview(plain)[start:at], offset + start)
        start = at + least_hole
        while plain.startswith(zeros, start):
            start += least_hole


def write_out(fd: int) -> None:
    """Have the file system of an open file write what only memory holds; an error shows where it is read back."""
    # Not `sync`, which waits for all file systems of the machine: one of them may not answer any more.
    ctypes.CDLL(None).syncfs(fd)
