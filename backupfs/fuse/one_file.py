"""Bytes as a file, for programs that read nothing else: a mount that is one file, and is not written to.

A process of its own answers the kernel. It ends with whoever wanted the file, and takes the mount with it.
"""

import contextlib
import errno
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import trio

from backupfs.errors import BackupfsError, MountError
from backupfs.forked import Line, end_with_parent, fork

_PATIENCE_S = 30.0
_BLOCK = 4096

Read = Callable[[int, int], bytes]  # (offset, length) → bytes, fewer at the end


class _Ready(NamedTuple):
    pass


class _Refused(NamedTuple):
    reason: str


@contextlib.contextmanager
def presented(read: Read, size: int) -> Iterator[str]:
    """Show bytes as a file; gives its path. It forks: call it before any thread. Raises: MountError."""
    if not os.path.exists("/dev/fuse"):
        raise MountError("there is no /dev/fuse")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise MountError("there is no fusermount3: install the package fuse3")
    with tempfile.TemporaryDirectory(prefix="backupfs-", ignore_cleanup_errors=True) as folder:
        path = os.path.join(folder, "volume.raw")
        with open(path, "xb"):
            pass
        process = fork(lambda line: _serve(line, read, size, path), lambda error: _Refused(str(error)), [])
        try:
            answer = next(process.messages(_PATIENCE_S, (_Ready, _Refused)), _Refused("its server ended"))
            if isinstance(answer, _Refused):
                raise MountError(answer.reason)
            yield path
        except TimeoutError:
            raise MountError("a mount of it does not come about") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
            process.wait()


def _serve(line: Line, read: Read, size: int, path: str) -> None:
    # Asked to end, and not killed on the spot: it has a mount to take away.
    end_with_parent(signal.SIGTERM)
    trio.run(_answer, line, read, size, path)


async def _answer(line: Line, read: Read, size: int, path: str) -> None:
    import pyfuse3

    class OneFile(pyfuse3.Operations):
        """The file is the root itself."""

        async def getattr(self, inode: int, _ctx: object = None) -> pyfuse3.EntryAttributes:
            if inode != pyfuse3.ROOT_INODE:
                raise pyfuse3.FUSEError(errno.ENOENT)
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = inode
            entry.st_mode = stat.S_IFREG | 0o400
            entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
            entry.st_size = size
            entry.st_blksize, entry.st_blocks = _BLOCK, -(-size // 512)
            entry.entry_timeout = entry.attr_timeout = 3600.0
            return entry

        async def open(self, inode: int, _flags: int, _ctx: object = None) -> pyfuse3.FileInfo:
            return pyfuse3.FileInfo(fh=inode, keep_cache=True)

        async def read(self, _fh: int, offset: int, length: int) -> bytes:
            try:
                return read(offset, length)
            except BackupfsError as error:
                raise pyfuse3.FUSEError(errno.EIO) from error

    try:
        pyfuse3.init(OneFile(), path, {"ro", "nosuid", "nodev", "fsname=backupfs"})
    except RuntimeError as error:
        raise MountError(f"it cannot be mounted ({error})") from error
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(_end_on_signal)
            line.send(_Ready())
            await pyfuse3.main()
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=True)


async def _end_on_signal(task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
    import pyfuse3

    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            pyfuse3.terminate()
