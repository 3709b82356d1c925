"""What a volume lacks as a whole is told by every image, and kept in each: nothing goes without a word."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from backupfs.errors import PathNotFound
from backupfs.snapshots.walk import find_path
from backupfs.usecases.events import Event, FileSkipped, Remark
from tests.builders import File, build, new_repository
from tests.disks.test_partitions import TABLES, disk_with
from tests.disks.test_source import converted, damage
from tests.usecases.test_image import bytes_of, disk_in, run_image
from tests.usecases.test_image_files import MIB, volume_of
from tests.usecases.test_image_free import dirty_ntfs


def blank(path: Path, size: int = 16 * MIB) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def write(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def images_of(path: Path, times: int = 1) -> list[tuple[list[str], str]]:
    """Return what is told of each image, and what it keeps."""
    repository, found = new_repository(), []
    for _ in range(times):
        events: list[Event] = []
        snapshot = run_image(repository, path, report=events.append).snapshot
        assert snapshot is not None
        told = [event.text for event in events if isinstance(event, Remark)]
        told += [f"! {os.fsdecode(event.path)}: {event.reason}" for event in events if isinstance(event, FileSkipped)]
        try:
            kept = bytes_of(repository, snapshot, "/files/.unread").decode()
        except PathNotFound:
            kept = ""
        found.append((told, kept))
    return found


def make_dirty_ext(path: Path, folder: Path) -> None:
    source = Path(os.fsdecode(build({"a": File(b"a")}, folder / "source")))
    volume_of(source, path, "ext4", size=16 * MIB)
    subprocess.run(["debugfs", "-w", "-R", "feature needs_recovery", path], check=True, capture_output=True)


def make_dirty_ntfs(path: Path, _folder: Path) -> None:
    subprocess.run(["mkfs.ntfs", "-q", "-F", "-Q", blank(path)], check=True, capture_output=True)
    assert images_of(path) == [([], "")]
    dirty_ntfs(path)


@pytest.mark.parametrize("make", [make_dirty_ext, make_dirty_ntfs])
def test_a_journal_that_waits_is_told_each_time_and_kept(make: Callable[[Path, Path], None], tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    make(path, tmp_path)
    for told, kept in images_of(path, 3):
        [remark] = told
        assert remark.startswith("disk")
        assert remark.endswith(": it was not unmounted: files are shown as of before its journal is replayed")
        assert kept == "disk: it was not unmounted: files are shown as of before its journal is replayed\n"


def test_a_damaged_file_with_a_disk_is_told_each_time_and_kept(tmp_path: Path) -> None:
    path = converted(disk_in(tmp_path / "raw"), tmp_path / "disk.qcow2", "qcow2", [])
    damage(path, "qcow2")
    for told, kept in images_of(path, 2):
        assert f"! {kept.splitlines()[0]}" in told
        assert kept.startswith("disk: it is damaged by the word of `qemu-img check`: ERROR")


def test_a_gpt_without_a_whole_copy_is_told(tmp_path: Path) -> None:
    path = disk_with(TABLES["gpt"], tmp_path / "disk.raw")
    write(path, 512 + 24, b"?")
    write(path, 64 * MIB - 512 + 24, b"?")
    for told, kept in images_of(path, 2):
        assert told == [f"! {kept.rstrip()}"]
        assert kept == "disk: the partition table is damaged: no copy of the GPT is whole, so no partitions are shown\n"
    # Its mark alone says so, too.
    write(path, 0, bytes(512))
    [(told, kept)] = images_of(path)
    assert told == [f"! {kept.rstrip()}"]


def test_partitions_behind_the_end_are_told(tmp_path: Path) -> None:
    path = disk_with(TABLES["mbr"], tmp_path / "disk.raw")
    os.truncate(path, 8 * MIB)
    [(told, kept)] = images_of(path)
    assert told == [
        "! disk: the partition table is damaged, or the disk cut short: 2 of its partitions lie beyond its end"
    ]
    assert told == [f"! {kept.rstrip()}"]


def test_a_chain_of_logical_partitions_that_breaks_off_is_told(tmp_path: Path) -> None:
    path = disk_with(TABLES["mbr with logical ones"], tmp_path / "disk.raw")
    assert images_of(path) == [([], "")]
    data = path.read_bytes()
    # The second table of the chain.
    first = int.from_bytes(data[446 + 2 * 16 + 8 :][:4], "little") * 512
    second = int.from_bytes(data[first + 446 + 16 + 8 :][:4], "little") * 512
    write(path, first + second + 510, b"??")
    [(told, _)] = images_of(path)
    assert told == ["! disk: the partition table is damaged: its chain of logical partitions breaks off"]


def test_a_superblock_that_is_gone_is_told(tmp_path: Path) -> None:
    path = blank(tmp_path / "disk.raw")
    subprocess.run(["mkfs.ext4", "-q", "-b", "1024", path], check=True)
    write(path, 1024, bytes(1024))
    for told, kept in images_of(path, 2):
        assert told == ["! disk:/: its superblock is damaged, a copy is at byte 8,389,632"]
        assert told == [f"! {kept.rstrip()}"]


def test_what_nobody_knows_is_told_and_what_is_always_there_is_not(tmp_path: Path) -> None:
    path = blank(tmp_path / "disk.raw", 64 * MIB)
    types = "21686148-6449-6E6F-744E-656564454649", "L", "L", "L"
    table = "label: gpt\n" + "".join(f"size=4M,type={one}\n" for one in types)
    subprocess.run(["sfdisk", "-q", path], input=table.encode(), check=True)
    write(path, 440, b"boot code")
    write(path, MIB + 5000, b"the BIOS boot partition has code")
    subprocess.run(["mkswap", "-q", blank(tmp_path / "swap", 4 * MIB)], check=True, capture_output=True)
    write(path, 9 * MIB, (tmp_path / "swap").read_bytes())
    # The second is empty, the third swap, the fourth is of somebody else.
    assert images_of(path) == [([], "")]
    write(path, 14 * MIB, b"somebody else's")
    for told, kept in images_of(path, 2):
        assert told == ["disk4: no file system that is known"]
        assert kept == "disk4: no file system that is known\n"


def test_the_copy_of_a_table_that_was_there_before_hides_no_file_system(tmp_path: Path) -> None:
    path = disk_with(TABLES["gpt"], tmp_path / "disk.raw")
    copy = path.read_bytes()[-33 * 512 :]
    assert b"EFI PART" in copy
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True)
    write(path, 64 * MIB - len(copy), copy)
    repository = new_repository()
    snapshot = run_image(repository, path).snapshot
    assert snapshot is not None
    assert [volume.name for volume in snapshot.volumes] == ["disk"]
    assert find_path(snapshot, b"/files/disk/lost+found", repository.trees.load).is_directory
