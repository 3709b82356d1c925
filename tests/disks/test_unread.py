"""Volumes that are known and not read are named."""

import os
import struct
from pathlib import Path

import pytest

from backupfs.disks.layout import read_layout
from backupfs.disks.source import open_disk
from tests.usecases.test_image_files import MIB


def remarks_of(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    source = open_disk(os.fsencode(path))
    layout = read_layout([source])
    source.close()
    return layout.remarks, layout.undivided


@pytest.mark.parametrize(
    ("place", "data", "says"),
    [
        (4096, struct.pack("<4sII60xi", b"\xfc\x4e\x2b\xa9", 1, 0, 1), "a software RAID of level 1 (md)"),
        (0, struct.pack("<4sII60xi", b"\xfc\x4e\x2b\xa9", 1, 0, 5), "a software RAID of level 5 (md)"),
        (0, b"\xeb\x58\x90-FVE-FS-", "BitLocker"),
        (0, b"\0\0\0ReFS\0", "ReFS"),
        (1024, b"\x10\x20\xf5\xf2", "F2FS"),
        (4120, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"), "bcache"),
        (4120, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef"), "bcachefs"),
    ],
)
def test_what_is_known_and_not_read_is_named(place: int, data: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(place) + data + bytes(MIB))
    [remark], undivided = remarks_of(path)
    assert remark.startswith("disk: it ")
    assert says in remark
    assert remark.endswith(", which is not read")
    assert undivided == ()


@pytest.mark.parametrize("size", [1, 100, 1025, 4200])
def test_what_is_short_is_nothing(size: int, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(size))
    assert remarks_of(path) == ((), (0,))
