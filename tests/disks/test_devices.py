"""What is made of a disk, by what the kernel says."""

import os
from pathlib import Path

import pytest

from backupfs.disks.devices import beneath, made_of


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """A disk with two partitions; one holds a logical volume, which holds an encrypted one; and a loop device."""
    by_number = tmp_path / "dev" / "block"
    by_number.mkdir(parents=True)

    def device(path: str, number: str, **files: str) -> Path:
        folder = tmp_path / "devices" / path
        (folder / "holders").mkdir(parents=True)
        (folder / "slaves").mkdir()
        (folder / "dev").write_text(f"{number}\n")
        for name, content in files.items():
            (folder / name).write_text(content)
        (by_number / number).symlink_to(folder)
        return folder

    device("vda", "254:0")
    device("vda/vda1", "254:1", partition="1\n")
    second = device("vda/vda2", "254:2", partition="2\n")
    volume, encrypted = device("dm-0", "253:0"), device("dm-1", "253:1")
    for lower, upper in ((second, volume), (volume, encrypted)):
        (lower / "holders" / upper.name).symlink_to(upper)
        (upper / "slaves" / lower.name).symlink_to(lower)
    loop = device("loop0", "7:0")
    (loop / "loop").mkdir()
    (loop / "loop" / "backing_file").write_text("/srv/disk.img\n")
    device("loop0/loop0p1", "259:0", partition="1\n")
    return tmp_path


def test_partitions_and_all_that_holds_them_are_made_of_a_disk(sysfs: Path) -> None:
    numbers = {os.makedev(*pair) for pair in ((254, 0), (254, 1), (254, 2), (253, 0), (253, 1))}
    assert made_of(os.makedev(254, 0), sysfs) == numbers
    assert made_of(os.makedev(254, 1), sysfs) == {os.makedev(254, 1)}
    assert made_of(os.makedev(253, 0), sysfs) == {os.makedev(253, 0), os.makedev(253, 1)}
    assert made_of(os.makedev(1, 99), sysfs) == {os.makedev(1, 99)}


def test_a_file_is_beneath_its_loop_device_and_its_partitions(sysfs: Path) -> None:
    assert list(beneath(os.makedev(7, 0), sysfs)) == [b"/srv/disk.img"]
    assert list(beneath(os.makedev(259, 0), sysfs)) == [b"/srv/disk.img"]
    assert list(beneath(os.makedev(253, 1), sysfs)) == []
