"""Disks back to devices and files: what is written, what is refused, and that it is read back."""

import os
import subprocess
from pathlib import Path

import pytest

from backupfs.errors import DamagedObject, PathNotFound, SourceError
from backupfs.repository.repository import Repository
from backupfs.snapshots.snapshot import Snapshot
from backupfs.usecases import restore_image as restore_module
from backupfs.usecases.image_scan import DISK_CHUNK
from backupfs.usecases.restore_image import RestoreImageResult, restore_image
from tests.builders import back_up, copy_of, ignore, new_repository, reopened
from tests.usecases.test_image import MIB, disk_in, make_image

Imaged = tuple[Repository, Snapshot, Path]


@pytest.fixture
def imaged(tmp_path: Path) -> Imaged:
    path = disk_in(tmp_path / "disk.raw", size=30 * MIB + 512 * 7, table=b"label: gpt\nsize=5M\n")
    repository = new_repository()
    snapshot = make_image(repository, path)
    return reopened(repository), snapshot, path


def run(
    repository: Repository, snapshot: Snapshot, target: Path, name: str = "", dry_run: bool = False
) -> RestoreImageResult:
    return restore_image(repository, snapshot, name, os.fsencode(target), dry_run, ignore)


def test_a_new_file_becomes_the_disk_and_stays_sparse(imaged: Imaged, tmp_path: Path) -> None:
    repository, snapshot, path = imaged
    result = run(repository, snapshot, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == path.read_bytes()
    assert result.verified == result.size == path.stat().st_size
    assert (tmp_path / "out").stat().st_blocks * 512 <= result.written + MIB < 20 * MIB


def test_only_what_differs_is_written(imaged: Imaged, tmp_path: Path) -> None:
    repository, snapshot, path = imaged
    plain = path.read_bytes()
    target = tmp_path / "out"
    changed = bytearray(plain)
    for at in (9, 3 * MIB, 3 * MIB + DISK_CHUNK, len(plain) - 1):
        changed[at] ^= 1
    target.write_bytes(changed)
    assert run(repository, snapshot, target, dry_run=True).written > 0
    assert target.read_bytes() == changed
    result = run(repository, snapshot, target)
    assert target.read_bytes() == plain
    # Of holes all is written that a window has of one.
    assert result.written <= 4 * 4 * MIB
    assert run(repository, snapshot, target).written == 0


def test_what_is_read_back_and_differs_is_an_error(
    imaged: Imaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, snapshot, _ = imaged
    monkeypatch.setattr(restore_module._Run, "_write", lambda self, plain, at: None)
    with pytest.raises(SourceError, match="does not hold what was written"):
        run(repository, snapshot, tmp_path / "out")


@pytest.mark.expected_log("damaged|missing|cut short|is not in")
def test_damage_is_an_error_and_never_other_bytes(imaged: Imaged, tmp_path: Path) -> None:
    repository, snapshot, _ = imaged
    store = copy_of(repository.store)
    for info in list(store.list("packs/data/")):
        store.delete(info.key)
    with pytest.raises(DamagedObject):
        run(reopened(store), snapshot, tmp_path / "out")


def test_targets_that_cannot_take_a_disk_are_refused(imaged: Imaged, tmp_path: Path) -> None:
    repository, snapshot, _ = imaged
    for target, says in ((tmp_path, "neither"), (Path("/dev/null"), "neither"), (Path("/dev/nosuch"), "there is no")):
        with pytest.raises(SourceError, match=says):
            run(repository, snapshot, target)
    with pytest.raises(SourceError, match="there is no"):
        run(repository, snapshot, tmp_path / "nosuch", dry_run=True)


@pytest.mark.parametrize("size", [0, 11, 30 * MIB + 512 * 8])
def test_a_file_of_another_size_stays_as_it_is(size: int, imaged: Imaged, tmp_path: Path) -> None:
    repository, snapshot, _ = imaged
    (tmp_path / "out").write_bytes(b"x" * size)
    for dry_run in (False, True):
        with pytest.raises(SourceError, match=f"it has {size:,} bytes, the disk 31,460,864; remove it first"):
            run(repository, snapshot, tmp_path / "out", dry_run=dry_run)
    assert (tmp_path / "out").read_bytes() == b"x" * size


def test_a_file_that_cannot_be_made_is_said_in_a_line(imaged: Imaged, tmp_path: Path) -> None:
    repository, snapshot, _ = imaged
    with pytest.raises(SourceError, match="nosuch/out cannot be made: No such file"):
        run(repository, snapshot, tmp_path / "nosuch" / "out")


def test_disks_are_named_where_there_are_several(tmp_path: Path) -> None:
    repository = new_repository()
    paths = [disk_in(tmp_path / name, seed, 3 * MIB, b"label: dos\n") for seed, name in enumerate(("vda", "vdb"))]
    snapshot = make_image(repository, *paths)
    with pytest.raises(PathNotFound, match="several disks: name one of vda, vdb"):
        run(repository, snapshot, tmp_path / "out")
    with pytest.raises(PathNotFound, match="no disk vdc"):
        run(repository, snapshot, tmp_path / "out", "vdc")
    run(repository, snapshot, tmp_path / "out", "vdb")
    assert (tmp_path / "out").read_bytes() == paths[1].read_bytes()
    (tmp_path / "source").mkdir()
    files = back_up(repository, tmp_path / "source")
    with pytest.raises(PathNotFound, match="has no disks"):
        run(repository, files, tmp_path / "out")


def test_what_a_loop_device_is_made_of_is_refused(
    imaged: Imaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, snapshot, _ = imaged
    (tmp_path / "out").write_bytes(b"used")
    backing = tmp_path / "block" / "loop3" / "loop" / "backing_file"
    backing.parent.mkdir(parents=True)
    backing.write_text(f"{tmp_path / 'out'}\n")
    monkeypatch.setattr(restore_module, "_BLOCK_DEVICES", tmp_path / "block")
    with pytest.raises(SourceError, match="attached as /dev/loop3"):
        run(repository, snapshot, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"used"
    run(repository, snapshot, tmp_path / "other")


@pytest.mark.parametrize("name", ["own", "hard link", "symlink", "bind mount", "after it was removed"])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may attach a loop device")
def test_a_file_is_refused_by_whatever_name_a_loop_device_was_made_of_it(
    name: str, imaged: Imaged, tmp_path: Path
) -> None:
    repository, snapshot, path = imaged
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    target = other = tmp_path / "a" / "out"
    target.write_bytes(bytes(path.stat().st_size))
    if name == "symlink":
        other = tmp_path / "link"
        other.symlink_to(target)
    elif name == "bind mount":
        other = tmp_path / "b" / "out"
        subprocess.run(["mount", "--bind", tmp_path / "a", tmp_path / "b"], check=True)
    elif name != "own":
        other = tmp_path / "other"
        os.link(target, other)
    try:
        done = subprocess.run(["losetup", "-f", "--show", other], check=True, capture_output=True, text=True)
        device = done.stdout.strip()
        if name == "after it was removed":
            other.unlink()
        try:
            with pytest.raises(SourceError, match=f"is attached as {device}: "):
                run(repository, snapshot, target)
        finally:
            subprocess.run(["losetup", "-d", device], check=True)
    finally:
        if name == "bind mount":
            subprocess.run(["umount", tmp_path / "b"], check=True)
    assert target.read_bytes() == bytes(path.stat().st_size)
    run(repository, snapshot, target)
