"""The snapshots as a read-only file system: numbers, names, attributes, bytes.

Every operation is synchronous over what is in memory. It raises `NotCached` where a chunk must be loaded and `Stale`
where the list of snapshots must be read again; whoever calls does that and calls again. Belongs to the trio thread.

Numbers: 1 is the top, `VIRTUAL | n` are directories above the snapshots, their links and the snapshots' roots, all
others are entries of pages (see pages.py). A directory has one number; names of one hardlinked file share one.
"""

import logging
import os
import stat
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId, SnapshotId
from backupfs.repository.repository import Repository
from backupfs.snapshots.content import Content
from backupfs.snapshots.listing import SnapshotList
from backupfs.snapshots.losses import NO_DOUBTS
from backupfs.snapshots.node import NANOSECONDS, STAT_ROW, Xattrs
from backupfs.snapshots.snapshot import FILES, HAS_XATTRS, IMAGE, Snapshot
from backupfs.snapshots.tree import LeafPage, load_xattrs
from backupfs.view.content import FileReader, stored_blocks
from backupfs.view.folders import Entry, Folder, Link, Root, arrange, name_snapshots
from backupfs.view.freshness import Freshness
from backupfs.view.loading import Loader
from backupfs.view.pages import POSITION_BITS, POSITION_MASK, PageTable

log = logging.getLogger(__name__)

TOP = 1
VIRTUAL = 1 << 56

_BLOCK_SIZE = 4096
_MOST_LEVELS = 4096  # of directories, when a path is put together


class NoSuchEntry(Exception):
    """There is no such name or number."""


class Attributes(NamedTuple):
    """What a look at an entry gives."""

    inode: int
    mode: int
    nlink: int
    uid: int
    gid: int
    device: int
    size: int
    blocks: int  # of 512 bytes, holes not counted
    mtime_ns: int
    ctime_ns: int
    is_lasting: bool  # neither it nor its name ever changes; False down to the snapshots' roots


@dataclass(frozen=True, slots=True)
class MountFilter:
    """Which snapshots are shown; empty fields do not restrict."""

    snapshots: frozenset[SnapshotId] = frozenset()
    hosts: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    paths: tuple[bytes, ...] = ()


class SnapshotView:
    """The tree of names over a repository's snapshots."""

    def __init__(self, repository: Repository, listed: SnapshotList, shown: MountFilter, loader: Loader) -> None:
        """Take the parts.

        listed: read already; `rearrange` takes over what it holds later.
        """
        self._repository = repository
        self._listed = listed
        self._filter = shown
        self._loader = loader
        self._table = PageTable(loader)
        self._files = FileReader(loader)
        self._started_ns = time.time_ns()
        self._owner = (os.getuid(), os.getgid())
        self._names: dict[SnapshotId, bytes] = {}
        self._numbers: dict[bytes, int] = {b"": TOP}  # path above the snapshots → number
        self._entries: dict[int, Entry] = {}  # kept for ever: open files of a forgotten snapshot go on
        self._parents: dict[int, tuple[int, bytes]] = {}  # the same → parent and name
        self._open_folders: dict[int, _OpenFolder] = {}
        self._handles = 0
        self._linked: dict[tuple[int, int, bytes], int] = {}  # hardlinked files: (root, file system, row) → number
        self._roots: dict[int, int] = {}  # directory → root of its snapshot, for hardlinks
        self.size = 0  # stored bytes of the repository
        self.freshness: Freshness | None = None
        self.rearrange()

    # Above the snapshots.

    @property
    def snapshots(self) -> list[Snapshot]:
        """The snapshots that are shown, oldest first."""
        wanted = self._filter
        return [
            snapshot
            for snapshot in self._listed.selected(wanted.hosts, wanted.tags, wanted.paths)
            if snapshot.kind in (FILES, IMAGE) and (not wanted.snapshots or snapshot.snapshot_id in wanted.snapshots)
        ]

    @property
    def never_has_xattrs(self) -> bool:
        """Tell whether no entry has xattrs, now and as long as the view lives."""
        return bool(self._filter.snapshots) and not any(snapshot.traits & HAS_XATTRS for snapshot in self.snapshots)

    def rearrange(self) -> None:
        """Show what the list of snapshots holds now."""
        self._names = name_snapshots(
            (snapshot for snapshot in self._listed.snapshots if snapshot.kind in (FILES, IMAGE)), self._names
        )
        # Who asked for certain snapshots gets the latest of these.
        doubts = NO_DOUBTS if self._filter.snapshots else self._listed.doubts()
        self._number(TOP, b"", arrange(self.snapshots, self._names, self._listed.verifications, doubts))
        indexes = (self._repository.tree_index, self._repository.data_index)
        self.size = sum(pack.size for index in indexes for pack in index.packs().values())

    def _number(self, number: int, path: bytes, entry: Entry) -> None:
        self._entries[number] = entry
        children = entry.children if isinstance(entry, Folder) else entry.above if isinstance(entry, Root) else {}
        for name, child in children.items():
            below = self._number_of(path, name, child)
            self._parents[below] = (number, name)
            self._number(below, path + b"/" + name, child)

    def _number_of(self, path: bytes, name: bytes, entry: Entry) -> int:
        key = path + b"/" + name
        if isinstance(entry, Link):
            # A link that points elsewhere is another link: what is known of the old one stays true.
            key += b"\0" + entry.target
        elif isinstance(entry, Root):
            # One that an index gave another root is another directory: nothing known of the old one is true of it.
            key += b"\0" + entry.snapshot.snapshot_id + entry.tree
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = VIRTUAL | len(self._numbers)
        return number

    def _number_above(self, inode: int, name: bytes, root: Root) -> int:
        return self._number_of(self._folder_path(inode), name, root.above[name])

    def _entry(self, inode: int) -> Entry:
        try:
            return self._entries[inode]
        except KeyError:
            raise NoSuchEntry from None

    def _folder_path(self, inode: int) -> bytes:
        path = b""
        while inode != TOP:
            inode, name = self._parents[inode]
            path = b"/" + name + path
        return path

    def _check_fresh(self) -> None:
        if self.freshness is not None:
            self.freshness.check()

    def _virtual_attributes(self, inode: int) -> Attributes:
        entry = self._entry(inode)
        uid, gid = self._owner
        if isinstance(entry, Link):
            size = len(entry.target)
            return Attributes(inode, stat.S_IFLNK | 0o777, 1, uid, gid, 0, size, 0, entry.time_ns, entry.time_ns, False)
        if isinstance(entry, Root):
            time_ns, nlink = entry.time_ns, 2
        else:
            time_ns = entry.time_ns or self._started_ns
            nlink = 2 + sum(not isinstance(child, Link) for child in entry.children.values())
        return Attributes(inode, stat.S_IFDIR | 0o755, nlink, uid, gid, 0, _BLOCK_SIZE, 0, time_ns, time_ns, False)

    # Entries of snapshots.

    def _place(self, inode: int) -> tuple[LeafPage, int]:
        """Return (page, position) of an entry of a snapshot. Raises: NotCached; NoSuchEntry; DamagedObject."""
        try:
            page = self._table.page(inode >> POSITION_BITS)
        except IndexError:
            raise NoSuchEntry from None
        position = inode & POSITION_MASK
        if position >= len(page.names):
            raise NoSuchEntry
        return page, position

    def _attributes_at(self, page: LeafPage, slot: int, position: int) -> Attributes:
        mode, uid, gid, nlink, inode, size, mtime_s, mtime_part, ctime_s, ctime_part = STAT_ROW.unpack_from(
            page.rows, position * STAT_ROW.size
        )
        number = slot << POSITION_BITS | position
        device = 0
        if mode & 0o170000 == 0o100000:
            content = page.contents[position]
            blocks = (
                (size + 511) // 512
                if content.__class__ is bytes
                else (stored_blocks(content, size, self._loader, self._snapshot_of(slot).volumes))
            )
            if nlink > 1:
                number = self._shared_number(page, slot, position, number)
        elif mode & 0o170000 == 0o040000:
            blocks = (size + 511) // 512
            if not (inode or mtime_s or ctime_s):
                # A directory above the sources was not looked at itself.
                time_ns = self._snapshot_of(slot).time_ns
                return Attributes(number, mode, nlink, uid, gid, 0, size, blocks, time_ns, time_ns, True)
        else:
            blocks = 0
            content = page.contents[position]
            if nlink > 1:
                number = self._shared_number(page, slot, position, number)
            if mode & 0o170000 == 0o120000:
                size = len(content)
            elif mode & 0o170000 in (0o020000, 0o060000):
                device = _device(content)
        return Attributes(
            number,
            mode,
            nlink,
            uid,
            gid,
            device,
            size,
            blocks,
            mtime_s * NANOSECONDS + mtime_part,
            ctime_s * NANOSECONDS + ctime_part,
            True,
        )

    def _shared_number(self, page: LeafPage, slot: int, position: int, number: int) -> int:
        """Return the one number of a file with several names: that of the name seen first.

        The whole row is part of the identity: where a file changed between two looks, its names are two files here.
        """
        key = (self._root_of(slot), page.filesystem(position), page.row(position))
        return self._linked.setdefault(key, number)

    def _root_of(self, slot: int) -> int:
        directory = self._table.directory_of(slot)
        root = self._roots.get(directory)
        if root is None:
            root = directory
            while root < VIRTUAL:
                root = self._table.directory_of(root >> POSITION_BITS)
            self._roots[directory] = root
        return root

    def _snapshot_of(self, slot: int) -> Snapshot:
        root = self._entries[self._root_of(slot)]
        assert isinstance(root, Root)
        return root.snapshot

    def _visit(self, directory: int) -> None:
        if directory >= VIRTUAL:
            root = self._entry(directory)
            if not isinstance(root, Root):
                raise NotADirectoryError
            tree = root.tree
        else:
            page, position = self._place(directory)
            content = page.contents[position]
            if not stat.S_ISDIR(_mode(page, position)):
                raise NotADirectoryError
            if not isinstance(content, bytes) or len(content) != 32:
                raise DamagedObject("a directory is damaged: its content is not a tree's id")
            tree = ChunkId(content)
        self._table.visit(directory, tree)

    # Operations.

    def lookup(self, parent: int, name: bytes) -> Attributes | None:
        """Return the attributes of a name in a directory; None if it has no such name, and never will.

        Raises: NoSuchEntry where the name may appear later; NotCached; Stale; DamagedObject.
        """
        if parent >= VIRTUAL or parent == TOP:
            entry = self._entry(parent)
            if isinstance(entry, Folder):
                self._check_fresh()
                entry = self._entry(parent)
                assert isinstance(entry, Folder)
                child = entry.children.get(name)
                if child is None:
                    raise NoSuchEntry
                return self._virtual_attributes(self._number_of(self._folder_path(parent), name, child))
            if isinstance(entry, Root) and name in entry.above:
                return self._virtual_attributes(self._number_above(parent, name, entry))
        table = self._table
        if not table.is_known(parent):
            self._visit(parent)
        slot = table.slot_of_name(parent, name)
        page = table.page(slot)
        position = bisect_left(page.names, name)
        if position == len(page.names) or page.names[position] != name:
            return None
        return self._attributes_at(page, slot, position)

    def attributes(self, inode: int) -> Attributes:
        """Return the attributes of an entry. Raises: NoSuchEntry; NotCached; DamagedObject."""
        if inode >= VIRTUAL or inode == TOP:
            return self._virtual_attributes(inode)
        page, position = self._place(inode)
        return self._attributes_at(page, inode >> POSITION_BITS, position)

    def open_directory(self, inode: int) -> int:
        """Return a handle that `entries` takes. Raises: NoSuchEntry; NotADirectoryError; NotCached; DamagedObject."""
        if (inode >= VIRTUAL or inode == TOP) and isinstance(self._entry(inode), Folder):
            self._handles += 1
            handle = VIRTUAL << 1 | self._handles
            self._open_folders[handle] = _OpenFolder(inode)
            return handle
        if not self._table.is_known(inode):
            self._visit(inode)
        return inode

    def close_directory(self, handle: int) -> None:
        """Give back a handle."""
        self._open_folders.pop(handle, None)

    def entries(self, handle: int, start: int) -> Iterator[tuple[bytes, Attributes, int]]:
        """Yield (name, attributes, where the next entry starts) of a directory from `start` on; 0 is its beginning.

        Raises: NotCached; Stale; DamagedObject; any of them also after some entries.
        """
        opened = self._open_folders.get(handle)
        if opened is not None:
            return self._folder_entries(opened, start)
        return self._page_entries(handle, start)

    def _folder_entries(self, opened: "_OpenFolder", start: int) -> Iterator[tuple[bytes, Attributes, int]]:
        if start == 0:
            self._check_fresh()
            folder = self._entry(opened.inode)
            assert isinstance(folder, Folder)
            path = self._folder_path(opened.inode)
            opened.listing = [
                (name, self._number_of(path, name, folder.children[name])) for name in sorted(folder.children)
            ]
        for position in range(start, len(opened.listing)):
            name, number = opened.listing[position]
            yield name, self._virtual_attributes(number), position + 1

    def _page_entries(self, directory: int, start: int) -> Iterator[tuple[bytes, Attributes, int]]:
        table = self._table
        root = self._entries.get(directory)
        above = sorted(root.above) if isinstance(root, Root) else []
        for name in above[start:]:
            assert isinstance(root, Root)
            start += 1
            yield name, self._virtual_attributes(self._number_above(directory, name, root)), start
        place: int | None
        place, position = table.slot_of_entry(directory, start - len(above))
        while place is not None:
            page = table.page(place)
            names = page.names
            for at in range(position, len(names)):
                start += 1
                yield names[at], self._attributes_at(page, place, at), start
            place, position = table.next_slot(place), 0

    def target(self, inode: int) -> bytes:
        """Return where a symbolic link points. Raises: NoSuchEntry; NotCached; DamagedObject."""
        if inode >= VIRTUAL or inode == TOP:
            entry = self._entry(inode)
            if isinstance(entry, Link):
                return entry.target
            raise NoSuchEntry
        page, position = self._place(inode)
        target = page.contents[position]
        if not isinstance(target, bytes) or not target or b"\0" in target:
            raise DamagedObject("a symbolic link is damaged: it has no target")
        return target

    def xattrs(self, inode: int) -> Xattrs:
        """Return the extended attributes of an entry. Raises: NoSuchEntry; NotCached; DamagedObject."""
        if inode >= VIRTUAL or inode == TOP:
            return ()
        page, position = self._place(inode)
        found = page.xattrs(position)
        if isinstance(found, bytes):
            return load_xattrs(found, self._loader.tree)
        return found

    def open_file(self, inode: int) -> None:
        """Look whether a number is a file's. Raises: NoSuchEntry; NotCached; DamagedObject."""
        self._place(inode)

    def close_file(self, inode: int) -> None:
        """Forget what is only kept for open files."""
        self._files.close(inode)

    def read(self, inode: int, offset: int, length: int) -> bytes | memoryview:
        """Return bytes of a file, fewer than asked for only at its end. Raises: NotCached; DamagedObject."""
        page, position = self._place(inode)
        size = STAT_ROW.unpack_from(page.rows, position * STAT_ROW.size)[5]
        content = page.contents[position]
        volumes = self._snapshot_of(inode >> POSITION_BITS).volumes if content.__class__ is list else ()
        return self._files.read(inode, content, size, offset, length, volumes)

    def path_of(self, inode: int) -> bytes:
        """Return the path of an entry from the top, for messages. Raises: NotCached; NoSuchEntry; DamagedObject."""
        path = b""
        for _ in range(_MOST_LEVELS):
            if inode == TOP:
                break
            if inode >= VIRTUAL:
                inode, name = self._parents[inode]
            else:
                page, position = self._place(inode)
                name = page.names[position]
                inode = self._table.directory_of(inode >> POSITION_BITS)
            path = b"/" + name + path
        return path or b"/"


@dataclass(slots=True)
class _OpenFolder:
    """An open directory above the snapshots, as it was when its reading began."""

    inode: int
    listing: list[tuple[bytes, int]] = field(default_factory=list)


def _mode(page: LeafPage, position: int) -> int:
    mode: int = STAT_ROW.unpack_from(page.rows, position * STAT_ROW.size)[0]
    return mode


def _device(content: Content) -> int:
    if not isinstance(content, bytes) or len(content) != 8:
        raise DamagedObject("a device file is damaged: it has no device number")
    return os.makedev(int.from_bytes(content[:4], "little"), int.from_bytes(content[4:], "little"))
