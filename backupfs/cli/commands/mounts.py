"""mount, umount: snapshots as a file system."""

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import click

from backupfs.cli.settings import PATH, Settings, run_case, with_settings
from backupfs.errors import shown

if TYPE_CHECKING:
    from pathlib import Path

    from backupfs.ids import SnapshotId
    from backupfs.repository.repository import Repository
    from backupfs.usecases.events import Report
    from backupfs.usecases.mount import MountOptions


@click.command("mount")
@click.argument("mountpoint", metavar="DIR")
@click.option("-f", "--foreground", is_flag=True, help="Stay here until the mount ends, and log here.")
@click.option("--snapshot", multiple=True, metavar="SNAP", help="Show only these snapshots.")
@click.option("--host", multiple=True, metavar="NAME", help="Show only this host's snapshots.")
@click.option("--tag", multiple=True, metavar="TAG", help="Show only snapshots with this tag.")
@click.option("--path", multiple=True, metavar="PATH", type=PATH, help="Show only snapshots of this path.")
@click.option("--allow-other", is_flag=True, help="Let other users in; permissions are enforced.")
@click.option("--cache-data", metavar="SIZE", help="Keep up to SIZE of files' content on this machine's disk: 20G.")
@click.option("--log-file", metavar="FILE", help="Where a mount in the background logs.")
@with_settings
def mount_command(
    settings: Settings,
    mountpoint: str,
    foreground: bool,
    snapshot: tuple[str, ...],
    host: tuple[str, ...],
    tag: tuple[str, ...],
    path: tuple[bytes, ...],
    allow_other: bool,
    cache_data: str | None,
    log_file: str | None,
) -> int:
    """Show the snapshots as a read-only file system at DIR.

    \b
    DIR/latest/…             the newest snapshot of files
    DIR/snapshots/TIME/…     every one by its time
    DIR/hosts/HOST/TIME/…    by host, with `latest`
    DIR/images/NAME/TIME/…   images: disks, volumes, files, .verify; with `latest`
    DIR/tags/TAG/TIME/…      by tag
    DIR/ids/ID/…             by id

    Inside a snapshot stand the paths as they were on the host. Restore by copying. New snapshots appear by
    themselves. The command returns when the mount is ready; `backupfs umount DIR` ends it.
    """
    repository = settings.open_repository("backupfs.usecases.mount")
    from pathlib import Path

    from backupfs.cli.report import Reporter, print_json
    from backupfs.cli.values import size
    from backupfs.localfs.sources import normalise
    from backupfs.usecases.mount import MountFilter, MountOptions, default_log_file, mount_in_background

    place = Path(os.path.abspath(mountpoint))
    shown_ones = MountFilter(
        snapshots=_ids(repository, snapshot),
        hosts=host,
        tags=tag,
        paths=tuple(normalise(one, os.getcwdb()) for one in path),
    )
    options = MountOptions(shown=shown_ones, allow_other=allow_other, cache_data=size(cache_data or "0"))
    serve = partial(_serve, repository, place, options, Reporter(settings))
    if foreground:
        serve(lambda: None)
        return 0
    log_path = Path(os.path.abspath(log_file)) if log_file else default_log_file(settings.folders().cache)
    pid = mount_in_background(serve, place, options, log_path)
    if settings.json:
        print_json({"mountpoint": str(place), "pid": pid, "log_file": str(log_path)})
    elif not settings.quiet:
        click.echo(f"mounted at {shown(str(place))}; `backupfs umount {shown(mountpoint)}` ends it")
        click.echo(f"log: {shown(str(log_path))}")
    return 0


def _ids(repository: "Repository", names: tuple[str, ...]) -> "frozenset[SnapshotId]":
    if not names:
        return frozenset()
    from backupfs.snapshots.listing import load_snapshots

    listed = load_snapshots(repository)
    return frozenset(listed.find(name).snapshot_id for name in names)


def _serve(
    repository: "Repository", place: "Path", options: "MountOptions", report: "Report", on_ready: Callable[[], None]
) -> None:
    from backupfs.usecases.mount import serve_mount

    run_case(serve_mount, repository, place, options, on_ready, report)


@click.command("umount")
@click.argument("mountpoint", metavar="DIR")
@click.option("-z", "--lazy", is_flag=True, help="Take it away now, even if something still uses it.")
@with_settings
def umount_command(settings: Settings, mountpoint: str, lazy: bool) -> int:
    """End a mount, and wait until its server has ended.

    Needs no repository and no password.
    """
    from pathlib import Path

    from backupfs.usecases.umount import umount

    umount(Path(os.path.abspath(mountpoint)), lazy)
    if settings.json:
        from backupfs.cli.report import print_json

        print_json({"unmounted": os.path.abspath(mountpoint)})
    elif not settings.quiet:
        click.echo(f"unmounted {shown(mountpoint)}")
    return 0
