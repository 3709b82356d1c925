"""Partition tables as sfdisk makes them, and such as nobody should."""

import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

from backupfs.disks.partitions import Partition, partition_name, partitions_of

MIB = 1 << 20

TABLES = {
    "gpt": "label: gpt\nsize=5M,name=first\nsize=7M\nstart=40M,size=3M,name=čtvrtý\n",
    "gpt with gaps in the numbers": "label: gpt\n2: size=5M\n7: size=6M\n",
    "mbr": "label: dos\nsize=5M,type=83,bootable\nsize=7M,type=82\n",
    "mbr with logical ones": "label: dos\n1: size=5M,type=83\n3: size=50M,type=5\n5: size=9M,type=83\n"
    "6: size=8M,type=7\n7: size=4M,type=83\n",
    "empty": "label: gpt\n",
}


def disk_with(table: str, path: Path, size: int = 64 * MIB) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
    subprocess.run(["sfdisk", "-q", path], input=table.encode(), check=True)
    return path


def parts_of(path: Path) -> list[Partition]:
    with open(path, "rb") as file:
        return partitions_of(lambda at, length: os.pread(file.fileno(), length, at), path.stat().st_size)


@pytest.mark.parametrize("name", TABLES)
def test_partitions_are_those_of_sfdisk(name: str, tmp_path: Path) -> None:
    path = disk_with(TABLES[name], tmp_path / "disk")
    table = json.loads(subprocess.run(["sfdisk", "-J", path], capture_output=True, check=True).stdout)
    wanted = [
        Partition(
            int(one["node"].removeprefix(str(path))),
            one["start"] * 512,
            one["size"] * 512,
            one.get("name", ""),
            one["type"].lower().zfill(2),
        )
        for one in table["partitiontable"].get("partitions", [])
        if one["type"] != "5"
    ]
    assert parts_of(path) == wanted
    assert name == "empty" or len(wanted) >= 2


@pytest.mark.parametrize("damaged", ["header", "entries", "sector"])
def test_the_second_gpt_counts_where_the_first_is_damaged(damaged: str, tmp_path: Path) -> None:
    path = disk_with(TABLES["gpt"], tmp_path / "disk")
    wanted = parts_of(path)
    with open(path, "r+b") as file:
        file.seek({"header": 512 + 24, "entries": 1024 + 33, "sector": 512}[damaged])
        file.write(b"?" * (512 if damaged == "sector" else 1))
    assert parts_of(path) == wanted
    assert len(wanted) == 3


def test_no_table_and_the_boot_sector_of_a_file_system_have_no_partitions(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    assert parts_of(path) == []
    path.write_bytes(b"\xeb\x58\x90mkfs.fat" + b"text " * 98 + b"....." + b"\x55\xaa" + bytes(MIB))
    assert parts_of(path) == []
    path.write_bytes(b"\x55\xaa")
    assert parts_of(path) == []


def test_a_chain_that_goes_in_circles_ends(tmp_path: Path) -> None:
    path = disk_with(TABLES["mbr with logical ones"], tmp_path / "disk")
    with open(path, "r+b") as file:
        file.seek(446 + 2 * 16 + 8)
        [first] = struct.unpack("<I", file.read(4))
        # The second entry of the first table in the chain leads to that table.
        file.seek(first * 512 + 446 + 16 + 4)
        file.write(b"\x05\0\0\0" + struct.pack("<II", 0, 2048))
    assert [part.number for part in parts_of(path)] == [1, 5]


def test_partitions_beyond_the_end_are_left_out(tmp_path: Path) -> None:
    path = disk_with(TABLES["mbr"], tmp_path / "disk")
    os.truncate(path, 8 * MIB)
    assert [part.number for part in parts_of(path)] == [1]


LARGE = "label: dos\n1: start=512,size=4096,type=83\n3: start=8192,size=50000,type=5\n5: start=8448,size=4096,type=83\n"


def large_disk(path: Path) -> Path:
    """Make a disk whose table counts in sectors of 4,096 bytes."""
    small = disk_with(LARGE, path.with_name("small")).read_bytes()
    with open(path, "wb") as file:
        file.truncate(512 * MIB)
        for lba in (0, 8192):
            file.seek(lba * 4096)
            file.write(small[lba * 512 : (lba + 1) * 512])
    return path


@pytest.mark.parametrize("lba", [512, 8448])
@pytest.mark.parametrize("command", [["mkfs.ext4", "-q"], ["mkswap", "-q"], ["mkfs.fat"], None])
def test_an_mbr_that_counts_in_large_sectors_is_read_by_what_is_where_it_says(
    command: "list[str] | None", lba: int, tmp_path: Path
) -> None:
    path = large_disk(tmp_path / "disk")
    small = [(1, 512 * 512, 4096 * 512)]
    large = [(1, 512 * 4096, 4096 * 4096), (5, 8448 * 4096, 4096 * 4096)]

    def found(sector: int = 0) -> list[tuple[int, int, int]]:
        with open(path, "rb") as file:
            size = path.stat().st_size
            parts = partitions_of(lambda at, length: os.pread(file.fileno(), length, at), size, sector)
        return [part[:3] for part in parts]

    assert found() == found(512) == small
    assert found(4096) == large
    if command is None:
        inside = b"\xfc\x4e\x2b\xa9\1\0\0\0".ljust(4096, b"\0")  # md
    else:
        with open(tmp_path / "inside", "wb") as file:
            file.truncate(16 * MIB)
        subprocess.run([*command, tmp_path / "inside"], check=True, capture_output=True)
        inside = (tmp_path / "inside").read_bytes()
    with open(path, "r+b") as file:
        file.seek(lba * 4096)
        file.write(inside)
    assert found() == found(4096) == large
    # Where something is in the small ones, too, they count.
    with open(path, "r+b") as file:
        file.seek(512 * 512)
        file.write(inside[: MIB // 2])
    assert found() == small


def test_names_are_those_of_linux() -> None:
    assert [partition_name(disk, 3) for disk in ("vda", "nvme0n1", "disk1")] == ["vda3", "nvme0n1p3", "disk1p3"]
