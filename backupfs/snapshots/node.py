"""One directory entry, and its fixed-size row in a tree page."""

import stat
import struct
from dataclasses import dataclass

from backupfs.snapshots.content import Content

# mode, uid, gid, nlink, inode, size, mtime (s, ns), ctime (s, ns). Not st_dev, not atime: they change by themselves.
STAT_ROW = struct.Struct("<IIIIQQqIqI")
NANOSECONDS = 10**9

# Flags of a node.
RACY = 1  # it may have changed since without its times showing it: read it again next time
CHANGED_WHILE_READ = 2  # its content is not of one moment
INCOMPLETE = 4  # a directory that has more than its tree says: left out unnamed, or not readable

Xattrs = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One entry of a directory, with everything that a restore needs."""

    name: bytes
    mode: int  # type and permissions, as st_mode
    uid: int
    gid: int
    nlink: int
    inode: int
    size: int
    mtime_s: int
    mtime_part_ns: int
    ctime_s: int
    ctime_part_ns: int
    content: Content  # of a file; the tree's id of a directory; the target of a symlink; major|minor of a device
    flags: int = 0
    owner: bytes = b""  # the user's name where the source had one
    group: bytes = b""
    xattrs: Xattrs = ()
    filesystem: int = 0  # ordinal of its filesystem in the snapshot; with the inode it identifies a hardlinked file

    @property
    def row(self) -> bytes:
        """Its stat row."""
        return STAT_ROW.pack(
            self.mode, self.uid, self.gid, self.nlink, self.inode, self.size,
            self.mtime_s, self.mtime_part_ns, self.ctime_s, self.ctime_part_ns,
        )  # fmt: skip

    @property
    def mtime_ns(self) -> int:
        """The modification time in nanoseconds since 1970; negative before."""
        return self.mtime_s * NANOSECONDS + self.mtime_part_ns

    @property
    def ctime_ns(self) -> int:
        """The change time in nanoseconds since 1970; negative before."""
        return self.ctime_s * NANOSECONDS + self.ctime_part_ns

    @property
    def is_directory(self) -> bool:
        """Tell whether `content` is a tree's id."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Tell whether `content` is file content."""
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Tell whether `content` is a link's target."""
        return stat.S_ISLNK(self.mode)

    @property
    def is_hardlinked(self) -> bool:
        """Tell whether other names of the snapshot may lead to the same file."""
        return self.nlink > 1 and not stat.S_ISDIR(self.mode)

    @property
    def device(self) -> tuple[int, int]:
        """The (major, minor) of a device file."""
        content = self.content
        assert isinstance(content, bytes)
        return (int.from_bytes(content[:4], "little"), int.from_bytes(content[4:8], "little"))


def encode_device(major: int, minor: int) -> bytes:
    """Return the content of a device file's node."""
    return major.to_bytes(4, "little") + minor.to_bytes(4, "little")
