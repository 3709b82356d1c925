"""Make an image of disks: scanning processes read and cut them, and the rest is as for every snapshot (storing.py)."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from backupfs.disks.hints import Hints
from backupfs.disks.layout import read_layout
from backupfs.disks.source import DiskSource, attached_disks, is_name
from backupfs.errors import UsageError, shown
from backupfs.ids import short
from backupfs.repository.repository import Repository
from backupfs.repository.slots import Slots
from backupfs.snapshots.snapshot import FREE_LEFT_OUT, IMAGE, Disk, Snapshot
from backupfs.usecases.events import Remark, Report
from backupfs.usecases.image_free import find_free
from backupfs.usecases.image_freeze import frozen
from backupfs.usecases.image_hints import image_of_hints
from backupfs.usecases.image_scan import DiskRoot, image_scan
from backupfs.usecases.image_unread import tell_lacks
from backupfs.usecases.image_walk import load_readers
from backupfs.usecases.scanner import Root, Scanner
from backupfs.usecases.scanners import scanner_count
from backupfs.usecases.storing import BackupResult, StoringRun, WriteOptions


@dataclass(frozen=True, slots=True)
class ImageOptions(WriteOptions):
    """What a user can say about an image."""

    name: str = ""  # of the image; empty: the host's
    luks_passphrases: tuple[bytes, ...] = field(default=(), repr=False)  # for volumes that are encrypted
    luks_keys: tuple[bytes, ...] = field(default=(), repr=False)  # the same: what a passphrase would give
    force: bool = False  # compare with nothing, read all files again
    hints: Mapping[str, Hints] = field(default_factory=dict)  # of disks, by name
    skips_free: bool = False  # leave out the free space of file systems
    freezes: bool = False  # freeze mounted file systems on the disks while these are read


def image(repository: Repository, disks: list[DiskSource], options: ImageOptions, report: Report) -> BackupResult:
    """Make a snapshot of disks, all of them as they are now.

    It forks, as `backup` does. The disks must not change while they are read: freeze what writes to them, or take
    snapshots of them.
    Raises: SourceError; UsageError for two disks of one name; StoreError, perhaps in a group.
    """
    _require_different(disks)
    if options.name and not is_name(options.name):
        raise UsageError(
            f"--name {shown(options.name)}: give letters, digits and ._+-, beginning with one of the first"
        )
    run = StoringRun(repository, options, report)
    name = options.name or run.host
    _tell_others(disks, report)
    parent = run.trusted(_parent_of(run, name, options))
    # Once, before anything is forked or frozen.
    load_readers(report)
    with frozen(disks, repository, report) if options.freezes else contextlib.nullcontext():
        for source in disks:
            source.forget_cached()
        root = _read(repository, disks, run, parent, options, report)
    captured = tuple(Disk(source.name, number, source.path, source.form) for number, source in enumerate(disks))
    # Trusted hints take the parent as it is, zeros in place of free space too.
    trusts = any(hints.is_trusted for hints in options.hints.values())
    if trusts and parent is not None:
        _tell_later(run, parent, report)
    traits = parent.traits & FREE_LEFT_OUT if parent is not None and trusts else 0
    traits |= FREE_LEFT_OUT if root.has_left_out else 0
    return run.commit(
        IMAGE, [source.path for source in disks], parent, root, traits,
        image=name, disks=captured, volumes=root.volumes,
    )  # fmt: skip


def _read(
    repository: Repository,
    disks: list[DiskSource],
    run: StoringRun,
    parent: Snapshot | None,
    options: ImageOptions,
    report: Report,
) -> DiskRoot:
    """Read and store all disks; return `/`."""
    layout = read_layout(disks, options.luks_passphrases, options.luks_keys)
    for remark in (remark for source in disks for remark in source.remarks):
        report(Remark(remark))
    tell_lacks(layout, report)
    free = find_free(layout, report) if options.skips_free else {}

    def scan(scanner: Scanner, slots: Slots, begins: bool) -> Root | None:
        return image_scan(
            repository, disks, layout, parent, options.hints, free, run.taken_ns, options.sizes, slots, scanner, begins
        )  # fmt: skip

    root = run.store({}, scanner_count(), scan)
    assert isinstance(root, DiskRoot)
    return root


def _require_different(disks: list[DiskSource]) -> None:
    names: dict[str, DiskSource] = {}
    for source in disks:
        other = names.setdefault(source.name, source)
        if other is not source:
            raise UsageError(
                f"{shown(other.path)} and {shown(source.path)} would both be {shown(source.name)}: "
                f"name one of them, as in NAME={shown(source.path)}"
            )


def _tell_others(disks: list[DiskSource], report: Report) -> None:
    """Say which disks of this machine are not among those that are captured."""
    devices = {source.device for source in disks} - {None}
    if not devices:
        return
    for name, size in attached_disks().items():
        try:
            device = os.stat(f"/dev/{name}").st_rdev
        except OSError:
            device = 0
        if device not in devices:
            report(Remark(f"the disk {shown(name)} ({size / 2**30:,.1f} GiB) is attached and not in the image"))


def _tell_later(run: StoringRun, parent: Snapshot, report: Report) -> None:
    """Say of the child of an image that is not the last one what it does not have."""
    last = run.listed.images(parent.image)[-1]
    if last.snapshot_id != parent.snapshot_id:
        later, earlier = short(last.snapshot_id), short(parent.snapshot_id)
        report(
            Remark(
                f"{later} is a later image of {shown(parent.image)} than {earlier}: what was changed there is not in "
                "this child"
            )
        )


def _parent_of(run: StoringRun, name: str, options: ImageOptions) -> Snapshot | None:
    """Return the image to compare with: what maps of changes count from, else the last one of this name."""
    named = image_of_hints(options.hints, run.listed)
    if named is not None and options.force:
        raise UsageError("--force compares with no image, and a map counts from one: give one of them only")
    if options.force:
        return None
    own = run.listed.images(name)
    return named or (own[-1] if own else None)
