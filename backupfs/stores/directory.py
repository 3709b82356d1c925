"""A store in a folder: each object is a file below it, its key the path.

A put writes a temporary file in the hidden folder `.tmp`, syncs it, gives it its name and syncs the folder that holds
the name, so that an object is there whole or not at all, also after a power cut. Nothing is made or changed until the
first put, so a folder on a read-only medium can be read. The store's clock is that of the folder's file system,
which is another machine's on a network share.
"""

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import secrets
import stat
import threading
from collections.abc import Iterator, Sequence

from backupfs.errors import (
    AccessDenied,
    DamagedObject,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreUnavailable,
    shown,
)
from backupfs.stores.store import ObjectInfo, Store, is_key, range_length, validate_key

# The leading dot keeps it out of the keys; one folder for all, so that leftovers are found without a walk.
_TEMPORARY_FOLDER = ".tmp"
# A put lasts minutes at most: what nobody wrote to for a day belongs to a run that died.
_STALE_NS = 24 * 3600 * 10**9

# Objects of this size and more go past the page cache: nobody reads them soon, and in it they would push out what is in
# use. In the middle of a backup 16 MiB cost 46 ms of CPU through the cache of a virtual machine, and 5 past it.
_LEAST_DIRECT = 1 << 20
_DIRECT_STEP = 4 << 20
_PAGE = 4096

_FOLDER_MODE = 0o700
_FILE_MODE = 0o600
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
# A fifo under an object's name must not hang the reader; for files the flag changes nothing.
_READ_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK

_ABSENT = (FileNotFoundError, NotADirectoryError)  # the second: what should be a folder of the key is a file
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
# What a disk says of a sector that it cannot read, and a file system of checksums that do not fit.
_UNREADABLE = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG})
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})

_log = logging.getLogger(__name__)


class DirectoryStore(Store):
    """Files below one root folder, private to their owner.

    Only `create` makes the root: a put into a root that is missing, because its disk is not mounted, must fail and
    not fill the disk below. The lock guards what this process knows of the folder; files need none, since each put
    writes a file of its own and naming it is atomic.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.path.abspath(root)
        self._lock = threading.Lock()
        self._durable_folders: set[str] = set()  # paths below the root whose own names are known to be synced
        self._looked_for_stale = False

    @property
    def url(self) -> str:
        """The absolute path of the root."""
        return self._root

    @property
    def folder(self) -> str:
        """The root, absolute."""
        return os.path.abspath(os.fsdecode(self._root))

    def create(self) -> None:
        """Make the root and what is missing above it; an existing folder stays as it is."""
        with self._translated(f"cannot make the folder {shown(self._root)}"):
            _make_folders(self._root)
        self._require_root()

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """Write a file beside, then give it its name."""
        validate_key(key)
        with self._translated(f"cannot store object {key} in {shown(self._root)}"):
            descriptor, temporary = self._open_temporary()
            try:
                try:
                    # Before the data: on a full disk the leftovers of dead runs may be just the room needed.
                    self._remove_stale(os.fstat(descriptor).st_mtime_ns)
                    _write(descriptor, data)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                self._publish(temporary, key, if_absent)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return a range of an object, from one file even while another put replaces it.

        One that the disk cannot read is damaged, as if its bytes were wrong: others may well be readable.
        """
        validate_key(key)
        with self._translated(f"cannot read object {key} in {shown(self._root)}"):
            try:
                descriptor = os.open(self._path(key), _READ_FILE)
            except _ABSENT:
                raise self._missing(key) from None
            except OSError as error:
                self._require_readable(error, key)
                raise
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise self._missing(key)
                # Checked before reading: a wrong length must not allocate memory that the object cannot fill.
                return _read(descriptor, key, start, range_length(key, status.st_size, start, length))
            except OSError as error:
                self._require_readable(error, key)
                raise
            finally:
                os.close(descriptor)

    def size(self, key: str) -> int:
        """Return the size of the object's file."""
        validate_key(key)
        with self._translated(f"cannot look at object {key} in {shown(self._root)}"):
            try:
                status = os.stat(self._path(key))
            except _ABSENT:
                raise self._missing(key) from None
        if not stat.S_ISREG(status.st_mode):
            raise self._missing(key)
        return status.st_size

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield objects, reading one folder at a time; files whose names are no keys are not the store's."""
        folder = prefix.rpartition("/")[0]
        # A prefix outside the keys ("../", "/etc/") matches none of them, so it is looked for in the root, in vain.
        return self._list_folder(folder if is_key(folder) else "", prefix)

    def now(self) -> int:
        """Return the time that the file system gives to a new file."""
        with self._translated(f"cannot make a file in {shown(self._root)} to read its clock"):
            descriptor, temporary = self._open_temporary()
            try:
                return os.fstat(descriptor).st_mtime_ns
            finally:
                os.close(descriptor)
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def delete(self, key: str) -> None:
        """Remove the object's file; its folder stays."""
        validate_key(key)
        path = self._path(key)
        with self._translated(f"cannot delete object {key} in {shown(self._root)}"):
            try:
                os.unlink(path)
            except IsADirectoryError:
                return
            except _ABSENT:
                self._require_root()
                return
            _sync_folder(os.path.dirname(path))

    def close(self) -> None:
        """There is nothing to give back: no file stays open between calls."""

    def _path(self, key: str) -> str:
        return os.path.join(self._root, key)

    def _open_temporary(self) -> tuple[int, str]:
        folder = self._path(_TEMPORARY_FOLDER)
        path = os.path.join(folder, secrets.token_hex(16))
        try:
            return os.open(path, _NEW_FILE, _FILE_MODE), path
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, _FOLDER_MODE)
            return os.open(path, _NEW_FILE, _FILE_MODE), path

    def _remove_stale(self, now_ns: int) -> None:
        """Remove, once in the life of this store, the temporary files of runs that died; a failure costs room only."""
        with self._lock:
            if self._looked_for_stale:
                return
            self._looked_for_stale = True
        try:
            with os.scandir(self._path(_TEMPORARY_FOLDER)) as entries:
                for entry in entries:
                    if now_ns - entry.stat(follow_symlinks=False).st_mtime_ns > _STALE_NS:
                        os.unlink(entry.path)
                        _log.info("removed temporary file %s, left by a run that died", shown(entry.path))
        except OSError as error:
            # Most often another run that starts now removes the same files.
            _log.debug("stopped removing temporary files in %s: %s", shown(self._root), error.strerror)

    def _publish(self, temporary: str, key: str, if_absent: bool) -> None:
        """Give a synced temporary file the name of its object, and sync the name."""
        path = self._path(key)
        folder = key.rpartition("/")[0]
        self._make_folder(folder)
        try:
            self._give_name(temporary, path, key, if_absent)
        except FileNotFoundError:
            # Somebody tidied away a folder that was empty: make it again, once.
            with self._lock:
                self._durable_folders.clear()
            self._make_folder(folder)
            self._give_name(temporary, path, key, if_absent)
        _sync_folder(os.path.dirname(path))

    def _give_name(self, temporary: str, path: str, key: str, if_absent: bool) -> None:
        if if_absent:
            try:
                os.link(temporary, path)
                return
            except FileExistsError:
                raise self._exists(key) from None
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
            # FAT and some network shares have no hard links: look, then rename, in two steps.
            if os.path.lexists(path):
                raise self._exists(key)
        os.replace(temporary, path)

    def _make_folder(self, folder: str) -> None:
        """Make a folder of a key below the root, if need be; its name and those above are durable on return."""
        path = self._root
        with self._lock:
            for segment in folder.split("/") if folder else ():
                parent, path = path, os.path.join(path, segment)
                if path in self._durable_folders:
                    continue
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path, _FOLDER_MODE)
                # Also when it was there: another process may have made it a moment ago and not synced it yet.
                _sync_folder(parent)
                self._durable_folders.add(path)

    def _list_folder(self, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        with self._translated(f"cannot list {shown(self._path(folder))}"):
            entries = self._entries(folder, prefix)
        for key, entry in entries:
            if key.endswith("/"):
                yield from self._list_folder(key[:-1], prefix)
                continue
            with self._translated(f"cannot look at object {key} in {shown(self._root)}"):
                try:
                    status = entry.stat()
                except _ABSENT:
                    self._require_root()
                    continue
            if stat.S_ISREG(status.st_mode):
                yield ObjectInfo(key, status.st_size, status.st_mtime_ns)

    def _entries(self, folder: str, prefix: str) -> Sequence[tuple[str, os.DirEntry[str]]]:
        """Return what a folder holds of the keys with a prefix, sorted; folders end in a slash, as in their keys.

        The slash takes part in the order: `a-b` comes before all of `a/`, and that before `a0`.
        """
        found = []
        try:
            with os.scandir(self._path(folder)) as entries:
                for entry in entries:
                    key = f"{folder}/{entry.name}" if folder else entry.name
                    if not is_key(key):
                        continue
                    if entry.is_dir():
                        key += "/"
                    if key.startswith(prefix):
                        found.append((key, entry))
        except _ABSENT:
            self._require_root()
        return sorted(found, key=lambda pair: pair[0])

    def _missing(self, key: str) -> StoreError:
        """Return the error for an object that is not there, which may be the fault of the root."""
        return self._root_failure() or ObjectMissing(f"object {key} is not in {shown(self._root)}")

    def _require_readable(self, error: OSError, key: str) -> None:
        """Raise DamagedObject for an error that tells of this object's bytes alone."""
        if error.errno in _UNREADABLE and self._root_failure() is None:
            raise DamagedObject(
                f"object {key} in {shown(self._root)} cannot be read ({error.strerror}): check the disk, and put the "
                "object back from a copy"
            ) from error

    def _exists(self, key: str) -> ObjectExists:
        return ObjectExists(f"object {key} is in {shown(self._root)} already")

    def _require_root(self) -> None:
        """Refuse to take what is absent for deleted when the root itself is not there."""
        if failure := self._root_failure():
            raise failure from None

    def _root_failure(self) -> StoreError | None:
        """Return what is wrong with the root as a whole, if anything."""
        try:
            mode = os.stat(self._root).st_mode
        except OSError as error:
            return StoreMissing(
                f"the folder {shown(self._root)} cannot be reached ({error.strerror}): "
                "check the path, and that its disk is mounted"
            )
        if not stat.S_ISDIR(mode):
            return StoreError(f"{shown(self._root)} is not a folder: name the folder that holds the objects")
        return None

    @contextlib.contextmanager
    def _translated(self, failed: str) -> Iterator[None]:
        """Turn an error of the operating system into one of ours; `failed` says what could not be done, and where."""
        try:
            yield
        except OSError as error:
            raise self._failure(error, failed) from error

    def _failure(self, error: OSError, failed: str) -> StoreError:
        if isinstance(error, _ABSENT) and (failure := self._root_failure()):
            return failure
        message = f"{failed}: {error.strerror}"
        if error.errno in _NO_ROOM:
            return StoreFull(f"{message}; free some room there, or raise the quota, and run the command again")
        if error.errno in _REFUSED:
            return AccessDenied(f"{message}; check owner and permissions there, and whether the disk is read-only")
        return StoreUnavailable(f"{message}; check the disk or the network share, and run the command again")


def _write(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of a buffer; no view of it outlives the call, also when it fails."""
    with memoryview(data) as view, view.cast("B") as octets:
        written = _write_direct(descriptor, octets) if len(octets) >= _LEAST_DIRECT else 0
        while written < len(octets):
            written += os.write(descriptor, octets[written:])


# Buffers for direct writes, each in use by one call at a time; kept, as fresh memory costs more than the copying.
_step_buffers: list[mmap.mmap] = []


def _write_direct(descriptor: int, octets: memoryview) -> int:
    """Write whole pages from a buffer's start past the page cache, and return how many bytes that were.

    A file system that cannot do that, now or at all, gets none or a part of them.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        return 0
    try:
        buffer = _step_buffers.pop()
    except IndexError:
        buffer = mmap.mmap(-1, _DIRECT_STEP)
    written = 0
    end = len(octets) // _PAGE * _PAGE
    try:
        with memoryview(buffer) as pages:
            while written < end:
                length = min(_DIRECT_STEP, end - written)
                pages[:length] = octets[written : written + length]
                count = os.write(descriptor, pages[:length])
                written += count
                if count < length:
                    break  # a full disk, or one that ends within a page: the plain way tells
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        _step_buffers.append(buffer)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)
    return written


def _read(descriptor: int, key: str, start: int, length: int) -> bytes:
    data = os.pread(descriptor, length, start)
    if len(data) == length:
        return data
    # Linux reads at most 2 GiB at once, and a network share may return less than asked.
    parts = [data]
    done = len(data)
    while done < length:
        part = os.pread(descriptor, length - done, start + done)
        if not part:
            raise DamagedObject(f"object {key} became shorter while it was read")
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def _make_folders(path: str) -> None:
    """Make a folder and those missing above it, each private to its owner and durable on return."""
    if os.path.lexists(path):
        return
    parent = os.path.dirname(path)
    _make_folders(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, _FOLDER_MODE)
    _sync_folder(parent)


def _sync_folder(path: str) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network shares cannot sync a folder and say so; they keep names safe in their own way or not at all.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
