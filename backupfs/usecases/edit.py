"""Change an image: a child is made of a scratch copy, with what was written to it; the image itself stays as it is.

Only what was written is read and stored; all else is taken from the image by chunk ids. File systems that were changed
have to pass their checker first.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from backupfs.disks.checkers import check_volume
from backupfs.disks.hints import Claim, Hints, read_hints
from backupfs.disks.source import RawDisk
from backupfs.errors import MountError, PathNotFound, SourceError, UnknownSnapshot, UsageError, shown
from backupfs.fuse import mounted
from backupfs.repository.repository import Repository
from backupfs.snapshots.listing import SnapshotList
from backupfs.snapshots.snapshot import Disk, Snapshot
from backupfs.snapshots.volumes import bases_of, keys_of, places_of
from backupfs.snapshots.walk import find_path, shown_volumes
from backupfs.usecases.events import Remark, Report
from backupfs.usecases.image import ImageOptions, image
from backupfs.usecases.image_unread import damage_before
from backupfs.usecases.scratch import ScratchMount
from backupfs.usecases.storing import BackupResult
from backupfs.usecases.umount import umount


@dataclass(frozen=True, slots=True)
class EditOptions:
    """What a user can say about a child of an image."""

    tags: tuple[str, ...] = ()  # beside those of the image
    is_checked: bool = True  # refuse a file system that its checker finds broken
    dry_run: bool = False


@contextlib.contextmanager
def scratch_at(mountpoint: Path, listed: SnapshotList) -> Iterator[tuple[ScratchMount, Snapshot]]:
    """Have the scratch copy that is mounted somewhere for oneself, and what it is a copy of.

    Raises: MountError, also while anything else uses it: what that writes would be in the child in parts;
    UnknownSnapshot.
    """
    name = shown(str(mountpoint))
    copied = _copied_at(mountpoint)
    try:
        snapshot = listed.find(copied)
    except UnknownSnapshot as error:
        raise UnknownSnapshot(
            f"the image that was copied to {name} was forgotten: `backupfs image {name}/disks/*.raw` keeps what is "
            "there as an image of its own"
        ) from error
    lock = -1
    try:
        lock = os.open(mountpoint / "changes" / f"{snapshot.disks[0].name}.map", os.O_RDONLY | os.O_CLOEXEC)
        # The kernel's own lock, of which the server is not asked.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mount = mounted.find_mount(mountpoint)
        users = list(mounted.users_of(mount)) if mount is not None else []
        if users:
            more = f" and {len(users) - 3} more" if len(users) > 3 else ""
            raise MountError(
                f"{name} is in use by {shown(', '.join(users[:3]))}{more}: no child is made until all that is mounted "
                "from it is unmounted, its loop devices are detached and its files are closed"
            )
        yield ScratchMount(mountpoint, Path()), snapshot
    except BlockingIOError:
        raise MountError(f"another process makes the child of {name} just now") from None
    finally:
        if lock >= 0:
            os.close(lock)


def discard_edit(mountpoint: Path) -> None:
    """Unmount a scratch copy, and forget what was written to it. Raises: MountError, also for any other mount."""
    with contextlib.suppress(_ServerGone):
        _copied_at(mountpoint)
    umount(mountpoint)


class _ServerGone(MountError):
    """A mount whose server has ended."""


def _copied_at(mountpoint: Path) -> str:
    """Return the id of the image that the scratch copy at a mountpoint is of. Raises: MountError."""
    name = shown(str(mountpoint))
    if mounted.find_mount(mountpoint) is None:
        raise MountError(f"no backupfs is mounted at {name}")
    try:
        [first, *_] = sorted((mountpoint / "changes").iterdir())
        words = first.read_text("ascii").split("\n", 1)[0].split()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOTCONN:
            raise _ServerGone(
                f"the server of the mount at {name} has ended, and what was written is lost: `backupfs edit --discard "
                f"{name}` removes the mount"
            ) from error
        words = []
    if len(words) != 2 or words[0] != "since":
        raise MountError(f"what is mounted at {name} is no copy to edit: `backupfs edit SNAP DIR` makes one")
    return words[1]


def commit_edit(
    repository: Repository, snapshot: Snapshot, scratch: ScratchMount, options: EditOptions, report: Report
) -> BackupResult:
    """Make a child of an image from its scratch copy.

    It forks, as `image` does. Raises: UsageError if nothing was changed; SourceError if a file system that was changed
    is not sound; StoreError.
    """
    hints = {
        disk.name: replace(
            read_hints(os.fsencode(scratch.changes(disk.name)), snapshot.volumes[disk.volume].size), is_trusted=True
        )
        for disk in snapshot.disks
    }
    written = {disk.volume: _written(hints[disk.name], snapshot.volumes[disk.volume].size) for disk in snapshot.disks}
    if not any(written.values()):
        raise UsageError("nothing was changed, so there is no child to make")
    if options.is_checked:
        _check(repository, snapshot, scratch, written, report)
        # The checker may have replayed a journal.
        for disk in snapshot.disks:
            found = read_hints(os.fsencode(scratch.changes(disk.name)), snapshot.volumes[disk.volume].size)
            hints[disk.name] = replace(found, is_trusted=True)
    sources: list[_EditedDisk] = []
    try:
        for disk in snapshot.disks:
            source = _EditedDisk(disk, scratch)
            source.problems = damage_before(snapshot, disk.name, repository.trees.load)
            sources.append(source)
        made = ImageOptions(
            host=snapshot.host, tags=(*snapshot.tags, *options.tags), dry_run=options.dry_run, name=snapshot.image,
            hints=hints, luks_keys=keys_of(snapshot.volumes),
        )  # fmt: skip
        return image(repository, list(sources), made, report)
    finally:
        for source in sources:
            source.close()


class _EditedDisk(RawDisk):
    """The scratch copy of a disk, which goes on as what the disk came from."""

    def __init__(self, disk: Disk, scratch: ScratchMount) -> None:
        try:
            fd = os.open(scratch.disk(disk.name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(f"the copy of {shown(disk.name)} cannot be read: {error.strerror}") from error
        super().__init__(disk.name, disk.source, fd)
        self.form = disk.form

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer; what cannot be read is the repository's, and not the disk's that it came from."""
        try:
            super().read_into(buffer, offset)
        except SourceError as error:
            raise SourceError(
                f"the disk {shown(self.name)} cannot be read from the repository around byte {offset:,}: "
                "`backupfs check --read-data` names what is damaged"
            ) from error

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield everything: the mount cannot tell of holes, and what was not written is not asked for."""
        yield start, end


def _written(hints: Hints, size: int) -> list[tuple[int, int]]:
    return [(start, end) for start, end, claim in hints.between(0, size) if claim == Claim.READ]


def _check(
    repository: Repository,
    snapshot: Snapshot,
    scratch: ScratchMount,
    written: dict[int, list[tuple[int, int]]],
    report: Report,
) -> None:
    """Check the file systems in volumes that were written to. Raises: SourceError for one that is not sound."""
    volumes = snapshot.volumes
    under = {base for volume in volumes for base in bases_of(volume)}
    shown_ones = shown_volumes(snapshot, repository.trees.load).values()
    places = places_of(volumes, repository.trees.load)
    for number in sorted({disk.volume for disk in snapshot.disks}.union(shown_ones) - under):
        volume = volumes[number]
        if not any(
            place.disk is not None
            and any(low < place.offset + place.length and high > place.offset for low, high in written[place.disk])
            for place in places(number, 0, volume.size)
        ):
            continue
        checked = check_volume(scratch.volume(volume.name), volume.size)
        if checked.sound is False:
            raise SourceError(
                f"what was changed in {shown(volume.name)} is not sound, so no child was made: {checked.words}"
            )
        if not checked.form and _has_files(repository, snapshot, volume.name):
            raise SourceError(
                f"what was changed in {shown(volume.name)} is no file system any more, so no child was made; if that "
                "is meant: --unchecked"
            )
        if checked.sound is None:
            report(Remark(f"{shown(volume.name)} was changed and not checked: {checked.words}"))


def _has_files(repository: Repository, snapshot: Snapshot, name: str) -> bool:
    """Tell whether a file system was found in a volume."""
    try:
        find_path(snapshot, b"/files/" + name.encode(), repository.trees.load)
    except PathNotFound:
        return False
    return True
