"""Write a disk of an image to a new file, raw or in a format of virtual machines."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

from backupfs.errors import SourceError, UsageError, shown
from backupfs.repository.repository import Repository
from backupfs.snapshots.snapshot import Snapshot
from backupfs.usecases.events import Report
from backupfs.usecases.own_folders import require_elsewhere
from backupfs.usecases.restore_image import RestoreImageResult, restore_image

# What users say, and what qemu calls it.
FORMATS = {"raw": "raw", "qcow2": "qcow2", "vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx", "vdi": "vdi"}


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
    What is not raw is a sparse raw file for a while, in the same folder.
    Indexes must be loaded. Raises: PathNotFound; SourceError; UsageError; DamagedObject; StoreError.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {shown(form)}: choose one of {', '.join(FORMATS)}")
    require_elsewhere(target, own_folders)
    if os.path.lexists(target):
        raise SourceError(f"{shown(target)} is there already: name a new file, or restore with `restore --image`")
    if form == "raw":
        return restore_image(repository, snapshot, name, target, False, report)
    if shutil.which("qemu-img") is None:
        raise SourceError(f"the format {form} takes qemu-img to write: install the package qemu-utils")
    folder = os.path.dirname(os.path.abspath(target))
    try:
        work = tempfile.mkdtemp(prefix=b".backupfs-export-", dir=folder)
    except OSError as error:
        raise SourceError(f"{shown(folder)} cannot be written: {error.strerror}") from error
    try:
        plain, made = os.path.join(work, b"raw"), os.path.join(work, b"made")
        result = restore_image(repository, snapshot, name, plain, False, report)
        # A VHD holds whole cylinders only, unless it is told not to.
        options = [b"-o", b"force_size=on"] if FORMATS[form] == "vpc" else []
        _run([b"qemu-img", b"convert", b"-f", b"raw", b"-O", FORMATS[form].encode(), *options, plain, made], target)
        _run([b"qemu-img", b"compare", b"-f", b"raw", b"-F", FORMATS[form].encode(), plain, made], target)
        os.rename(made, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return result


def _run(command: list[bytes], target: bytes) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().rpartition(b"\n")[2]
        raise SourceError(f"{shown(target)} could not be written: {shown(words)}")
