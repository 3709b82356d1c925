"""What a reader of file systems gives, whoever wrote it: entries, where their bytes lie, and bytes that lie nowhere.

Readers see hostile input. They run in a process of their own (sandbox.py), and whatever they raise costs the view of
files only, never the image.
"""

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

Read = Callable[[int, int], bytes]  # (offset, length) → bytes of the volume, fewer at its end

READ = -1
Extent = tuple[int, int | None]  # (length, offset in the volume; None: a hole; READ: `data` gives the bytes)


def append_extent(found: list[Extent], length: int, place: int | None) -> None:
    """Add an extent to those of a file, if it has bytes; as a part of the last one if it goes on where that ends."""
    if length <= 0:
        return
    if found:
        last, at = found[-1]
        goes_on = at == place if {at, place} & {None, READ} else place == (at or 0) + last
        if goes_on:
            found[-1] = last + length, at
            return
    found.append((length, place))


class Unreadable(Exception):
    """What is asked for cannot be read; the message says why."""


class PartlyUnreadable(Unreadable):
    """Some extended attributes cannot be had; those that can are in `found`."""

    def __init__(self, text: str, found: list[tuple[bytes, bytes]]) -> None:
        super().__init__(text)
        self.found = found


@dataclass(slots=True)
class Entry:
    """A file, directory or whatever else has a name."""

    name: bytes
    mode: int
    uid: int = 0
    gid: int = 0
    nlink: int = 1
    inode: int = 0
    size: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    target: bytes = b""  # of a symbolic link
    device: tuple[int, int] = (0, 0)
    handle: Any = field(default=None, repr=False)  # the reader's own
    problem: str = ""  # why nothing but its name can be read

    @property
    def is_directory(self) -> bool:
        """Tell whether it has entries."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Tell whether it has bytes."""
        return stat.S_ISREG(self.mode)


class Filesystem(Protocol):
    """A file system in a volume. Every method raises Unreadable, or anything else where the reader has a fault."""

    form: str  # ext4, ntfs, …
    remarks: tuple[str, ...]  # what a user should know of the whole

    def top(self) -> Entry:
        """Return the top directory; its name is empty."""

    def entries(self, directory: Entry) -> Iterator[Entry]:
        """Yield what is in a directory, in any order."""

    def identity(self, directory: Entry) -> object:
        """Return what tells a directory from all others."""

    def xattrs(self, entry: Entry) -> list[tuple[bytes, bytes]]:
        """Return extended attributes as the kernel would show them to root, in byte order of names.

        Raises: PartlyUnreadable where some of them cannot be shown.
        """

    def extents(self, file: Entry) -> list[Extent] | None:
        """Return where a file's bytes lie, in order; None if none of them lies anywhere as it is."""

    def data(self, file: Entry) -> Iterator[bytes]:
        """Yield the bytes of each extent that is READ, in order, those of two apart; all where there are none."""
