"""Write a disk of an image to a device or a file: only what differs, and read back at the end.

Windows of the disk are independent: each is read, compared by chunk ids, and only what differs is fetched and written.
Interrupted, the target is partly the old and partly the new; running it again goes on where it was.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from backupfs.errors import PathNotFound, SourceError, shown
from backupfs.ids import ChunkId
from backupfs.repository.repository import Repository
from backupfs.snapshots.content import CHUNK, HOLE, pieces
from backupfs.snapshots.snapshot import Disk, Snapshot
from backupfs.snapshots.volumes import Volume
from backupfs.stores.requests import RequestCounts
from backupfs.stores.together import threads
from backupfs.usecases.events import Progress, Report
from backupfs.usecases.own_folders import require_elsewhere

_WINDOW = 4 << 20
_BLOCK_DEVICES = Path("/sys/block")
_DEVICE_FOLDERS = (b"/dev", b"/dev/mapper", b"/dev/disk/by-id", b"/dev/disk/by-uuid", b"/dev/disk/by-path")
_AT_ONCE = {False: 4, True: 12}  # for a store at hand, and one that is far
_REREAD_TABLE = 0x125F  # BLKRRPART
# How a loop device tells what it is made of: struct loop_info64, which begins with the file's device and inode.
_LOOP_GET_STATUS64, _LOOP_STATUS, _LOOP_FILE = 0x4C05, 232, struct.Struct("=QQ")

Look = Callable[[int], int]  # at the window that starts there


@dataclass(frozen=True, slots=True)
class RestoreImageResult:
    """What became of the target."""

    size: int  # of the disk
    written: int  # bytes that differed
    verified: int  # bytes that were read back
    requests: RequestCounts
    duration_ns: int


def disk_of(snapshot: Snapshot, name: str) -> tuple[Disk, Volume]:
    """Return a disk of an image by its name; the only one if the name is empty. Raises: PathNotFound."""
    names = ", ".join(shown(disk.name) for disk in snapshot.disks)
    if not snapshot.disks:
        raise PathNotFound("the snapshot has no disks: it is one of files")
    fitting = [disk for disk in snapshot.disks if not name or disk.name == name]
    if len(fitting) != 1:
        which = f"no disk {shown(name)}" if name else "several disks"
        raise PathNotFound(f"the image has {which}: name one of {names}, as in SNAP:{shown(snapshot.disks[0].name)}")
    return fitting[0], snapshot.volumes[fitting[0].volume]


def restore_image(
    repository: Repository,
    snapshot: Snapshot,
    name: str,
    target: bytes,
    dry_run: bool,
    report: Report,
    own_folders: Sequence[bytes] = (),
    final: bytes = b"",
) -> RestoreImageResult:
    """Make a device or a file equal to a disk of an image.

    name: of the disk; empty: the only one. target: a block device that nothing uses, a file of the disk's size, or one
    that is not there, which is made. dry_run: only compare. own_folders: of the repository and the cache, where it
    cannot be. final: what the caller calls a new file once it is whole, and messages call it at once.
    Indexes must be loaded. Raises: PathNotFound; SourceError if the target cannot take the disk; UsageError for one in
    a folder of our own; DamagedObject; StoreError.
    """
    started = time.monotonic_ns()
    require_elsewhere(target, own_folders)
    _, volume = disk_of(snapshot, name)
    fd = _open(target, volume.size, dry_run) if not final else _make(target, volume.size, final)
    try:
        # What another name waits for goes when this fails.
        remedy = "" if final else ": it is not whole, and the same command goes on where this one ended"
        run = _Run(repository, volume, fd, final or target, remedy, report)
        written = run.through(run.mend if not dry_run else run.differing)
        if not dry_run:
            os.fsync(fd)
            # Read back from the device, not from memory.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            wrong = run.through(run.differing)
            if wrong:
                raise SourceError(
                    f"{shown(final or target)} does not hold what was written to it: {wrong:,} bytes read back are "
                    "others"
                )
            _tell_kernel(fd)
    finally:
        os.close(fd)
    return RestoreImageResult(
        volume.size, written, 0 if dry_run else volume.size, repository.store.requests, time.monotonic_ns() - started
    )


class _Run:
    """One disk and its target. Every window may be in a thread of its own."""

    def __init__(
        self, repository: Repository, volume: Volume, fd: int, target: bytes, remedy: str, report: Report
    ) -> None:
        self._repository = repository
        self._volume = volume
        self._fd = fd
        self._target = target
        self._remedy = remedy  # where it cannot be written
        self._report = report
        self._zeros = bytes(_WINDOW)

    def through(self, look: Look) -> int:
        """Look at all windows, some at once; return the sum of what that gave."""
        size, done, total = self._volume.size, 0, 0
        starts = iter(range(0, size, _WINDOW))
        count = _AT_ONCE[self._repository.store.is_far]
        with threads(count) as pool:
            waiting = [pool.submit(look, start) for start in itertools.islice(starts, 2 * count)]
            while waiting:
                total += waiting.pop(0).result()
                done = min(size, done + _WINDOW)
                self._report(Progress("restore", 0, done, size_total=size))
                waiting += [pool.submit(look, start) for start in itertools.islice(starts, 1)]
        return total

    def differing(self, start: int) -> int:
        """Return how many bytes of a window are not the disk's."""
        return sum(length for length, *_ in self._differences(start))

    def mend(self, start: int) -> int:
        """Write what differs in a window; return how many bytes that were."""
        written = 0
        for length, kind, source, offset, at in self._differences(start):
            plain: bytes | memoryview = self._zeros[:length]
            if kind == CHUNK:
                plain = self._repository.data.load(ChunkId(source))[offset : offset + length]
            elif kind != HOLE:
                plain = source[offset : offset + length]
            self._write(plain, at)
            written += length
        return written

    def _differences(self, start: int) -> Iterator[tuple[int, int, bytes, int, int]]:
        """Yield (length, kind, source, offset in it, place in the target) of pieces that are others there."""
        volume = self._volume
        length = min(_WINDOW, volume.size - start)
        there = memoryview(self._read(start, length))
        at = 0
        for piece in pieces(volume.content, volume.size, start, length, self._repository.trees.load):
            found = there[at : at + piece.length]
            if piece.kind == HOLE:
                same = found == self._zeros[: piece.length]
            elif piece.kind == CHUNK:
                same = len(found) == piece.length and self._is_chunk(found, piece.source, piece.offset)
            else:
                same = found == piece.source[piece.offset : piece.offset + piece.length]
            if not same:
                yield piece.length, piece.kind, piece.source, piece.offset, start + at
            at += piece.length

    def _is_chunk(self, found: memoryview, chunk_id: bytes, offset: int) -> bool:
        data = self._repository.data
        location = data.location(ChunkId(chunk_id))
        if location is not None and location.length == len(found):
            return data.chunk_id(found) == chunk_id
        # A window may begin or end within a chunk.
        return data.load(ChunkId(chunk_id))[offset : offset + len(found)] == found

    def _read(self, start: int, length: int) -> bytes:
        try:
            return os.pread(self._fd, length, start)
        except OSError as error:
            raise SourceError(f"{shown(self._target)} cannot be read at byte {start:,}: {error.strerror}") from error

    def _write(self, plain: bytes | memoryview, at: int) -> None:
        try:
            done = 0
            while done < len(plain):
                done += os.pwrite(self._fd, plain[done:], at + done)
        except OSError as error:
            raise SourceError(
                f"{shown(self._target)} cannot be written at byte {at:,}: {error.strerror}{self._remedy}"
            ) from error


def _open(target: bytes, size: int, dry_run: bool) -> int:
    """Open what the disk goes to. Raises: SourceError that says why it cannot."""
    name = shown(target)
    try:
        status = os.stat(target)
    except FileNotFoundError:
        if os.path.dirname(target) in _DEVICE_FOLDERS or dry_run:
            raise SourceError(f"there is no {name}") from None
        return _make(target, size, target)
    except OSError as error:
        raise SourceError(f"{name} cannot be used: {error.strerror}") from error
    is_device = stat.S_ISBLK(status.st_mode)
    if not is_device and not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{name} is neither a block device nor a file: a disk cannot be written there")
    user = _loop_over(target)
    if user:
        raise SourceError(f"{name} is attached as {user}: `losetup -d {user}` first; nothing was written")
    try:
        # Exclusive: of a device that is mounted, or that something is made of, the kernel says so.
        fd = os.open(target, (os.O_RDONLY if dry_run else os.O_RDWR) | (os.O_EXCL if is_device else 0) | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise SourceError(
                f"{name} is mounted or in use: unmount what is on it first; nothing was written"
            ) from error
        raise SourceError(f"{name} cannot be opened: {error.strerror}") from error
    there = os.lseek(fd, 0, os.SEEK_END)
    if is_device and there < size:
        os.close(fd)
        raise SourceError(f"{name} is too small: it has {there:,} bytes, the disk {size:,}; nothing was written")
    if not is_device and there != size:
        os.close(fd)
        raise SourceError(
            f"{name} is there and no copy of the disk: it has {there:,} bytes, the disk {size:,}; remove it first, or "
            "name another file; nothing was written"
        )
    return fd


def _make(target: bytes, size: int, final: bytes) -> int:
    try:
        fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SourceError(f"{shown(final)} cannot be made: {error.strerror}") from error
    try:
        os.truncate(fd, size)
    except OSError as error:
        os.close(fd)
        os.unlink(target)
        raise SourceError(f"{shown(final)} cannot have {size:,} bytes: {error.strerror}") from error
    return fd


def _loop_over(target: bytes) -> str:
    """Return the loop device that is made of a file or device, whatever its name was then, if there is one."""
    own = _identity(os.stat(target))
    for path in _BLOCK_DEVICES.glob("loop*/loop/backing_file"):
        device = f"/dev/{path.parent.parent.name}"
        if own in _identities_beneath(device, path):
            return device
    return ""


def _identity(status: os.stat_result) -> tuple[int, int]:
    # Of a device the number, as it may have several nodes; no file lies on the device 0.
    return (0, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def _identities_beneath(device: str, backing_file: Path) -> Iterator[tuple[int, int]]:
    """Yield what a loop device is made of by its own word, and by the name that it was made with."""
    with contextlib.suppress(OSError):  # for root only, or it went just now
        fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_STATUS))
        finally:
            os.close(fd)
        # The kernel's way to write a device's number is that of stat(2).
        yield _LOOP_FILE.unpack_from(status)
    with contextlib.suppress(OSError):
        yield _identity(os.stat(backing_file.read_bytes().rstrip(b"\n")))


def _tell_kernel(fd: int) -> None:
    """Have the kernel read the partition table of a device again."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        try:
            fcntl.ioctl(fd, _REREAD_TABLE)
        except OSError:
            return  # a device without partitions
