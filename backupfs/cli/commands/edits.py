"""put, rm: a child of a snapshot with other files."""

import os
from typing import TYPE_CHECKING

import click

from backupfs.cli.commands.contents import split_snapshot_path
from backupfs.cli.settings import PATH, Settings, with_settings
from backupfs.errors import UsageError, shown

if TYPE_CHECKING:
    from backupfs.repository.repository import Repository
    from backupfs.snapshots.listing import SnapshotList
    from backupfs.snapshots.snapshot import Snapshot


@click.command("put")
@click.argument("what", metavar="SNAP:PATH", type=PATH)
@click.argument("local", metavar="LOCAL", type=PATH)
@click.option("-p", "--parents", is_flag=True, help="Make the folders above PATH that the snapshot does not have.")
@click.option("--tag", multiple=True, metavar="TAG", help="Tag the child, beside the tags of the snapshot.")
@click.option("-n", "--dry-run", is_flag=True, help="Read and count, store nothing.")
@with_settings
def put_command(
    settings: Settings, what: bytes, local: bytes, parents: bool, tag: tuple[str, ...], dry_run: bool
) -> int:
    """Make a child of a snapshot in which PATH is the file or folder LOCAL of this machine.

    What stood at PATH is replaced, a folder with all that was in it; all else is as in SNAP, which itself does not
    change. LOCAL keeps its own mode, owner, times and attributes; a symlink is put as a link. The child is stored
    as now and of the same host, so it becomes `latest`.
    """
    from backupfs.localfs.sources import normalise

    name, path = _split(what)
    place = normalise(local, os.getcwdb())
    if what.endswith(b"/") and not (os.path.isdir(place) and not os.path.islink(place)):
        raise UsageError(f"{shown(what)} ends as a folder does, and {shown(local)} is none: name the file in it")
    repository, listed, snapshot = _opened(settings, name)
    from backupfs.cli.report import Reporter
    from backupfs.cli.summaries import tell_backup
    from backupfs.cli.values import own_folders
    from backupfs.usecases.amend import AmendOptions, put

    _require_files(snapshot, "put")
    own = own_folders(settings.folders(), repository.store)
    options = AmendOptions(tags=tag, dry_run=dry_run, makes_parents=parents, own_folders=own)
    report = Reporter(settings)
    result = put(repository, listed, snapshot, path, place, options, report)
    report.clear()
    tell_backup(settings, result, report)
    return 3 if report.skipped else 0


@click.command("rm")
@click.argument("what", metavar="SNAP:PATH", type=PATH)
@click.argument("more", metavar="[PATH]...", nargs=-1, type=PATH)
@click.option("-R", "--recursive", is_flag=True, help="Remove folders, with all that is in them.")
@click.option("--tag", multiple=True, metavar="TAG", help="Tag the child, beside the tags of the snapshot.")
@click.option("-n", "--dry-run", is_flag=True, help="Count, store nothing.")
@with_settings
def rm_command(
    settings: Settings, what: bytes, more: tuple[bytes, ...], recursive: bool, tag: tuple[str, ...], dry_run: bool
) -> int:
    """Make a child of a snapshot that has all that SNAP has, but for some paths.

    SNAP itself does not change: what is removed is in it until it is forgotten. Further paths are of the same snapshot,
    with SNAP: or without. The child becomes `latest`, as with `put`.
    """
    name, first = _split(what)
    paths = [first]
    for words in more:
        other, path = (name, _normal(words)) if words.startswith(b"/") else _split(words)
        if other != name:
            raise UsageError(f"{shown(words)} is of another snapshot than {shown(what)}: change one at a time")
        paths.append(path)
    repository, listed, snapshot = _opened(settings, name)
    from backupfs.cli.report import Reporter
    from backupfs.cli.summaries import tell_backup
    from backupfs.usecases.amend import AmendOptions, remove

    _require_files(snapshot, "rm")
    options = AmendOptions(tags=tag, dry_run=dry_run, recursive=recursive)
    report = Reporter(settings)
    result = remove(repository, listed, snapshot, paths, options, report)
    report.clear()
    tell_backup(settings, result, report)
    return 0


def _split(words: bytes) -> tuple[str, bytes]:
    """Return the snapshot's name and the absolute path of SNAP:PATH. Raises: UsageError."""
    name, path = split_snapshot_path(words)
    if not path:
        raise UsageError(f"{shown(words)}: which file in it? give SNAP:PATH, as in latest:/etc/hosts")
    return name, _normal(path)


def _normal(path: bytes) -> bytes:
    from backupfs.localfs.sources import normalise

    return normalise(path, b"/")


def _opened(settings: Settings, name: str) -> "tuple[Repository, SnapshotList, Snapshot]":
    repository = settings.open_repository("backupfs.usecases.amend")
    from backupfs.snapshots.listing import load_all

    listed = load_all(repository)
    return repository, listed, listed.find(name)


def _require_files(snapshot: "Snapshot", verb: str) -> None:
    """Raise UsageError for a snapshot that is an image."""
    from backupfs.ids import short
    from backupfs.snapshots.snapshot import FILES

    if snapshot.kind != FILES:
        raise UsageError(f"{short(snapshot.snapshot_id)} is an image of disks: {verb} changes snapshots of files only")
