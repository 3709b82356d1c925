"""What the kernel asks of a scratch copy of disks: thin handlers under the guard (guard.py).

The files alias each other, a partition the disk that it is on. The kernel keeps what it read of a file until that is
opened again: who writes to one and then opens another sees what was written.
"""

import errno
import os
import stat
from typing import NoReturn

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, StatvfsData

from backupfs.fuse.guard import GuardedOperations, guarded
from backupfs.view.loading import Loader
from backupfs.view.scratch import ReadOnly, ScratchAttributes, ScratchDisks

_BLOCK = 4096
_LONGEST_NAME = 255
_LASTING_S = 10**8


class ScratchOperations(GuardedOperations):
    """The handlers."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, disks: ScratchDisks, loader: Loader) -> None:
        """Take the parts."""
        super().__init__(loader, disks.path_of)
        self._disks = disks

    def _filled(self, found: ScratchAttributes) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = found.inode
        entry.st_mode = stat.S_IFDIR | 0o700 if found.is_directory else stat.S_IFREG | 0o400 | found.is_writable << 7
        entry.st_nlink = 2 if found.is_directory else 1
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_size = found.size
        entry.st_blksize = _BLOCK
        entry.st_blocks = -(-found.size // 512)
        entry.st_mtime_ns = entry.st_atime_ns = entry.st_ctime_ns = found.time_ns
        # The map of changes grows; nothing else does.
        entry.entry_timeout = _LASTING_S
        entry.attr_timeout = _LASTING_S if found.is_directory or found.is_writable else 0
        return entry

    @guarded
    def lookup(self, parent_inode: int, name: bytes, _ctx: object) -> EntryAttributes:
        """Find a name."""
        return self._filled(self._disks.lookup(parent_inode, name))

    @guarded
    def getattr(self, inode: int, _ctx: object) -> EntryAttributes:
        """Give the attributes of an inode."""
        return self._filled(self._disks.attributes(inode))

    @guarded
    def setattr(
        self, inode: int, attr: EntryAttributes, fields: pyfuse3.SetattrFields, _fh: object, _ctx: object
    ) -> EntryAttributes:
        """Keep everything as it is; a disk has one size."""
        found = self._disks.attributes(inode)
        if fields.update_size and attr.st_size != found.size:
            raise FUSEError(errno.EPERM)
        return self._filled(found)

    @guarded
    def opendir(self, inode: int, _ctx: object) -> int:
        """Give the inode as handle."""
        return inode

    @guarded
    def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Reply a window of a directory."""
        for name, found, following in self._disks.entries(fh, start_id):
            if not pyfuse3.readdir_reply(token, name, self._filled(found), following):
                return

    @guarded
    def open(self, inode: int, flags: int, _ctx: object) -> FileInfo:
        """Give the inode as handle."""
        found = self._disks.attributes(inode)
        if flags & os.O_ACCMODE != os.O_RDONLY and not found.is_writable:
            raise FUSEError(errno.EACCES)
        return FileInfo(fh=inode, direct_io=not found.is_writable, keep_cache=False)

    @guarded
    def read(self, fh: int, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]
        """Give bytes of a file."""
        return self._disks.read(fh, off, size)

    @guarded
    def write(self, fh: int, off: int, buf: bytes) -> int:
        """Take bytes."""
        try:
            written = self._disks.write(fh, off, buf)
        except ReadOnly:
            raise FUSEError(errno.EROFS) from None
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        if not written and buf:
            raise FUSEError(errno.ENOSPC)
        return written

    @guarded
    def flush(self, _fh: int) -> None:
        """Answer once that there is nothing to flush, ever."""
        raise FUSEError(errno.ENOSYS)

    @guarded
    def fsync(self, _fh: int, _datasync: bool) -> None:
        """Do nothing: what is thrown away need not last."""

    @guarded
    def access(self, _inode: int, _mode: int, _ctx: object) -> bool:
        """Answer once that the kernel is not to ask."""
        raise FUSEError(errno.ENOSYS)

    @guarded
    def getxattr(self, _inode: int, _name: bytes, _ctx: object) -> bytes:
        """Answer once that there are none."""
        raise FUSEError(errno.ENOSYS)

    @guarded
    def listxattr(self, _inode: int, _ctx: object) -> list[bytes]:
        """Answer once that there are none."""
        raise FUSEError(errno.ENOSYS)

    @guarded
    def statfs(self, _ctx: object) -> StatvfsData:
        """Say nothing of space: the files have all that they will ever have."""
        data = StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK
        data.f_namemax = _LONGEST_NAME
        return data

    async def _refuse(self, *_arguments: object) -> NoReturn:
        raise FUSEError(errno.EPERM)

    # There are these files and no others.
    create = mknod = mkdir = symlink = link = rename = unlink = rmdir = _refuse  # type: ignore[assignment]

    async def forget(self, _inode_list: object) -> None:
        """Do nothing: numbers carry no state."""
