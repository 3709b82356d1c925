"""Look into an image that was taken before, and keep the files that are found in it.

The disks are read from the repository, as `image` reads them from devices. The snapshot is never rewritten: a note
gives it another root, which has what it had and the files that were found.
"""

import contextlib
import time
from dataclasses import dataclass, field, replace

from backupfs.disks.layout import read_layout
from backupfs.disks.source import DiskSource
from backupfs.errors import DamagedObject, PathNotFound, UsageError, shown
from backupfs.ids import ChunkId, short
from backupfs.repository.repository import Repository
from backupfs.repository.slots import Slots
from backupfs.snapshots import notes
from backupfs.snapshots.indexing import encode_index
from backupfs.snapshots.listing import SnapshotList
from backupfs.snapshots.node import Node
from backupfs.snapshots.snapshot import HAS_XATTRS, IMAGE, Snapshot
from backupfs.snapshots.tree import nodes
from backupfs.snapshots.volumes import keys_of
from backupfs.snapshots.walk import find_path, tree_of, walk
from backupfs.stores.requests import RequestCounts
from backupfs.usecases.events import Report
from backupfs.usecases.image_scan import DiskRoot, image_scan
from backupfs.usecases.image_unread import damage_before, tell_lacks
from backupfs.usecases.image_walk import load_readers
from backupfs.usecases.scanner import Root, Scanner
from backupfs.usecases.scanners import scanner_count
from backupfs.usecases.stored_disk import StoredDisk
from backupfs.usecases.storing import StoringRun, WriteOptions


@dataclass(frozen=True, slots=True)
class IndexOptions(WriteOptions):
    """What a user can say about an index."""

    force: bool = False  # look into all volumes again
    luks_passphrases: tuple[bytes, ...] = field(default=(), repr=False)  # for volumes that are encrypted


@dataclass(frozen=True, slots=True)
class IndexResult:
    """What an index found."""

    snapshot: Snapshot  # as it is shown from now on
    looked: bool  # whether there was any volume to look into
    added: tuple[str, ...]  # names of volumes whose files are shown now, and were not
    renewed: tuple[str, ...]  # those whose files were shown otherwise
    volumes: tuple[str, ...]  # names of volumes that were not known
    without: tuple[str, ...]  # those that may have files of which none can be shown
    files_skipped: int
    plain_added: int
    stored_added: int
    requests: RequestCounts
    duration_ns: int

    @property
    def is_new(self) -> bool:
        """Tell whether anything is shown otherwise than before."""
        return bool(self.added or self.renewed or self.volumes)


def index(
    repository: Repository, listed: SnapshotList, snapshot: Snapshot, options: IndexOptions, report: Report
) -> IndexResult:
    """Show the files of volumes of an image that shows none of them yet.

    listed: from `load_all`, just now. It forks, as `image` does.
    Raises: UsageError for what is no image; WrongPassword if the key slot may not change what a snapshot shows;
    DamagedObject; StoreError.
    """
    started = time.monotonic_ns()
    if snapshot.kind != IMAGE:
        raise UsageError(
            f"{short(snapshot.snapshot_id)} is a snapshot of files, which are shown already: there is nothing to index"
        )
    if [disk.volume for disk in snapshot.disks] != list(range(len(snapshot.disks))):
        raise UsageError(
            f"{short(snapshot.snapshot_id)} has a table of disks that this backupfs does not write: upgrade it"
        )
    notes.require_right(repository, notes.INDEX)
    disks: list[DiskSource] = [StoredDisk(repository, snapshot, disk.volume) for disk in snapshot.disks]
    for stored in disks:
        # Where the list is damaged itself, it is what is made anew here.
        with contextlib.suppress(DamagedObject):
            stored.problems = damage_before(snapshot, stored.name, repository.trees.load)
    layout = read_layout(disks, options.luks_passphrases, keys_of(snapshot.volumes))
    tell_lacks(layout, report)
    names = [disk.name for disk in disks] + [volume.name for volume in layout.volumes]
    undivided = {names[number] for number in layout.undivided}
    before = _trees_of(repository, snapshot)
    lost = sorted(before.keys() - set(names))
    if lost:
        raise UsageError(
            f"{', '.join(map(shown, lost))}: files are shown in a volume that this backupfs does not find in the "
            "image; an index would take them out of sight, so the image stays as it is"
        )
    if undivided <= before.keys() and not options.force:
        requests = repository.store.requests
        return IndexResult(snapshot, False, (), (), (), (), 0, 0, 0, requests, time.monotonic_ns() - started)
    load_readers(report)
    run = StoringRun(repository, options, report, listed)
    # What stands from before may lie in packs that are gone.
    again = options.force or run.trusted(snapshot) is None

    def scan(scanner: Scanner, slots: Slots, begins: bool) -> Root | None:
        return image_scan(
            repository, disks, layout, snapshot, {}, {}, snapshot.time_ns, options.sizes, slots, scanner, begins,
            again=again,
        )  # fmt: skip

    root = run.store({}, scanner_count(), scan)
    assert isinstance(root, DiskRoot)
    found = _with(snapshot, root, run)
    trees = _trees_of(repository, found)
    added = tuple(sorted(trees.keys() - before.keys()))
    renewed = tuple(sorted(name for name in trees.keys() & before.keys() if trees[name] != before[name]))
    known = {volume.name for volume in snapshot.volumes}
    volumes = tuple(volume.name for volume in found.volumes if volume.name not in known)
    if added or renewed or volumes:
        found = _counted(repository, found)
        note = notes.new_note(snapshot.snapshot_id, notes.INDEX)
        time_ns = listed.next_index_ns(snapshot)
        notes.put_note(repository, replace(note, time_ns=time_ns, arguments=encode_index(found)))
    else:
        found = snapshot
    done = run.result(snapshot.snapshot_id)
    return IndexResult(
        found, True, added, renewed, volumes, tuple(sorted(undivided - trees.keys())), done.counts.files_skipped,
        done.plain_added, done.stored_added, done.requests, done.duration_ns,
    )  # fmt: skip


def _with(snapshot: Snapshot, root: DiskRoot, run: StoringRun) -> Snapshot:
    """Return the image with what was found; its disks stay what they are."""
    disks = len(snapshot.disks)
    return replace(
        snapshot,
        root=root.tree,
        root_row=root.row,
        root_owner=root.owner,
        root_group=root.group,
        root_xattrs=root.xattrs,
        traits=snapshot.traits | (HAS_XATTRS if run.counts.has_xattrs else 0),
        volumes=(*snapshot.volumes[:disks], *root.volumes[disks:]),
        statistics=replace(snapshot.statistics, files_skipped=run.counts.files_skipped),
    )


def _trees_of(repository: Repository, snapshot: Snapshot) -> dict[str, ChunkId]:
    """Return the trees of the volumes whose files are shown, by name."""
    return {node.name.decode("utf-8", "replace"): tree_of(node) for node in _tops(repository, snapshot)}


def _tops(repository: Repository, snapshot: Snapshot) -> list[Node]:
    load = repository.trees.load
    try:
        return [node for node in nodes(tree_of(find_path(snapshot, b"/files", load)), load) if node.is_directory]
    except (PathNotFound, DamagedObject):
        return []  # what cannot be read is looked for again


def _counted(repository: Repository, snapshot: Snapshot) -> Snapshot:
    """Return an image with its files counted: those that were found now, and those that stand from before."""
    files = directories = 0
    for top in _tops(repository, snapshot):
        directories += 1
        try:
            for _, node in walk(top, b"", repository.trees.load):
                files += not node.is_directory
                directories += node.is_directory
        except DamagedObject:
            continue  # `check` tells
    folders = 4  # the root, disks, volumes, files
    statistics = replace(snapshot.statistics, files=files, directories=directories + folders)
    return replace(snapshot, statistics=statistics)
