"""Removing what is in the way below a target, or has no place there: a file, or a tree of them.

What is kept, or cannot go, stays with all the directories above it. Directories that keep their owner out are opened to
him, as for writing. Threading: as the target that is removed from.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from backupfs.localfs.directories import Directory
from backupfs.localfs.reading import DIRECTORY_FLAGS
from backupfs.localfs.writing import Target


class Removal(NamedTuple):
    """What became of something that was to go."""

    gone: int  # entries
    stays: bool  # something of it is there still: kept, or because of an error
    error: OSError | None  # the first that hindered


def is_empty(target: Target, directory: Directory, name: bytes) -> bool:
    """Tell whether a directory has nothing in it, or cannot be looked into. Raises: OSError."""
    try:
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=target.fd(directory))
    except PermissionError:
        return True
    try:
        return not os.listdir(fd)
    finally:
        os.close(fd)


def remove_tree(
    target: Target, directory: Directory, name: bytes, kept: Callable[[bytes, bool], bool], dry_run: bool = False
) -> Removal:
    """Remove a file, or a directory with everything in it that can go, on its own file system.

    kept: (path below the target with a leading slash, is a directory) → leave it alone. A directory that keeps
    something stays, too.
    dry_run: only tell what would be.
    Raises: OSError if it is not there.
    """
    relative = target.path_of(directory, name)[len(target.path.rstrip(b"/")) :]
    above = target.fd(directory)
    status = os.stat(name, dir_fd=above, follow_symlinks=False)
    is_directory = stat.S_ISDIR(status.st_mode)
    if kept(relative, is_directory):
        return Removal(0, True, None)
    if not is_directory:
        error = _unlink_error(target, directory, name, dry_run)
        return Removal(0, True, error) if error else Removal(1, False, None)
    removed, first = 0, None
    device = os.fstat(above).st_dev
    holders: set[Directory] = set()  # directories that something stays in, with all above
    stack = [(Directory(directory, name), relative, False)]
    while stack:
        current, at, emptied = stack.pop()
        assert current.parent is not None
        if not emptied:
            try:
                found = _entries(target, current, device, dry_run)
            except OSError as raised:
                holders.add(current)
                first, found = first or raised, []
            stack.append((current, at, True))
            for child, is_directory in found:
                path = at + b"/" + child
                if kept(path, is_directory):
                    holders.add(current)
                elif is_directory:
                    stack.append((Directory(current, child), path, False))
                elif error := _unlink_error(target, current, child, dry_run):
                    holders.add(current)
                    first = first or error
                else:
                    removed += 1
            continue
        goes = current not in holders
        if goes:
            goes, error = _remove_empty(target, current, dry_run)
            first = first or error
        if goes:
            target.access.forget_former_mode(current)
            removed += 1
        else:
            holders.add(current.parent)
            with contextlib.suppress(OSError):
                target.give_mode_back(current)
        target.leave(current)
    return Removal(removed, directory in holders, first)


def _entries(target: Target, directory: Directory, device: int, dry_run: bool) -> list[tuple[bytes, bool]]:
    """Return (name, is a directory) of what is in a directory that is to be removed. Raises: OSError."""
    assert directory.parent is not None
    if not target.access.let_owner_in(directory, target.fd(directory.parent)):
        return []
    fd = target.fd(directory)
    if os.fstat(fd).st_dev != device:
        raise OSError(errno.EBUSY, "another file system is mounted in it")
    directory.closed = dry_run and target.access.refuses(fd)
    with os.scandir(fd) as entries:
        return [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]


def _unlink_error(target: Target, directory: Directory, name: bytes, dry_run: bool) -> OSError | None:
    """Remove what is no directory; return what hinders that, or would."""
    if dry_run:
        return _closed_error() if directory.closed else None
    try:
        os.unlink(name, dir_fd=target.fd(directory))
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


def _remove_empty(target: Target, directory: Directory, dry_run: bool) -> tuple[bool, OSError | None]:
    """Remove a directory; return (whether it went, what hindered that). Something may have come into it."""
    assert directory.parent is not None
    if dry_run:
        return not directory.parent.closed, _closed_error() if directory.parent.closed else None
    try:
        os.rmdir(directory.name, dir_fd=target.fd(directory.parent))
    except OSError as error:
        return False, None if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else error
    return True, None


def _closed_error() -> OSError:
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES))
