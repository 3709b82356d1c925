"""What the kernel asks of the snapshots, answered from the view: thin handlers under one guard (guard.py)."""

import errno

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, StatvfsData

from backupfs.fuse.guard import GuardedOperations, guarded
from backupfs.view.filesystem import Attributes, SnapshotView
from backupfs.view.loading import Loader

# Three years stand for ever.
LASTING_S = 10**8
# Above the snapshots names come and go: the kernel asks for them again after this time. Together with the age of the
# list of snapshots it is how long a forgotten one can still be seen.
CHANGING_S = 1.0

_BLOCK = 4096
_LONGEST_NAME = 255


class SnapshotOperations(GuardedOperations):
    """The handlers."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, view: SnapshotView, loader: Loader, enforces_acls: bool = False) -> None:
        """Take the parts.

        enforces_acls: let the kernel read the ACLs of what it is to permit; without, it goes by modes alone.
        """
        super().__init__(loader, view.path_of)
        self.enable_acl = enforces_acls
        self._view = view
        # pyfuse3 copies what a handler returns before any other handler runs, so one object of each kind will do.
        self._attributes = EntryAttributes()
        self._attributes.st_blksize = _BLOCK
        self._absent = EntryAttributes()
        self._absent.st_ino = 0
        self._absent.entry_timeout = LASTING_S
        self._opened = FileInfo(keep_cache=True)
        self._asks_xattrs = not view.never_has_xattrs

    async def refresh(self) -> None:
        """Read the list of snapshots again."""
        if self._view.freshness is not None:
            await self._view.freshness.refreshed()

    # Answers.

    def _filled(self, found: Attributes) -> EntryAttributes:
        entry = self._attributes
        (
            entry.st_ino,
            entry.st_mode,
            entry.st_nlink,
            entry.st_uid,
            entry.st_gid,
            entry.st_rdev,
            entry.st_size,
            entry.st_blocks,
            mtime_ns,
            entry.st_ctime_ns,
            is_lasting,
        ) = found
        entry.st_mtime_ns = entry.st_atime_ns = mtime_ns
        entry.entry_timeout = entry.attr_timeout = LASTING_S if is_lasting else CHANGING_S
        return entry

    @guarded
    def lookup(self, parent_inode: int, name: bytes, _ctx: object) -> EntryAttributes:
        """Find a name; a name that no snapshot will ever have there is remembered as absent by the kernel."""
        found = self._view.lookup(parent_inode, name)
        return self._absent if found is None else self._filled(found)

    @guarded
    def getattr(self, inode: int, _ctx: object) -> EntryAttributes:
        """Give the attributes of an inode."""
        return self._filled(self._view.attributes(inode))

    @guarded
    def opendir(self, inode: int, _ctx: object) -> int:
        """Give the handle that `readdir` gets."""
        return self._view.open_directory(inode)

    @guarded
    def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Reply a window of a directory; what goes wrong behind its first entry is for the next window to say."""
        reply, filled = pyfuse3.readdir_reply, self._filled
        replied = False
        try:
            for name, found, following in self._view.entries(fh, start_id):
                if not reply(token, name, filled(found), following):
                    return
                replied = True
        except Exception:
            if not replied:
                raise

    @guarded
    def releasedir(self, fh: int) -> None:
        """Take back a handle."""
        self._view.close_directory(fh)

    @guarded
    def readlink(self, inode: int, _ctx: object) -> bytes:
        """Give a link's target."""
        return self._view.target(inode)

    @guarded
    def open(self, inode: int, _flags: int, _ctx: object) -> FileInfo:
        """Give the inode as handle; what the kernel has cached of the file is still true."""
        self._opened.fh = inode
        return self._opened

    @guarded
    def read(self, fh: int, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]
        """Give bytes of a file."""
        return self._view.read(fh, off, size)

    @guarded
    def flush(self, _fh: int) -> None:
        """Answer once that there is nothing to flush, ever."""
        raise FUSEError(errno.ENOSYS)

    @guarded
    def release(self, fh: int) -> None:
        """Take back a handle."""
        self._view.close_file(fh)

    @guarded
    def access(self, _inode: int, _mode: int, _ctx: object) -> bool:
        """Answer once that the kernel is not to ask."""
        raise FUSEError(errno.ENOSYS)

    @guarded
    def getxattr(self, inode: int, name: bytes, _ctx: object) -> bytes:
        """Give one extended attribute."""
        if not self._asks_xattrs:
            raise FUSEError(errno.ENOSYS)
        for known, value in self._view.xattrs(inode):
            if known == name:
                return value
        raise FUSEError(errno.ENODATA)

    @guarded
    def listxattr(self, inode: int, _ctx: object) -> list[bytes]:
        """Give the names of all extended attributes."""
        if not self._asks_xattrs:
            raise FUSEError(errno.ENOSYS)
        return [name for name, _ in self._view.xattrs(inode)]

    @guarded
    def statfs(self, _ctx: object) -> StatvfsData:
        """Give the stored size of the repository; nothing is free."""
        data = StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK
        data.f_blocks = -(-self._view.size // _BLOCK)
        data.f_namemax = _LONGEST_NAME
        return data

    async def forget(self, _inode_list: object) -> None:
        """Do nothing: numbers carry no state."""
