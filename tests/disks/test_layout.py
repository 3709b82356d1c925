"""Logical volumes, in metadata that LVM wrote and in such as it never would.

vg0.pv.gz is the first MiB of a physical volume of 100 MiB, as lvm2 2.03.16 made it:
    vgcreate vg0 PV; lvcreate -n root -L 20M vg0; lvcreate -n data -L 30M vg0; lvextend -L +8M vg0/root
"""

import gzip
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from backupfs.disks.layout import Layout, read_layout
from backupfs.disks.logical import add_groups
from backupfs.disks.lvm import NotLvm, parse, read_physical_volume
from backupfs.disks.source import open_disk
from backupfs.disks.table import VolumeReader, VolumeTable
from backupfs.snapshots.volumes import Ranges
from backupfs.usecases.events import Event, FileSkipped
from tests.builders import File, build, new_repository
from tests.usecases.test_image import bytes_of, make_image, run_image

MIB = 1 << 20
PV = gzip.decompress((Path(__file__).parent / "vg0.pv.gz").read_bytes())
EXTENT = 4 * MIB
# (place in the volume, place behind the header, length), in extents.
ROOT = ((0, 0, 5), (5, 13, 2))


def disk_of(folder: Path, root: bytes, before: int = 0) -> Path:
    """Return a disk whose physical volume begins at a place and has something in its logical volume `root`."""
    path = folder / "disk.raw"
    with open(path, "wb") as file:
        file.truncate(before + 101 * MIB)
        file.seek(before)
        file.write(PV)
        for at, place, count in ROOT:
            file.seek(before + MIB + place * EXTENT)
            file.write(root[at * EXTENT : (at + count) * EXTENT])
    return path


def layout_of(*paths: Path) -> Layout:
    sources = [open_disk(os.fsencode(path)) for path in paths]
    try:
        return read_layout(sources)
    finally:
        for source in sources:
            source.close()


def file_system(folder: Path) -> bytes:
    source = build({"etc": {"hosts": File(b"127.0.0.1 localhost\n" * 500)}}, folder / "source")
    path = folder / "fs.raw"
    path.write_bytes(bytes(28 * MIB))
    subprocess.run(["mkfs.ext4", "-q", "-d", source, path], check=True)
    return path.read_bytes()


def test_volumes_are_where_lvm_put_them(tmp_path: Path) -> None:
    layout = layout_of(disk_of(tmp_path, bytes(28 * MIB)))
    assert layout.remarks == ()
    assert [(volume.name, volume.size) for volume in layout.volumes] == [("vg0-data", 32 * MIB), ("vg0-root", 28 * MIB)]
    assert layout.table.on_disks(1) == ((32 * MIB, 0, MIB + 5 * EXTENT),)
    assert layout.table.on_disks(2) == ((20 * MIB, 0, MIB), (8 * MIB, 0, MIB + 13 * EXTENT))
    assert layout.undivided == (1, 2)


@pytest.mark.parametrize("in_partition", [False, True])
def test_files_of_a_logical_volume_are_shown(in_partition: bool, tmp_path: Path) -> None:
    root = file_system(tmp_path)
    path = disk_of(tmp_path, root, 3 * MIB if in_partition else 0)
    if in_partition:
        table = b"label: gpt\nstart=3M,size=100M\n"
        with open(path, "r+b") as file:
            file.truncate(110 * MIB)
        subprocess.run(["sfdisk", "-q", "--wipe=never", "--wipe-partitions=never", path], input=table, check=True)
    repository = new_repository()
    snapshot = make_image(repository, path)
    assert bytes_of(repository, snapshot, "/volumes/vg0-root.raw") == root
    assert bytes_of(repository, snapshot, "/files/vg0-root/etc/hosts") == b"127.0.0.1 localhost\n" * 500
    assert [volume.name for volume in snapshot.volumes] == ["disk", *["disk1"] * in_partition, "vg0-data", "vg0-root"]


def test_the_newest_metadata_of_a_group_counts_whoever_has_it(tmp_path: Path) -> None:
    there = read_physical_volume(lambda at, length: PV[at : at + length])
    assert there is not None
    other = replace(there, uuid="another", sequence=0, metadata={})
    sources = [open_disk(os.fsencode(disk_of(tmp_path, bytes(28 * MIB))))]
    for members in ([(0, other), (0, there)], [(0, there), (0, other)]):
        table = VolumeTable(sources)
        assert add_groups(table, members, set()) == []
        assert [volume.name for volume in table.volumes] == ["vg0-data", "vg0-root"]
    sources[0].close()


@pytest.mark.parametrize(
    "text", ["a {", "a = [1, 2", "a b", "= 3", "a = }", "}" * 2 + "x", "a {" * 50, 'a = "b', "a = \x01"]
)
def test_garbled_text_is_refused_or_harmless(text: str) -> None:
    try:
        parsed = parse(text)
    except NotLvm:
        return
    assert isinstance(parsed, dict)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (512 + 40, "it is a physical volume of LVM whose label has a wrong checksum"),
        (4096, "it is a physical volume of LVM that cannot be read: the head of its metadata has a wrong checksum"),
        (
            4096 + 40,
            "it is a physical volume of LVM that cannot be read: the head of its metadata has a wrong checksum",
        ),
        (-1, "it is a physical volume of LVM that cannot be read: its metadata has a wrong checksum"),
    ],
)
def test_metadata_with_a_wrong_checksum_is_a_problem_and_costs_the_volumes_only(
    place: int, says: str, tmp_path: Path
) -> None:
    path = disk_of(tmp_path, file_system(tmp_path))
    if place < 0:
        # Where an extent of a volume begins, in the text that counts: the last one.
        place = PV.rindex(b"pe_start = 2048") + len("pe_start = ")
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    layout = layout_of(path)
    assert layout.problems == (("disk", says),)
    assert layout.remarks == ()
    assert layout.volumes == []
    repository, events = new_repository(), list[Event]()
    snapshot = run_image(repository, path, report=events.append).snapshot
    assert snapshot is not None
    assert bytes_of(repository, snapshot, "/disks/disk.raw") == path.read_bytes()
    assert bytes_of(repository, snapshot, "/files/.unread").decode() == f"disk: {says}\n"
    assert [event.reason for event in events if isinstance(event, FileSkipped)] == [says]


def test_a_label_that_is_left_in_a_file_system_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(file_system(tmp_path))
    with open(path, "r+b") as file:
        file.seek(512)
        file.write(PV[512:1000] + b"rest" + PV[1004:1024])
    layout = layout_of(path)
    assert (layout.remarks, layout.problems, layout.undivided) == ((), (), (0,))


def test_ranges_are_cut_where_asked(tmp_path: Path) -> None:
    ranges = Ranges([(10, 0, 100), (20, 1, 0), (5, 0, 7)])
    assert list(ranges.parts(5, 27)) == [(5, 0, 105), (20, 1, 0), (2, 0, 7)]
    assert list(ranges.parts(30, 99)) == [(5, 0, 7)]
    assert list(ranges.parts(35, 1)) == []
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(os.urandom(200))
    sources = [open_disk(os.fsencode(tmp_path / name)) for name in ("a", "b")]
    one, two = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    whole = one[100:110] + two[:20] + one[7:12]
    table = VolumeTable(sources)
    number = table.add("made", ranges)
    assert VolumeReader(table, number).read(3, 100) == whole[3:]
    assert table.on_disks(table.add("part", Ranges([(12, number, 9)]))) == ((1, 0, 109), (11, 1, 0))
    for source in sources:
        source.close()


def test_a_volume_beyond_what_it_lies_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(200))
    sources = [open_disk(os.fsencode(tmp_path / "a"))]
    table = VolumeTable(sources)
    for wrong in ((10, 0, 191), (10, 1, 0), (-1, 0, 0), (10, 0, -1)):
        with pytest.raises(ValueError, match="beyond"):
            table.add("wrong", Ranges([wrong]))
    sources[0].close()


def test_two_volumes_never_have_one_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(200))
    sources = [open_disk(os.fsencode(tmp_path / "a"))]
    table = VolumeTable(sources)
    for _ in range(3):
        table.add("a", Ranges([(10, 0, 0)]))
    assert [volume.name for volume in table.volumes] == ["a~2", "a~3", "a~4"]
    sources[0].close()
