"""Forget snapshots: a note each; prune deletes, later, what no snapshot needs any more."""

from dataclasses import dataclass

from backupfs import workers
from backupfs.ids import SnapshotId
from backupfs.repository.repository import Repository
from backupfs.snapshots import notes
from backupfs.snapshots.listing import load_snapshots
from backupfs.snapshots.losses import Loss
from backupfs.snapshots.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class ForgetResult:
    """What was, or would be, forgotten."""

    forgotten: tuple[Snapshot, ...]
    broken: tuple[SnapshotId, ...]  # the same, of those that are damaged or lost
    losses: tuple[Loss, ...]  # those of them that are lost; some stand for several numbers
    kept: int


async def forget(repository: Repository, names: list[str], dry_run: bool) -> ForgetResult:
    """Forget snapshots by their names; all names are understood before the first is forgotten.

    One that is damaged or lost may be named, too: then nothing tells of it any more.

    Raises: UnknownSnapshot; UnknownVersion; WrongPassword if the key slot may not destroy; StoreError.
    """
    listed = await workers.request(load_snapshots, repository)
    chosen = dict.fromkeys(listed.find_any(name) for name in names)
    snapshots = tuple(snapshot for snapshot in listed.snapshots if snapshot.snapshot_id in chosen)
    losses = tuple(loss for loss in listed.losses() if loss.name in chosen)
    numbers = {one.snapshot_id: (one.host_id, one.sequence, one.sequence) for one in snapshots}
    numbers |= {SnapshotId(loss.name): (loss.host_id, loss.first, loss.last) for loss in losses}
    healthy = [snapshot.snapshot_id for snapshot in snapshots]
    broken = [snapshot_id for snapshot_id in chosen if snapshot_id not in healthy]
    if not dry_run:
        for snapshot_id in [*healthy, *broken]:
            note = notes.new_note(snapshot_id, notes.FORGET, *numbers.get(snapshot_id, ()))
            await workers.request(notes.put_note, repository, note)
    return ForgetResult(snapshots, tuple(broken), losses, len(listed.snapshots) - len(snapshots))
