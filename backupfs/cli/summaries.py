"""Results of verbs as text and as JSON, with the same names everywhere."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from backupfs.cli.report import Reporter, Value, duration_text, name_value, print_json, size_text, time_text
from backupfs.cli.settings import Settings
from backupfs.errors import shown
from backupfs.ids import SnapshotId, short
from backupfs.snapshots.node import Node
from backupfs.snapshots.snapshot import FREE_LEFT_OUT, IMAGE, Snapshot, has_doubtful_time
from backupfs.snapshots.verification import Result, Verification
from backupfs.stores.requests import RequestCounts

if TYPE_CHECKING:
    from backupfs.usecases.check import CheckResult
    from backupfs.usecases.forget import ForgetResult
    from backupfs.usecases.index import IndexResult
    from backupfs.usecases.restore import RestoreResult
    from backupfs.usecases.restore_image import RestoreImageResult
    from backupfs.usecases.storing import BackupResult
    from backupfs.usecases.thaw import ThawResult


def snapshot_value(snapshot: Snapshot) -> dict[str, Value]:
    """Return a snapshot for JSON."""
    return {
        "id": snapshot.snapshot_id.hex(),
        "short_id": short(snapshot.snapshot_id),
        "time_ns": snapshot.time_ns,
        "name": snapshot.time_name,
        "host": snapshot.host,
        "host_id": snapshot.host_id.hex(),
        "kind": "image" if snapshot.kind == IMAGE else "files",
        "image": snapshot.image or None,
        "disks": [
            {"name": disk.name, "size": snapshot.volumes[disk.volume].size, "format": disk.form}
            for disk in snapshot.disks
        ],
        "free_left_out": bool(snapshot.traits & FREE_LEFT_OUT),
        "sequence": snapshot.sequence,
        "paths": [path.decode("utf-8", "replace") for path in snapshot.paths],
        "tags": list(snapshot.tags),
        "parent": snapshot.parent.hex() or None,
        "user": snapshot.user,
        "program": snapshot.program,
        "doubtful_time": has_doubtful_time(snapshot),
        "statistics": asdict(snapshot.statistics),
    }


def tell_snapshots(
    settings: Settings, snapshots: list[Snapshot], verifications: Callable[[SnapshotId], list[Verification]]
) -> None:
    """Print a list of snapshots. verifications: gives those of a snapshot, oldest first."""
    if settings.json:
        print_json(
            [
                {
                    **snapshot_value(snapshot),
                    "verifications": [verification_value(made) for made in verifications(snapshot.snapshot_id)],
                }
                for snapshot in snapshots
            ]
        )
        return
    if not snapshots:
        click.echo("no snapshots")
        return
    rows: list[tuple[str, ...]] = [("id", "time", "host", "tags", "files", "size", "paths")]
    for snapshot in snapshots:
        statistics = snapshot.statistics
        doubt = " (clock was off)" if has_doubtful_time(snapshot) else ""
        rows.append(
            (
                short(snapshot.snapshot_id),
                time_text(snapshot.time_ns) + doubt,
                shown(snapshot.host),
                ",".join(map(shown, snapshot.tags)),
                f"{statistics.files:,}",
                size_text(statistics.size),
                _what_of(snapshot),
            )
        )
    _print_columns(rows, right=(4, 5))
    click.echo(f"{len(snapshots)} snapshot{'s' if len(snapshots) != 1 else ''}")
    if settings.verbose:
        for snapshot in snapshots:
            statistics = snapshot.statistics
            since = f" compared with {short(SnapshotId(snapshot.parent))}," if snapshot.parent else ""
            click.echo(
                f"{short(snapshot.snapshot_id)}: by {shown(snapshot.user)} with {shown(snapshot.program)},{since}"
                f" {statistics.files_new:,} new, {statistics.files_changed:,} changed,"
                f" {statistics.files_skipped:,} skipped, {size_text(statistics.stored_added)} stored,"
                f" {duration_text(statistics.duration_ns)}"
            )
            for made in verifications(snapshot.snapshot_id):
                click.echo(f"  {time_text(made.time_ns)}, level {made.level}: {made.result.name.lower()}")
                for one in made.outcomes:
                    subject = f"{shown(one.subject)}: " if one.subject else ""
                    click.echo(f"    {one.level} {one.result.name.lower():7} {subject}{shown(one.words)}")


def _what_of(snapshot: Snapshot) -> str:
    paths = " ".join(map(shown, snapshot.paths))
    return f"image {shown(snapshot.image)}: {paths}" if snapshot.kind == IMAGE else paths


def _print_columns(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> None:
    used = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in used}
    for row in rows:
        cells = [
            row[column].rjust(widths[column]) if column in right else row[column].ljust(widths[column])
            for column in used
        ]
        click.echo("  ".join(cells).rstrip())


def tell_backup(settings: Settings, result: "BackupResult", report: Reporter) -> None:
    """Print the report of a backup."""
    counts = result.counts
    if settings.json:
        print_json(
            {
                "event": "summary",
                "snapshot": snapshot_value(result.snapshot) if result.snapshot is not None else None,
                "parent": result.parent.hex() or None,
                "files": counts.files,
                "directories": counts.directories,
                "size": counts.size,
                "files_new": counts.files_new,
                "files_changed": counts.files_changed,
                "files_unchanged": counts.files_unchanged,
                "files_skipped": counts.files_skipped,
                "chunks_new": result.data.chunks + result.trees.chunks,
                "plain_added": result.plain_added,
                "stored_added": result.stored_added,
                "packs": result.data.packs + result.trees.packs,
                "left_out": len(report.left_out),
                "requests": asdict(result.requests),
                "duration_ns": result.duration_ns,
            }
        )
        return
    if settings.quiet:
        return
    if result.snapshot is not None:
        click.echo(f"snapshot {short(result.snapshot.snapshot_id)} saved, {time_text(result.snapshot.time_ns)}")
    else:
        click.echo("dry run: nothing was stored")
    compared = f", compared with {short(result.parent)}" if result.parent else ""
    click.echo(
        f"  files    {counts.files:,} ({size_text(counts.size)}): {counts.files_new:,} new,"
        f" {counts.files_changed:,} changed, {counts.files_unchanged:,} unchanged{compared}"
    )
    click.echo(f"  folders  {counts.directories:,}")
    stored = f", {size_text(result.stored_added)} stored after compression" if result.snapshot is not None else ""
    click.echo(f"  new      {size_text(result.plain_added)} after deduplication{stored}")
    for line in report.left_out_summary():
        click.echo(f"  left out {line}")
    if report.skipped:
        click.echo(f"  skipped  {len(report.skipped):,} that could not be read; each is named above")
    _tell_requests(result.requests)
    click.echo(f"  time     {duration_text(result.duration_ns)}")


def tell_image(settings: Settings, result: "BackupResult") -> None:
    """Print the report of an image."""
    counts, snapshot = result.counts, result.snapshot
    if settings.json:
        print_json(
            {
                "event": "summary",
                "snapshot": snapshot_value(snapshot) if snapshot is not None else None,
                "parent": result.parent.hex() or None,
                "disks": len(snapshot.disks) if snapshot is not None else None,
                "files": counts.files,
                "directories": counts.directories,
                "files_skipped": counts.files_skipped,
                "size": counts.size,
                "chunks_new": result.data.chunks,
                "plain_added": result.plain_added,
                "stored_added": result.stored_added,
                "packs": result.data.packs + result.trees.packs,
                "requests": asdict(result.requests),
                "duration_ns": result.duration_ns,
            }
        )
        return
    if settings.quiet:
        return
    if snapshot is not None:
        click.echo(
            f"image {shown(snapshot.image)}, snapshot {short(snapshot.snapshot_id)} saved, "
            f"{time_text(snapshot.time_ns)}"
        )
        for disk in snapshot.disks:
            size = size_text(snapshot.volumes[disk.volume].size)
            click.echo(f"  disk     {shown(disk.name)} ({size}, {shown(disk.form)}) from {shown(disk.source)}")
        click.echo(f"  files    {counts.files:,} in them" + _skipped_in_image(counts.files_skipped))
    else:
        click.echo(f"dry run: nothing was stored of disks of {size_text(counts.size)}")
    stored = f", {size_text(result.stored_added)} stored after compression" if snapshot is not None else ""
    click.echo(f"  new      {size_text(result.plain_added)} after deduplication{stored}")
    _tell_requests(result.requests)
    click.echo(f"  time     {duration_text(result.duration_ns)}")


def tell_index(settings: Settings, result: "IndexResult") -> None:
    """Print what was found in an image."""
    snapshot = result.snapshot
    if settings.json:
        print_json({"event": "summary", **asdict(result), "snapshot": snapshot_value(snapshot)})
        return
    if settings.quiet:
        return
    image = f"image {shown(snapshot.image)}, snapshot {short(snapshot.snapshot_id)}"
    if not result.looked:
        click.echo(f"{image}: the files of all its volumes are shown already; --force looks into them again")
        return
    click.echo(f"{image}: {'indexed' if result.is_new else 'nothing more was found in it'}")
    for label, names in (
        ("added   ", result.added),
        ("renewed ", result.renewed),
        ("volumes ", result.volumes),
        ("no files", result.without),
    ):
        if names:
            click.echo(f"  {label} {', '.join(map(shown, names))}")
    click.echo(f"  files    {snapshot.statistics.files:,} in it" + _skipped_in_image(result.files_skipped))
    if result.is_new:
        click.echo(
            f"  new      {size_text(result.plain_added)} after deduplication, "
            f"{size_text(result.stored_added)} stored after compression"
        )
    _tell_requests(result.requests)
    click.echo(f"  time     {duration_text(result.duration_ns)}")


def _skipped_in_image(count: int) -> str:
    problems = "1 problem, named above" if count == 1 else f"{count:,} problems, each named above"
    return f"; {problems}: the disks themselves are stored as they were read" if count else ""


def _tell_requests(requests: RequestCounts) -> None:
    if requests:
        click.echo(
            f"  requests {requests.put:,} put, {requests.get:,} get, {requests.list:,} list, {requests.delete:,} delete"
            f"; {size_text(requests.sent)} sent, {size_text(requests.received)} received"
        )


def tell_forget(settings: Settings, result: "ForgetResult", dry_run: bool) -> None:
    """Print which snapshots were forgotten."""
    if settings.json:
        forgotten: list[Value] = [snapshot_value(snapshot) for snapshot in result.forgotten]
        broken: list[Value] = [snapshot_id.hex() for snapshot_id in result.broken]
        lost: list[Value] = [
            {
                "id": loss.name.hex(),
                "host": loss.host,
                "host_id": loss.host_id.hex(),
                "first": loss.first,
                "last": loss.last,
            }
            for loss in result.losses
        ]
        print_json(
            {
                "event": "summary",
                "forgotten": forgotten,
                "broken": broken,
                "lost": lost,
                "kept": result.kept,
                "dry_run": dry_run,
            }
        )
        return
    if settings.quiet:
        return
    verb = "would forget" if dry_run else "forgot"
    gone = {loss.name: loss for loss in result.losses}
    for snapshot_id in result.broken:
        loss = gone.get(snapshot_id)
        what = "which cannot be read"
        if loss is not None:
            what = f"{loss.numbers}, which {'are' if loss.last > loss.first else 'is'} gone"
        click.echo(f"{verb} {short(snapshot_id)}, {what}")
    for snapshot in result.forgotten:
        paths = " ".join(map(shown, snapshot.paths))
        click.echo(
            f"{verb} {short(snapshot.snapshot_id)}, {time_text(snapshot.time_ns)}, {shown(snapshot.host)}, {paths}"
        )
    click.echo(
        f"{result.kept} snapshot{'s' if result.kept != 1 else ''} kept;"
        " the space of the forgotten is kept until the repository is pruned"
    )


def tell_restore(settings: Settings, result: "RestoreResult", dry_run: bool) -> None:
    """Print the report of a restore."""
    if settings.json:
        print_json({"event": "summary", "dry_run": dry_run, **asdict(result)})
        return
    if settings.quiet:
        return
    click.echo("dry run: nothing was written" if dry_run else "restored")
    click.echo(f"  files    {result.files:,} ({size_text(result.size)}), {result.unchanged:,} left as they were")
    click.echo(f"  folders  {result.directories:,}")
    if result.deleted:
        click.echo(f"  deleted  {result.deleted:,}")
    if result.verified:
        click.echo(f"  verified {result.verified:,} read back and found as in the snapshot")
    if result.errors:
        damaged = f", {result.damaged:,} of them because the repository is damaged" if result.damaged else ""
        click.echo(f"  failed   {result.errors:,}{damaged}; each is named above")
    _tell_requests(result.requests)
    click.echo(f"  time     {duration_text(result.duration_ns)}")


def tell_restore_image(
    settings: Settings, result: "RestoreImageResult", dry_run: bool = False, verb: str = "restored"
) -> None:
    """Print what became of a device, or of a file."""
    if settings.json:
        print_json({"event": "summary", "dry_run": dry_run, **asdict(result)})
        return
    if settings.quiet:
        return
    done = "differs in" if dry_run else f"{verb}: wrote"
    click.echo(f"{done} {size_text(result.written)} of {size_text(result.size)}")
    if result.verified:
        click.echo("  verified all of it, read back and found as in the snapshot")
    _tell_requests(result.requests)
    click.echo(f"  time     {duration_text(result.duration_ns)}")


def verification_value(made: Verification) -> dict[str, Value]:
    """Return a verification for JSON."""
    outcomes: list[Value] = [
        {"level": one.level, "subject": one.subject or None, "result": one.result.name.lower(), "words": one.words}
        for one in made.outcomes
    ]
    return {
        "snapshot": made.snapshot_id.hex(),
        "time_ns": made.time_ns,
        "host": made.host,
        "level": made.level,
        "result": made.result.name.lower(),
        "outcomes": outcomes,
        "duration_ns": made.duration_ns,
        "program": made.program,
    }


def tell_verification(settings: Settings, made: Verification) -> None:
    """Print how a verification ended."""
    if settings.json:
        print_json({"event": "summary", **verification_value(made)})
        return
    if settings.quiet:
        return
    for one in made.outcomes:
        subject = f"{shown(one.subject)}: " if one.subject else ""
        click.echo(f"level {one.level}  {one.result.name.lower():7}  {subject}{shown(one.words)}")
    where = f" to level {made.level}" if made.result == Result.PASSED else ""
    click.echo(f"{short(made.snapshot_id)} {made.result.name.lower()}{where}, {duration_text(made.duration_ns)}")


def tell_thaw(settings: Settings, result: "ThawResult", dry_run: bool) -> None:
    """Print what a path needs and what was requested."""
    if settings.json:
        print_json({"event": "summary", "dry_run": dry_run, **asdict(result)})
        return
    if settings.quiet:
        return
    click.echo(f"{result.packs:,} packs, {size_text(result.size)}; {result.ready:,} can be read now")
    if result.under_way:
        click.echo(f"  under way {result.under_way:,}, asked for before")
    if result.requested:
        classes = ", ".join(f"{count:,} in {shown(name)}" for name, count in sorted(result.classes.items()))
        verb = "would ask for" if dry_run else "asked for"
        click.echo(f"  {verb} {result.requested:,}, {size_text(result.requested_size)} (archived: {classes})")
    if result.missing:
        click.echo(f"  missing   {result.missing:,}: see `backupfs check`")
    if result.lost:
        click.echo(f"  lost      {result.lost:,} chunks, which are in no index: see `backupfs check`")
    if result.hours:
        click.echo(f"  ready in  {result.hours:g} hours at most, by what the provider says")


def tell_check(settings: Settings, result: "CheckResult") -> None:
    """Print what a check found."""
    if settings.json:
        findings: list[Value] = [
            {
                "severity": str(finding.severity),
                "object": finding.key,
                "what": finding.what,
                "snapshots": list(finding.snapshots),
                "paths": [path.decode("utf-8", "replace") for path in finding.paths],
                "paths_total": finding.paths_total,
            }
            for finding in result.findings
        ]
        hit: list[Value] = [snapshot_id.hex() for snapshot_id in result.snapshots_hit]
        print_json({"event": "summary", **asdict(result), "findings": findings, "snapshots_hit": hit})
        return
    for finding in result.findings:
        if settings.quiet and finding.severity not in ("damage", "unread"):
            continue
        click.echo(f"{finding.severity}: {shown(finding.key)}: {shown(finding.what)}")
        if finding.snapshots:
            click.echo(f"  snapshots: {', '.join(finding.snapshots)}")
        for path in finding.paths:
            click.echo(f"  path: {shown(path)}")
        if finding.paths_total > len(finding.paths):
            click.echo(f"  … and {finding.paths_total - len(finding.paths):,} more paths")
    if result.findings_omitted:
        click.echo(f"… and {result.findings_omitted:,} more findings")
    if settings.quiet:
        return
    click.echo(
        f"checked {result.snapshots:,} snapshots, {result.tree_chunks:,} tree pages, {result.entries:,} entries,"
        f" {result.packs:,} packs in {duration_text(result.duration_ns)}"
    )
    _tell_requests(result.requests)
    if result.packs_read:
        packs = "1 pack" if result.packs_read == 1 else f"{result.packs_read:,} packs"
        click.echo(f"read {packs} whole, {size_text(result.bytes_read)}")
    if result.noted_packs:
        click.echo(
            f"noted {result.noted_packs:,} damaged packs on this machine: its next backup stores again what was in them"
            " and is still in the sources"
        )
    click.echo("DAMAGED: see above" if result.damaged else "no damage found")


_TYPES = {0o040000: "d", 0o120000: "l", 0o100000: "-", 0o010000: "p", 0o140000: "s", 0o020000: "c", 0o060000: "b"}
_TYPE_WORDS = {
    0o040000: "directory",
    0o120000: "symlink",
    0o100000: "file",
    0o010000: "fifo",
    0o140000: "socket",
    0o020000: "character device",
    0o060000: "block device",
}


def node_value(path: bytes, node: Node) -> dict[str, Value]:
    """Return a directory entry for JSON."""
    value: dict[str, Value] = {
        **name_value("path", path),
        "type": _TYPE_WORDS.get(node.mode & 0o170000, "unknown"),
        "mode": node.mode & 0o7777,
        "uid": node.uid,
        "gid": node.gid,
        "owner": node.owner.decode("utf-8", "replace"),
        "group": node.group.decode("utf-8", "replace"),
        "size": node.size,
        "mtime_ns": node.mtime_ns,
        "inode": node.inode,
        "links": node.nlink,
    }
    if node.is_symlink and isinstance(node.content, bytes):
        value |= name_value("target", node.content)
    return value


def node_line(path: bytes, node: Node, long: bool) -> str:
    """Return a directory entry as `ls` shows it."""
    if not long:
        return shown(path) + ("/" if node.is_directory else "")
    bits = node.mode
    letters = "".join("rwx"[2 - at % 3] if bits >> at & 1 else "-" for at in range(8, -1, -1))
    special = list(letters)
    for bit, position, low, high in ((0o4000, 2, "s", "S"), (0o2000, 5, "s", "S"), (0o1000, 8, "t", "T")):
        if bits & bit:
            special[position] = low if special[position] == "x" else high
    owner = shown(node.owner) if node.owner else str(node.uid)
    group = shown(node.group) if node.group else str(node.gid)
    target = f" -> {shown(node.content)}" if node.is_symlink and isinstance(node.content, bytes) else ""
    kind = _TYPES.get(bits & 0o170000, "?")
    return (
        f"{kind}{''.join(special)} {node.nlink:>3} {owner:<8} {group:<8} {node.size:>12}"
        f" {time_text(node.mtime_ns)} {shown(path)}{target}"
    )
