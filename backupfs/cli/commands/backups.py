"""backup, snapshots, forget: making snapshots and looking at them."""

import logging
import os

import click

from backupfs.cli.settings import PATH, Settings, as_host, as_text, run_case, with_settings
from backupfs.errors import UsageError, shown


@click.command("backup")
@click.argument("paths", nargs=-1, type=PATH)
@click.option(
    "-e",
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave out what fits; as in .gitignore, `!` takes back in.",
)
@click.option("--exclude-file", multiple=True, metavar="FILE", help="Read patterns from FILE.")
@click.option("--exclude-caches", is_flag=True, help="Leave out the content of folders tagged by CACHEDIR.TAG.")
@click.option(
    "--exclude-if-present",
    multiple=True,
    metavar="NAME[:HEADER]",
    help="Leave out the content of folders with such a file.",
)
@click.option("--exclude-larger-than", metavar="SIZE", help="Leave out files above SIZE (as in 500M).")
@click.option("-x", "--one-file-system", is_flag=True, help="Do not enter other file systems.")
@click.option(
    "--files-from",
    multiple=True,
    metavar="FILE",
    help="Read paths from FILE, by line (# begins a comment) or NUL-separated; - is standard input.",
)
@click.option("--stdin", "stdin_name", metavar="NAME", help="Back up standard input as the file NAME.")
@click.option("--tag", callback=as_text, multiple=True, metavar="TAG", help="Tag the snapshot.")
@click.option("--host", callback=as_host, default="", metavar="NAME", help="Another host name than this machine's.")
@click.option("--time", "when", metavar="TIME", help="Another time than now: 2026-11-22T08:13:11, with Z or +01:00.")
@click.option(
    "--parent",
    metavar="SNAP",
    help="Compare with this snapshot instead of the newest of these paths, or else of this host.",
)
@click.option("--force", is_flag=True, help="Compare with nothing and read every file.")
@click.option("--compression", default="auto", metavar="LEVEL", help="off, auto, or 1 to 19.", show_default=True)
@click.option("-n", "--dry-run", is_flag=True, help="Read and count, store nothing.")
@with_settings
def backup_command(
    settings: Settings,
    paths: tuple[bytes, ...],
    exclude: tuple[str, ...],
    exclude_file: tuple[str, ...],
    exclude_caches: bool,
    exclude_if_present: tuple[str, ...],
    exclude_larger_than: str | None,
    one_file_system: bool,
    files_from: tuple[str, ...],
    stdin_name: str | None,
    tag: tuple[str, ...],
    host: str,
    when: str | None,
    parent: str | None,
    force: bool,
    compression: str,
    dry_run: bool,
) -> int:
    """Back up files and folders into a new snapshot.

    Only what changed since the last snapshot of the same paths is read, and only what the repository does not have
    is stored. Interrupt it at any time: the next run goes on from what was stored. Memory and kernel file systems
    (/proc, /sys, /run …), the repository and the cache are left out, and the report says so.

    Symbolic links are stored as links. A PATH that is one to a folder and ends in a slash means the folder, which is
    stored at its own place.
    """
    import sys
    from functools import partial

    from backupfs.cli import values
    from backupfs.localfs.exclude import check_marker
    from backupfs.localfs.selection import SelectionRules

    markers = tuple(os.fsencode(marker) for marker in exclude_if_present)
    for marker in markers:
        check_marker(marker)
    rules = SelectionRules(
        patterns=values.patterns(exclude, exclude_file),
        caches=exclude_caches,
        if_present=markers,
        larger_than=values.size(exclude_larger_than) if exclude_larger_than is not None else None,
        one_file_system=one_file_system,
    )
    level = values.level(compression)
    time_ns = values.moment_ns(when) if when is not None else None
    sources = values.absolute_paths(paths, files_from)
    if stdin_name is not None and sources:
        raise UsageError("give paths to back up, or --stdin NAME, not both")
    if stdin_name is not None:
        values.require_input()
    if stdin_name is None and not sources:
        raise UsageError("what to back up? give a PATH")

    repository = settings.open_repository("backupfs.usecases.backup")
    from backupfs.cli.report import Reporter
    from backupfs.cli.summaries import tell_backup
    from backupfs.usecases.backup import BackupOptions, backup, backup_stream
    from backupfs.usecases.events import Remark

    options = BackupOptions(
        host=host,
        tags=tag,
        time_ns=time_ns,
        parent=parent,
        force=force,
        level=level,
        dry_run=dry_run,
        rules=rules,
        own_folders=values.own_folders(settings.folders(), repository.store),
    )
    report = Reporter(settings)
    if stdin_name is not None:
        name = values.file_path(os.fsencode(stdin_name))
        read_into = partial(_read_into, sys.stdin.buffer.fileno())
        result = backup_stream(repository, name, read_into, options, report)
    else:
        for path in values.bare_links(sources):
            link = shown(path)
            report(Remark(f"{link} is a symbolic link, and only the link is stored: name {link}/ for what it leads to"))
        result = backup(repository, sources, options, report)
    report.clear()
    tell_backup(settings, result, report)
    return 3 if report.skipped else 0


def _read_into(descriptor: int, buffer: memoryview) -> int:
    return os.readv(descriptor, [buffer])


@click.command("snapshots")
@click.argument("names", nargs=-1, metavar="[SNAP]...")
@click.option("--host", callback=as_text, multiple=True, metavar="NAME", help="Only this host's.")
@click.option("--tag", callback=as_text, multiple=True, metavar="TAG", help="Only those with this tag.")
@click.option("--path", multiple=True, metavar="PATH", type=PATH, help="Only those of this path.")
@with_settings
def snapshots_command(
    settings: Settings, names: tuple[str, ...], host: tuple[str, ...], tag: tuple[str, ...], path: tuple[bytes, ...]
) -> int:
    """List the snapshots, oldest first."""
    repository = settings.open_repository("backupfs.cli.summaries", files=False)
    from backupfs.cli.summaries import tell_snapshots
    from backupfs.localfs.sources import normalise
    from backupfs.snapshots.listing import load_snapshots

    listed = load_snapshots(repository)
    chosen = listed.selected(host, tag, [normalise(one, os.getcwdb()) for one in path])
    if names:
        wanted = {listed.find(name).snapshot_id for name in names}
        chosen = [snapshot for snapshot in chosen if snapshot.snapshot_id in wanted]
    tell_snapshots(settings, chosen, listed.verifications)
    losses = listed.confirmed_losses()
    for loss in losses:
        logging.getLogger(__name__).warning("%s: see `backupfs check`", loss)
    return 1 if listed.damaged or losses else 0


@click.command("forget")
@click.argument("names", nargs=-1, required=True, metavar="SNAP...")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be forgotten.")
@with_settings
def forget_command(settings: Settings, names: tuple[str, ...], dry_run: bool) -> int:
    """Forget snapshots: they vanish from lists and mounts.

    Their space is kept until the repository can be pruned, which this version cannot do yet.

    One that is damaged or lost is forgotten by the id that `check` names: then nothing tells of it any more.
    """
    repository = settings.open_repository("backupfs.usecases.forget", files=False)
    from backupfs.cli.summaries import tell_forget
    from backupfs.usecases.forget import forget

    result = run_case(forget, repository, list(names), dry_run)
    tell_forget(settings, result, dry_run)
    return 0
