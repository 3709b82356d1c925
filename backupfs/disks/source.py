"""A disk as bytes: a block device, a file that holds one as it is, or one in a format of virtual machines.

Formats other than raw are read by qemu, which knows them best: `qemu-nbd` serves the file on a socket, `qemu-img` says
where there is data (nbd.py). Which files it reads is decided before (chain.py).
"""

import abc
import errno
import fcntl
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from backupfs.disks.chain import ENDINGS, RAW, Chain, is_raw_by_name, looks_like
from backupfs.disks.nbd import NbdServer
from backupfs.errors import SourceError, UsageError, shown

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")
# What the names of files with disks in them end in, and the disk's does not.
_SUFFIXES = (".raw", ".img", ".dd", ".iso", ".qcow2", ".vmdk", ".vhd", ".vhdx", ".vdi")
_BLKSSZGET = 0x1268  # linux/fs.h
_TELLING = (*(os.fsencode(suffix) for suffix in _SUFFIXES), *(one for some in ENDINGS.values() for one in some))


class DiskSource(abc.ABC):
    """An open disk. Processes that are forked later read it, too."""

    form: str
    size: int
    remarks: tuple[str, ...] = ()  # what a user should know of it
    problems: tuple[str, ...] = ()  # what is damaged of what it is read from

    def __init__(self, name: str, path: bytes) -> None:
        """Take the parts.

        name: as in the snapshot: vda, disk1. path: absolute.
        """
        self.name = name
        self.path = path

    @abc.abstractmethod
    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from an offset on. Raises: SourceError."""

    @abc.abstractmethod
    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of what may be other than zeros between two places, in order."""

    @abc.abstractmethod
    def descriptors(self) -> list[int]:
        """Return what a process must keep open to read it; from then on reading opens nothing."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give back what is open."""

    @property
    def device(self) -> int | None:
        """The number of the block device, if it is one."""
        return None

    @property
    def sector(self) -> int:
        """The bytes in which partition tables count; 0: nobody knows."""
        return 0

    def forget_cached(self) -> None:
        """Have everything that is read from now on come from the disk."""
        return

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes, fewer at the end of the disk. Raises: SourceError."""
        buffer = memoryview(bytearray(max(0, min(length, self.size - offset))))
        self.read_into(buffer, offset)
        return bytes(buffer)


class RawDisk(DiskSource):
    """A block device or a file with the bytes of a disk."""

    form = RAW

    def __init__(self, name: str, path: bytes, fd: int) -> None:
        """Take the parts, the descriptor too."""
        super().__init__(name, path)
        self._fd = fd
        self.size = os.lseek(fd, 0, os.SEEK_END)

    @property
    def device(self) -> int | None:
        """The number of the block device, if it is one."""
        status = os.fstat(self._fd)
        return status.st_rdev if stat.S_ISBLK(status.st_mode) else None

    @property
    def sector(self) -> int:
        """What the kernel counts a block device in."""
        if self.device is None:
            return 0
        buffer = bytearray(4)
        try:
            fcntl.ioctl(self._fd, _BLKSSZGET, buffer)
        except OSError:
            return 0
        return int.from_bytes(buffer, sys.byteorder)

    def forget_cached(self) -> None:
        """Drop what the kernel keeps of a device: what a mounted file system wrote since goes past that."""
        if self.device is not None:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:] if done else buffer], offset + done)
            except OSError as error:
                raise SourceError(
                    f"the disk {shown(self.path)} cannot be read at byte {offset + done:,}: {error.strerror}"
                ) from error
            if count == 0:
                raise SourceError(f"the disk {shown(self.path)} ends at byte {offset + done:,}: it became smaller")
            done += count

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges that are no holes; a device is one range."""
        # What lies behind the end of a file would pass for a hole.
        if os.lseek(self._fd, 0, os.SEEK_END) < self.size:
            raise SourceError(f"the disk {shown(self.path)} became smaller than it was: {self.size:,} bytes")
        while start < end:
            try:
                low = os.lseek(self._fd, start, os.SEEK_DATA)
                high = os.lseek(self._fd, low, os.SEEK_HOLE)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    yield start, end  # a file system that cannot tell
                return
            if low >= end:
                return
            yield low, min(high, end)
            start = high

    def descriptors(self) -> list[int]:
        """Return the file's."""
        return [self._fd]

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class ServedDisk(DiskSource):
    """A disk in a format that qemu reads for us."""

    def __init__(self, name: str, path: bytes, form: str, folders: Sequence[bytes] = ()) -> None:
        """Open all files of it and start the server.

        folders: as for Chain.
        Raises: SourceError.
        """
        super().__init__(name, path)
        self.form = form
        chain = Chain(path, form, folders)
        self._server = NbdServer(path, form, chain)
        self.size = self._server.size
        try:
            if chain.size not in (0, self.size):
                raise SourceError(
                    f"the disk {shown(path)} cannot be read: it says that it has {chain.size:,} bytes, and qemu reads "
                    f"{self.size:,}: convert it with the program that made it"
                )
            self._data = self._server.data_ranges()
            self.remarks = self._server.remarks
            self.problems = tuple(self._server.problems())
        except BaseException:
            self._server.close()
            raise

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer."""
        self._server.read_into(buffer, offset)

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield what the format says is not zero."""
        for low, high in self._data:
            if high > start:
                if low >= end:
                    return
                yield max(low, start), min(high, end)

    def descriptors(self) -> list[int]:
        """Return that of this process's connection."""
        return [self._server.connection()]

    def close(self) -> None:
        """End the server."""
        self._server.close()


def open_disk(path: bytes, name: str = "", form: str = "", folders: Sequence[bytes] = ()) -> DiskSource:
    """Open a block device, or a file with a disk in it, whatever its format.

    name: for the snapshot; empty: what the device or file is called. form: of a file, by qemu's name; empty: what its
    name says if that is raw, else what it begins like. folders: where files that it is made of may lie, too.
    Raises: SourceError; UsageError for a name that cannot be one, and for a device in a format.
    """
    path = os.path.abspath(path)
    name = name or default_name(path)
    try:
        # A pipe would wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"the disk {shown(path)} cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not (stat.S_ISBLK(status.st_mode) or stat.S_ISREG(status.st_mode)):
            raise SourceError(f"{shown(path)} is no disk: give a block device or a file that holds a disk")
        if os.lseek(fd, 0, os.SEEK_END) == 0:
            raise SourceError(f"the disk {shown(path)} has no bytes")
        if not is_name(name):
            raise UsageError(
                f"{shown(name)} cannot be the name of a disk: give one of letters, digits and ._+- as in "
                f"NAME={shown(path)}"
            )
        # What a device holds may look like anything; only files are in formats.
        if not stat.S_ISREG(status.st_mode):
            if form not in ("", RAW):
                raise UsageError(f"{shown(path)} is a device, whose bytes are the disk: --format is for files")
            form = RAW
        seen = "" if form else looks_like(fd)
        # A link may have a name that says nothing.
        telling = path if path.lower().endswith(_TELLING) else os.path.realpath(path)
        form = form or (RAW if is_raw_by_name(telling) else seen)
        _require_as_named(telling, name, seen)
        if form == RAW:
            fd, kept = -1, fd
            disk: DiskSource = RawDisk(name, path, kept)
        else:
            disk = ServedDisk(name, path, form, folders)
        disk.remarks += _doubts(telling, name, form, seen)
        return disk
    finally:
        if fd >= 0:
            os.close(fd)


def is_name(text: str) -> bool:
    """Tell whether a text can be the name of a disk, or of an image."""
    return _NAME.fullmatch(text) is not None


def _require_as_named(path: bytes, name: str, seen: str) -> None:
    """Refuse a file that is not what its name says: a VHD says what it is at its end only."""
    # What ends in .vmdk may be the plain half of one.
    said = next((form for form, endings in ENDINGS.items() if path.lower().endswith(endings)), "vmdk")
    if seen == RAW and said != "vmdk":
        raise SourceError(
            f"the disk {shown(path)} is no {said} though its name says so: it is damaged or cut short, copy it again; "
            f"if it is a raw disk: --format {name}=raw"
        )


def _doubts(path: bytes, name: str, form: str, seen: str) -> tuple[str, ...]:
    """Say where the format of a file is a guess that may be wrong. seen: what it begins like, if that was asked."""
    if seen in ("", RAW):
        return ()
    if form == RAW:
        remark = f"begins like {seen} and is stored as a raw disk, as its name says: --format {name}={seen} reads it so"
    elif path.lower().endswith(ENDINGS[seen]):
        return ()
    else:
        remark = (
            f"is read as {seen} because it begins like one: if it is a raw disk, whose guest could write that, say "
            f"--format {name}=raw"
        )
    return (f"{shown(path)} {remark}",)


def default_name(path: bytes) -> str:
    """Return what a disk is called: its device's name in the kernel, or its file's without what says the format."""
    name = os.fsdecode(os.path.basename(os.path.realpath(path) if path.startswith(b"/dev/") else path))
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def attached_disks(devices: Path = Path("/sys/block")) -> dict[str, int]:
    """Return the disks that this machine has, by name, with their sizes: those that hold data of their own.

    Left out are memory, loops, drives without a medium and what is made of other disks.
    """
    found: dict[str, int] = {}
    try:
        entries = sorted(devices.iterdir())
    except OSError:
        return found
    for entry in entries:
        if entry.name.startswith(("loop", "ram", "zram", "dm-", "md", "sr", "fd", "nbd", "mtdblock")):
            continue
        try:
            size = int((entry / "size").read_text()) * 512
        except (OSError, ValueError):
            continue
        if size:
            found[entry.name] = size
    return found
