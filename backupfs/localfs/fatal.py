"""The errors that end a restore: the next file would meet them again."""

import errno

_FATAL = {
    errno.ENOSPC: "is full: make room and run the restore again with --overwrite if-changed",
    errno.EDQUOT: "is over its quota: make room and run the restore again with --overwrite if-changed",
    errno.EROFS: "is on a read-only file system: choose another target or mount it for writing",
    errno.EMFILE: "cannot be written: too many files are open in this process",
    errno.ENFILE: "cannot be written: too many files are open on this machine",
    errno.ENOMEM: "cannot be written: the machine is out of memory",
}


def is_fatal(error: OSError) -> bool:
    """Tell whether every other file would fail for the same reason."""
    return error.errno in _FATAL


def fatal_reason(error: OSError) -> str:
    """Return what is wrong with the target by a fatal error, and what to do about it."""
    return _FATAL[error.errno or 0]
