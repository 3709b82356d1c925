"""Every exception of backupfs, with the exit code and the errno it ends in.

A message says what happened, to which object or file, and what to do next.
Names in messages go through `shown`, so that a hostile name cannot drive the terminal.
"""

import errno

# What a command ends with that was interrupted; no exception of its own, it is Python's KeyboardInterrupt.
EXIT_INTERRUPTED = 130


def shown(name: bytes | str) -> str:
    """Return a name as printable text: control characters and bytes that are no UTF-8 are escaped."""
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class BackupfsError(Exception):
    """The base of all errors that a user is told about in one line."""

    exit_code = 1
    errno = errno.EIO


class UsageError(BackupfsError):
    """The command's words, a path or a file given by the user cannot be used."""

    errno = errno.EINVAL


class StoreError(BackupfsError):
    """The store did not do what was asked."""


class ObjectMissing(StoreError):
    """The store has no object under this key."""


class ObjectExists(StoreError):
    """An object that must be new is there already."""


class AccessDenied(StoreError):
    """The store refuses this to the credentials or the user given."""

    errno = errno.EACCES


class StoreUnavailable(StoreError):
    """The store does not answer, is full, or failed in a way that trying again may mend."""


class StoreMissing(StoreUnavailable):
    """The place that should hold the objects (a folder, a bucket) is not there."""


class StoreFull(StoreUnavailable):
    """The store has no room for the object; nothing of it is visible."""

    errno = errno.ENOSPC


class ObjectArchived(StoreError):
    """The object is in a class of storage that must be thawed before it can be read."""


class RepositoryError(BackupfsError):
    """What is in the store cannot be used as a repository."""


class NotARepository(RepositoryError):
    """There is no repository at this place."""

    exit_code = 10


class RepositoryExists(RepositoryError):
    """`init` met a repository: it is never overwritten."""


class RepositoryLocked(RepositoryError):
    """Another process makes or maintains the repository, and this command cannot run beside it."""

    exit_code = 11


class WrongPassword(RepositoryError):
    """No key slot opens with this password."""

    exit_code = 12


class UnknownVersion(RepositoryError):
    """The repository needs a newer backupfs."""


class UnknownSnapshot(RepositoryError):
    """No snapshot, or more than one, fits the name given."""

    errno = errno.ENOENT


class PathNotFound(RepositoryError):
    """The snapshot has no such path."""

    errno = errno.ENOENT


class DamagedObject(RepositoryError):
    """Bytes of the repository are not what was written: missing, cut short, changed or swapped.

    The message names the object; wrong bytes are never returned in its place.
    """


class SourceError(BackupfsError):
    """A source or target on this machine cannot be used at all (a single bad file is an event, not this)."""


class MountError(BackupfsError):
    """The mount cannot be made or ended; the message says why."""
