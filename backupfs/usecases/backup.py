"""Back up files: scanning processes walk and read them, and the rest is as for every snapshot (storing.py)."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from backupfs.localfs import sources
from backupfs.localfs.selection import Selection, SelectionRules, identities
from backupfs.repository.repository import Repository
from backupfs.repository.slots import Slots
from backupfs.snapshots.listing import SnapshotList
from backupfs.snapshots.snapshot import FILES, Snapshot
from backupfs.usecases.events import FileSkipped, Report
from backupfs.usecases.file_scan import file_scan
from backupfs.usecases.scanner import Root, Scanner
from backupfs.usecases.scanners import scanner_count
from backupfs.usecases.storing import BackupResult, StoringRun, WriteOptions


@dataclass(frozen=True, slots=True)
class BackupOptions(WriteOptions):
    """What a user can say about a backup of files."""

    parent: str | None = None  # a snapshot's name; None: the newest that fits
    force: bool = False  # compare with nothing, read everything
    rules: SelectionRules = field(default_factory=SelectionRules)
    own_folders: tuple[bytes, ...] = ()  # paths of the repository and the cache, never backed up


def backup(repository: Repository, paths: list[bytes], options: BackupOptions, report: Report) -> BackupResult:
    """Make a snapshot of some paths of this machine.

    It forks: call it while this process has one thread and no event loop. Interrupted anywhere, the repository stays
    valid, and the next run finds what was stored.
    Raises: SourceError if none of the paths exists; UnknownSnapshot; StoreError, perhaps in a group.
    """
    run = StoringRun(repository, options, report)
    paths = _existing(paths, report)
    parent = run.trusted(None if options.force else _parent_of(run.listed, options, run.host, paths))
    tree = None if parent is None else parent.root
    ordinals: dict[int, int] = {}
    for path in paths:
        ordinals.setdefault(os.lstat(path).st_dev, len(ordinals))
    selection = Selection(options.rules, identities(options.own_folders), frozenset(paths))

    def scan(scanner: Scanner, slots: Slots, begins: bool) -> Root | None:
        roots = sources.minimal_roots(paths)
        archive = (lambda archiver: archiver.archive(roots, tree)) if begins else None
        return file_scan(repository, options, slots, selection, ordinals, scanner, archive)

    return run.commit(FILES, paths, parent, run.store(ordinals, scanner_count(), scan))


def backup_stream(
    repository: Repository, name: bytes, read_into: Callable[[memoryview], int], options: BackupOptions, report: Report
) -> BackupResult:
    """Make a snapshot of one file, whose bytes come from a stream. It forks, as `backup` does.

    name: absolute path of the file in the snapshot.
    read_into: fills a buffer from its start; called in another process.
    """
    run = StoringRun(repository, options, report)
    selection = Selection(SelectionRules(), frozenset(), frozenset())

    def scan(scanner: Scanner, slots: Slots, _begins: bool) -> Root | None:
        return file_scan(
            repository, options, slots, selection, {}, scanner,
            lambda archiver: archiver.archive_stream(name, read_into, run.taken_ns),
        )  # fmt: skip

    return run.commit(FILES, [name], None, run.store({}, 1, scan))


def _existing(paths: list[bytes], report: Report) -> list[bytes]:
    missing: dict[bytes, str] = {}
    for path in paths:
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            missing[path] = "it does not exist"
        except OSError as error:
            missing[path] = error.strerror or str(error)
    existing = sources.existing_sources(paths, missing)
    for path, reason in missing.items():
        report(FileSkipped(path, reason))
    return existing


def _parent_of(listed: SnapshotList, options: BackupOptions, host: str, paths: list[bytes]) -> Snapshot | None:
    if options.parent is not None:
        return listed.find(options.parent)
    own = [snapshot for snapshot in listed.snapshots if snapshot.kind == FILES and snapshot.host == host]
    same = [snapshot for snapshot in own if set(snapshot.paths) == set(paths)]
    return next(reversed(same or own), None)
