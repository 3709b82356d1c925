"""The order in which a restore goes through a snapshot, once to write and once more to verify.

Of each page of a directory first what is no directory, then the directories, as the backup walked: neighbours here are
neighbours in blocks. No recursion of Python's: depth is bounded by memory alone. The order, and so the number of each
entry, depends on the snapshot and the patterns only.
"""

import grp
import os
import pwd
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Protocol

from backupfs.codec.records import decode_record
from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId
from backupfs.localfs.directories import Directory
from backupfs.localfs.exclude import Excluder, Pattern
from backupfs.localfs.metadata import Metadata
from backupfs.snapshots.node import INCOMPLETE, NANOSECONDS, STAT_ROW, Node
from backupfs.snapshots.tree import LeafPage, decode_xattrs, leaf_pages

Load = Callable[[ChunkId], bytes | memoryview]

# Entries between two pauses: it bounds how long a cancelled run goes on, and how long others wait for the target.
PAUSE = 64


class Place:
    """A directory of the snapshot during the walk."""

    __slots__ = (
        "blocked", "directory", "included", "is_incomplete", "metadata", "name", "number", "parent", "seen", "standing",
    )  # fmt: skip

    def __init__(
        self, parent: "Place | None", name: bytes, included: bool, number: int, is_incomplete: bool = False
    ) -> None:
        self.parent = parent
        self.name = name
        self.included = included  # everything below is wanted
        self.number = number
        self.is_incomplete = is_incomplete  # what the snapshot lacks may have been there
        self.metadata: Metadata | None = None
        self.directory: Directory | None = None  # once it is made or opened
        self.standing: Directory | None = None  # once it was opened for what may have to go from it
        self.blocked = False  # it cannot be made, and somebody was told
        # Names that the snapshot has here, where somebody asked before the first page.
        self.seen: set[bytes] | None = None

    @property
    def path(self) -> bytes:
        """The path below the start, with a leading slash; empty for the start itself."""
        parts: list[bytes] = []
        place: Place | None = self
        while place is not None and place.parent is not None:
            parts.append(place.name)
            place = place.parent
        return b"".join([b"/" + part for part in reversed(parts)])


class Visitor(Protocol):
    """What is done on the way."""

    def page(self, place: Place, page: LeafPage, positions: list[int], first: int) -> Iterator[None]:
        """Take the entries of a page that are no directories, pausing now and then; `first` numbers the first."""

    def directory(self, place: Place) -> bool:
        """Take a directory that everything or something below may be wanted of; return whether to go in."""

    def left(self, place: Place, complete: bool) -> None:
        """Take the end of a directory; `complete` unless some page of it could not be read."""

    def damaged(self, place: Place, name: bytes, error: DamagedObject) -> None:
        """Take that a directory, or an entry of it, cannot be read as it was."""


class Traversal:
    """Leads a visitor through a directory of a snapshot."""

    def __init__(self, load: Load, include: tuple[Pattern, ...], exclude: tuple[Pattern, ...], by_number: bool) -> None:
        """Take the parts.

        load: gives tree chunks.
        include, exclude: patterns over paths from the start on, which is their `/`.
        by_number: owners are restored by number and not by name.
        """
        self._load = load
        self._include = Excluder(include) if include else None
        self._exclude = Excluder(exclude) if exclude else None
        self._by_number = by_number
        self._number = 0

    def start(self, node: Node) -> Place:
        """Return the place that the walk starts from, which is that of a directory's node or of a file's."""
        return Place(None, b"", self._include is None, 0, bool(node.flags & INCOMPLETE))

    def keeps(self, path: bytes, is_directory: bool) -> bool:
        """Tell whether a path of the target is none of the restore's business, and so never deleted."""
        if self._exclude is not None and self._exclude.excluded(path, is_directory) is not None:
            return True
        if self._include is None:
            return False
        while path:
            if self._include.excluded(path, is_directory) is not None:
                return False
            path, is_directory = path.rpartition(b"/")[0], True
        return True

    def walk(self, visitor: Visitor, start: Place, tree: ChunkId) -> Iterator[None]:
        """Go through everything below a directory, pausing now and then."""
        stack = [self._directory(visitor, start, tree)]
        while stack:
            step = next(stack[-1], self)
            if step is self:
                stack.pop()
            elif step is None:
                yield
            else:
                stack.append(step)  # type: ignore[arg-type]

    def one(self, visitor: Visitor, start: Place, node: Node) -> Iterator[None]:
        """Lead to one node that is no directory."""
        page = _page_of(node)
        for _ in self._page(visitor, start, page):
            yield
        visitor.left(start, True)

    def _directory(self, visitor: Visitor, place: Place, tree: ChunkId) -> "Iterator[object]":
        complete = True
        try:
            for page in leaf_pages(tree, self._load):
                yield from self._page(visitor, place, page)
        except DamagedObject as error:
            complete = False
            visitor.damaged(place, b"", error)
        visitor.left(place, complete)

    def _page(self, visitor: Visitor, place: Place, page: LeafPage) -> "Iterator[object]":
        if place.seen is not None:
            place.seen.update(page.names)
        others: list[int] = []
        directories: list[int] = []
        for at, row in enumerate(STAT_ROW.iter_unpack(page.rows)):
            (directories if row[0] & 0o170000 == 0o40000 else others).append(at)
        included: frozenset[int] | None = None
        if self._exclude is not None or not place.included:
            others, directories, included = self._selected(place, page, others, directories)
        first = self._number
        self._number += len(others)
        if others:
            yield from visitor.page(place, page, others, first)
        for at in directories:
            is_incomplete = bool(page.flag(at) & INCOMPLETE)
            child = Place(place, page.names[at], included is None or at in included, self._number, is_incomplete)
            self._number += 1
            try:
                child.metadata = self.metadata(page, at)
                content = page.contents[at]
                if not isinstance(content, bytes) or len(content) != 32:
                    raise DamagedObject("the snapshot holds a directory without a tree")
            except DamagedObject as error:
                visitor.damaged(place, child.name, error)
                continue
            if visitor.directory(child):
                yield self._directory(visitor, child, ChunkId(content))
            yield None

    def _selected(
        self, place: Place, page: LeafPage, others: list[int], directories: list[int]
    ) -> tuple[list[int], list[int], frozenset[int]]:
        """Return (others, directories, which of the directories are wanted whole)."""
        names, path = page.names, place.path or b"/"
        if self._exclude is not None:
            out = self._exclude.excluded_names(path, [names[at] for at in directories], [names[at] for at in others])
            others = [at for at in others if names[at] not in out]
            directories = [at for at in directories if names[at] not in out]
        if place.included or self._include is None:
            return others, directories, frozenset(directories)
        chosen = self._include.excluded_names(path, [names[at] for at in directories], [names[at] for at in others])
        return (
            [at for at in others if names[at] in chosen],
            directories,
            frozenset(at for at in directories if names[at] in chosen),
        )

    def metadata(self, page: LeafPage, at: int) -> Metadata:
        """Return what one node has beside its content. Raises: DamagedObject."""
        mode, uid, gid, _, inode, _, seconds, part, *_ = STAT_ROW.unpack(page.row(at))
        xattrs = page.xattrs(at)
        if isinstance(xattrs, bytes):
            xattrs = decode_xattrs(decode_record(self._load(ChunkId(xattrs)), "a chunk of xattrs"))
            if isinstance(xattrs, bytes):
                raise DamagedObject("a chunk of xattrs is damaged: it names another")
        owners, groups = self.local_ids(page)
        # A directory that was only on the way to a source has no times of its own.
        recorded = inode != 0 or seconds != 0 or part != 0
        mtime_ns = seconds * NANOSECONDS + part if recorded else None
        return Metadata(mode, owners.get(uid, uid), groups.get(gid, gid), mtime_ns, xattrs)

    def metadata_of(self, node: Node) -> Metadata:
        """Return what a node has beside its content."""
        return self.metadata(_page_of(node), 0)

    def local_ids(self, page: LeafPage) -> tuple[dict[int, int], dict[int, int]]:
        """Return the ids of this machine for the owners and groups that a page names: id in the snapshot → here."""
        if self._by_number:
            return {}, {}
        return _local_ids(page.owners, page.groups)


def _page_of(node: Node) -> LeafPage:
    row = STAT_ROW.pack(
        node.mode, node.uid, node.gid, node.nlink, node.inode, node.size, node.mtime_s, node.mtime_part_ns,
        node.ctime_s, node.ctime_part_ns,
    )  # fmt: skip
    return LeafPage(
        [node.name], row, [node.content], bytes([node.flags]), ((node.uid, node.owner),), ((node.gid, node.group),),
        {0: node.xattrs}, {0: node.filesystem},
    )  # fmt: skip


@lru_cache(maxsize=256)
def _local_ids(
    owners: tuple[tuple[int, bytes], ...], groups: tuple[tuple[int, bytes], ...]
) -> tuple[dict[int, int], dict[int, int]]:
    return {uid: _local_uid(name, uid) for uid, name in owners}, {gid: _local_gid(name, gid) for gid, name in groups}


@lru_cache(maxsize=4096)
def _local_uid(name: bytes, uid: int) -> int:
    try:
        return pwd.getpwnam(os.fsdecode(name)).pw_uid
    except (KeyError, ValueError):
        return uid


@lru_cache(maxsize=4096)
def _local_gid(name: bytes, gid: int) -> int:
    try:
        return grp.getgrnam(os.fsdecode(name)).gr_gid
    except (KeyError, ValueError):
        return gid
