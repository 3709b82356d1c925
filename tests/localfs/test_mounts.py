"""Reading mountinfo, and which mounts a backup passes over."""

import os
from pathlib import Path

import pytest

from backupfs.localfs import mounts
from backupfs.localfs.mounts import Mount, parse_mountinfo, pseudo_filesystem, pseudo_mount_points, visible_mounts

ROOT = b"25 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"


def test_a_line_is_read_with_any_number_of_optional_fields() -> None:
    data = (
        ROOT
        + b"36 25 0:32 /sub /mnt rw - fuse.sshfs me@host: rw\n40 25 0:4 / /n rw a:1 b:2 propagate_from:3 - tmpfs  rw\n"
    )
    assert parse_mountinfo(data) == [
        Mount(25, 1, (8, 1), b"/", "ext4", b"/dev/sda1"),
        Mount(36, 25, (0, 32), b"/mnt", "fuse.sshfs", b"me@host:"),
        Mount(40, 25, (0, 4), b"/n", "tmpfs", b""),
    ]


def test_escaped_bytes_of_a_mount_point_and_a_source_are_restored() -> None:
    [mount] = parse_mountinfo(b"36 25 0:32 / /a\\040b\\011c\\012d\\134e\\0401\xff rw - cifs //h/my\\040share rw\n")
    assert mount.mount_point == b"/a b\tc\nd\\e 1\xff"
    assert mount.source == b"//h/my share"


def test_lines_of_another_form_are_passed_over() -> None:
    assert (
        parse_mountinfo(b"\nnonsense\n1 2 x:y / /a rw - ext4 s rw\n1 2 3:4 / /a rw ext4 s rw\n1 2 3:4 / /a rw -") == []
    )


@pytest.mark.parametrize(
    ("fstype", "mount_point"),
    [
        ("proc", b"/proc"),
        ("proc", b"/srv/chroot/proc"),
        ("sysfs", b"/sys"),
        ("devtmpfs", b"/dev"),
        ("cgroup2", b"/sys/fs/cgroup"),
        ("nsfs", b"/run/docker/netns/x"),
        ("autofs", b"/home"),
        ("tmpfs", b"/run"),
        ("tmpfs", b"/run/user/1000"),
        ("tmpfs", b"/dev/shm"),
        ("tmpfs", b"/sys/fs/cgroup"),
        ("tmpfs", b"/var/run/lock"),
        ("tmpfs", b"/proc/acpi"),
        ("ramfs", b"/run/credentials/x"),
        ("fuse.backupfs", b"/mnt/backup"),
        ("fuse.gvfsd-fuse", b"/run/user/1000/gvfs"),
        ("fuse.portal", b"/run/user/1000/doc"),
    ],
)
def test_kernel_windows_and_runtime_state_are_pseudo(fstype: str, mount_point: bytes) -> None:
    assert pseudo_filesystem(fstype, mount_point)


@pytest.mark.parametrize(
    ("fstype", "mount_point"),
    [
        ("ext4", b"/"),
        ("overlay", b"/"),
        ("tmpfs", b"/tmp"),
        ("tmpfs", b"/home/me/ramdisk"),
        ("tmpfs", b"/running"),
        ("ext4", b"/run/media/me/stick"),
        ("fuse.sshfs", b"/mnt"),
        ("squashfs", b"/snap/core/1"),
    ],
)
def test_file_systems_with_data_of_users_are_kept(fstype: str, mount_point: bytes) -> None:
    assert not pseudo_filesystem(fstype, mount_point)


def pseudo_in(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[bytes, str]:
    file = tmp_path / "mountinfo"
    file.write_bytes(data)
    monkeypatch.setattr(mounts, "MOUNTINFO", str(file))
    return pseudo_mount_points()


def test_pseudo_mount_points_are_told_with_their_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ROOT + b"30 25 0:5 / /proc rw - proc proc rw\n31 25 0:6 / /tmp rw - tmpfs tmpfs rw\n"
    assert pseudo_in(data, tmp_path, monkeypatch) == {b"/proc": "proc"}


def test_a_disk_mounted_over_autofs_is_not_pseudo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ROOT + b"30 25 0:5 / /home rw - autofs systemd-1 rw\n90 30 8:2 / /home rw - ext4 /dev/sda2 rw\n"
    assert pseudo_in(data, tmp_path, monkeypatch) == {}


def test_a_mount_hidden_by_a_later_one_above_it_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ROOT + (
        b"30 25 0:5 / /mnt/proc rw - proc proc rw\n"
        b"31 30 0:6 / /mnt/proc/sys/fs/binfmt_misc rw - binfmt_misc none rw\n"
        b"90 25 8:2 / /mnt rw - ext4 /dev/sda2 rw\n"
        b"91 90 0:7 / /mnt/sys rw - sysfs none rw\n"
    )
    assert pseudo_in(data, tmp_path, monkeypatch) == {b"/mnt/sys": "sysfs"}


def test_a_root_that_is_its_own_parent_or_lies_over_the_first_root_is_visible() -> None:
    rootfs = b"1 1 0:1 / / rw - rootfs rootfs rw\n"
    over = b"25 1 8:1 / / rw - ext4 /dev/sda1 rw\n26 25 0:5 / /proc rw - proc proc rw\n"
    assert [mount.mount_id for mount in visible_mounts(parse_mountinfo(rootfs))] == [1]
    assert [mount.mount_id for mount in visible_mounts(parse_mountinfo(rootfs + over))] == [25, 26]


def test_a_host_without_proc_has_no_pseudo_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "MOUNTINFO", str(tmp_path / "missing"))
    assert pseudo_mount_points() == {}


@pytest.mark.skipif(not os.path.exists(mounts.MOUNTINFO), reason="this host has no /proc")
def test_the_proc_of_this_host_is_a_pseudo_mount() -> None:
    assert pseudo_mount_points()[b"/proc"] == "proc"
