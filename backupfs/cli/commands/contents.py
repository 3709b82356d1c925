"""ls, dump, restore: what is inside snapshots, without a mount."""

import os
import sys
from typing import TYPE_CHECKING

import click

from backupfs.cli.settings import PATH, Settings, run_case, with_settings
from backupfs.errors import UsageError, shown

if TYPE_CHECKING:
    from backupfs.repository.repository import Repository
    from backupfs.snapshots.snapshot import Snapshot


def split_snapshot_path(text: bytes) -> tuple[str, bytes]:
    """Return (snapshot's name, absolute path or b"") of SNAP[:PATH]. Raises: UsageError."""
    name, colon, path = text.partition(b":/")
    snapshot = os.fsdecode(name)
    if ":" in snapshot and not snapshot.endswith(":latest"):
        raise UsageError(f"{shown(text)}: PATH in SNAP:PATH starts with /, as in latest:/home")
    return snapshot, b"/" + path if colon else b""


def _found(settings: Settings, text: bytes, module: str) -> "tuple[Repository, Snapshot, bytes]":
    name, path = split_snapshot_path(text)
    repository = settings.open_repository(module)
    from backupfs.snapshots.listing import load_all

    snapshot = load_all(repository).find(name)
    return repository, snapshot, path


@click.command("ls")
@click.argument("what", metavar="SNAP[:PATH]", type=PATH)
@click.option("-l", "--long", is_flag=True, help="Modes, owners, sizes and times, too.")
@click.option("-R", "--recursive", is_flag=True, help="Everything below, too.")
@with_settings
def ls_command(settings: Settings, what: bytes, long: bool, recursive: bool) -> int:
    """List a folder of a snapshot.

    SNAP is an id or the start of one, `latest`, or HOST:latest; PATH is absolute, as it was on the host.
    """
    repository, snapshot, path = _found(settings, what, "backupfs.cli.summaries")
    from backupfs.cli.report import print_json
    from backupfs.cli.summaries import node_line, node_value
    from backupfs.snapshots.tree import nodes
    from backupfs.snapshots.walk import find_path, tree_of, walk

    load = repository.trees.load
    top = find_path(snapshot, path, load)
    if not top.is_directory:
        entries = iter([(path, top)])
    elif recursive:
        entries = walk(top, path, load)
    else:
        entries = ((path.rstrip(b"/") + b"/" + node.name, node) for node in nodes(tree_of(top), load))
    for at, node in entries:
        if settings.json:
            print_json(node_value(at, node))
        else:
            name = at if recursive or not top.is_directory else node.name
            sys.stdout.write(node_line(name, node, long) + "\n")
    return 0


@click.command("dump")
@click.argument("what", metavar="SNAP:PATH", type=PATH)
@with_settings
def dump_command(settings: Settings, what: bytes) -> int:
    """Write a file to standard output, or a folder as a tar."""
    if sys.stdout.isatty():
        raise UsageError(
            "dump writes the bytes to standard output: send them to a file or a command, not to the terminal"
        )
    repository, snapshot, path = _found(settings, what, "backupfs.usecases.dump")
    from backupfs.usecases.dump import dump

    dump(repository, snapshot, path, sys.stdout.buffer)
    return 0


@click.command("restore")
@click.argument("what", metavar="SNAP[:PATH]", type=PATH)
@click.argument("target", type=PATH)
@click.option(
    "--overwrite",
    type=click.Choice(["always", "if-changed", "if-newer", "never"]),
    default="always",
    show_default=True,
    help="What to do with files that are there: if-changed goes by size and time.",
)
@click.option("-i", "--include", multiple=True, metavar="PATTERN", help="Restore only what fits.")
@click.option("-e", "--exclude", multiple=True, metavar="PATTERN", help="Leave out what fits.")
@click.option("--delete", is_flag=True, help="Delete in TARGET what the snapshot does not have (-v names it).")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--verify", is_flag=True, help="Read everything back afterwards and compare.")
@click.option("--sparse", is_flag=True, help="Make holes of long runs of zeros, too.")
@click.option(
    "--owner",
    type=click.Choice(["name", "number"]),
    default="name",
    show_default=True,
    help="Give files to the users of the same names where this machine has them, or to the same numbers.",
)
@click.option("--image", is_flag=True, help="Write the disk SNAP[:DISK] to the device or file TARGET.")
@with_settings
def restore_command(
    settings: Settings,
    what: bytes,
    target: bytes,
    overwrite: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    delete: bool,
    dry_run: bool,
    verify: bool,
    sparse: bool,
    owner: str,
    image: bool,
) -> int:
    """Put a folder's content, or one file, into the folder TARGET; with --image, a disk on the device TARGET.

    Everything comes back: owners, times, attributes, links, holes. Each file is written under a temporary name and
    renamed when it is whole. No symlink in TARGET is followed. Patterns go by paths from the restored folder on.
    With --image only blocks that differ are written, and all are read back. Refused are a device that is mounted or too
    small and a file that is there with another size than the disk's.
    """
    from backupfs.cli import values
    from backupfs.localfs.sources import normalise

    if image:
        return _restore_image(settings, what, target, dry_run)
    included, excluded = values.patterns(include), values.patterns(exclude)
    repository, snapshot, path = _found(settings, what, "backupfs.usecases.restore")
    from backupfs.cli.report import Reporter
    from backupfs.cli.summaries import tell_restore
    from backupfs.usecases.restore import restore
    from backupfs.usecases.restore_items import RestoreOptions

    options = RestoreOptions(
        overwrite=overwrite,
        include=included,
        exclude=excluded,
        delete=delete,
        dry_run=dry_run,
        verify=verify,
        sparse=sparse,
        owner=owner,
        own_folders=values.own_folders(settings.folders(), repository.store),
    )
    report = Reporter(settings)
    place = normalise(target, os.getcwdb())
    result = run_case(restore, repository, snapshot, path or b"/", place, options, report)
    report.clear()
    tell_restore(settings, result, dry_run)
    if result.damaged:
        return 1
    return 3 if result.errors else 0


def _restore_image(settings: Settings, what: bytes, target: bytes, dry_run: bool) -> int:
    from backupfs.cli.values import own_folders, split_disk

    name, disk = split_disk(what)
    repository = settings.open_repository("backupfs.usecases.restore_image")
    from backupfs.cli.report import Reporter
    from backupfs.cli.summaries import tell_restore_image
    from backupfs.snapshots.listing import load_all
    from backupfs.usecases.restore_image import restore_image

    snapshot = load_all(repository).find(name)
    report = Reporter(settings)
    own = own_folders(settings.folders(), repository.store)
    result = restore_image(repository, snapshot, disk, os.path.abspath(target), dry_run, report, own)
    report.clear()
    tell_restore_image(settings, result, dry_run)
    return 0


@click.command("thaw")
@click.argument("what", metavar="SNAP[:PATH]", type=PATH)
@click.option(
    "--tier",
    type=click.Choice(["expedited", "standard", "bulk"]),
    default="standard",
    show_default=True,
    help="How fast; faster costs more.",
)
@click.option("--days", type=int, default=7, show_default=True, help="How long what was thawed stays readable.")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what is needed.")
@with_settings
def thaw_command(settings: Settings, what: bytes, tier: str, days: int, dry_run: bool) -> int:
    """Have a path's content brought back from an archive class of object storage.

    It takes minutes to days until it can be read; run the same command again to see how far it is.
    """
    repository, snapshot, path = _found(settings, what, "backupfs.usecases.thaw")
    from backupfs.cli.report import Reporter
    from backupfs.cli.summaries import tell_thaw
    from backupfs.usecases.thaw import ThawOptions, thaw

    report = Reporter(settings)
    result = thaw(repository, snapshot, path or b"/", ThawOptions(tier, days, dry_run), report)
    report.clear()
    tell_thaw(settings, result, dry_run)
    return 1 if result.missing or result.lost else 0
