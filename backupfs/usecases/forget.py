"""Forget snapshots: a note each; prune deletes, later, what no snapshot needs any more."""

from dataclasses import dataclass

from backupfs import workers
from backupfs.errors import UnknownSnapshot
from backupfs.ids import SnapshotId
from backupfs.repository.repository import Repository
from backupfs.snapshots import notes
from backupfs.snapshots.listing import load_snapshots
from backupfs.snapshots.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class ForgetResult:
    """What was, or would be, forgotten."""

    forgotten: tuple[Snapshot, ...]
    broken: tuple[SnapshotId, ...]  # the same, of those that are damaged or lost
    kept: int


async def forget(repository: Repository, names: list[str], dry_run: bool) -> ForgetResult:
    """Forget snapshots by their names; all names are understood before the first is forgotten.

    One that is damaged or lost may be named, too: then nothing tells of it any more.

    Raises: UnknownSnapshot; WrongPassword if the key slot may not destroy; StoreError.
    """
    listed = await workers.request(load_snapshots, repository)
    chosen: set[SnapshotId] = set()
    broken: list[SnapshotId] = []
    for name in names:
        try:
            chosen.add(listed.find(name).snapshot_id)
        except UnknownSnapshot as error:
            try:
                broken.append(listed.find_broken(name))
            except UnknownSnapshot:
                raise error from None
    snapshots = tuple(snapshot for snapshot in listed.snapshots if snapshot.snapshot_id in chosen)
    numbers = {one.snapshot_id: (one.host_id, one.sequence, one.sequence) for one in snapshots}
    numbers |= {SnapshotId(loss.name): (loss.host_id, loss.first, loss.last) for loss in listed.losses()}
    if not dry_run:
        for snapshot_id in [*(snapshot.snapshot_id for snapshot in snapshots), *broken]:
            note = notes.new_note(snapshot_id, notes.FORGET, *numbers.get(snapshot_id, ()))
            await workers.request(notes.put_note, repository, note)
    return ForgetResult(snapshots, tuple(broken), len(listed.snapshots) - len(snapshots))
