"""init, check, stats: the repository as a whole."""

import click

from backupfs.cli.settings import Settings, as_text, run_case, with_settings


@click.command("init")
@click.option("--slot-name", callback=as_text, default="first", show_default=True, help="Name of the first key slot.")
@with_settings
def init_command(settings: Settings, slot_name: str) -> int:
    """Make a new, empty repository.

    An existing one is never touched. The password is asked for twice; without it nobody can ever read the backups, so
    keep a copy where it survives this machine. `backupfs key add` gives the repository further passwords.
    """
    from backupfs.cli.passwords import read_first_password
    from backupfs.cli.report import print_json
    from backupfs.usecases.init import init, require_no_repository

    store = settings.store()
    require_no_repository(store)
    password = read_first_password(settings.password_file, settings.password_command)
    repository = init(store, password, slot_name, settings.folders())
    identity = repository.config.repository_id.hex()
    if settings.json:
        print_json({"repository": store.url, "id": identity})
    elif not settings.quiet:
        click.echo(f"made the repository {identity[:8]} at {store.url}")
        click.echo("Keep the password: without it nobody can ever read what will be in it.")
    return 0


@click.command("check")
@click.option("--read-data", is_flag=True, help="Read every pack whole and check every chunk; slow and sure.")
@click.option("--read-data-subset", metavar="PART", help="Read a part of the packs only: 5% or 2/10.")
@with_settings
def check_command(settings: Settings, read_data: bool, read_data_subset: str | None) -> int:
    """Check that all that snapshots need is there and is right.

    Without options: all metadata is read and authenticated, and every pack has to be there in its full size. Ends
    with 1 when something is damaged, naming the objects, the snapshots and the paths that are hit. Damaged packs are
    noted on this machine, and its next backup stores again what was in them and is still in the sources. Ends with 3
    when nothing is known to be damaged and objects could not be read: archived, refused, or not answered.
    """
    repository = settings.open_repository("backupfs.usecases.check", snapshots=False, files=False)
    from backupfs.cli.report import Reporter
    from backupfs.cli.summaries import tell_check
    from backupfs.usecases.check import CheckOptions, check

    report = Reporter(settings)
    options = CheckOptions(read_data=read_data or read_data_subset is not None, subset=read_data_subset)
    result = run_case(check, repository, options, report)
    report.clear()
    tell_check(settings, result)
    if result.damaged:
        return 1
    return 3 if result.unread else 0


@click.command("stats")
@with_settings
def stats_command(settings: Settings) -> int:
    """Show how large the repository is and what it saves."""
    repository = settings.open_repository("backupfs.usecases.stats")
    from dataclasses import asdict

    from backupfs.cli.report import print_json, size_text
    from backupfs.usecases.stats import stats

    found = stats(repository)
    if settings.json:
        print_json({**asdict(found), "stored_bytes": found.stored_bytes})
        return 0
    click.echo(f"snapshots   {found.snapshots:>12,}   {size_text(found.snapshot_bytes):>10} of files in them")
    click.echo(f"chunks      {found.chunks:>12,}   {size_text(found.chunk_bytes):>10} before compression, each once")
    click.echo(f"data packs  {found.data_packs:>12,}   {size_text(found.data_bytes):>10}")
    click.echo(f"tree packs  {found.tree_packs:>12,}   {size_text(found.tree_bytes):>10}")
    click.echo(f"index       {found.index_segments:>12,}   {size_text(found.index_bytes):>10}")
    click.echo(f"other       {found.other_objects:>12,}   {size_text(found.other_bytes):>10}")
    click.echo(f"stored                     {size_text(found.stored_bytes):>10} in all")
    return 0
