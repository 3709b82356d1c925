"""What the programs that check file systems say, in a line."""

import os
import struct
import subprocess
from pathlib import Path

import pytest

from backupfs.disks.checkers import _complaint, check_volume

MIB = 1 << 20


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume"
    with open(path, "wb") as file:
        file.truncate(8 * MIB)
    return path


def test_the_reason_is_the_first_complaint_and_not_the_sum(volume: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", volume], check=True)
    subprocess.run(["debugfs", "-w", "-R", "clri <11>", volume], check=True, capture_output=True)
    checked = check_volume(volume, volume.stat().st_size)
    assert checked.sound is False
    assert checked.words == "ext2/3/4: Entry 'lost+found' in / (2) has deleted/unused inode 11."


def test_what_could_be_better_is_no_complaint(tmp_path: Path) -> None:
    """e2fsck says it of sound file systems, too, and said it here in the place of what was wrong."""
    words = (
        b"$ e2fsck -fn\ne2fsck 1.47.0 (5-Feb-2023)\nPass 1: Checking inodes, blocks, and sizes\n"
        b"Inode 50 extent tree (at level 1) could be narrower.  Optimize? no\n\n"
        b"Inode 63 has illegal block(s).  Clear? no\n"
    )
    assert _complaint(words, tmp_path) == "Inode 63 has illegal block(s)."


def test_the_reason_of_others_is_their_first_complaint_too(volume: Path) -> None:
    os.truncate(volume, 40 * MIB)
    subprocess.run(["mkfs.vfat", volume], check=True, capture_output=True)
    with open(volume, "r+b") as file:
        file.seek(2100)
        file.write(b"\xff\xff\x01")
    assert check_volume(volume, 40 * MIB).words.startswith("FAT: FATs differ")
    os.truncate(volume, 400 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-f", volume], check=True)
    subprocess.run(
        ["xfs_db", "-x", "-c", "inode 128", "-c", "write core.nlinkv2 9", volume], check=True, capture_output=True
    )
    assert check_volume(volume, 400 * MIB).words == "XFS: would have reset inode 128 nlinks from 9 to 2"


def test_a_program_that_takes_too_long_is_ended(volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["mkfs.ext4", "-q", volume], check=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "e2fsck").write_text("#!/bin/sh\nexec sleep 100\n")
    (tmp_path / "bin" / "e2fsck").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    checked = check_volume(volume, volume.stat().st_size, timeout_s=1)
    assert (checked.sound, checked.words) == (False, "ext2/3/4: it took more than 1 s")


def test_data_that_is_not_what_its_sum_says_is_a_complaint_of_btrfs(volume: Path, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(data)
    os.truncate(volume, 120 * MIB)
    subprocess.run(["mkfs.btrfs", "-q", "-r", tmp_path / "source", volume], check=True)
    assert check_volume(volume, 120 * MIB).sound
    place = volume.read_bytes().index(data[100_000:100_500])
    with open(volume, "r+b") as file:
        file.seek(place)
        file.write(bytes([data[100_000] ^ 1]))
    checked = check_volume(volume, 120 * MIB)
    assert checked.sound is False
    assert "csum" in checked.words


def fill_log(path: Path) -> None:
    """Leave in an XFS's log what a mount would replay, as that of a running system has it."""
    with open(path, "r+b") as file:
        start = file.read(128)
        (block,), (log,), (blocks,) = (
            struct.unpack_from(*one) for one in ((">I", start, 4), (">Q", start, 48), (">I", start, 84))
        )
        group, within = log >> start[124], log & ((1 << start[124]) - 1)
        # The log's one record says that it was unmounted: a flag of its only operation.
        file.seek((group * blocks + within) * block + 512 + 9)
        assert file.read(1) == b"\x20"
        file.seek(-1, os.SEEK_CUR)
        file.write(b"\0")


def test_an_xfs_whose_log_is_not_empty_is_not_judged(volume: Path) -> None:
    os.truncate(volume, 400 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-f", volume], check=True)
    assert check_volume(volume, 400 * MIB).sound is True
    fill_log(volume)
    checked = check_volume(volume, 400 * MIB)
    assert checked.sound is None
    assert checked.words.startswith("XFS: its log is not empty, as of a running system")


def test_of_many_words_the_first_and_the_last_are_kept(
    volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log is told of before all that is wrong without it."""
    (tmp_path / "bin").mkdir()
    script = "echo 'changes in a log which is being'; echo 'ignored because'; yes wrong | head -c 200000; exit 1"
    (tmp_path / "bin" / "xfs_repair").write_text(f"#!/bin/sh\necho 'metadata'\n{script}\n")
    (tmp_path / "bin" / "xfs_repair").chmod(0o755)
    os.truncate(volume, 400 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-f", volume], check=True)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    checked = check_volume(volume, 400 * MIB)
    assert checked.sound is None
    assert len(checked.output) < 70_000
