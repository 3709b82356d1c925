"""Readers of free space on volumes that are damaged, and on those whose files only the kernel can read."""

import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.disks.bitmaps import clear_runs
from backupfs.disks.checkers import check_volume
from backupfs.disks.filesystem import Unreadable
from backupfs.disks.free_space import find_free_space
from backupfs.disks.ranges import joined

MIB = 1 << 20


@given(st.binary(max_size=40), st.integers(0, 330))
def test_runs_of_clear_bits_are_those_that_a_look_at_each_bit_finds(bitmap: bytes, count: int) -> None:
    clear = {at for at in range(min(count, len(bitmap) * 8)) if not bitmap[at // 8] >> at % 8 & 1}
    runs = list(clear_runs(bitmap, count))
    assert {at for start, end in runs for at in range(start, end)} == clear
    assert joined(runs) == runs


def reader_of(data: bytes | bytearray) -> Callable[[int, int], bytes]:
    return lambda at, length: bytes(data[at : at + length])


def free_of(data: bytes | bytearray) -> list[tuple[int, int]]:
    found = find_free_space(reader_of(data), len(data))
    assert found is not None
    return joined(found.ranges)


def test_clusters_of_ext4_are_counted(tmp_path: Path) -> None:
    """No reader of files knows them, so such a volume is stored whole as yet; what is in use is right all the same."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(200):
        (source / f"f{number}").write_bytes(random.Random(number).randbytes(number * 301))
    path = tmp_path / "volume"
    path.write_bytes(random.Random(3).randbytes(96 * MIB))
    options = ["-O", "bigalloc", "-C", "65536", "-E", "nodiscard"]
    subprocess.run(["mkfs.ext4", "-q", "-F", *options, "-d", source, path], check=True, capture_output=True)
    data = bytearray(path.read_bytes())
    free = free_of(data)
    assert sum(end - start for start, end in free) > 40 * MIB
    for start, end in free:
        data[start:end] = bytes(end - start)
    path.write_bytes(data)
    assert check_volume(path, len(data), is_writable=False).sound
    (tmp_path / "out").mkdir()
    subprocess.run(["debugfs", "-R", f"rdump / {tmp_path}/out", path], check=True, capture_output=True)
    for number in range(200):
        assert (tmp_path / f"out/f{number}").read_bytes() == (source / f"f{number}").read_bytes()


MAKERS: dict[str, tuple[int, list[str]]] = {
    "ext4": (16, ["mkfs.ext4", "-q", "-F"]),
    "xfs": (320, ["mkfs.xfs", "-q", "-f"]),
    "btrfs": (128, ["mkfs.btrfs", "-q", "-f"]),
    "ntfs": (16, ["mkntfs", "-q", "-F", "-Q"]),
    "vfat": (40, ["mkfs.vfat", "-F", "32"]),
}


@pytest.mark.parametrize("form", MAKERS)
def test_damaged_volumes_end_with_free_space_within_them_or_with_an_error(form: str, tmp_path: Path) -> None:
    megabytes, words = MAKERS[form]
    path = tmp_path / "volume"
    with open(path, "wb") as file:
        file.truncate(megabytes * MIB)
    subprocess.run([*words, path], check=True, capture_output=True)
    whole = path.read_bytes()
    touched: list[int] = []

    def noting(at: int, length: int) -> bytes:
        touched.extend(range(at, min(at + length, at + 512)))
        return whole[at : at + length]

    found = find_free_space(noting, len(whole))
    assert found is not None
    assert found.form == form
    assert sum(end - start for start, end in found.ranges) > len(whole) // 3
    chooser = random.Random(5)
    errors = 0
    for _ in range(150):
        changed = {chooser.choice(touched): chooser.randrange(256) for _ in range(chooser.choice((1, 4, 30)))}

        def read(at: int, length: int, changed: dict[int, int] = changed) -> bytes:
            data = bytearray(whole[at : at + length])
            for place, value in changed.items():
                if at <= place < at + len(data):
                    data[place - at] = value
            return bytes(data)

        try:
            space = find_free_space(read, len(whole))
            ranges = list(space.ranges) if space is not None else []
        except (Unreadable, struct.error):
            errors += 1
        else:
            assert all(0 <= start < end <= len(whole) for start, end in ranges)
    assert errors
