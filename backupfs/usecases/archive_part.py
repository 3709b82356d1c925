"""A run of entries of one directory: looked at, compared with one page of the parent, read where they changed.

Where another scanning process waits for work, it gets half of the directories that are still to be gone through.
"""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from backupfs.ids import ChunkId
from backupfs.localfs import reading
from backupfs.localfs.selection import BY_PATTERN
from backupfs.snapshots.content import Content
from backupfs.snapshots.node import INCOMPLETE, NANOSECONDS, RACY, STAT_ROW, Xattrs, encode_device
from backupfs.snapshots.tree import LeafPage, TreeBuilder
from backupfs.usecases.archive_context import ArchiveContext, row_of
from backupfs.usecases.archive_files import FileStorer
from backupfs.usecases.nested import Nested

# From this depth on a directory's descriptor is closed while the walk is below it, and reopened by way of `..`.
_MOST_OPEN = 128


@dataclass(frozen=True, slots=True)
class DirectoriesTask:
    """Some directories in one directory, to be stored by somebody else."""

    path: bytes  # of the directory they are in
    identity: tuple[int, int]  # its (st_dev, st_ino)
    names: tuple[bytes, ...]
    parents: tuple[ChunkId | None, ...]  # trees to compare them with
    wants_xattrs: bool


# A directory as it was stored: its tree, its xattrs and its flags.
Below = tuple[ChunkId, Xattrs, int]
# What became of each directory; None: the directory they are in cannot be found by its path any more.
DirectoriesResult = tuple[Below, ...] | None


class OpenDirectory:
    """A descriptor that may be closed for a while."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close it, unless it is closed."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


# A path that may become longer than the kernel takes cannot be found by another process.
_LONGEST_PATH = 3000
# Directories without any below them are given away in bunches: less work than the words about it is no help.
_ENOUGH_TO_GIVE = 8


class Stored(NamedTuple):
    """What a directory's walk returns."""

    tree: ChunkId
    above: int | None  # a descriptor of the directory above if that was closed
    is_incomplete: bool  # there is more in it than was stored


# (directory, path, parent's tree, device, the directory above if it was closed) → the walk
Descend = Callable[[OpenDirectory, bytes, ChunkId | None, int, os.stat_result | None], Nested[Stored]]


class Part:
    """A run of entries of one directory: looked at, compared with one page of the parent, read where they changed."""

    def __init__(
        self,
        context: ArchiveContext,
        files: FileStorer,
        descend: Descend,
        directory: OpenDirectory,
        path: bytes,
        device: int,
        names: list[bytes],
        page: LeafPage | None,
        looked_ns: int,
        is_source: bool = False,
    ) -> None:
        self._context = context
        self._files = files
        self._descend = descend
        self._directory = directory
        self._path = path
        self._prefix = path if path.endswith(b"/") else path + b"/"
        self._device = device
        self._names = names
        self._page = page
        self._looked_ns = looked_ns
        self._is_source = is_source
        self.same_as_page = False
        self.is_incomplete = False  # something is there that was left out for its size, or could not be read
        self._statuses: list[os.stat_result] = []
        self._rows: list[bytes] = []
        self._contents: list[Content] = []
        self._flags: bytearray = bytearray()
        self._xattrs: dict[int, Xattrs | bytes] = {}
        self._filesystems: dict[int, int] = {}

    def walk(self) -> Nested[None]:
        """Look at every entry, read what is new, go through the directories."""
        directories = self._look()
        page = self._page
        if (
            page is not None
            and not page.flags
            and page.names == self._names
            and page.rows == b"".join(self._rows)
            and page.sparse_columns[1] == self._filesystems
            and self._context.owners_are_current(page)
        ):
            self._take_page(page, len(directories))
            contents = page.contents
            known = {at: ChunkId(content) for at in directories if isinstance(content := contents[at], bytes)}
            stored = yield from self._through(directories, known, wants_xattrs=False)
            for position, (tree, _, flags) in zip(directories, stored, strict=True):
                if tree != contents[position] or flags:
                    if self.same_as_page:
                        self._contents = list(page.contents)
                        self.same_as_page = False
                    self._contents[position] = tree
                    self._flags[position] = flags
        else:
            known = self._compare(directories)
            stored = yield from self._through(directories, known, wants_xattrs=True)
            for position, (tree, xattrs, flags) in zip(directories, stored, strict=True):
                self._contents[position] = tree
                self._flags[position] = flags
                saved = self._context.save_xattrs(xattrs)
                if saved:
                    self._xattrs[position] = saved

    def add_to(self, builder: TreeBuilder, name: bytes = b"") -> int:
        """Give the entries to the builder of the directory's tree; return how many there are.

        name: what the only entry is called there, if not as here.
        """
        for position, own in enumerate(self._names):
            status = self._statuses[position]
            builder.add(
                name or own,
                self._rows[position],
                self._contents[position],
                self._flags[position],
                self._xattrs.get(position, ()),
                self._filesystems.get(position, 0),
                (status.st_uid, reading.owner_name(status.st_uid)),
                (status.st_gid, reading.group_name(status.st_gid)),
            )
        return len(self._names)

    def _look(self) -> list[int]:
        """Stat every entry and leave out what is not wanted; return the positions of directories."""
        context, fd = self._context, self._directory.fd
        statuses, rows = self._statuses, self._rows
        directories: list[int] = []
        missing: set[bytes] = set()
        status_of, pack, second = os.stat, STAT_ROW.pack, NANOSECONDS
        size = 0
        for name in self._names:
            try:
                status = status_of(name, dir_fd=fd, follow_symlinks=False)
            except OSError as error:
                missing.add(name)
                self.is_incomplete |= self._tell_unread(name, error)
                continue
            mode, inode, device, links, uid, gid, length = status[:7]
            mtime_ns, ctime_ns = status.st_mtime_ns, status.st_ctime_ns
            kind = mode & 0o170000
            if kind == 0o40000:
                directories.append(len(statuses))
            else:
                if kind == 0o100000:
                    size += length
                if links > 1:
                    ordinal = context.ordinal(device)
                    if ordinal:
                        self._filesystems[len(statuses)] = ordinal
            rows.append(
                pack(
                    mode,
                    uid,
                    gid,
                    links,
                    inode,
                    length,
                    mtime_ns // second,
                    mtime_ns % second,
                    ctime_ns // second,
                    ctime_ns % second,
                )
            )
            statuses.append(status)
        if missing:
            self._names = [name for name in self._names if name not in missing]
        if context.selection.asks or context.selection.own:
            left_out = self._left_out(directories)
            if left_out:
                self._drop(left_out)
                directories = [at for at, status in enumerate(statuses) if stat.S_ISDIR(status.st_mode)]
                size = sum(status.st_size for status in statuses if stat.S_ISREG(status.st_mode))
        context.counts.size += size
        context.counts.files += len(statuses) - len(directories)
        return directories

    def _left_out(self, directories: list[int]) -> set[int]:
        selection = self._context.selection
        dropped: set[int] = set()
        for at in directories:
            status = self._statuses[at]
            if selection.is_own(status.st_dev, status.st_ino):
                self._context.leave_out(self._prefix + self._names[at], "the repository or the cache itself")
                dropped.add(at)
        if selection.asks and not self._is_source:
            among = set(directories)
            names = self._names
            others = [name for at, name in enumerate(names) if at not in among]
            sizes = {
                names[at]: status.st_size for at, status in enumerate(self._statuses) if stat.S_ISREG(status.st_mode)
            }
            reasons = selection.left_out(self._path, [names[at] for at in directories], others, sizes)
            if reasons:
                for at, name in enumerate(names):
                    if name in reasons:
                        dropped.add(at)
                        self.is_incomplete |= reasons[name] != BY_PATTERN
                        self._context.leave_out(self._prefix + name, reasons[name])
        return dropped

    def _drop(self, positions: set[int]) -> None:
        kept = [at for at in range(len(self._names)) if at not in positions]
        self._filesystems = {new: self._filesystems[at] for new, at in enumerate(kept) if at in self._filesystems}
        self._names = [self._names[at] for at in kept]
        self._statuses[:] = [self._statuses[at] for at in kept]
        self._rows[:] = [self._rows[at] for at in kept]

    def _take_page(self, page: LeafPage, directories: int) -> None:
        self.same_as_page = True
        self._contents = page.contents
        self._flags = bytearray(len(self._names))
        self._xattrs = page.sparse_columns[0]
        counts = self._context.counts
        counts.files_unchanged += len(self._names) - directories
        if self._xattrs:
            counts.has_xattrs = True

    def _compare(self, directories: list[int]) -> dict[int, ChunkId]:
        """Reuse or read every entry that is no directory; return the parent's trees of directories by position."""
        page, counts = self._page, self._context.counts
        positions = {name: at for at, name in enumerate(page.names)} if page is not None else {}
        page_xattrs = page.sparse_columns[0] if page is not None else {}
        trees: dict[int, ChunkId] = {}
        count = len(self._names)
        self._contents = [b""] * count
        self._flags = bytearray(count)
        dropped: set[int] = set()
        among = set(directories)
        for at, name in enumerate(self._names):
            old = positions.get(name)
            if at in among:
                if old is not None and page is not None and _mode_of(page.row(old)) & 0o170000 == 0o40000:
                    content = page.contents[old]
                    if isinstance(content, bytes):
                        trees[at] = ChunkId(content)
                continue
            if old is not None and page is not None and page.row(old) == self._rows[at] and not page.flag(old):
                counts.files_unchanged += 1
                self._contents[at] = page.contents[old]
                xattrs = page_xattrs.get(old)
                if xattrs:
                    counts.has_xattrs = True
                    self._xattrs[at] = xattrs
                continue
            try:
                self._read(at, name)
            except OSError as error:
                self.is_incomplete |= self._tell_unread(name, error)
                dropped.add(at)
                continue
            if old is None:
                counts.files_new += 1
            else:
                counts.files_changed += 1
        if dropped:
            trees = self._drop_unread(dropped, directories, trees)
        return trees

    def _drop_unread(self, dropped: set[int], directories: list[int], trees: dict[int, ChunkId]) -> dict[int, ChunkId]:
        counts = self._context.counts
        counts.files -= len(dropped)
        counts.size -= sum(status.st_size for at in dropped if stat.S_ISREG((status := self._statuses[at]).st_mode))
        kept = [at for at in range(len(self._names)) if at not in dropped]
        moved = {at: new for new, at in enumerate(kept)}
        self._contents = [self._contents[at] for at in kept]
        self._flags = bytearray(self._flags[at] for at in kept)
        self._xattrs = {moved[at]: xattrs for at, xattrs in self._xattrs.items() if at in moved}
        self._drop(dropped)
        directories[:] = [moved[at] for at in directories]
        return {moved[at]: tree for at, tree in trees.items()}

    def _read(self, at: int, name: bytes) -> None:
        context, status = self._context, self._statuses[at]
        kind = status.st_mode & 0o170000
        xattrs: Xattrs
        if kind == 0o100000:
            if status.st_size > 1 << 20:
                context.counts.current = self._prefix + name
            found = self._files.store(name, self._directory.fd, self._prefix + name, status)
            if found.status is not status or found.size != status.st_size:
                context.counts.size += found.size - status.st_size
                self._statuses[at] = found.status
                self._rows[at] = row_of(found.status, found.size)
            self._contents[at] = found.content
            self._flags[at] = found.flags | (RACY if context.is_racy(found.status, self._looked_ns) else 0)
            xattrs = found.xattrs
        else:
            if kind == 0o120000:
                self._contents[at] = os.readlink(name, dir_fd=self._directory.fd)
            elif kind in (0o20000, 0o60000):
                self._contents[at] = encode_device(os.major(status.st_rdev), os.minor(status.st_rdev))
            try:
                xattrs = reading.read_xattrs(reading.path_in(self._directory.fd, name), follow=False)
            except FileNotFoundError:
                xattrs = ()  # no /proc: links and devices go without
        if xattrs:
            self._xattrs[at] = context.save_xattrs(xattrs)

    def walk_task(self, parents: tuple[ChunkId | None, ...], wants_xattrs: bool) -> Nested[list[Below]]:
        """Go through directories that another process gave away: all names of this part."""
        known = {at: tree for at, tree in enumerate(parents) if tree is not None}
        return (yield from self._through(list(range(len(self._names))), known, wants_xattrs))

    def _through(self, positions: list[int], known: dict[int, ChunkId], wants_xattrs: bool) -> Nested[list[Below]]:
        """Store the directories at some positions, with others' help if they ask for work; return all in order."""
        scanner = self._context.scanner
        stored: dict[int, Below] = {}
        given: list[tuple[int, list[int]]] = []
        left = list(reversed(positions))
        while left:
            if len(left) > 1 and scanner.is_wanted() and self._is_worth_giving(left):
                half = left[len(left) // 2 - 1 :: -1]
                del left[: len(left) // 2]
                given.append((scanner.give(self._task(half, known, wants_xattrs)), half))
            at = left.pop()
            stored[at] = yield from self._below(at, known.get(at), wants_xattrs)
        for number, half in given:
            result = scanner.result_of(number)
            if result is not None:
                stored.update(zip(half, result, strict=True))
                continue
            # The directory was moved meanwhile: only this process still has it open.
            for at in half:
                stored[at] = yield from self._below(at, known.get(at), wants_xattrs)
        return [stored[at] for at in positions]

    def _is_worth_giving(self, left: list[int]) -> bool:
        # A directory with directories in it has more than two links on most file systems, and exactly one on others.
        return len(self._path) < _LONGEST_PATH and (
            len(left) >= _ENOUGH_TO_GIVE or any(self._statuses and self._statuses[at].st_nlink != 2 for at in left)
        )

    def _task(self, half: list[int], known: dict[int, ChunkId], wants_xattrs: bool) -> DirectoriesTask:
        status = os.fstat(self._directory.fd)
        names, parents = tuple(self._names[at] for at in half), tuple(known.get(at) for at in half)
        return DirectoriesTask(self._path, (status.st_dev, status.st_ino), names, parents, wants_xattrs)

    def _below(self, at: int, parent: ChunkId | None, wants_xattrs: bool) -> Nested[Below]:
        """Store the directory at a position. One that cannot be read is stored empty."""
        context, name = self._context, self._names[at]
        path = self._prefix + name
        context.counts.directories += 1
        try:
            below = OpenDirectory(reading.open_directory(name, self._directory.fd))
            try:
                device = os.fstat(below.fd).st_dev
                xattrs = reading.read_xattrs(below.fd) if wants_xattrs else ()
            except OSError:
                below.close()
                raise
            reason = context.selection.not_entered(path, device, self._device)
            if reason is not None:
                context.leave_out(path, reason)
                below.close()
                return context.empty_tree(), xattrs, INCOMPLETE
            above = None
            if not self._is_source and self._path.count(b"/") >= _MOST_OPEN:
                above = os.fstat(self._directory.fd)
                self._directory.close()
            stored: Stored = yield self._descend(below, path, parent, device, above)
            if stored.above is not None:
                self._directory.fd = stored.above
            return stored.tree, xattrs, INCOMPLETE if stored.is_incomplete else 0
        except OSError as error:
            if self._directory.fd < 0:
                raise  # the way back is lost: the directory above reports it
            self._tell_unread(name, error)
            return context.empty_tree(), self._xattrs_by_name(name), INCOMPLETE

    def _xattrs_by_name(self, name: bytes) -> Xattrs:
        """Return those of a directory that cannot be opened: without its ACL its mode would give rights to others."""
        try:
            return reading.read_xattrs(reading.path_in(self._directory.fd, name), follow=False)
        except OSError:
            return ()

    def _tell_unread(self, name: bytes, error: OSError) -> bool:
        """Report what could not be read, and return whether that is a failure: what is gone meanwhile is none.

        What the user named is one whatever became of it.
        """
        path = self._prefix + name
        if isinstance(error, FileNotFoundError) and not self._is_source and self._is_gone(name):
            self._context.vanish(path)
            return False
        self._context.skip(path, error)
        return True

    def _is_gone(self, name: bytes) -> bool:
        try:
            os.stat(name, dir_fd=self._directory.fd, follow_symlinks=False)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return False


def _mode_of(row: bytes) -> int:
    return int.from_bytes(row[:4], "little")
