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

from backupfs.errors import SourceError, shown
from backupfs.localfs.content import write_at
from backupfs.localfs.directories import Access, Directory
from backupfs.localfs.fatal import fatal_reason
from backupfs.localfs.metadata import (
    ACCESS_ACL,
    DEFAULT_ACL,
    Metadata,
    MetadataSetter,
    change_mode,
    remove_foreign_xattrs,
    remove_xattr,
    umask,
)
from backupfs.localfs.naming import rename_to_free
from backupfs.localfs.place import make_path, require_place_above
from backupfs.localfs.reading import DIRECTORY_FLAGS

TEMPORARY_PREFIX = b".backupfs-"

_NEW_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Directories beyond them are opened again when needed; a default limit of 1024 descriptors leaves room for files.
_MOST_OPEN = 128
# The same for another process, which needs little more than the way to where it is.
_MOST_OPEN_APART = 32

# Removes the directory that stands under a name, called just before the rename to it.
MakeWay = Callable[[], None]


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
        self._own = (os.geteuid(), os.getegid())
        self._metadata = MetadataSetter(self.is_root_user, self._own, problem)
        self.access = Access(self.is_root_user, self._own[0], is_dry=not make)
        self._kept_bits = 0o777 & ~umask()  # what a new file's mode keeps of the one asked for
        self._open: OrderedDict[Directory, int] = OrderedDict()
        self._most_open = _MOST_OPEN
        self._root_fd = -1
        self.temporary_prefix = b""  # that the names of all temporary files of this run begin with
        self._temporary = b""  # and those of this process
        self.renew_temporary_prefix()
        self._numbers = itertools.count(1)
        self.root = Directory(None, b"")
        self.exists = True
        try:
            self.root.existed = os.path.isdir(path)
            if not self.root.existed:
                if not make and not os.path.lexists(path):
                    self.exists = False
                    require_place_above(path)
                    return
                make_path(path)
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
            if self.access.keeps_owner_out(status) and make:
                self.access.note_former_mode(self.root, status)
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
        other.access = self.access.for_another_process()
        other._most_open = _MOST_OPEN_APART
        other._temporary += b"%d-" % number
        other._metadata = self._metadata.for_another_process(problem)
        return other

    @property
    def owners_kept(self) -> bool:
        """Whether ownership was recorded and not set, as only root may."""
        return self._metadata.owners_kept

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
            fd = self._keep(below, os.open(below.name, DIRECTORY_FLAGS, dir_fd=fd))
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
        if not self.is_root_user and self._kept_bits & 0o700 != 0o700:
            change_mode(fd, name, 0o700)
        directory = Directory(parent, name)
        if parent.inherits:
            made = self._keep(directory, os.open(name, DIRECTORY_FLAGS, dir_fd=fd))
            for acl in (ACCESS_ACL, DEFAULT_ACL):
                remove_xattr(made, acl)
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
        is_known = self.access.let_owner_in(directory, above)
        if is_known:
            self._note_existing(directory, self._keep(directory, os.open(name, DIRECTORY_FLAGS, dir_fd=above)))
        return directory

    def give_mode_back(self, directory: Directory) -> None:
        """Set the mode that a directory had before its owner was let in. Raises: OSError."""
        if directory.former_mode is not None:
            os.fchmod(self.fd(directory), directory.former_mode)
            self.access.forget_former_mode(directory)

    def _note_existing(self, directory: Directory, fd: int) -> None:
        directory.names = {os.fsencode(name) for name in os.listdir(fd)}
        status = os.fstat(fd)
        directory.inherits = bool(status.st_mode & stat.S_ISGID)
        directory.closed = self.access.is_dry and self.access.refuses(fd)
        directory.foreign = self.access.is_dry and not self.is_root_user and status.st_uid != self._own[0]
        try:
            directory.inherits |= DEFAULT_ACL in os.listxattr(fd)
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
                    remove_foreign_xattrs(fd, metadata.xattrs)
                self._metadata.apply(fd, metadata, self.path_of(directory), (status.st_uid, status.st_gid))
                self.access.forget_former_mode(directory)
            else:
                self.give_mode_back(directory)
            self._open_above(directory)
        finally:
            self._close(directory)

    def leave(self, directory: Directory) -> None:
        """Close a directory that everything is done in, and have the one above open."""
        self._open_above(directory)
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
        for directory in self.access.opened_to_owner():
            with contextlib.suppress(OSError):
                self.give_mode_back(directory)
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
        fd = os.open(temporary, _NEW_FILE_FLAGS, 0o600, dir_fd=self.fd(directory))
        if not self.is_root_user and self._kept_bits & 0o600 != 0o600:
            os.fchmod(fd, 0o600)  # for those who open it again
        return fd

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
            _give_name(temporary, name, directory, fd_above)
        except BaseException:
            _unlink_quietly(temporary, fd_above)
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
        _give_name(temporary, name, directory, above)

    def _finish_file(self, fd: int, directory: Directory, name: bytes, metadata: Metadata) -> None:
        own = self._own
        if metadata.xattrs or directory.inherits:
            if directory.inherits:
                remove_xattr(fd, ACCESS_ACL)
                own = (-1, -1)
            self._metadata.apply(fd, metadata, self.path_of(directory, name), own)
            return
        mode = metadata.mode & 0o7777
        if metadata.owner != own[0] or metadata.group != own[1]:
            mode = self._metadata.set_owner(fd, metadata, own, lambda: self.path_of(directory, name))
        os.fchmod(fd, mode)
        if metadata.mtime_ns is not None:
            os.utime(fd, ns=(metadata.mtime_ns, metadata.mtime_ns))

    def remove_temporary(self, directory: Directory, temporary: bytes) -> None:
        """Remove a file that is not finished; whatever hinders it is passed over."""
        try:
            _unlink_quietly(temporary, self.fd(directory))
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
            self._metadata.apply_by_name(above, temporary, metadata, self.path_of(directory, name), directory.inherits)
            if make_way is not None:
                make_way()
                above = self.fd(directory)
            _give_name(temporary, name, directory, above)
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
            _give_name(temporary, name, directory, above)
        finally:
            # Renaming onto another name of the same file does nothing, by POSIX, and leaves both names.
            self.remove_temporary(directory, temporary)

    def mend(self, directory: Directory, name: bytes, status: os.stat_result, metadata: Metadata) -> None:
        """Bring what a file has beside its bytes up to date, where that differs. Raises: OSError."""
        self._metadata.mend(self.fd(directory), name, status, metadata, lambda: self.path_of(directory, name))

    # What is there already.

    def status(self, directory: Directory, name: bytes) -> os.stat_result | None:
        """Return what stands under a name, or None. Raises: OSError."""
        try:
            return os.stat(name, dir_fd=self.fd(directory), follow_symlinks=False)
        except FileNotFoundError:
            return None

    def read_link(self, directory: Directory, name: bytes) -> bytes:
        """Return where a symlink leads. Raises: OSError."""
        return os.readlink(name, dir_fd=self.fd(directory))

    def remove_empty(self, directory: Directory, name: bytes) -> None:
        """Remove an empty directory. Raises: OSError."""
        os.rmdir(name, dir_fd=self.fd(directory))

    def full(self, error: OSError) -> SourceError:
        """Return the error that ends the run."""
        return SourceError(f"the target {shown(self.path)} {fatal_reason(error)}")


def _give_name(temporary: bytes, name: bytes, directory: Directory, fd: int) -> None:
    """Rename a file in a directory. Raises: OSError, also where it would replace what was not there before this run."""
    if name in directory.names:
        os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
    else:
        rename_to_free(temporary, name, fd)


def _unlink_quietly(name: bytes, dir_fd: int) -> None:
    """Remove a file that may not be there."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except OSError:
        return
