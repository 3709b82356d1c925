"""What a disk is booted by, as its partitions say."""

from pathlib import Path

import pytest

from backupfs.disks.machine import firmware_of
from tests.disks.test_partitions import disk_with

GPT = "label: gpt\nsize=8M,type=U\nsize=8M,type=L\n"
# The beginning of what Windows puts into the first sector of a disk with a GPT; it only says that booting failed.
CODE = bytes.fromhex("33c08ed0bc007c8ec08ed8be007cbf0006b90002fcf3a450681c06cbfbb90400bdbe07")


@pytest.mark.parametrize(
    ("table", "code", "firmware"),
    [
        (GPT, b"", "uefi"),
        (GPT, CODE, "uefi"),
        (GPT + "size=1M,type=21686148-6449-6E6F-744E-656564454649\n", CODE, "bios"),
        ("label: gpt\nsize=8M,type=L\n", CODE, "bios"),
        ("label: dos\nsize=8M,type=ef\n", b"", "uefi"),
        ("label: dos\nsize=8M,type=ef\n", CODE, "bios"),
        ("label: dos\nsize=8M,type=83\n", b"", "bios"),
    ],
)
def test_a_disk_is_booted_by_what_it_has_something_for(table: str, code: bytes, firmware: str, tmp_path: Path) -> None:
    path = disk_with(table, tmp_path / "disk")
    with open(path, "r+b") as file:
        file.write(code)
    assert firmware_of(path) == firmware
