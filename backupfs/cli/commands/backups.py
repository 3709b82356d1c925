"""backup, snapshots, forget: making snapshots and looking at them."""

import os
from typing import TYPE_CHECKING

import click

from backupfs.cli.settings import Settings, with_settings
from backupfs.errors import UsageError, shown

if TYPE_CHECKING:
    from backupfs.localfs.exclude import Pattern
    from backupfs.localfs.selection import SelectionRules
    from backupfs.stores.store import Store

_SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@click.command("backup")
@click.argument("paths", nargs=-1, type=click.Path(path_type=bytes))
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
    help="Read paths from FILE, by line or NUL-separated; - is standard input.",
)
@click.option("--stdin", "stdin_name", metavar="NAME", help="Back up standard input as the file NAME.")
@click.option("--tag", multiple=True, metavar="TAG", help="Tag the snapshot.")
@click.option("--host", default="", metavar="NAME", help="Another host name than this machine's.")
@click.option("--time", "when", metavar="TIME", help="Another time than now: 2026-11-22T08:13:11, with Z or +01:00.")
@click.option("--parent", metavar="SNAP", help="Compare with this snapshot instead of the newest of these paths.")
@click.option("--force", is_flag=True, help="Compare with nothing and read every file.")
@click.option("--compression", default="auto", metavar="LEVEL", help="off, auto, or 1 to 19.", show_default=True)
@click.option("-n", "--dry-run", is_flag=True, help="Read and count, store nothing.")
@with_settings
def backup_command(settings: Settings, paths: tuple[bytes, ...], **options: object) -> int:
    """Back up files and folders into a new snapshot.

    Only what changed since the last snapshot of the same paths is read, and only what the repository does not have
    is stored. Interrupt it at any time: the next run goes on from what was stored. Memory and kernel file systems
    (/proc, /sys, /run …), the repository and the cache are left out, and the report says so.
    """
    import sys
    from functools import partial

    level = _level(str(options["compression"]))
    rules = _rules(options)
    wanted = _paths(paths, options)
    time_ns = _time(options["when"]) if isinstance(options["when"], str) else None
    stdin_name = options["stdin_name"]
    if bool(wanted) == bool(stdin_name):
        raise UsageError(
            "give paths to back up, or --stdin NAME, not both" if wanted else "what to back up? give a PATH"
        )
    repository = settings.open_repository("backupfs.usecases.backup")
    import trio

    from backupfs.cli.report import Reporter
    from backupfs.cli.summaries import tell_backup
    from backupfs.usecases.backup import BackupOptions, backup, backup_stream

    chosen = BackupOptions(
        host=str(options["host"]),
        tags=tuple(map(str, options["tag"])),  # type: ignore[call-overload]
        time_ns=time_ns,
        parent=options["parent"],  # type: ignore[arg-type]
        force=bool(options["force"]),
        level=level,
        dry_run=bool(options["dry_run"]),
        rules=rules,
        own_folders=_own_folders(settings, repository.store),
    )
    report = Reporter(settings)
    if isinstance(stdin_name, str):
        from backupfs.localfs.sources import normalise

        name = normalise(os.fsencode(stdin_name), b"/")
        read = partial(_read_some, sys.stdin.buffer.fileno())
        result = trio.run(backup_stream, repository, name, read, chosen, report)
    else:
        result = trio.run(backup, repository, wanted, chosen, report)
    report.clear()
    tell_backup(settings, result, report)
    return 3 if report.skipped else 0


def _read_some(descriptor: int, buffer: memoryview) -> int:
    return os.readv(descriptor, [buffer])


def _paths(paths: tuple[bytes, ...], options: dict[str, object]) -> list[bytes]:
    from backupfs.localfs.sources import normalise, read_list

    found = list(paths)
    for name in options["files_from"]:  # type: ignore[attr-defined]
        found += read_list(_read_input(name))
    here = os.getcwdb()
    return [normalise(path, here) for path in found]


def _read_input(name: str) -> bytes:
    import sys

    try:
        if name == "-":
            return sys.stdin.buffer.read()
        with open(name, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"{shown(name)} cannot be read: {error.strerror}") from error


def _rules(options: dict[str, object]) -> "SelectionRules":
    from backupfs.localfs.exclude import check_marker, parse_pattern, parse_patterns
    from backupfs.localfs.selection import SelectionRules

    patterns: list[Pattern] = [parse_pattern(os.fsencode(text)) for text in options["exclude"]]  # type: ignore[attr-defined]
    for name in options["exclude_file"]:  # type: ignore[attr-defined]
        patterns += parse_patterns(_read_input(name).split(b"\n"), source=os.fsencode(name))
    markers = tuple(os.fsencode(marker) for marker in options["exclude_if_present"])  # type: ignore[attr-defined]
    for marker in markers:
        check_marker(marker)
    limit = options["exclude_larger_than"]
    return SelectionRules(
        patterns=tuple(patterns),
        caches=bool(options["exclude_caches"]),
        if_present=markers,
        larger_than=_size(limit) if isinstance(limit, str) else None,
        one_file_system=bool(options["one_file_system"]),
    )


def _size(text: str) -> int:
    number, unit = text.lower().removesuffix("b").removesuffix("i"), ""
    if number and number[-1] in _SIZE_UNITS:
        number, unit = number[:-1], number[-1]
    try:
        return int(float(number) * _SIZE_UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise UsageError(f"{shown(text)} is no size: write bytes, or 500K, 20M, 1.5G, 2T") from None


def _time(text: str) -> int:
    from datetime import datetime

    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"{shown(text)} is no time: write 2026-11-22T08:13:11, with Z or +01:00 if not local"
        ) from None
    return int(moment.timestamp()) * 10**9 + moment.microsecond * 1000


def _level(text: str) -> int:
    from backupfs.codec import compression

    if text == "off":
        return compression.OFF
    if text == "auto":
        return compression.DEFAULT_LEVEL
    if text.isdigit() and 1 <= int(text) <= compression.MAX_LEVEL:
        return int(text)
    raise UsageError(f"{shown(text)} is no compression: write off, auto, or a level from 1 to {compression.MAX_LEVEL}")


def _own_folders(settings: Settings, store: "Store") -> tuple[bytes, ...]:
    folders = settings.folders()
    own = [os.fsencode(folder) for folder in (folders.cache,) if folder is not None]
    if store.folder is not None:
        own.append(os.fsencode(store.folder))
    return tuple(own)


@click.command("snapshots")
@click.argument("names", nargs=-1, metavar="[SNAP]...")
@click.option("--host", multiple=True, metavar="NAME", help="Only this host's.")
@click.option("--tag", multiple=True, metavar="TAG", help="Only those with this tag.")
@click.option(
    "--path", multiple=True, metavar="PATH", type=click.Path(path_type=bytes), help="Only those of this path."
)
@with_settings
def snapshots_command(
    settings: Settings, names: tuple[str, ...], host: tuple[str, ...], tag: tuple[str, ...], path: tuple[bytes, ...]
) -> int:
    """List the snapshots, oldest first."""
    repository = settings.open_repository("backupfs.cli.summaries")
    from backupfs.cli.summaries import tell_snapshots
    from backupfs.localfs.sources import normalise
    from backupfs.snapshots.listing import load_snapshots

    listed = load_snapshots(repository)
    chosen = listed.selected(host, tag, [normalise(one, os.getcwdb()) for one in path])
    if names:
        wanted = {listed.find(name).snapshot_id for name in names}
        chosen = [snapshot for snapshot in chosen if snapshot.snapshot_id in wanted]
    tell_snapshots(settings, chosen)
    return 1 if listed.damaged else 0


@click.command("forget")
@click.argument("names", nargs=-1, required=True, metavar="SNAP...")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be forgotten.")
@with_settings
def forget_command(settings: Settings, names: tuple[str, ...], dry_run: bool) -> int:
    """Forget snapshots: they vanish from lists and mounts.

    Their space is kept until the repository can be pruned, which this version cannot do yet.
    """
    repository = settings.open_repository("backupfs.usecases.forget")
    import trio

    from backupfs.cli.summaries import tell_forget
    from backupfs.usecases.forget import forget

    result = trio.run(forget, repository, list(names), dry_run)
    tell_forget(settings, result, dry_run)
    return 0
