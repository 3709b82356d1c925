"""File systems that have lost their superblock are known by what is left of them, and nothing else is."""

import random
import struct
import subprocess
from pathlib import Path

import pytest

from backupfs.disks.checkers import check_volume
from backupfs.disks.superblocks import Copy, copy_in, form_of, is_swap
from tests.usecases.test_image_files import MIB

CASES: dict[str, tuple[list[str], str, float]] = {
    "ext4": (["mkfs.ext4", "-q", "-F"], "ext2/3/4", 160),
    "ext4 of 1 KiB": (["mkfs.ext4", "-q", "-F", "-b", "1024"], "ext2/3/4", 20),
    "ext2 of 2 KiB": (["mkfs.ext2", "-q", "-F", "-b", "2048"], "ext2/3/4", 64),
    "xfs": (["mkfs.xfs", "-q"], "XFS", 320),
    "xfs of odd size": (["mkfs.xfs", "-q", "-b", "size=1024"], "XFS", 333331 / 1024),
    "xfs of groups": (["mkfs.xfs", "-q", "-d", "agsize=96m"], "XFS", 320),
    "btrfs": (["mkfs.btrfs", "-q"], "btrfs", 160),
    "ntfs": (["mkfs.ntfs", "-q", "-F", "-Q"], "NTFS", 16),
    "exfat": (["mkfs.exfat"], "exFAT", 16),
    "fat32": (["mkfs.fat", "-F", "32"], "FAT", 64),
    "fat16": (["mkfs.fat", "-F", "16"], "FAT", 16),
    "fat12": (["mkfs.fat", "-F", "12"], "FAT", 4),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_of_a_file_system_names_it(name: str, tmp_path: Path) -> None:
    command, form, mib = CASES[name]
    size = int(mib * MIB)
    path = tmp_path / "volume"
    with open(path, "wb") as file:
        file.truncate(size)
    subprocess.run([*command, path], check=True, capture_output=True)

    def read(offset: int, length: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    assert form_of(read) == form
    with open(path, "r+b") as file:
        file.seek(0x10000 if form == "btrfs" else 0)
        file.write(bytes(2048 if form == "ext2/3/4" else 512))
    assert form_of(read) == ""
    found = copy_in(read, size)
    assert found is not None
    assert found.form == form
    assert 0 < found.place < size
    checked = check_volume(path, size)
    assert (checked.form, checked.sound) == (form, False)
    assert checked.words == f"{form}: {found.words}"


def test_noise_text_and_swap_are_nothing_that_was_lost(tmp_path: Path) -> None:
    for seed in range(20):
        data = bytearray(random.Random(seed).randbytes(3 * MIB))
        # Marks alone, where copies would have them.
        data[8193 * 1024 + 0x38 - 6 * MIB : 8193 * 1024 + 0x3A - 6 * MIB] = b"\x53\xef"
        data[MIB : MIB + 4] = b"XFSB"
        data[6 * 512 + 82 : 6 * 512 + 90] = b"FAT32   "
        assert copy_in(lambda at, length, data=data: bytes(data[at : at + length]), len(data)) is None
    path = tmp_path / "swap"
    path.write_bytes(bytes(MIB))
    subprocess.run(["mkswap", "-q", path], check=True, capture_output=True)
    swap = path.read_bytes()
    assert is_swap(lambda at, length: swap[at : at + length])
    assert check_volume(path, MIB).sound is None
    assert not is_swap(lambda at, length: bytes(length))


def test_a_copy_of_xfs_counts_only_where_a_group_begins() -> None:
    block = bytearray(512)
    block[:4] = b"XFSB"
    struct.pack_into(">I", block, 4, 4096)
    for blocks, groups, counts in ((256, 9, True), (256, 2, False), (200, 9, False), (0, 9, False)):
        struct.pack_into(">II", block, 84, blocks, groups)
        volume = bytes(3 * MIB) + block + bytes(6 * MIB)
        found = copy_in(lambda at, length, volume=volume: volume[at : at + length], len(volume))
        assert found == (Copy("XFS", 3 * MIB) if counts else None)
