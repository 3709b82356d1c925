"""Freezing the file systems on disks for as long as these are read, and thawing them whatever happens.

A process of its own watches: it thaws when this one is there no more, even if it was killed. A frozen file system makes
whoever writes to it wait, so none is frozen that a run itself has to write to.
Source: fsfreeze(8); fs/ioctl.c of Linux.
"""

import contextlib
import errno
import fcntl
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn

from backupfs.disks.devices import beneath, made_of
from backupfs.disks.source import DiskSource
from backupfs.errors import SourceError, shown
from backupfs.localfs.mounts import Mount, read_mounts, visible_mounts
from backupfs.repository.repository import Repository
from backupfs.usecases.events import Remark, Report

_FREEZE, _THAW = 0xC0045877, 0xC0045878
_THAWED = b"t"
_INSTEAD = (
    "image a snapshot of the volume instead (--before 'lvcreate -s …' --after 'lvremove …'), or keep what a run "
    "writes on another file system"
)


class _Mounted(NamedTuple):
    """A file system that is mounted."""

    device: int
    path: bytes
    form: str


@contextlib.contextmanager
def frozen(disks: Sequence[DiskSource], repository: Repository, report: Report) -> Iterator[None]:
    """Freeze the file systems on the devices among some disks while what is inside runs.

    It forks: call it before any thread. Raises: SourceError if one cannot be frozen, with none frozen any more.
    """
    found = _mounted_on(disks)
    for mounted in found:
        _require_unused(mounted, repository)
    if not found:
        report(Remark("nothing is frozen: no file system on the disks is mounted"))
        yield
        return
    fds: list[int] = []
    not_ours: list[int] = []
    # A module that is loaded late would be written as bytecode, perhaps onto what is frozen.
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        for mounted in found:
            fds.append(_open(mounted))
        with _watched(fds) as dismiss:
            try:
                for fd, mounted in zip(fds, found, strict=True):
                    _freeze(fd, mounted, not_ours)
                names = ", ".join(shown(mounted.path) for mounted in found)
                report(Remark(f"frozen while the disks are read: {names}"))
                yield
            finally:
                # All of them: an interrupt may come just after one was frozen.
                for fd in reversed(fds):
                    if fd not in not_ours:
                        _thaw(fd)
                dismiss()
    finally:
        sys.dont_write_bytecode = writes
        for fd in fds:
            os.close(fd)


def _mounted_on(disks: Sequence[DiskSource]) -> list[_Mounted]:
    """Return the file systems with bytes on any of the disks, each once, those that were mounted last first."""
    devices = {number for source in disks if source.device is not None for number in made_of(source.device)}
    found: dict[int, _Mounted] = {}
    for mount in visible_mounts(read_mounts()):
        device = _device_of(mount)
        if device in devices:
            found.setdefault(device, _Mounted(device, mount.mount_point, mount.fstype))
    return list(reversed(found.values()))


def _device_of(mount: Mount) -> int:
    """Return the number of the block device beneath a mount; of btrfs the one that its source names."""
    if mount.source.startswith(b"/"):
        with contextlib.suppress(OSError):
            status = os.stat(mount.source)
            if stat.S_ISBLK(status.st_mode):
                return status.st_rdev
    return os.makedev(*mount.device)


def _require_unused(mounted: _Mounted, repository: Repository) -> None:
    """Refuse a file system that this run has to write to. Raises: SourceError."""
    for what, path in _written(repository):
        if mounted.device in _devices_beneath(path):
            raise SourceError(
                f"{shown(mounted.path)} cannot be frozen: {what} is on it ({shown(path)}), and a run that waits for "
                f"itself never ends; {_INSTEAD}"
            )


def _written(repository: Repository) -> Iterator[tuple[str, bytes]]:
    """Yield (what, path) of all that a run writes to."""
    if repository.store.folder is not None:
        yield "the repository", os.fsencode(repository.store.folder)
    for what, folder in (("the cache", repository.local.cache), ("the state", repository.local.state)):
        if folder is not None:
            yield what, bytes(folder)
    yield "the folder for temporary files", os.fsencode(tempfile.gettempdir())
    for fd, what in ((1, "the output"), (2, "the log")):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.fstat(fd).st_mode):
                yield what, os.fsencode(os.readlink(f"/proc/self/fd/{fd}"))


def _devices_beneath(path: bytes) -> set[int]:
    """Return the devices that have to take what is written at a path, through loop devices too."""
    found: set[int] = set()
    waiting = [path]
    mounts = visible_mounts(read_mounts())
    while waiting:
        real = os.path.realpath(waiting.pop())
        above = [mount for mount in mounts if _is_below(real, mount.mount_point)]
        if above:
            device = _device_of(max(above, key=lambda mount: len(mount.mount_point)))
            if device not in found:
                found.add(device)
                waiting += beneath(device)
    return found


def _is_below(path: bytes, folder: bytes) -> bool:
    return path == folder or path.startswith(folder.rstrip(b"/") + b"/")


def _open(mounted: _Mounted) -> int:
    try:
        return os.open(mounted.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"{shown(mounted.path)} cannot be frozen: {error.strerror}") from error


def _freeze(fd: int, mounted: _Mounted, not_ours: list[int]) -> None:
    """Freeze a file system.

    not_ours: gets it if somebody else froze it.
    Raises: SourceError.
    """
    try:
        fcntl.ioctl(fd, _FREEZE, 0)
    except OSError as error:
        why = {
            errno.EBUSY: "it is frozen already: leave --freeze out, or thaw it",
            errno.EOPNOTSUPP: f"{mounted.form} cannot be: unmount it, or {_INSTEAD}",
            errno.EPERM: "that takes root",
        }.get(error.errno or 0, error.strerror)
        if error.errno == errno.EBUSY:
            not_ours.append(fd)
        raise SourceError(f"{shown(mounted.path)} cannot be frozen: {why}") from error


def _thaw(fd: int) -> None:
    # EINVAL: it is not frozen, which is what is wanted.
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _THAW, 0)


@contextlib.contextmanager
def _watched(fds: Sequence[int]) -> Iterator[Callable[[], None]]:
    """Have file systems thawed by another process when what is inside ends, however it does, but for one thing.

    Gives what tells that process that they are thawed.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    # An interrupt that comes in the middle of a fork is lost, or ends the wrong one.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        pid = os.fork()
        if pid == 0:
            _watch(reading, writing, fds)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.close(reading)
    try:
        yield lambda: _tell(writing)
    finally:
        os.close(writing)
        os.waitpid(pid, 0)


def _tell(writing: int) -> None:
    os.write(writing, _THAWED)


def _watch(reading: int, writing: int, fds: Sequence[int]) -> NoReturn:
    """Be the process that watches; the signals that end others are blocked here."""
    try:
        os.setsid()
        os.close(writing)
        # The end of the line is the end of the other process, and of those that it forked.
        if os.read(reading, 1) != _THAWED:
            for fd in fds:
                _thaw(fd)
    finally:
        os._exit(0)
