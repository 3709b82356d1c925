"""Walk, compare with the parent, read what changed, build trees: the part of a backup that touches sources.

The walk goes by descriptors and keeps no recursion of Python's: each directory is a generator that yields the
directories below it. Files of a directory come before its directories, so they are neighbours in blocks. An entry
whose stat row equals the parent's is reused and opened by nobody; a run of entries that equals a whole page of the
parent costs one comparison of bytes.
"""

import os
import stat
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator

from backupfs.ids import ChunkId
from backupfs.localfs import reading
from backupfs.snapshots.node import NANOSECONDS, STAT_ROW
from backupfs.snapshots.tree import LeafPage, TreeBuilder, leaf_pages
from backupfs.usecases.archive_context import ArchiveContext, row_of
from backupfs.usecases.archive_files import FileStorer
from backupfs.usecases.archive_parent import ParentTrees
from backupfs.usecases.archive_part import DirectoriesResult, DirectoriesTask, OpenDirectory, Part, Stored
from backupfs.usecases.nested import Nested, run_nested
from backupfs.usecases.scanner import Root

# As many entries are looked at before any of them is read; it bounds memory in directories of a million entries.
SLICE = 4096

_NO_MORE = object()


class Archiver:
    """Turns sources into trees. Belongs to one scanning process."""

    def __init__(self, context: ArchiveContext, files: FileStorer, parent: ParentTrees) -> None:
        """Take the parts."""
        self._context = context
        self._files = files
        self._parent = parent

    @property
    def context(self) -> ArchiveContext:
        """What is shared with those who build trees of what is stored here."""
        return self._context

    def archive(self, sources: list[bytes], parent: ChunkId | None) -> "Root":
        """Store everything below the sources and return `/`.

        sources: absolute, normalised, none below another.
        parent: root tree to compare with.
        """
        status = os.stat(b"/")
        row = row_of(status, status.st_size) if sources == [b"/"] else _row_on_the_way(status)
        stored = run_nested(self._from_root(b"/", sources, parent))
        self._context.counts.is_root_incomplete = stored.is_incomplete
        xattrs = self._context.save_xattrs(reading.read_xattrs(b"/") if sources == [b"/"] else ())
        owner, group = reading.owner_name(status.st_uid), reading.group_name(status.st_gid)
        return Root(stored.tree, row, owner, group, xattrs)

    def archive_stream(self, path: bytes, read_into: Callable[[memoryview], int], time_ns: int) -> "Root":
        """Store one file whose bytes come from a stream and return `/`.

        path: where it stands in the snapshot. time_ns: its modification time.
        """
        content, size = self._files.store_stream(read_into)
        times = (time_ns // NANOSECONDS, time_ns % NANOSECONDS) * 2
        row = STAT_ROW.pack(stat.S_IFREG | 0o600, os.getuid(), os.getgid(), 1, 0, size, *times)
        for name in reversed(path.split(b"/")[1:]):
            builder = self._context.builder()
            self._context.add_plain(builder, name, row, content)
            content = builder.finish()
            row = STAT_ROW.pack(stat.S_IFDIR | 0o755, os.getuid(), os.getgid(), 1, 0, 0, 0, 0, 0, 0)
        counts = self._context.counts
        counts.files = counts.files_new = 1
        counts.size = size
        assert isinstance(content, bytes)
        return Root(ChunkId(content), row, reading.owner_name(os.getuid()), reading.group_name(os.getgid()), ())

    def archive_task(self, task: DirectoriesTask) -> DirectoriesResult:
        """Store directories that another process gave away; None if the way to them is another one now."""
        try:
            directory = OpenDirectory(reading.open_directory(task.path, None))
        except OSError:
            return None
        try:
            status = os.fstat(directory.fd)
            if (status.st_dev, status.st_ino) != task.identity:
                return None
            part = self._part(directory, task.path, status.st_dev, list(task.names), None, 0)
            return tuple(run_nested(part.walk_task(task.parents, task.wants_xattrs)))
        finally:
            directory.close()

    # Above the sources: directories that are only on the way.

    def _from_root(self, path: bytes, sources: list[bytes], parent: ChunkId | None) -> Nested[Stored]:
        if sources == [path]:
            directory = OpenDirectory(reading.open_directory(path, None))
            self._context.counts.directories += 1
            stored: Stored = yield self._store_directory(directory, path, parent, os.fstat(directory.fd).st_dev, None)
            return stored
        prefix = path if path.endswith(b"/") else path + b"/"
        below: dict[bytes, list[bytes]] = {}
        for source in sources:
            below.setdefault(source[len(prefix) :].split(b"/", 1)[0], []).append(source)
        builder = self._context.builder()
        for name, inner in sorted(below.items()):
            child = prefix + name
            if inner == [child]:
                yield from self.source(builder, child, name, parent)
                continue
            stored = yield self._from_root(child, inner, self._parent.tree_below(parent, name))
            self._context.add_plain(builder, name, _row_on_the_way(os.stat(child)), stored.tree)
        return Stored(builder.finish(), None, False)

    def source(self, builder: TreeBuilder, path: bytes, name: bytes, parent: ChunkId | None) -> Nested[bool]:
        """Add a source itself to the directory above it; return whether it could be read.

        name: what it is called there. parent: the tree of that directory to compare with.
        """
        above, own = os.path.split(path)
        page = self._parent.page_of(parent, name)
        if page is not None and own != name:
            page = page.only(page.names.index(name), own) if name in page.names else None
        try:
            # A user need not be allowed to list it: homes lie in folders that nobody else is to look through.
            directory = OpenDirectory(os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            self._context.skip(path, error)
            return False
        try:
            device = os.fstat(directory.fd).st_dev
            part = self._part(directory, above, device, [own], page, time.time_ns(), is_source=True)
            yield from part.walk()
            return part.add_to(builder, name) > 0
        finally:
            directory.close()

    # At and below the sources.

    def _store_directory(
        self,
        directory: OpenDirectory,
        path: bytes,
        parent: ChunkId | None,
        device: int,
        above: os.stat_result | None,
    ) -> Nested[Stored]:
        """Store an open directory, which is closed at the end.

        above: the directory above, when the walk closed it and wants it back.
        """
        try:
            counts = self._context.counts
            counts.current = path
            self._context.tell_counts()
            looked_ns = time.time_ns()
            names: list[bytes] = []
            selection = self._context.selection
            reason = selection.marked(directory.fd) if path not in selection.sources else None
            is_incomplete = reason is not None
            if reason is not None:
                self._context.leave_out(path, reason)
            else:
                names = reading.list_names(directory.fd)
            builder = self._context.builder()
            reused = 0  # pages of the parent that stand unchanged, not yet in the builder
            changed = False
            for page, part_names in self._paired(names, parent):
                part = self._part(directory, path, device, part_names, page, looked_ns)
                yield from part.walk()
                is_incomplete |= part.is_incomplete
                if not changed and part.same_as_page:
                    reused += 1
                    continue
                if not changed:
                    changed = True
                    self._replay(builder, parent, reused)
                part.add_to(builder)
            tree = parent if not changed and parent is not None else builder.finish()
            return Stored(tree, _reopen_above(directory.fd, above), is_incomplete)
        finally:
            directory.close()

    def _paired(self, names: list[bytes], parent: ChunkId | None) -> Iterator[tuple[LeafPage | None, list[bytes]]]:
        """Yield (page of the parent, names in its range), so that a page is compared as a whole.

        No page comes with names that the parent cannot speak of; then the directory does not count as unchanged.
        """
        start = 0
        pages = self._parent.pages(parent) if parent is not None else iter((None,))
        page = next(pages)
        while page is not None:
            following = next(pages, _NO_MORE)
            end = bisect_left(names, following.names[0], start) if isinstance(following, LeafPage) else len(names)
            if following is None:
                break
            for at in range(start, max(end, start + 1), SLICE):
                yield page, names[at : min(at + SLICE, end)]
            if not isinstance(following, LeafPage):
                return
            page, start = following, end
        for at in range(start, max(len(names), start + 1), SLICE):
            yield None, names[at : at + SLICE]

    def _replay(self, builder: TreeBuilder, parent: ChunkId | None, count: int) -> None:
        if count == 0 or parent is None:
            return
        for number, page in enumerate(leaf_pages(parent, self._parent.load)):
            if number == count:
                return
            xattrs, filesystems = page.sparse_columns
            owners, groups = dict(page.owners), dict(page.groups)
            for at, name in enumerate(page.names):
                row = page.row(at)
                _, uid, gid = STAT_ROW.unpack(row)[:3]
                builder.add(
                    name,
                    row,
                    page.contents[at],
                    page.flag(at),
                    xattrs.get(at, ()),
                    filesystems.get(at, 0),
                    (uid, owners.get(uid, b"")),
                    (gid, groups.get(gid, b"")),
                )

    def _part(
        self,
        directory: OpenDirectory,
        path: bytes,
        device: int,
        names: list[bytes],
        page: LeafPage | None,
        looked_ns: int,
        is_source: bool = False,
    ) -> Part:
        return Part(
            self._context,
            self._files,
            self._store_directory,
            directory,
            path,
            device,
            names,
            page,
            looked_ns,
            is_source,
        )


def _reopen_above(fd: int, above: os.stat_result | None) -> int | None:
    if above is None:
        return None
    reopened = os.open(b"..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    found = os.fstat(reopened)
    if (found.st_dev, found.st_ino) != (above.st_dev, above.st_ino):
        os.close(reopened)
        raise OSError(0, "a directory was moved while the backup was in it")
    return reopened


def _row_on_the_way(status: os.stat_result) -> bytes:
    # A directory above the sources is none: what changes in it by itself is not recorded.
    return STAT_ROW.pack(status.st_mode, status.st_uid, status.st_gid, 1, 0, 0, 0, 0, 0, 0)
