"""Making a target that is missing, or telling what would hinder that."""

import errno
import os

from backupfs.localfs.mounts import read_mounts

# What making a directory gives in windows into the kernel.
_NOTHING_CAN_BE_MADE = {"proc": errno.ENOENT, "sysfs": errno.EPERM, "devpts": errno.EPERM}


def require_place_above(path: bytes) -> None:
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


def make_path(path: bytes) -> None:
    """Make a directory and those above it that are missing; the last one private until it is filled."""
    parent = os.path.dirname(path.rstrip(b"/"))
    if parent and not os.path.isdir(parent):
        os.makedirs(parent, exist_ok=True)
    os.mkdir(path, 0o700)
