"""Writing files of this machine below one target directory: by descriptor and name, never through a symlink.

Every directory is opened from its parent's descriptor, so no path is too long and none leads out of the target. New
content gets its name only when it is whole. Only the target itself, which the user named, may be a symlink.
Threading: a Target belongs to one thread at a time. `for_another_process` gives one more of the same directory.
"""

import contextlib
import copy
import errno
import itertools
import os
import stat
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from backupfs.errors import SourceError, shown
from backupfs.localfs.mounts import read_mounts
from backupfs.localfs.reading import path_in
from backupfs.snapshots.node import Xattrs

TEMPORARY_PREFIX = b".backupfs-"

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CHANGE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
# Directories beyond them are opened again when needed; a default limit of 1024 descriptors leaves room for files.
_MOST_OPEN = 128
# The same for another process, which needs little more than the way to where it is.
_MOST_OPEN_APART = 32
# What making a directory gives in windows into the kernel.
_NOTHING_CAN_BE_MADE = {"proc": errno.ENOENT, "sysfs": errno.EPERM, "devpts": errno.EPERM}
_ACCESS_ACL, _DEFAULT_ACL = "system.posix_acl_access", "system.posix_acl_default"
# These end a restore: the next file would meet them again.
_FATAL = {
    errno.ENOSPC: "is full: make room and run the restore again with --overwrite if-changed",
    errno.EDQUOT: "is over its quota: make room and run the restore again with --overwrite if-changed",
    errno.EROFS: "is on a read-only file system: choose another target or mount it for writing",
    errno.EMFILE: "cannot be written: too many files are open in this process",
    errno.ENFILE: "cannot be written: too many files are open on this machine",
    errno.ENOMEM: "cannot be written: the machine is out of memory",
}


# Removes the directory that stands under a name, called just before the rename to it.
MakeWay = Callable[[], None]


class Metadata(NamedTuple):
    """What a file has beside its bytes."""

    mode: int  # type and permissions
    owner: int  # ids of this machine
    group: int
    mtime_ns: int | None  # None: not recorded
    xattrs: Xattrs = ()


class Directory:
    """A directory at or below the target."""

    __slots__ = (
        "closed", "existed", "foreign", "former_mode", "identity", "inherits", "metadata", "name", "names", "ordinal",
        "parent", "pending",
    )  # fmt: skip

    def __init__(self, parent: "Directory | None", name: bytes) -> None:
        self.parent = parent
        self.name = name
        self.identity: tuple[int, int] | None = None  # (st_dev, st_ino), known once it was opened
        self.existed = False  # before this run
        self.former_mode: int | None = None  # to be given back: this user was let in to write
        self.closed = False  # a dry run found that this user cannot write into it
        self.foreign = False  # a dry run found that this user cannot give it a mode or times
        self.inherits = False  # gives what is made in it a group or an ACL of its own
        self.names: frozenset[bytes] | set[bytes] = frozenset()  # what was in it before this run
        self.metadata: Metadata | None = None  # to be set when everything in it is done; None: leave it alone
        self.pending = 1  # what is not done in it, and 1 for the walk that is still in it
        self.ordinal = 0

    @property
    def depth(self) -> int:
        """The number of directories above, up to the target."""
        depth, above = 0, self.parent
        while above is not None:
            depth, above = depth + 1, above.parent
        return depth


class Removal(NamedTuple):
    """What became of something that was to go."""

    gone: int  # entries
    stays: bool  # something of it is there still: kept, or because of an error
    error: OSError | None  # the first that hindered


class Target:
    """The directory that is written into."""

    def __init__(self, path: bytes, problem: Callable[[bytes, str], None], make: bool = True) -> None:
        """Open the target, and make it where it is missing.

        problem: takes (path, reason) of an attribute that could not be set.
        make: False for a dry run, which makes nothing: `exists` tells.
        Raises: SourceError.
        """
        self.path = path
        self.is_root_user = os.geteuid() == 0
        self._problem = problem
        self._own = (os.geteuid(), os.getegid())
        self._kept_bits = 0o777 & ~_umask()  # what a new file's mode keeps of the one asked for
        self._open: OrderedDict[Directory, int] = OrderedDict()
        self._most_open = _MOST_OPEN
        self._let_in: set[Directory] = set()  # those that have a former mode
        self._is_dry = not make
        self._root_fd = -1
        self.temporary_prefix = b""  # that the names of all temporary files of this run begin with
        self._temporary = b""  # and those of this process
        self.renew_temporary_prefix()
        self._numbers = itertools.count(1)
        self.owners_kept = False  # ownership was recorded and not set, as only root may
        self.root = Directory(None, b"")
        self.exists = True
        try:
            self.root.existed = os.path.isdir(path)
            if not self.root.existed:
                if not make and not os.path.lexists(path):
                    self.exists = False
                    _require_place_above(path)
                    return
                _make_path(path)
            # Resolved once, here: a symlink that the user names is meant.
            self._root_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if not make and os.fstatvfs(self._root_fd).f_flag & os.ST_RDONLY:
                os.close(self._root_fd)
                raise self.full(OSError(errno.EROFS, os.strerror(errno.EROFS)))
        except (FileExistsError, NotADirectoryError) as error:
            raise SourceError(
                f"the target {shown(path)} is not a directory: name one, or a path that is free"
            ) from error
        except OSError as error:
            raise SourceError(
                f"the target {shown(path)} cannot be used: {error.strerror}; choose a directory you may write to"
            ) from error
        if self.root.existed:
            status = os.fstat(self._root_fd)
            if self._keeps_owner_out(status) and not self._is_dry:
                self._note_former_mode(self.root, status)
                os.fchmod(self._root_fd, stat.S_IMODE(status.st_mode) | 0o700)
            self._note_existing(self.root, self._root_fd)

    def renew_temporary_prefix(self) -> None:
        """Take another start of temporary names, before there are any."""
        self.temporary_prefix = self._temporary = TEMPORARY_PREFIX + os.urandom(6).hex().encode() + b"-"

    def for_another_process(self, number: int, problem: Callable[[bytes, str], None]) -> "Target":
        """Return the same target for a process that was just forked; it has descriptors and temporary names of its own.

        number: differs from those of all other processes.
        """
        other = copy.copy(self)
        other._open = OrderedDict()
        other._let_in = set()
        other._most_open = _MOST_OPEN_APART
        other._temporary += b"%d-" % number
        other._problem = problem
        return other

    # Directories.

    def path_of(self, directory: Directory, name: bytes = b"") -> bytes:
        """Return a path for messages; it may be too long for any call."""
        parts = [name] if name else []
        above: Directory | None = directory
        while above is not None and above.parent is not None:
            parts.append(above.name)
            above = above.parent
        parts.append(self.path.rstrip(b"/"))
        return b"/".join(reversed(parts)) or b"/"

    def fd(self, directory: Directory) -> int:
        """Return an open descriptor of a directory, valid until the next call. Raises: OSError."""
        fd = self._open.get(directory)
        if fd is not None:
            self._open.move_to_end(directory)
            return fd
        closed: list[Directory] = []
        above = directory
        while (fd := self._descriptor(above)) is None:
            closed.append(above)
            assert above.parent is not None, "the target's own descriptor stays open"
            above = above.parent
        for below in reversed(closed):
            fd = self._keep(below, os.open(below.name, _DIRECTORY_FLAGS, dir_fd=fd))
        return fd

    def _descriptor(self, directory: Directory) -> int | None:
        return self._root_fd if directory.parent is None else self._open.get(directory)

    def _keep(self, directory: Directory, fd: int) -> int:
        status = os.fstat(fd)
        identity = (status.st_dev, status.st_ino)
        if directory.identity is None:
            directory.identity = identity
        elif directory.identity != identity:
            os.close(fd)
            raise OSError(errno.ESTALE, "the directory was replaced while it was restored")
        self._open[directory] = fd
        while len(self._open) > self._most_open:
            os.close(self._open.popitem(last=False)[1])
        return fd

    def make_directory(self, parent: Directory, name: bytes) -> Directory:
        """Make a new directory, for the owner alone until `finish_directory`.

        Raises: FileExistsError; OSError.
        """
        fd = self.fd(parent)
        os.mkdir(name, 0o700, dir_fd=fd)
        directory = Directory(parent, name)
        if parent.inherits:
            made = self._keep(directory, os.open(name, _DIRECTORY_FLAGS, dir_fd=fd))
            for acl in (_ACCESS_ACL, _DEFAULT_ACL):
                _remove_xattr(made, acl)
            os.fchmod(made, 0o700)
        return directory

    def replace_by_directory(self, parent: Directory, name: bytes) -> Directory:
        """Make a new directory in place of what is none, which stays if that cannot be. Raises: OSError."""
        above = self.fd(parent)
        aside = self.temporary_name()
        os.rename(name, aside, src_dir_fd=above, dst_dir_fd=above)
        try:
            directory = self.make_directory(parent, name)
        except BaseException:
            above = self.fd(parent)
            with contextlib.suppress(OSError):
                os.rename(aside, name, src_dir_fd=above, dst_dir_fd=above)
            raise
        self.remove_temporary(parent, aside)
        return directory

    def open_existing(self, parent: Directory, name: bytes) -> Directory:
        """Take a directory that was there before. Raises: OSError, also for a symlink.

        One of this ordinary user's that keeps him out is opened to him until `finish_directory`, or `close`. A dry run
        that cannot look into such a one knows nothing in it.
        """
        directory = Directory(parent, name)
        directory.existed = True
        above = self.fd(parent)
        is_known = self._let_owner_in(directory, above)
        if is_known:
            self._note_existing(directory, self._keep(directory, os.open(name, _DIRECTORY_FLAGS, dir_fd=above)))
        return directory

    def _let_owner_in(self, directory: Directory, above: int) -> bool:
        """Make a directory one that its owner, if that is this user, may list and write into; False if it cannot be."""
        if self.is_root_user:
            return True
        status = os.stat(directory.name, dir_fd=above, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode) or not self._keeps_owner_out(status):
            return True
        if self._is_dry:
            return status.st_mode & 0o500 == 0o500
        self._note_former_mode(directory, status)
        identity = (status.st_dev, status.st_ino)
        _change_mode(above, directory.name, stat.S_IMODE(status.st_mode) | 0o700, identity)
        return True

    def _keeps_owner_out(self, status: os.stat_result) -> bool:
        return not self.is_root_user and status.st_uid == self._own[0] and status.st_mode & 0o700 != 0o700

    def _note_former_mode(self, directory: Directory, status: os.stat_result) -> None:
        directory.former_mode = stat.S_IMODE(status.st_mode)
        self._let_in.add(directory)

    def _forget_former_mode(self, directory: Directory) -> None:
        directory.former_mode = None
        self._let_in.discard(directory)

    def _give_mode_back(self, directory: Directory) -> None:
        if directory.former_mode is not None:
            os.fchmod(self.fd(directory), directory.former_mode)
            self._forget_former_mode(directory)

    def _refuses(self, fd: int) -> bool:
        """Tell whether this user cannot write into an open directory, nor be let in."""
        if self.is_root_user or os.fstat(fd).st_uid == self._own[0]:
            return False
        return not os.access(b".", os.W_OK | os.X_OK, dir_fd=fd, effective_ids=True)

    def _note_existing(self, directory: Directory, fd: int) -> None:
        directory.names = {os.fsencode(name) for name in os.listdir(fd)}
        status = os.fstat(fd)
        directory.inherits = bool(status.st_mode & stat.S_ISGID)
        directory.closed = self._is_dry and self._refuses(fd)
        directory.foreign = self._is_dry and not self.is_root_user and status.st_uid != self._own[0]
        try:
            directory.inherits |= _DEFAULT_ACL in os.listxattr(fd)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.EACCES):
                raise

    def finish_directory(self, directory: Directory) -> None:
        """Set what a directory has beside its entries, then let it go. Raises: OSError."""
        metadata = directory.metadata
        try:
            if metadata is not None:
                fd = self.fd(directory)
                status = os.fstat(fd)
                if directory.existed:
                    self._remove_foreign_xattrs(fd, metadata.xattrs)
                self._apply(fd, metadata, self.path_of(directory), (status.st_uid, status.st_gid))
                self._forget_former_mode(directory)
            else:
                self._give_mode_back(directory)
            self._open_above(directory)
        finally:
            self._close(directory)

    def _open_above(self, directory: Directory) -> None:
        # The way from the target down would cost as many calls as the directory is deep, at each level.
        below, parent = self._open.get(directory), directory.parent
        if below is None or parent is None or self._descriptor(parent) is not None:
            return
        try:
            self._keep(parent, os.open(b"..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=below))
        except OSError:
            return  # it was moved, or may not be read

    def _close(self, directory: Directory) -> None:
        fd = self._open.pop(directory, None)
        if fd is not None:
            os.close(fd)

    def close_directories(self) -> None:
        """Close every descriptor but that of the target itself."""
        for directory in list(self._open):
            self._close(directory)

    def close(self) -> None:
        """Close every descriptor, and give directories that were not finished their modes back."""
        for directory in sorted(self._let_in, key=lambda directory: directory.depth, reverse=True):
            with contextlib.suppress(OSError):
                self._give_mode_back(directory)
        self.close_directories()
        if self._root_fd >= 0:
            os.close(self._root_fd)
            self._root_fd = -1

    # Files.

    def temporary_name(self) -> bytes:
        """Return a name that nothing has yet."""
        return b"%s%d" % (self._temporary, next(self._numbers))

    def create(self, directory: Directory, temporary: bytes) -> int:
        """Create a file under a temporary name and return its descriptor. Raises: OSError."""
        return os.open(temporary, _NEW_FILE_FLAGS, 0o600, dir_fd=self.fd(directory))

    def reopen(self, directory: Directory, temporary: bytes) -> int:
        """Open a file under its temporary name once more. Raises: OSError."""
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(temporary, flags, dir_fd=self.fd(directory))

    def write_file(self, directory: Directory, name: bytes, data: bytes | memoryview, metadata: Metadata) -> None:
        """Write a small file at once. Raises: OSError, after which nothing of it is left."""
        fd_above = self.fd(directory)
        temporary = b"%s%d" % (self._temporary, next(self._numbers))
        mode, owner, group, mtime_ns, xattrs = metadata
        own = self._own
        # Most files need two calls less.
        is_plain = (
            owner == own[0] and group == own[1] and not xattrs and not directory.inherits
            and mode & 0o7777 & ~self._kept_bits == 0 and mtime_ns is not None
        )  # fmt: skip
        fd = os.open(temporary, _NEW_FILE_FLAGS, mode & 0o777 if is_plain else 0o600, dir_fd=fd_above)
        try:
            try:
                if data and os.write(fd, data) != len(data):
                    write_at(fd, data, 0)
                if is_plain:
                    os.utime(fd, ns=(mtime_ns, mtime_ns))  # type: ignore[arg-type]
                else:
                    self._finish_file(fd, directory, name, metadata)
            finally:
                os.close(fd)
            os.rename(temporary, name, src_dir_fd=fd_above, dst_dir_fd=fd_above)
        except BaseException:
            unlink_quietly(temporary, fd_above)
            raise

    def finish_file(
        self,
        fd: int,
        directory: Directory,
        temporary: bytes,
        name: bytes,
        metadata: Metadata,
        make_way: MakeWay | None = None,
    ) -> None:
        """Set what a written file has beside its bytes, close it and give it its name. Raises: OSError."""
        try:
            self._finish_file(fd, directory, name, metadata)
        finally:
            os.close(fd)
        if make_way is not None:
            make_way()
        above = self.fd(directory)
        os.rename(temporary, name, src_dir_fd=above, dst_dir_fd=above)

    def _finish_file(self, fd: int, directory: Directory, name: bytes, metadata: Metadata) -> None:
        own = self._own
        if metadata.xattrs or directory.inherits:
            if directory.inherits:
                _remove_xattr(fd, _ACCESS_ACL)
                own = (-1, -1)
            self._apply(fd, metadata, self.path_of(directory, name), own)
            return
        mode = metadata.mode & 0o7777
        if metadata.owner != own[0] or metadata.group != own[1]:
            mode = self._set_owner(fd, metadata, own, lambda: self.path_of(directory, name))
        os.fchmod(fd, mode)
        if metadata.mtime_ns is not None:
            os.utime(fd, ns=(metadata.mtime_ns, metadata.mtime_ns))

    def remove_temporary(self, directory: Directory, temporary: bytes) -> None:
        """Remove a file that is not finished; whatever hinders it is passed over."""
        try:
            unlink_quietly(temporary, self.fd(directory))
        except OSError:
            return

    def make_special(
        self,
        directory: Directory,
        name: bytes,
        metadata: Metadata,
        link_target: bytes,
        device: tuple[int, int],
        make_way: MakeWay | None = None,
    ) -> None:
        """Make a symlink, fifo, socket or device in place of whatever file is there. Raises: OSError."""
        above = self.fd(directory)
        temporary = self.temporary_name()
        kind = stat.S_IFMT(metadata.mode)
        if kind == stat.S_IFLNK:
            os.symlink(link_target, temporary, dir_fd=above)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
            os.mknod(temporary, kind | 0o600, os.makedev(*device), dir_fd=above)
        else:
            raise OSError(errno.EINVAL, f"a file of the unknown type {kind:o} cannot be made")
        try:
            self._apply_by_name(above, temporary, metadata, self.path_of(directory, name), directory.inherits)
            if make_way is not None:
                make_way()
                above = self.fd(directory)
            os.rename(temporary, name, src_dir_fd=above, dst_dir_fd=above)
        except BaseException:
            self.remove_temporary(directory, temporary)
            raise

    def link(
        self,
        source: Directory,
        source_name: bytes,
        directory: Directory,
        name: bytes,
        make_way: MakeWay | None = None,
    ) -> None:
        """Give a restored file another name. Raises: OSError."""
        # Opening the way to the one may close the other.
        first = os.dup(self.fd(source))
        try:
            above = self.fd(directory)
            temporary = self.temporary_name()
            os.link(source_name, temporary, src_dir_fd=first, dst_dir_fd=above, follow_symlinks=False)
        finally:
            os.close(first)
        try:
            if make_way is not None:
                make_way()
                above = self.fd(directory)
            os.rename(temporary, name, src_dir_fd=above, dst_dir_fd=above)
        finally:
            # Renaming onto another name of the same file does nothing, by POSIX, and leaves both names.
            self.remove_temporary(directory, temporary)

    # Metadata.

    def _apply(self, fd: int, metadata: Metadata, path: bytes, own: tuple[int, int]) -> None:
        """Set everything on an open file or directory; what cannot be set is told to `problem`.

        own: the owner that it has.
        """
        mode = metadata.mode & 0o7777
        if (metadata.owner, metadata.group) != own:
            mode = self._set_owner(fd, metadata, own, lambda: path)
        # In this order: chown takes capabilities away, and without write permission a user.* attribute is refused.
        for name, value in metadata.xattrs:
            self._set_xattr(fd, name, value, path)
        os.fchmod(fd, mode)
        if metadata.mtime_ns is not None:
            os.utime(fd, ns=(metadata.mtime_ns, metadata.mtime_ns))

    def _set_owner(self, fd: int, metadata: Metadata, own: tuple[int, int], path: Callable[[], bytes]) -> int:
        """Set the owner and return the mode to set: set-id bits must never serve an owner they were not meant for."""
        mode = metadata.mode & 0o7777
        if self.is_root_user:
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
            self.owners_kept = True
            if own == (-1, -1):
                status = os.fstat(fd)
                own = (status.st_uid, status.st_gid)
        if metadata.owner != own[0]:
            mode &= ~stat.S_ISUID
        if metadata.group != own[1] and not stat.S_ISDIR(metadata.mode):
            mode &= ~stat.S_ISGID
        return mode

    def _apply_by_name(self, above: int, name: bytes, metadata: Metadata, path: bytes, inherits: bool) -> None:
        """Set everything on what must not be opened: symlinks, fifos, sockets, devices."""
        mode = metadata.mode & 0o7777
        if inherits or (metadata.owner, metadata.group) != self._own:
            if self.is_root_user:
                try:
                    os.chown(name, metadata.owner, metadata.group, dir_fd=above, follow_symlinks=False)
                except OSError as error:
                    if is_fatal(error):
                        raise
                    self._problem(path, f"its owner could not be set: {error.strerror}")
                    mode &= 0o1777
            elif (metadata.owner, metadata.group) != self._own:
                self.owners_kept = True
                mode &= 0o1777
        is_link = stat.S_ISLNK(metadata.mode)
        at = path_in(above, name)
        if inherits and not is_link:
            _remove_xattr(at, _ACCESS_ACL)
        if not is_link:
            _change_mode(above, name, mode)
        for attribute, value in metadata.xattrs:
            self._set_xattr(at, attribute, value, path)
        if metadata.mtime_ns is not None:
            os.utime(name, ns=(metadata.mtime_ns, metadata.mtime_ns), dir_fd=above, follow_symlinks=False)

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

    def _remove_foreign_xattrs(self, at: int | bytes, wanted: Xattrs) -> None:
        for name in foreign_xattrs(at, wanted):
            _remove_xattr(at, name)

    def mend(self, directory: Directory, name: bytes, status: os.stat_result, metadata: Metadata) -> None:
        """Bring what a file has beside its bytes up to date, where that differs. Raises: OSError."""
        same_owner = not self.is_root_user or (status.st_uid, status.st_gid) == (metadata.owner, metadata.group)
        above = self.fd(directory)
        at = path_in(above, name)
        if (
            stat.S_IMODE(status.st_mode) == stat.S_IMODE(metadata.mode)
            and same_owner
            and _has_xattrs(at, metadata.xattrs)
            and not foreign_xattrs(at, metadata.xattrs)
        ):
            return
        path = self.path_of(directory, name)
        own = (status.st_uid, status.st_gid)
        if not stat.S_ISREG(status.st_mode):
            self._remove_foreign_xattrs(at, metadata.xattrs)
            self._apply_by_name(above, name, metadata, path, own != self._own)
            return
        fd = self._open_to_change(above, name, status)
        if fd < 0:
            return
        try:
            self._remove_foreign_xattrs(fd, metadata.xattrs)
            self._apply(fd, metadata, path, own)
        finally:
            os.close(fd)

    def _open_to_change(self, above: int, name: bytes, status: os.stat_result) -> int:
        """Open a file whose status is known, though its mode may keep its owner out; -1 if it is another by now.

        Its owner may read and write it from then on. Raises: OSError.
        """
        identity = (status.st_dev, status.st_ino)
        if not self.is_root_user and status.st_mode & 0o600 != 0o600 and status.st_uid == self._own[0]:
            _change_mode(above, name, stat.S_IMODE(status.st_mode) | 0o600, identity)
        fd = os.open(name, _CHANGE_FLAGS, dir_fd=above)
        now = os.fstat(fd)
        if (now.st_dev, now.st_ino) != identity:
            os.close(fd)
            return -1
        return fd

    # Looking and removing.

    def status(self, directory: Directory, name: bytes) -> os.stat_result | None:
        """Return what stands under a name, or None. Raises: OSError."""
        try:
            return os.stat(name, dir_fd=self.fd(directory), follow_symlinks=False)
        except FileNotFoundError:
            return None

    def read_link(self, directory: Directory, name: bytes) -> bytes:
        """Return where a symlink leads. Raises: OSError."""
        return os.readlink(name, dir_fd=self.fd(directory))

    def is_empty(self, directory: Directory, name: bytes) -> bool:
        """Tell whether a directory has nothing in it, or cannot be looked into. Raises: OSError."""
        try:
            fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=self.fd(directory))
        except PermissionError:
            return True
        try:
            return not os.listdir(fd)
        finally:
            os.close(fd)

    def remove_empty(self, directory: Directory, name: bytes) -> None:
        """Remove an empty directory. Raises: OSError."""
        os.rmdir(name, dir_fd=self.fd(directory))

    def remove_tree(
        self, directory: Directory, name: bytes, kept: Callable[[bytes, bool], bool], dry_run: bool = False
    ) -> Removal:
        """Remove a file, or a directory with everything in it that can go, on its own file system.

        kept: (path below the target with a leading slash, is a directory) → leave it alone. A directory that keeps
        something stays, too.
        dry_run: only tell what would be.
        Raises: OSError if it is not there.
        """
        relative = self.path_of(directory, name)[len(self.path.rstrip(b"/")) :]
        above = self.fd(directory)
        status = os.stat(name, dir_fd=above, follow_symlinks=False)
        is_directory = stat.S_ISDIR(status.st_mode)
        if kept(relative, is_directory):
            return Removal(0, True, None)
        if not is_directory:
            error = self._unlink_error(directory, name, dry_run)
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
                    found = self._entries(current, device, dry_run)
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
                    elif error := self._unlink_error(current, child, dry_run):
                        holders.add(current)
                        first = first or error
                    else:
                        removed += 1
                continue
            goes = current not in holders
            if goes:
                goes, error = self._remove_empty(current, dry_run)
                first = first or error
            if goes:
                self._forget_former_mode(current)
                removed += 1
            else:
                holders.add(current.parent)
                with contextlib.suppress(OSError):
                    self._give_mode_back(current)
            self._open_above(current)
            self._close(current)
        return Removal(removed, directory in holders, first)

    def _entries(self, directory: Directory, device: int, dry_run: bool) -> list[tuple[bytes, bool]]:
        """Return (name, is a directory) of what is in a directory that is to be removed. Raises: OSError."""
        assert directory.parent is not None
        if not self._let_owner_in(directory, self.fd(directory.parent)):
            return []
        fd = self.fd(directory)
        if os.fstat(fd).st_dev != device:
            raise OSError(errno.EBUSY, "another file system is mounted in it")
        directory.closed = dry_run and self._refuses(fd)
        with os.scandir(fd) as entries:
            return [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]

    def _unlink_error(self, directory: Directory, name: bytes, dry_run: bool) -> OSError | None:
        """Remove what is no directory; return what hinders that, or would."""
        if dry_run:
            return _closed_error() if directory.closed else None
        try:
            os.unlink(name, dir_fd=self.fd(directory))
        except FileNotFoundError:
            return None
        except OSError as error:
            return error
        return None

    def _remove_empty(self, directory: Directory, dry_run: bool) -> tuple[bool, OSError | None]:
        """Remove a directory; return (whether it went, what hindered that). Something may have come into it."""
        assert directory.parent is not None
        if dry_run:
            return not directory.parent.closed, _closed_error() if directory.parent.closed else None
        try:
            os.rmdir(directory.name, dir_fd=self.fd(directory.parent))
        except OSError as error:
            return False, None if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else error
        return True, None

    def full(self, error: OSError) -> SourceError:
        """Return the error that ends the run."""
        return SourceError(f"the target {shown(self.path)} {_FATAL[error.errno or 0]}")


def is_fatal(error: OSError) -> bool:
    """Tell whether every other file would fail for the same reason."""
    return error.errno in _FATAL


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


def _closed_error() -> OSError:
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def unlink_quietly(name: bytes, dir_fd: int) -> None:
    """Remove a file that may not be there."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except OSError:
        return


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


def _has_xattrs(at: bytes, wanted: Xattrs) -> bool:
    try:
        return all(os.getxattr(at, name, follow_symlinks=False) == value for name, value in wanted)
    except OSError:
        return False


def _change_mode(above: int, name: bytes, mode: int, identity: tuple[int, int] | None = None) -> None:
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


def _umask() -> int:
    # umask(2) cannot be asked without being changed, for every thread of the process.
    try:
        with open("/proc/self/status", "rb") as file:
            for line in file:
                if line.startswith(b"Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass
    return 0o777


def _remove_xattr(at: int | bytes, name: str) -> None:
    try:
        os.removexattr(at, name, follow_symlinks=isinstance(at, int))
    except OSError:
        return  # there is none


def _require_place_above(path: bytes) -> None:
    """Raise what making a path would raise because of where it is."""
    above = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise NotADirectoryError(errno.ENOTDIR, "not a directory", above)
    number = 0
    if os.statvfs(above).f_flag & os.ST_RDONLY:
        number = errno.EROFS
    elif not os.access(above, os.W_OK | os.X_OK, effective_ids=True):
        number = errno.EACCES
    else:
        # Root may write there, says the kernel, but nothing can be made.
        device = os.stat(above).st_dev
        kinds = {mount.fstype for mount in read_mounts() if mount.device == (os.major(device), os.minor(device))}
        number = next((_NOTHING_CAN_BE_MADE[kind] for kind in kinds if kind in _NOTHING_CAN_BE_MADE), 0)
    if number:
        raise OSError(number, os.strerror(number), above)


def _make_path(path: bytes) -> None:
    """Make a directory and those above it that are missing; the last one private until it is filled."""
    parent = os.path.dirname(path.rstrip(b"/"))
    if parent and not os.path.isdir(parent):
        os.makedirs(parent, exist_ok=True)
    os.mkdir(path, 0o700)
