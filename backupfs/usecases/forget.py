"""Forget snapshots: a note each; prune deletes, later, what no snapshot needs any more."""

from dataclasses import dataclass

from backupfs import workers
from backupfs.repository.repository import Repository
from backupfs.snapshots import notes
from backupfs.snapshots.listing import load_snapshots
from backupfs.snapshots.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class ForgetResult:
    """What was, or would be, forgotten."""

    forgotten: tuple[Snapshot, ...]
    kept: int


async def forget(repository: Repository, names: list[str], dry_run: bool) -> ForgetResult:
    """Forget snapshots by their names; all names are understood before the first is forgotten.

    Raises: UnknownSnapshot; WrongPassword if the key slot may not destroy; StoreError.
    """
    listed = await workers.request(load_snapshots, repository)
    chosen = {listed.find(name).snapshot_id for name in names}
    snapshots = tuple(snapshot for snapshot in listed.snapshots if snapshot.snapshot_id in chosen)
    if not dry_run:
        for snapshot in snapshots:
            await workers.request(notes.put_note, repository, notes.new_note(snapshot.snapshot_id, notes.FORGET))
    return ForgetResult(snapshots, len(listed.snapshots) - len(snapshots))
