"""Setting what a file has beside its bytes: owner, mode, times, attributes and ACLs.

Nothing here follows a symlink. What cannot be set is told as a problem and the rest is set all the same; only an error
that every other file would meet is raised.
"""

import contextlib
import copy
import errno
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from backupfs.errors import shown
from backupfs.localfs.fatal import is_fatal
from backupfs.localfs.reading import path_in
from backupfs.snapshots.node import Xattrs

ACCESS_ACL, DEFAULT_ACL = "system.posix_acl_access", "system.posix_acl_default"
_CHANGE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


class Metadata(NamedTuple):
    """What a file has beside its bytes."""

    mode: int  # type and permissions
    owner: int  # ids of this machine
    group: int
    mtime_ns: int | None  # None: not recorded
    xattrs: Xattrs = ()


class MetadataSetter:
    """Sets metadata as this user may."""

    def __init__(self, is_root_user: bool, own: tuple[int, int], problem: Callable[[bytes, str], None]) -> None:
        """Begin with nothing set.

        own: the owner and group of what this process makes.
        problem: takes (path, reason) of an attribute that could not be set.
        """
        self._is_root_user = is_root_user
        self._own = own
        self._groups = frozenset(os.getgroups()) | {own[1]}  # that this user may give his files
        self._problem = problem
        self.owners_kept = False  # ownership was recorded and not set, as only root may

    def for_another_process(self, problem: Callable[[bytes, str], None]) -> "MetadataSetter":
        """Return one for a process that was just forked."""
        other = copy.copy(self)
        other._problem = problem
        return other

    def apply(self, fd: int, metadata: Metadata, path: bytes, own: tuple[int, int]) -> None:
        """Set everything on an open file or directory; what cannot be set is told to `problem`.

        own: the owner that it has.
        """
        mode = metadata.mode & 0o7777
        if (metadata.owner, metadata.group) != own:
            mode = self.set_owner(fd, metadata, own, lambda: path)
        # In this order: chown takes capabilities away, and without write permission a user.* attribute is refused.
        for name, value in metadata.xattrs:
            self._set_xattr(fd, name, value, path)
        os.fchmod(fd, mode)
        if metadata.mtime_ns is not None:
            os.utime(fd, ns=(metadata.mtime_ns, metadata.mtime_ns))

    def set_owner(self, fd: int, metadata: Metadata, own: tuple[int, int], path: Callable[[], bytes]) -> int:
        """Set the owner and return the mode to set: set-id bits must never serve an owner they were not meant for."""
        mode = metadata.mode & 0o7777
        if self._is_root_user:
            try:
                os.fchown(fd, metadata.owner, metadata.group)
                return mode
            except OSError as error:
                if is_fatal(error):
                    raise
                self._problem(path(), f"its owner could not be set: {error.strerror}")
                status = os.fstat(fd)
                own = (status.st_uid, status.st_gid)
        else:
            if own == (-1, -1):
                status = os.fstat(fd)
                own = (status.st_uid, status.st_gid)
            if self._may_give_group(metadata, own[1]):
                with contextlib.suppress(PermissionError):  # the file is another's
                    os.fchown(fd, -1, metadata.group)
                    own = (own[0], metadata.group)
            self.owners_kept |= own != (metadata.owner, metadata.group)
        if metadata.owner != own[0]:
            mode &= ~stat.S_ISUID
        if metadata.group != own[1] and not stat.S_ISDIR(metadata.mode):
            mode &= ~stat.S_ISGID
        return mode

    def _may_give_group(self, metadata: Metadata, group: int) -> bool:
        """Tell whether the group that is wanted is another than what the file has, and one of this user's."""
        return metadata.group != group and metadata.group in self._groups

    def apply_by_name(self, above: int, name: bytes, metadata: Metadata, path: bytes, inherits: bool) -> None:
        """Set everything on what must not be opened: symlinks, fifos, sockets, devices."""
        mode = metadata.mode & 0o7777
        if inherits or (metadata.owner, metadata.group) != self._own:
            if self._is_root_user:
                try:
                    os.chown(name, metadata.owner, metadata.group, dir_fd=above, follow_symlinks=False)
                except OSError as error:
                    if is_fatal(error):
                        raise
                    self._problem(path, f"its owner could not be set: {error.strerror}")
                    mode &= 0o1777
            else:
                group = os.lstat(path_in(above, name)).st_gid if inherits else self._own[1]
                if self._may_give_group(metadata, group):
                    os.chown(name, -1, metadata.group, dir_fd=above, follow_symlinks=False)
                    group = metadata.group
                if (metadata.owner, metadata.group) != (self._own[0], group):
                    self.owners_kept = True
                    mode &= 0o1777
        is_link = stat.S_ISLNK(metadata.mode)
        at = path_in(above, name)
        if inherits and not is_link:
            remove_xattr(at, ACCESS_ACL)
        if not is_link:
            change_mode(above, name, mode)
        for attribute, value in metadata.xattrs:
            self._set_xattr(at, attribute, value, path)
        if metadata.mtime_ns is not None:
            os.utime(name, ns=(metadata.mtime_ns, metadata.mtime_ns), dir_fd=above, follow_symlinks=False)

    def mend(
        self, above: int, name: bytes, status: os.stat_result, metadata: Metadata, path_of: Callable[[], bytes]
    ) -> None:
        """Bring what a file has beside its bytes up to date, where that differs.

        above: the descriptor of its directory. path_of: returns its path for messages.
        Raises: OSError.
        """
        if self._is_root_user:
            same_owner = (status.st_uid, status.st_gid) == (metadata.owner, metadata.group)
        else:
            same_owner = not self._may_give_group(metadata, status.st_gid)
        at = path_in(above, name)
        if (
            stat.S_IMODE(status.st_mode) == stat.S_IMODE(metadata.mode)
            and same_owner
            and _has_xattrs(at, metadata.xattrs)
            and not foreign_xattrs(at, metadata.xattrs)
        ):
            return
        path = path_of()
        own = (status.st_uid, status.st_gid)
        if not stat.S_ISREG(status.st_mode):
            remove_foreign_xattrs(at, metadata.xattrs)
            self.apply_by_name(above, name, metadata, path, own != self._own)
            return
        fd = self._open_to_change(above, name, status)
        if fd < 0:
            return
        try:
            remove_foreign_xattrs(fd, metadata.xattrs)
            self.apply(fd, metadata, path, own)
        finally:
            os.close(fd)

    def _set_xattr(self, at: int | bytes, name: bytes, value: bytes, path: bytes) -> None:
        follow = isinstance(at, int)
        try:
            os.setxattr(at, name, value, follow_symlinks=follow)
        except OSError as error:
            try:
                # Some are there by themselves, such as the label that a security module gives.
                if os.getxattr(at, name, follow_symlinks=follow) == value:
                    return
            except OSError:
                pass
            if is_fatal(error) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._problem(path, f"its attribute {shown(name)} could not be set: {error.strerror}")

    def _open_to_change(self, above: int, name: bytes, status: os.stat_result) -> int:
        """Open a file whose status is known, though its mode may keep its owner out; -1 if it is another by now.

        Its owner may read and write it from then on. Raises: OSError.
        """
        identity = (status.st_dev, status.st_ino)
        if not self._is_root_user and status.st_mode & 0o600 != 0o600 and status.st_uid == self._own[0]:
            change_mode(above, name, stat.S_IMODE(status.st_mode) | 0o600, identity)
        fd = os.open(name, _CHANGE_FLAGS, dir_fd=above)
        now = os.fstat(fd)
        if (now.st_dev, now.st_ino) != identity:
            os.close(fd)
            return -1
        return fd


def foreign_xattrs(at: int | bytes, wanted: Xattrs) -> list[str]:
    """Return the names of attributes that somebody set and the snapshot does not have; ACLs are among them.

    at: a descriptor, or the path of something that is not to be followed.
    """
    try:
        present = os.listxattr(at, follow_symlinks=isinstance(at, int))
    except OSError:
        return []
    if not present:
        return []
    names = {name for name, _ in wanted}
    return [
        name for name in present if name.startswith(("user.", "system.posix_acl_")) and os.fsencode(name) not in names
    ]


def remove_foreign_xattrs(at: int | bytes, wanted: Xattrs) -> None:
    """Remove attributes that somebody set and the snapshot does not have."""
    for name in foreign_xattrs(at, wanted):
        remove_xattr(at, name)


def remove_xattr(at: int | bytes, name: str) -> None:
    """Remove an attribute that may not be there."""
    try:
        os.removexattr(at, name, follow_symlinks=isinstance(at, int))
    except OSError:
        return


def change_mode(above: int, name: bytes, mode: int, identity: tuple[int, int] | None = None) -> None:
    """Set the mode of what has a name, unless it is another by now. Raises: OSError, also for a symlink."""
    # chmod by name would follow a symlink that took the file's place just now.
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    try:
        if identity is not None:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) != identity:
                return
        os.chmod(b"/proc/self/fd/%d" % fd, mode)
    finally:
        os.close(fd)


def umask() -> int:
    """Return the mode bits that new files do not get; all of them where that cannot be told."""
    # umask(2) cannot be asked without being changed, for every thread of the process.
    try:
        with open("/proc/self/status", "rb") as file:
            for line in file:
                if line.startswith(b"Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass
    return 0o777


def _has_xattrs(at: bytes, wanted: Xattrs) -> bool:
    try:
        return all(os.getxattr(at, name, follow_symlinks=False) == value for name, value in wanted)
    except OSError:
        return False
