"""put, rm, edit: a child of a snapshot with other files."""

import os
from typing import TYPE_CHECKING

import click

from backupfs.cli.commands.contents import split_snapshot_path
from backupfs.cli.settings import PATH, Settings, as_text, with_settings
from backupfs.errors import MountError, SourceError, UsageError, shown

if TYPE_CHECKING:
    from pathlib import Path

    from backupfs.repository.repository import Repository
    from backupfs.snapshots.listing import SnapshotList
    from backupfs.snapshots.snapshot import Snapshot


@click.command("put")
@click.argument("what", metavar="SNAP:PATH", type=PATH)
@click.argument("local", metavar="LOCAL", type=PATH)
@click.option("-p", "--parents", is_flag=True, help="Make the folders above PATH that the snapshot does not have.")
@click.option(
    "--tag", callback=as_text, multiple=True, metavar="TAG", help="Tag the child, beside the tags of the snapshot."
)
@click.option("-n", "--dry-run", is_flag=True, help="Read and count, store nothing.")
@with_settings
def put_command(
    settings: Settings, what: bytes, local: bytes, parents: bool, tag: tuple[str, ...], dry_run: bool
) -> int:
    """Make a child of a snapshot in which PATH is the file or folder LOCAL of this machine.

    What stood at PATH is replaced, a folder with all that was in it; all else is as in SNAP, which itself does not
    change. LOCAL keeps its own mode, owner, times and attributes; a symlink is put as a link. The child is stored
    as now and of the same host, so it becomes `latest`.

    In an image, PATH is /files/VOLUME/… on ext2, ext3, ext4 (by debugfs) or FAT (by mtools). That takes neither root
    nor a mount, and the child is made only if the file system's checker finds nothing wrong.
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
    from backupfs.snapshots.snapshot import IMAGE
    from backupfs.usecases.amend import AmendOptions, put

    if snapshot.kind == IMAGE:
        from backupfs.cli.summaries import tell_image
        from backupfs.usecases.amend_image import put_in_image
        from backupfs.usecases.edit import EditOptions

        report = Reporter(settings)
        made = EditOptions(tags=tag, dry_run=dry_run)
        result = put_in_image(repository, snapshot, path, place, parents, made, report)
        report.clear()
        tell_image(settings, result)
        return 0
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
@click.option(
    "--tag", callback=as_text, multiple=True, metavar="TAG", help="Tag the child, beside the tags of the snapshot."
)
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
    from backupfs.snapshots.snapshot import IMAGE
    from backupfs.usecases.amend import AmendOptions, remove

    if snapshot.kind == IMAGE:
        from backupfs.cli.summaries import tell_image
        from backupfs.usecases.amend_image import remove_from_image
        from backupfs.usecases.edit import EditOptions

        report = Reporter(settings)
        made = EditOptions(tags=tag, dry_run=dry_run)
        result = remove_from_image(repository, snapshot, paths, recursive, made, report)
        report.clear()
        tell_image(settings, result)
        return 0
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


@click.command("edit")
@click.argument("words", nargs=-1, metavar="SNAP DIR", type=PATH)
@click.option("--commit", is_flag=True, help="Make the child of what was written at DIR, and unmount it.")
@click.option("--discard", is_flag=True, help="Unmount DIR, and forget what was written.")
@click.option(
    "--run", metavar="COMMAND", help="Without DIR: run COMMAND in a copy, and make the child if it ends with 0."
)
@click.option("--unchecked", is_flag=True, help="Make the child even of a file system that its checker finds broken.")
@click.option(
    "--tag", callback=as_text, multiple=True, metavar="TAG", help="Tag the child, beside the tags of the image."
)
@with_settings
def edit_command(
    settings: Settings,
    words: tuple[bytes, ...],
    commit: bool,
    discard: bool,
    run: str | None,
    unchecked: bool,
    tag: tuple[str, ...],
) -> int:
    """Change an image: mount a copy of its disks that can be written, and make a child of what was written.

    \b
    backupfs edit web1:latest /mnt/e                  the disks and volumes, as files
    mount -o loop /mnt/e/volumes/vda1.raw /mnt/x      as root; or any program that works on such files
    umount /mnt/x                                     when everything is as it should be
    backupfs edit --commit /mnt/e                     the child is made; or --discard

    The image itself never changes. The child stores what was written, and is made only if the checkers of the file
    systems that were changed find nothing wrong. Until then what is written is in a file without a name in TMPDIR. With
    --run, COMMAND finds the copy in $BACKUPFS_EDIT.
    """
    count = 1 if commit or discard or run else 2
    if len(words) != count or sum(map(bool, (commit, discard, run))) > 1:
        raise UsageError("give one of: edit SNAP DIR, edit --commit DIR, edit --discard DIR, edit SNAP --run COMMAND")
    from pathlib import Path

    from backupfs.cli.report import Reporter

    place = Path(os.fsdecode(os.path.abspath(words[-1])))
    if discard:
        from backupfs.usecases.edit import discard_edit

        discard_edit(place)
        return 0
    repository = settings.open_repository("backupfs.usecases.edit")
    from backupfs.cli.summaries import tell_image
    from backupfs.snapshots.listing import load_all
    from backupfs.usecases.edit import EditOptions, commit_edit, scratch_at
    from backupfs.usecases.events import Remark
    from backupfs.usecases.mount import default_log_file
    from backupfs.usecases.scratch import scratch_in_background, scratch_mount
    from backupfs.usecases.umount import umount

    listed = load_all(repository)
    options = EditOptions(tag, not unchecked)
    report = Reporter(settings)
    still_mounted = ""
    if commit:
        with scratch_at(place, listed) as (scratch, snapshot):
            result = commit_edit(repository, snapshot, scratch, options, report)
        try:
            umount(place)
        except MountError as error:
            still_mounted = f"the child is made, but {error}"
    elif run:
        snapshot = listed.find(os.fsdecode(words[0]))
        with scratch_mount(repository, snapshot, is_edit=True) as scratch:
            _run_in(scratch.mountpoint, run)
            result = commit_edit(repository, snapshot, scratch, options, report)
    else:
        snapshot = listed.find(os.fsdecode(words[0]))
        log_file = default_log_file(settings.folders().cache)
        pid = scratch_in_background(repository, snapshot, place, log_file)
        if settings.json:
            from backupfs.cli.report import print_json

            print_json({"mountpoint": str(place), "pid": pid, "log_file": str(log_file)})
        elif not settings.quiet:
            name = shown(str(place))
            click.echo(f"{name}: disks and volumes of {snapshot.image}, to be written")
            click.echo(f"`backupfs edit --commit {name}` makes the child, `backupfs edit --discard {name}` forgets it")
        return 0
    report.clear()
    tell_image(settings, result)
    if still_mounted:
        report(Remark(still_mounted))
    return 0


def _run_in(place: "Path", command: str) -> None:
    import subprocess

    environment = {**os.environ, "BACKUPFS_EDIT": str(place)}
    code = subprocess.run(command, shell=True, env=environment, stdout=2, check=False).returncode
    if code:
        raise SourceError(f"the command ended with {code}, so no child was made: {shown(command)}")
