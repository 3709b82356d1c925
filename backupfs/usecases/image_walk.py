"""Reading the files of a volume in a process that is confined: what it is given is hostile input.

The process sends what it finds, plain values only. Directories come after all that is below them, so that whoever
receives builds each tree at once. What cannot be read is named and passed over.
"""

import errno
import resource
import stat
import time
from collections.abc import Iterator
from typing import NamedTuple

from backupfs.disks import explorer, readers, sandbox, superblocks
from backupfs.disks.filesystem import READ, Entry, Extent, Filesystem, PartlyUnreadable, Read, Unreadable
from backupfs.disks.ranges import Ranges, overlapping
from backupfs.forked import Line
from backupfs.snapshots.content import MOST_INLINE
from backupfs.snapshots.node import NANOSECONDS, STAT_ROW
from backupfs.usecases.events import Remark, Report

_BATCH = 512
_MOST_DEPTH = 2048
_MOST_ENTRIES = 1 << 28
_MOST_PROBLEMS = 1000
_MOST_SIZE = 1 << 62
# Bytes that are read of a volume through its parser. 32 is what btrfs can make of a block, NTFS of a cluster 16.
_MOST_RATIO = 32
_LEAST_READ = 4 << 30
# Shares of the processor time that a reader may have: behind the first none is spent on contents any more, behind the
# second on nothing, so that what was found before is not lost with it.
_READING_SHARE, _WALKING_SHARE = 0.8, 0.95
# To ask for the time is a system call, so it is not done for each.
_STEPS_PER_LOOK = 32
# What fits into a stat row.
_MOST_TIME_NS = (1 << 62) * NANOSECONDS


class Found(NamedTuple):
    """A file system in the volume."""

    form: str
    remarks: tuple[str, ...]


class Nothing(NamedTuple):
    """There is no file system in the volume that can be read, and nothing says that one was lost."""

    reason: str


class Node(NamedTuple):
    """An entry; one of the last four says what it is made of."""

    name: bytes
    row: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]
    kept: bytes = b""  # the content itself: a link's target, a device, the bytes of a small file
    extents: tuple[Extent, ...] | None = None
    data: int = 0  # the number of a file that was sent before
    directory: int = 0  # the number of a directory that was sent before


class Listed(NamedTuple):
    """Entries of a directory, in order; it may take several."""

    nodes: tuple[Node, ...]


class Closed(NamedTuple):
    """The directory whose entries were listed since the last one is complete, under a number."""

    number: int
    top: Node | None = None  # the directory itself, when it is the top


class Part(NamedTuple):
    """The next bytes of a file, which lie nowhere as they are."""

    data: bytes


class Gap(NamedTuple):
    """The next extents of a file of which other parts are sent as bytes."""

    extents: tuple[Extent, ...]


class PartsEnd(NamedTuple):
    """All of the file was sent, under a number; or they could not be."""

    number: int
    problem: str = ""


class Problem(NamedTuple):
    """Something that cannot be read."""

    path: bytes
    text: str


class Touched(NamedTuple):
    """Something was read, of a file or of what leads to files, where nothing should be in use."""

    offset: int


MESSAGES = (Found, Nothing, Listed, Closed, Part, Gap, PartsEnd, Problem, Touched, Node)


def load_readers(report: Report) -> None:
    """Load what reads file systems, once, before anything is forked; say so if most of it is not installed."""
    explorer.load()
    if not explorer.is_installed():
        report(
            Remark(
                "of the files in the disks only those on ext2, ext3, ext4 and XFS are shown, as the library that reads "
                "others is missing: `pip install '.[images]'` in backupfs's checkout adds it; the disks themselves are "
                "complete"
            )
        )


def walk_volume(line: Line, read_all: Read, size: int, kept: list[int], free: Ranges) -> None:
    """Be the process: find the file system in a volume and send all that is in it, or that there is none.

    kept: descriptors that `read_all` needs. free: what nothing should lead to.
    """
    touched: list[int] = []
    is_open = False

    def read(offset: int, length: int) -> bytes:
        # To find out what a volume holds, places are looked at that it may not use.
        if is_open and free and not touched:
            touched.extend(low for low, _ in overlapping(free, offset, offset + length))
        return read_all(offset, length)

    # What it needs is loaded while files can be.
    explorer.load()
    sandbox.confine([*kept, *line.descriptors])
    try:
        filesystem = readers.open_filesystem(read, size)
        is_open = True
        top = _top_of(filesystem) if filesystem is not None else None
    except Exception as error:
        line.send(Problem(b"/", f"its file system cannot be read: {_reason(error)}"))
        return
    if filesystem is None or top is None:
        _tell_nothing(line, read, size)
        return
    line.send(Found(filesystem.form, filesystem.remarks))
    _Walk(line, filesystem, size).run(top)
    if touched:
        line.send(Touched(touched[0]))


def _top_of(filesystem: Filesystem) -> Entry:
    top = filesystem.top()
    if not top.is_directory:
        raise Unreadable("its top is no directory")
    return top


def _tell_nothing(line: Line, read: Read, size: int) -> None:
    """Say why nothing is shown of a volume, where something might be."""
    form = superblocks.form_of(read)
    if not form and superblocks.is_swap(read):
        return
    form = form or superblocks.fixed_form_of(read)
    if form:
        lacks = "which cannot be read" if explorer.is_installed() else "and the library that reads it is missing"
        line.send(Nothing(f"it holds {form}, {lacks}"))
    else:
        copy = superblocks.copy_in(read, size)
        line.send(Nothing("no file system that is known") if copy is None else Problem(b"/", copy.words))


class _Walk:
    """One walk through a file system, without recursion."""

    def __init__(self, line: Line, filesystem: Filesystem, size: int) -> None:
        """Take the parts. size: of the volume."""
        self._line = line
        self._filesystem = filesystem
        self._size = size
        self._most_read = max(_MOST_RATIO * size, _LEAST_READ)
        self._left = self._most_read
        limit = resource.getrlimit(resource.RLIMIT_CPU)[0]
        self._time = limit if limit != resource.RLIM_INFINITY else sandbox.CPU_SECONDS
        self._used = 0.0
        self._numbers = self._entries = 0
        self._steps = -1
        self._problems = 0
        self._seen: set[object] = set()

    def run(self, top: Entry) -> None:
        """Send all that is below the top directory, and this last."""
        self._seen.add(self._filesystem.identity(top))
        stack = [_Open(top, b"", self._list(top, b""))]
        while stack:
            current = stack[-1]
            child = next(current.left, None)
            if child is None:
                number = self._send(current)
                stack.pop()
                if stack:
                    stack[-1].numbers[current.entry.name] = number
                else:
                    if self._problems > _MOST_PROBLEMS:
                        more = self._problems - _MOST_PROBLEMS
                        self._line.send_soon(Problem(b"/", f"{more:,} more could not be read, and are not listed"))
                    self._line.send(Closed(number, self._node(current.entry, b"/", number)))
            elif self._may_enter(child, current.path + b"/" + child.name, len(stack)):
                path = current.path + b"/" + child.name
                stack.append(_Open(child, path, self._list(child, path)))

    def _list(self, directory: Entry, path: bytes) -> list[Entry]:
        found: dict[bytes, Entry] = {}
        try:
            self._check_walking_time()
            for entry in self._filesystem.entries(directory):
                self._entries += 1
                self._check_walking_time()
                if self._entries > _MOST_ENTRIES:
                    raise Unreadable("the file system has more entries than are believed")
                if entry.name in (b"", b".", b"..") or b"/" in entry.name or b"\0" in entry.name:
                    self._problem(path + b"/" + entry.name, "it has a name that no file can have")
                elif entry.problem:
                    self._problem(path + b"/" + entry.name, f"it cannot be read: {entry.problem}")
                elif entry.name in found:
                    self._problem(path + b"/" + entry.name, "there are two of this name; the first is kept")
                else:
                    found[entry.name] = entry
        except Exception as error:
            self._problem(path or b"/", f"not all of the directory can be read: {_reason(error)}")
        return [found[name] for name in sorted(found)]

    def _may_enter(self, directory: Entry, path: bytes, depth: int) -> bool:
        identity = self._filesystem.identity(directory)
        if identity in self._seen:
            self._problem(path, "it is a directory that was met before: its content is left out")
            return False
        if depth >= _MOST_DEPTH:
            self._problem(path, "it lies deeper than is believed: its content is left out")
            return False
        self._seen.add(identity)
        return True

    def _send(self, current: "_Open") -> int:
        """Send a directory's entries; return its number."""
        batch: list[Node] = []
        for entry in current.entries:
            path = current.path + b"/" + entry.name
            number = current.numbers.get(entry.name, 0)
            if entry.is_directory and not number:
                # One that was not entered is there, and empty.
                self._numbers += 1
                number = self._numbers
                self._line.send_soon(Closed(number))
            node = self._node(entry, path, number)
            if node is not None:
                batch.append(node)
        # Files that were read on the way are sent before: then nothing comes between the parts of a directory.
        for at in range(0, len(batch), _BATCH):
            self._line.send_soon(Listed(tuple(batch[at : at + _BATCH])))
        self._numbers += 1
        if current.path:
            self._line.send_soon(Closed(self._numbers))
        return self._numbers

    def _node(self, entry: Entry, path: bytes, number: int) -> Node | None:
        try:
            xattrs = tuple(self._filesystem.xattrs(entry))
        except PartlyUnreadable as error:
            self._problem(path, _reason(error))
            xattrs = tuple(error.found)
        except Exception as error:
            self._problem(path, f"its attributes cannot be read: {_reason(error)}")
            xattrs = ()
        try:
            return self._with_content(entry, xattrs, number)
        except Exception as error:
            self._problem(path, _reason(error))
            return None

    def _with_content(self, entry: Entry, xattrs: tuple[tuple[bytes, bytes], ...], number: int) -> Node:
        size = entry.size
        if not 0 <= size < _MOST_SIZE:
            raise Unreadable(f"it says that it has {size} bytes")
        if entry.is_directory:
            return Node(entry.name, _row_of(entry, size), xattrs, directory=number)
        if stat.S_ISLNK(entry.mode):
            if not entry.target or b"\0" in entry.target:
                raise Unreadable("it is a link without a target")
            return Node(entry.name, _row_of(entry, len(entry.target)), xattrs, entry.target)
        if stat.S_ISCHR(entry.mode) or stat.S_ISBLK(entry.mode):
            device = b"".join((part & 0xFFFFFFFF).to_bytes(4, "little") for part in entry.device)
            return Node(entry.name, _row_of(entry, 0), xattrs, device)
        if not entry.is_file or size == 0:
            return Node(entry.name, _row_of(entry, 0), xattrs)
        self._check_walking_time()
        extents = self._filesystem.extents(entry)
        if extents is None:
            extents = [(size, READ)]
        for length, place in extents:
            if place not in (None, READ) and not 0 <= place <= self._size - length:
                raise Unreadable("it lies behind the end of the disk, which is cut short")
        if any(place == READ for _, place in extents):
            return self._read(entry, xattrs, extents)
        return Node(entry.name, _row_of(entry, size), xattrs, extents=tuple(extents))

    def _read(self, entry: Entry, xattrs: tuple[tuple[bytes, bytes], ...], extents: list[Extent]) -> Node:
        """Send a file of which some or all is to be read through the parser."""
        row = _row_of(entry, entry.size)
        count = sum(length for length, place in extents if place == READ)
        self._check_time(_READING_SHARE)
        if count > self._left:
            raise Unreadable(
                f"{count:,} bytes of it would have to be unpacked, and {self._most_read:,} is the most in this volume"
            )
        self._left -= count
        data = self._filesystem.data(entry)
        if count == entry.size <= MOST_INLINE:
            return Node(entry.name, row, xattrs, b"".join(data))
        self._numbers += 1
        number = self._numbers
        try:
            self._send_parts(extents, data)
        except Exception as error:
            self._line.send(PartsEnd(number, _reason(error)))
            raise
        self._line.send(PartsEnd(number))
        return Node(entry.name, row, xattrs, data=number)

    def _send_parts(self, extents: list[Extent], data: Iterator[bytes]) -> None:
        gap: list[Extent] = []
        for length, place in extents:
            if place != READ:
                gap.append((length, place))
                if len(gap) < _BATCH:
                    continue
            if gap:
                self._line.send(Gap(tuple(gap)))
                gap = []
            left = length if place == READ else 0
            while left > 0:
                self._check_time(_READING_SHARE)
                part = next(data, b"")
                if not 0 < len(part) <= left:
                    raise Unreadable("its reader gives other bytes than it said")
                self._line.send(Part(part))
                left -= len(part)
        if gap:
            self._line.send(Gap(tuple(gap)))

    def _check_time(self, share: float) -> None:
        """Raises: Unreadable when the process has used this share of the processor time that it may have."""
        self._used = time.process_time()
        if self._used > share * self._time:
            raise Unreadable("the reader of its volume had no time left")

    def _check_walking_time(self) -> None:
        """Look at the time now and then. Raises: Unreadable."""
        self._steps += 1
        if self._steps % _STEPS_PER_LOOK == 0 or self._used > _WALKING_SHARE * self._time:
            self._check_time(_WALKING_SHARE)

    def _problem(self, path: bytes, text: str) -> None:
        self._problems += 1
        if self._problems <= _MOST_PROBLEMS:
            self._line.send_soon(Problem(path, text))


class _Open:
    """A directory on the way down."""

    def __init__(self, entry: Entry, path: bytes, entries: list[Entry]) -> None:
        self.entry = entry
        self.path = path
        self.entries = entries
        self.left: Iterator[Entry] = iter([child for child in entries if child.is_directory])
        self.numbers: dict[bytes, int] = {}


def _row_of(entry: Entry, size: int) -> bytes:
    return STAT_ROW.pack(
        entry.mode & 0xFFFFFFFF,
        entry.uid & 0xFFFFFFFF,
        entry.gid & 0xFFFFFFFF,
        entry.nlink & 0xFFFFFFFF,
        entry.inode & 0xFFFFFFFFFFFFFFFF,
        size,
        *_time(entry.mtime_ns),
        *_time(entry.ctime_ns),
    )


def _time(time_ns: int) -> tuple[int, int]:
    bounded = max(-_MOST_TIME_NS, min(_MOST_TIME_NS, time_ns))
    return bounded // NANOSECONDS, bounded % NANOSECONDS


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it takes more memory than a reader may have"
    if isinstance(error, RecursionError):
        return "it goes deeper than a reader may go"
    if isinstance(error, OSError) and error.errno == errno.EPERM:
        return "its reader wanted something that it may not do"
    return " ".join(f"{error}".split())[:300] or type(error).__name__
