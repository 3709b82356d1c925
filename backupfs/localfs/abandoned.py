"""Temporary files of restores that died, and the lock that tells them from those of a restore that runs.

A restore holds a lock on `.backupfs-TOKEN-lock` in its target, with all its processes, and its temporary files are
`.backupfs-TOKEN-…`. The kernel lets go of the lock when the last of the processes ends, however it ends. So whoever
gets the lock of another restore knows that nobody writes to its files any more.
Threading: one thread at a time, the target's.
"""

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterator

from backupfs.localfs.directories import Directory
from backupfs.localfs.writing import TEMPORARY_PREFIX, Target

_LOCK = re.compile(re.escape(TEMPORARY_PREFIX) + rb"[0-9a-f]{12}-lock")
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_EXISTING = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_TRIES = 3


class RunLock:
    """Shows other restores that this one runs, until `release`, and cleans up after those that do not."""

    def __init__(self, target: Target) -> None:
        """Take the lock, where the target's file system has such a thing; call it before other processes are forked."""
        self._target = target
        self._root_fd = os.dup(target.fd(target.root))
        self._fd = -1
        for _ in range(_TRIES):
            with _unchanged_times(self._root_fd):
                self._fd = self._take(target.temporary_prefix + b"lock")
            if self._fd >= 0:
                return
            # Another restore met the file before it was locked: it takes it for a dead one's.
            target.renew_temporary_prefix()

    def _take(self, name: bytes) -> int:
        try:
            fd = os.open(name, _NEW, 0o600, dir_fd=self._root_fd)
        except OSError:
            return -1
        if _is_locked(fd):
            return fd
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._root_fd)
        return -1

    def remove_abandoned(self) -> int:
        """Remove temporary files below the target whose writers are all dead; return how many."""
        names = self._target.root.names
        dead = {name: fd for name in names if _LOCK.fullmatch(name) and (fd := self._lock_of_dead(name)) >= 0}
        removed = 0
        try:
            if dead:
                removed, complete = self._remove_below([name.removesuffix(b"lock") for name in dead])
                if complete:
                    with _unchanged_times(self._root_fd):
                        for name in dead:
                            os.unlink(name, dir_fd=self._root_fd)
        finally:
            # Only now: until its file is gone, its name must not become somebody's who lives.
            for fd in dead.values():
                os.close(fd)
        return removed

    def _lock_of_dead(self, name: bytes) -> int:
        """Return the descriptor of another restore's lock, which this process now holds; -1 if that one runs."""
        try:
            fd = os.open(name, _EXISTING, dir_fd=self._root_fd)
        except OSError:
            return -1
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and _is_locked(fd):
            return fd
        os.close(fd)
        return -1

    def remove_own(self) -> None:
        """Remove what processes of this restore left that were killed; all have ended."""
        self._remove_below([self._target.temporary_prefix])

    def _remove_below(self, prefixes: list[bytes]) -> tuple[int, bool]:
        """Remove files by the starts of their names, on the target's file system; return how many, and if all went."""
        target, starts = self._target, tuple(prefixes)
        device = os.fstat(self._root_fd).st_dev
        removed, complete = 0, True
        stack = [target.root]
        while stack:
            directory = stack.pop()
            try:
                fd = target.fd(directory)
                status = os.fstat(fd)
                if status.st_dev != device:
                    continue
                with os.scandir(fd) as entries:
                    found = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]
                left = [name for name, is_directory in found if name.startswith(starts) and not is_directory]
                with _unchanged_times(fd) if left else contextlib.nullcontext():
                    for name in left:
                        if not _LOCK.fullmatch(name):
                            os.unlink(name, dir_fd=fd)
                            removed += 1
            except OSError:
                complete = False
                continue
            stack += [Directory(directory, name) for name, is_directory in found if is_directory]
        target.close_directories()
        return removed, complete

    def release(self) -> None:
        """Let go of the lock and its file."""
        if self._fd >= 0:
            with _unchanged_times(self._root_fd), contextlib.suppress(OSError):
                self._unlink_lock()
            os.close(self._fd)
        os.close(self._root_fd)

    def _unlink_lock(self) -> None:
        name = self._target.temporary_prefix + b"lock"
        try:
            os.unlink(name, dir_fd=self._root_fd)
        except PermissionError:
            # The target has its mode by now, and that may keep its owner from writing.
            mode = stat.S_IMODE(os.fstat(self._root_fd).st_mode)
            os.fchmod(self._root_fd, mode | 0o700)
            try:
                os.unlink(name, dir_fd=self._root_fd)
            finally:
                os.fchmod(self._root_fd, mode)


def _is_locked(fd: int) -> bool:
    """Take the lock on a file; False where another holds it, or the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    # Whoever held it before may have removed it.
    return os.fstat(fd).st_nlink > 0


@contextlib.contextmanager
def _unchanged_times(directory_fd: int) -> Iterator[None]:
    """Leave the times of a directory as they are while something in it comes or goes that is none of the user's."""
    before = os.fstat(directory_fd)
    try:
        yield
    finally:
        # Only its owner may; for others it was the restore that changed it.
        with contextlib.suppress(OSError):
            os.utime(directory_fd, ns=(before.st_atime_ns, before.st_mtime_ns))
