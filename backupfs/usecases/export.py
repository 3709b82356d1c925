"""Write a disk of an image to a new file, raw or in a format of virtual machines."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence

from backupfs.errors import SourceError, UsageError, shown
from backupfs.repository.repository import Repository
from backupfs.snapshots.snapshot import Snapshot
from backupfs.usecases.events import Report
from backupfs.usecases.own_folders import require_elsewhere
from backupfs.usecases.restore_image import RestoreImageResult, restore_image

# What users say, and what qemu calls it.
FORMATS = {"raw": "raw", "qcow2": "qcow2", "vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx", "vdi": "vdi"}
_PREFIX = b".backupfs-export-"  # of folders that exports write in


def export(
    repository: Repository,
    snapshot: Snapshot,
    name: str,
    target: bytes,
    form: str,
    report: Report,
    own_folders: Sequence[bytes] = (),
) -> RestoreImageResult:
    """Write a disk to a file that is not there yet, and compare the file with the disk.

    name: of the disk; empty: the only one. form: one of FORMATS.
    own_folders: of the repository and the cache, where it cannot be.
    It is written in a folder of its own beside the file, and gets its name when it is whole; what is not raw is a
    sparse raw file for a while. What an export left there that was killed, the next one removes.
    Indexes must be loaded. Raises: PathNotFound; SourceError; UsageError; DamagedObject; StoreError.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {shown(form)}: choose one of {', '.join(FORMATS)}")
    require_elsewhere(target, own_folders)
    if os.path.lexists(target):
        raise SourceError(f"{shown(target)} is there already: name a new file, or restore with `restore --image`")
    if form != "raw" and shutil.which("qemu-img") is None:
        raise SourceError(f"the format {form} takes qemu-img to write: install the package qemu-utils")
    folder = os.path.dirname(os.path.abspath(target))
    _remove_abandoned(folder)
    with _work_folder(folder) as (work, lock_fd):
        plain = made = os.path.join(work, b"raw")
        result = restore_image(repository, snapshot, name, plain, False, report, final=target)
        if form != "raw":
            made = os.path.join(work, b"made")
            kind = FORMATS[form].encode()
            # A VHD holds whole cylinders only, unless it is told not to.
            options = [b"-o", b"force_size=on"] if kind == b"vpc" else []
            _run([b"qemu-img", b"convert", b"-f", b"raw", b"-O", kind, *options, plain, made], target, lock_fd)
            _run([b"qemu-img", b"compare", b"-f", b"raw", b"-F", kind, plain, made], target, lock_fd)
        os.rename(made, target)
    return result


@contextlib.contextmanager
def _work_folder(folder: bytes) -> Iterator[tuple[bytes, int]]:
    """Give a new folder to write in, and the lock that shows others that somebody does; then remove it."""
    while True:
        try:
            work = tempfile.mkdtemp(prefix=_PREFIX, dir=folder)
        except OSError as error:
            raise SourceError(f"{shown(folder)} cannot be written: {error.strerror}") from error
        try:
            lock_fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another export met it before it was locked, and took it for a dead one's
        try:
            if not _is_locked(lock_fd):
                continue
            yield work, lock_fd
            return
        finally:
            shutil.rmtree(work, ignore_errors=True)
            os.close(lock_fd)


def _is_locked(fd: int) -> bool:
    """Take the lock on a folder; False where another has taken it, and removes it. Some file systems have no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return os.fstat(fd).st_nlink > 0


def _remove_abandoned(folder: bytes) -> None:
    """Remove what exports to a folder left whose processes are all dead."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            if name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(os.path.join(folder, name))


def _remove_if_abandoned(work: bytes) -> None:
    fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_uid == os.geteuid():
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(work)
    finally:
        os.close(fd)


def _run(command: list[bytes], target: bytes, lock_fd: int) -> None:
    # It keeps the lock, should it outlive this process.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, pass_fds=[lock_fd])
    if done.returncode:
        words = (done.stderr or done.stdout).strip().rpartition(b"\n")[2]
        raise SourceError(f"{shown(target)} could not be written: {shown(words)}")
