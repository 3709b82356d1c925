"""Make a child of a snapshot of files: the same but for some entries, that were put, replaced or removed.

The snapshot itself never changes. What is read goes the way of a backup; of the trees only the pages of directories on
the way to a change are stored, as all others are named by the ids that they had.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

from backupfs.errors import DamagedObject, PathNotFound, SourceError, UsageError, shown
from backupfs.ids import ChunkId
from backupfs.localfs.selection import Selection, SelectionRules, identities
from backupfs.localfs.sources import minimal_roots
from backupfs.repository.repository import Repository
from backupfs.repository.slots import Slots
from backupfs.snapshots.content import Content
from backupfs.snapshots.listing import SnapshotList
from backupfs.snapshots.node import STAT_ROW, Node
from backupfs.snapshots.snapshot import FILES, HAS_XATTRS, ROOT_INCOMPLETE, Snapshot
from backupfs.snapshots.tree import TreeBuilder, find_node, nodes
from backupfs.snapshots.walk import Load, find_path, root_node, tree_of, walk
from backupfs.usecases.archive_counts import Counts
from backupfs.usecases.archiver import Archiver
from backupfs.usecases.events import Remark, Report
from backupfs.usecases.file_scan import file_scan
from backupfs.usecases.nested import Nested, run_nested
from backupfs.usecases.scanner import Root, Scanner
from backupfs.usecases.scanners import scanner_count
from backupfs.usecases.storing import BackupResult, StoringRun, WriteOptions

# What becomes of the entries of a directory: a path of this machine whose file or directory takes the place, None for
# one that is removed, or what becomes of the entries below.
Edits = dict[bytes, "Edits | bytes | None"]


@dataclass(frozen=True, slots=True)
class AmendOptions(WriteOptions):
    """What a user can say about a change; tags are added to those of the snapshot."""

    makes_parents: bool = False  # of what is put
    recursive: bool = False  # remove directories with all that is in them
    own_folders: tuple[bytes, ...] = ()  # paths of the repository and the cache, never stored


def put(
    repository: Repository,
    listed: SnapshotList,
    snapshot: Snapshot,
    path: bytes,
    local: bytes,
    options: AmendOptions,
    report: Report,
) -> BackupResult:
    """Make a child in which a file or directory of this machine stands at a path, instead of what stood there.

    listed: from `load_all`, just now. path, local: absolute and normalised.
    It forks, as `backup` does.
    Raises: PathNotFound for a directory that is missing above; UsageError; SourceError; DamagedObject; StoreError,
    the last three perhaps in a group.
    """
    status = _look_at(local)
    if path == b"/":
        raise UsageError("put needs a PATH below / in the snapshot, as in latest:/etc/hosts")
    load = repository.trees.load
    old = _find(snapshot, path, load, options.makes_parents)
    if old is not None and old.is_directory != stat.S_ISDIR(status.st_mode):
        kinds = ("a folder", "none") if old.is_directory else ("no folder", "one")
        raise UsageError(
            f"{shown(path)} is {kinds[0]} in the snapshot and {shown(local)} is {kinds[1]}: "
            f"name another PATH, or remove that one first"
        )
    removed = _counted(old, path, load, report) if old is not None else Counts()
    return _amend(repository, listed, snapshot, {path: local}, removed, status.st_dev, options, report)


def remove(
    repository: Repository,
    listed: SnapshotList,
    snapshot: Snapshot,
    paths: list[bytes],
    options: AmendOptions,
    report: Report,
) -> BackupResult:
    """Make a child in which some paths are not; else as `put`. Raises: PathNotFound, before anything is stored."""
    load = repository.trees.load
    removed = Counts()
    found = {path: find_path(snapshot, path, load) for path in paths}
    for path in minimal_roots(paths):
        node = found[path]
        if path == b"/":
            raise UsageError("a snapshot without anything is none: `backupfs forget` takes it away")
        if node.is_directory and not options.recursive:
            raise UsageError(f"{shown(path)} is a folder: -R removes it with all that is in it")
        removed.add(_counted(node, path, load, report))
    edits: dict[bytes, bytes | None] = dict.fromkeys(minimal_roots(paths))
    return _amend(repository, listed, snapshot, edits, removed, None, options, report)


def _amend(
    repository: Repository,
    listed: SnapshotList,
    snapshot: Snapshot,
    changes: dict[bytes, bytes | None],
    removed: Counts,
    device: int | None,
    options: AmendOptions,
    report: Report,
) -> BackupResult:
    """Store and commit. changes: by path, none below another. device: of what is put."""
    assert snapshot.kind == FILES
    tags = (*snapshot.tags, *options.tags)
    options = replace(options, host=snapshot.host, tags=tags)
    run = StoringRun(repository, options, report, listed)
    own = frozenset(local for local in changes.values() if local is not None)
    selection = Selection(SelectionRules(), identities(options.own_folders), own)
    # Not a number that the snapshot has: equal inodes of another file system would pass for names of one file.
    ordinals = {} if device is None else {device: run.taken_ns}

    # What is reused from the snapshot may lie in a pack that is gone.
    compares = run.trusted(snapshot) is not None

    def scan(scanner: Scanner, slots: Slots, begins: bool) -> Root | None:
        def archive(archiver: Archiver) -> Root:
            amender = _Amender(archiver, repository.trees.load, compares)
            return amender.root(snapshot, _edits_of(changes))

        return file_scan(repository, options, slots, selection, ordinals, scanner, archive if begins else None)

    root = run.store(ordinals, 1 if device is None else scanner_count(), scan)
    before = snapshot.statistics
    unchanged = max(0, before.files - removed.files)
    run.counts.add(
        Counts(
            files=unchanged,
            directories=max(0, before.directories - removed.directories),
            size=max(0, before.size - removed.size),
            files_unchanged=unchanged,
            has_xattrs=bool(snapshot.traits & HAS_XATTRS),
            is_root_incomplete=bool(snapshot.traits & ROOT_INCOMPLETE),
        )
    )
    return run.commit(FILES, list(snapshot.paths), snapshot, root)


class _Amender:
    """Builds the trees on the way to what changes. Belongs to one scanning process."""

    def __init__(self, archiver: Archiver, load: Load, compares: bool) -> None:
        """Take the parts. compares: whether what is put may be found unchanged."""
        self._archiver = archiver
        self._context = archiver.context
        self._load = load
        self._compares = compares

    def root(self, snapshot: Snapshot, edits: Edits) -> Root:
        """Return `/` of the child."""
        tree = run_nested(self._directory(snapshot.root, edits))
        return Root(tree, snapshot.root_row, snapshot.root_owner, snapshot.root_group, snapshot.root_xattrs)

    def _directory(self, tree: ChunkId | None, edits: Edits) -> Nested[ChunkId]:
        """Build a directory anew. tree: as it was; None: it is new."""
        builder = self._context.builder()
        pending = sorted(edits, reverse=True)
        old: Iterator[Node | None] = iter(()) if tree is None else nodes(tree, self._load)
        for node in chain(old, (None,)):
            while pending and (node is None or pending[-1] <= node.name):
                name = pending.pop()
                same = node is not None and node.name == name
                yield from self._edited(builder, tree, name, edits[name], node if same else None)
                if same:
                    break
            else:
                if node is not None:
                    self._add(builder, node, node.content)
        return builder.finish()

    def _edited(
        self, builder: TreeBuilder, tree: ChunkId | None, name: bytes, edit: "Edits | bytes | None", old: Node | None
    ) -> Nested[None]:
        if isinstance(edit, bytes):
            if not (yield from self._archiver.source(builder, edit, name, tree if self._compares else None)):
                raise SourceError(f"{shown(edit)} could not be stored, so the snapshot has no child")
        elif edit is not None and old is not None:
            below = yield self._directory(tree_of(old), edit)
            self._add(builder, old, below)
        elif edit is not None:
            below = yield self._directory(None, edit)
            self._context.add_plain(builder, name, _row_of_new(), below)

    def _add(self, builder: TreeBuilder, node: Node, content: Content) -> None:
        xattrs = self._context.save_xattrs(node.xattrs)
        owner, group = (node.uid, node.owner), (node.gid, node.group)
        builder.add(node.name, node.row, content, node.flags, xattrs, node.filesystem, owner, group)


def _edits_of(changes: dict[bytes, bytes | None]) -> Edits:
    top: Edits = {}
    for path, change in changes.items():
        *above, name = path.split(b"/")[1:]
        at = top
        for part in above:
            below = at.setdefault(part, {})
            assert isinstance(below, dict)
            at = below
        at[name] = change
    return top


def _row_of_new() -> bytes:
    # As a directory on the way to a source: there is none whose times it could have.
    return STAT_ROW.pack(stat.S_IFDIR | 0o755, os.getuid(), os.getgid(), 1, 0, 0, 0, 0, 0, 0)


def _look_at(local: bytes) -> os.stat_result:
    """Return what stands at a path of this machine. Raises: SourceError if it cannot be read; UsageError."""
    if local == b"/":
        raise UsageError("put takes a file or a folder below /")
    try:
        status = os.lstat(local)
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            os.close(os.open(local, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        raise SourceError(f"{shown(local)} cannot be read: {error.strerror}") from error
    return status


def _find(snapshot: Snapshot, path: bytes, load: Load, makes_parents: bool) -> Node | None:
    """Return what stands at a path, if something does. Raises: PathNotFound for a directory that is missing above."""
    node = root_node(snapshot, load)
    done = b""
    *above, last = path.split(b"/")[1:]
    for name in (*above, last):
        if not node.is_directory:
            raise PathNotFound(f"{shown(done)} is not a directory and can have no {shown(name)}")
        found = find_node(tree_of(node), name, load)
        if found is None:
            if done.count(b"/") < len(above) and not makes_parents:
                raise PathNotFound(
                    f"{shown(done or b'/')} has no {shown(name)} in this snapshot: --parents makes what is missing"
                )
            return None
        node = found
        done += b"/" + name
    return node


def _counted(node: Node, path: bytes, load: Load, report: Report) -> Counts:
    """Return what an entry and all below it count in the snapshot's statistics."""
    counts = Counts()
    _count(counts, node)
    if node.is_directory:
        try:
            for _, below in walk(node, path, load):
                _count(counts, below)
        except DamagedObject as error:
            # That it cannot be read is perhaps why it goes.
            report(Remark(f"{shown(path)} is damaged, so the totals of the snapshot are not exact: {error}"))
    return counts


def _count(counts: Counts, node: Node) -> None:
    if not node.is_directory:
        counts.files += 1
        counts.size += node.size if node.is_file else 0
    elif node.inode or node.mtime_ns or node.ctime_ns:
        # Others are directories on the way to a source, which no backup counts.
        counts.directories += 1
