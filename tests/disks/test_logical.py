"""Logical volumes of every kind that is read, against a model that deals bytes out.

mixed.pv0.gz and mixed.pv1.gz are the first MiB of the two physical volumes of a group, 24 MiB each, in extents of
256 KiB, as lvm2 2.03.16 wrote them from a text with every kind (vgcfgrestore). Thin metadata is made by thin_restore.
"""

import gzip
import os
import random
import re
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from backupfs.disks import lvm as lvm_module
from backupfs.disks import thin as thin_module
from backupfs.disks.filesystem import Unreadable
from backupfs.disks.layout import Layout, read_layout
from backupfs.disks.logical import add_groups
from backupfs.disks.lvm import NotLvm, PhysicalVolume, parse, read_physical_volume
from backupfs.disks.source import DiskSource, open_disk
from backupfs.disks.table import VolumeTable
from backupfs.disks.thin import Thin, ThinPool
from backupfs.snapshots.volumes import MAPPED, STRIPES
from backupfs.usecases.events import Event, FileSkipped
from tests.builders import File, build, new_repository, reopened, run_check
from tests.usecases.test_image import bytes_of, make_image, run_image
from tests.usecases.test_image_files import restored
from tests.view.test_filesystem import Client

KIB, MIB = 1 << 10, 1 << 20
EXTENT = 256 * KIB
HEADS = [gzip.decompress((Path(__file__).parent / f"mixed.pv{number}.gz").read_bytes()) for number in range(2)]
PV_SIZE = 24 * MIB
BLOCK = 64 * KIB  # of the pool
POOL_BLOCKS = 48 * EXTENT // BLOCK

# (first block of the device, first of the pool, count) by device.
Mappings = dict[int, list[tuple[int, int, int]]]


def thin_metadata(folder: Path, mappings: Mappings, size: int = 2 * MIB, blocks: int = POOL_BLOCKS) -> bytes:
    devices = "".join(
        f'<device dev_id="{device}" mapped_blocks="{sum(count for _, _, count in ranges)}" transaction="0" '
        'creation_time="0" snap_time="0">'
        + "".join(
            f'<range_mapping origin_begin="{first}" data_begin="{data}" length="{count}" time="0"/>'
            for first, data, count in ranges
        )
        + "</device>"
        for device, ranges in mappings.items()
    )
    (folder / "thin.xml").write_text(
        f'<superblock uuid="" time="1" transaction="1" flags="0" version="2" data_block_size="{BLOCK // 512}" '
        f'nr_data_blocks="{blocks}">{devices}</superblock>'
    )
    (folder / "thin.meta").write_bytes(bytes(size))
    subprocess.run(["thin_restore", "-i", folder / "thin.xml", "-o", folder / "thin.meta"], check=True)
    subprocess.run(["thin_check", "-q", folder / "thin.meta"], check=True)
    return (folder / "thin.meta").read_bytes()


class Group:
    """The group's two disks, as bytes, and what its volumes should be."""

    def __init__(self, folder: Path, seed: int = 1) -> None:
        chooser = random.Random(seed)
        self.folder = folder
        self.disks = [bytearray(head + chooser.randbytes(PV_SIZE - MIB)) for head in HEADS]
        self.chooser = chooser
        # No notes of RAID, at first.
        for disk, first in ((0, 9), (1, 15)):
            self.put(disk, first, bytes(EXTENT))
        self.mappings: Mappings = {1: [], 2: [], 3: []}

    def put(self, disk: int, first: int, data: bytes) -> None:
        at = MIB + first * EXTENT
        self.disks[disk][at : at + len(data)] = data

    def get(self, disk: int, first: int, count: int) -> bytes:
        at = MIB + first * EXTENT
        return bytes(self.disks[disk][at : at + count * EXTENT])

    def write_thin(self, mappings: Mappings) -> None:
        self.mappings = mappings
        self.put(0, 40, thin_metadata(self.folder, mappings))

    def store_in_thin(self, device: int, plain: bytes, free: list[int]) -> None:
        """Put bytes into a thin volume: a block of the pool for each that is not zeros."""
        blocks = [(at, plain[at * BLOCK : (at + 1) * BLOCK]) for at in range(len(plain) // BLOCK)]
        placed = [(at, free.pop(), data) for at, data in blocks if data.strip(b"\0")]
        for _, place, data in placed:
            self.put_in_pool(place, data)
        self.write_thin(self.mappings | {device: [(at, place, 1) for at, place, _ in placed]})

    def put_in_pool(self, block: int, data: bytes) -> None:
        if block < 128:  # the striped part: stripes are as large as blocks
            self.put(block % 2, 48, b"")
            at = MIB + 48 * EXTENT + block // 2 * BLOCK
            self.disks[block % 2][at : at + BLOCK] = data
        else:
            at = MIB + 64 * EXTENT + (block - 128) * BLOCK
            self.disks[1][at : at + BLOCK] = data

    def save(self) -> list[Path]:
        paths = [self.folder / "a.raw", self.folder / "b.raw"]
        for path, data in zip(paths, self.disks, strict=True):
            path.write_bytes(data)
        return paths

    def volumes(self) -> dict[str, bytes]:
        """Return what each volume should be."""
        get = self.get
        pool = dealt(get(0, 48, 16), get(1, 48, 16), 64 * KIB) + get(1, 64, 16)
        base = get(0, 64, 16)
        return {
            "mixed-mix": dealt(get(0, 0, 4), get(1, 0, 4), 16 * KIB)
            + get(1, 4, 6)
            + dealt(get(1, 10, 5), get(0, 4, 5), 64 * KIB),
            "mixed-twin": get(0, 10, 8) + get(0, 20, 8),
            "mixed-old": get(0, 28, 8),
            "mixed-fast": dealt(get(0, 36, 4), get(1, 40, 4), 16 * KIB),
            "mixed-base": base,
            "mixed-thin": self._mapped(1, 16 * MIB, pool, b""),
            "mixed-snap--1": self._mapped(2, 16 * MIB, pool, b""),
            "mixed-late": self._mapped(3, 8 * MIB, pool, base),
        }

    def _mapped(self, device: int, size: int, pool: bytes, origin: bytes) -> bytes:
        found = bytearray(origin + bytes(size - len(origin)))
        for first, data, count in self.mappings[device]:
            found[first * BLOCK : (first + count) * BLOCK] = pool[data * BLOCK : (data + count) * BLOCK]
        return bytes(found)


def dealt(one: bytes, other: bytes, stripe: int) -> bytes:
    return b"".join(
        leg[at : at + stripe] for at in range(0, len(one), stripe) for leg in (one, other)
    )  # fmt: skip


def some_mappings(chooser: random.Random) -> Mappings:
    blocks = chooser.sample(range(POOL_BLOCKS), POOL_BLOCKS)
    one = [(first, blocks[at], 1) for at, first in enumerate(sorted(chooser.sample(range(256), 90)))]
    # A snapshot shares what did not change.
    other = [(first, blocks[100 + at] if at % 7 == 0 else data, 1) for at, (first, data, _) in enumerate(one)]
    return {1: one, 2: other, 3: [(3, 10, 20), (30, 40, 1), (60, 5, 7), (127, 150, 1)]}


class Opened:
    """The layout of disks while they are open."""

    def __init__(self, *paths: Path) -> None:
        self.sources: list[DiskSource] = [open_disk(os.fsencode(path)) for path in paths]

    def __enter__(self) -> Layout:
        return read_layout(self.sources)

    def __exit__(self, *_: object) -> None:
        for source in self.sources:
            source.close()


def read_all(layout: Layout) -> dict[str, bytes]:
    first = len(layout.table.disks)
    return {
        volume.name: layout.reader(first + at).read(0, volume.size)
        for at, volume in enumerate(layout.volumes)
        if volume.is_shown
    }


def test_volumes_of_all_kinds_are_what_was_dealt_out(tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.write_thin(some_mappings(group.chooser))
    with Opened(*group.save()) as layout:
        assert layout.remarks == ()
        wanted = group.volumes()
        found = read_all(layout)
        assert found.keys() == wanted.keys()
        for name, plain in wanted.items():
            assert found[name] == plain, name
        chooser = random.Random(2)
        for number in range(2, len(layout.table)):
            if layout.volumes[number - 2].is_shown:
                plain = wanted[layout.table.name(number)]
                for _ in range(50):
                    start, length = chooser.randrange(len(plain)), chooser.randrange(1, 300_000)
                    assert layout.reader(number).read(start, length) == plain[start : start + length]


def test_an_image_has_them_however_it_is_read(tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.write_thin(some_mappings(group.chooser))
    wanted = group.volumes()
    repository = new_repository()
    snapshot = make_image(repository, *group.save(), name="many")
    repository = reopened(repository)
    assert {volume.kind for volume in snapshot.volumes} >= {STRIPES, MAPPED}
    for name, plain in wanted.items():
        assert bytes_of(repository, snapshot, f"/volumes/{name}.raw") == plain, name
    for name, data in (("a", group.disks[0]), ("b", group.disks[1])):
        assert bytes_of(repository, snapshot, f"/disks/{name}.raw") == data
    found = restored(repository, snapshot, "/volumes", tmp_path / "out")
    assert sorted(found) == [b"", *sorted(name.encode() + b".raw" for name in wanted)]
    for name, plain in wanted.items():
        assert (tmp_path / "out" / f"{name}.raw").read_bytes() == plain
    sizes = {volume.name: (volume.data_size, volume.size) for volume in snapshot.volumes}
    assert sizes["mixed-mix"] == (6 * MIB, 6 * MIB)
    assert sizes["mixed-thin"] == (90 * BLOCK, 16 * MIB)
    assert not run_check(repository, read_data=True).damaged

    async def look() -> None:
        client = Client(repository)
        chooser = random.Random(3)
        for name, plain in wanted.items():
            seen = await client.walk(f"images/many/{snapshot.time_name}/volumes/{name}.raw".encode())
            assert seen.size == len(plain)
            assert await client.read(seen.inode) == plain
            for _ in range(20):
                start, length = chooser.randrange(len(plain)), chooser.randrange(1, 200_000)
                assert await client.read(seen.inode, start, length) == plain[start : start + length]

    trio.run(look)


def file_system(folder: Path, kind: str, size: int, files: int) -> bytes:
    tree = {f"f{number}": File(os.urandom(number * 3000)) for number in range(files)}
    source = build({"etc": {"hosts": File(b"127.0.0.1 localhost\n" * 500)}, **tree}, folder / f"source-{kind}")
    path = folder / f"fs-{kind}"
    path.write_bytes(bytes(size))
    subprocess.run([f"mkfs.{kind}", "-q", "-d", source, path], check=True)
    return path.read_bytes()


def test_files_on_thin_and_striped_volumes_are_read_where_they_lie(tmp_path: Path) -> None:
    group = Group(tmp_path)
    plain = file_system(tmp_path, "ext4", 16 * MIB, 40)
    free = group.chooser.sample(range(POOL_BLOCKS), POOL_BLOCKS)
    group.store_in_thin(1, plain, free)
    mix = file_system(tmp_path, "ext2", 6 * MIB, 10)
    for at in range(0, 2 * MIB, 16 * KIB):  # the first segment of it
        turn = at // (16 * KIB)
        place = MIB + turn // 2 * 16 * KIB
        group.disks[turn % 2][place : place + 16 * KIB] = mix[at : at + 16 * KIB]
    group.put(1, 4, mix[2 * MIB : 2 * MIB + 6 * EXTENT])
    for at in range(0, 10 * EXTENT, 64 * KIB):
        turn, start = at // (64 * KIB), 2 * MIB + 6 * EXTENT
        place = MIB + (10, 4)[turn % 2] * EXTENT + turn // 2 * 64 * KIB
        group.disks[1 - turn % 2][place : place + 64 * KIB] = mix[start + at : start + at + 64 * KIB]
    repository, events = new_repository(), list[Event]()
    paths = group.save()
    snapshot = run_image(repository, *paths, report=events.append).snapshot
    assert snapshot is not None
    assert not [event for event in events if isinstance(event, FileSkipped)]
    assert bytes_of(repository, snapshot, "/volumes/mixed-thin.raw") == plain
    assert bytes_of(repository, snapshot, "/volumes/mixed-mix.raw") == mix
    for name, folder, count in (("thin", "source-ext4", 40), ("mix", "source-ext2", 10)):
        for number in range(count):
            wanted = (tmp_path / folder / f"f{number}").read_bytes()
            assert bytes_of(repository, snapshot, f"/files/mixed-{name}/f{number}") == wanted
    # Nothing of it changed: the next image has no new chunk and walks nothing.
    again = run_image(repository, *paths)
    assert again.data.chunks == 0
    assert again.snapshot is not None
    assert again.snapshot.volumes == snapshot.volumes


def raid_note(own: int, events: int, failed: int = 0, recovery: int = (1 << 64) - 1) -> bytes:
    return struct.pack("<4sIIIQQQQ", b"DmRd", 0, 2, own, events, failed, recovery, (1 << 64) - 1)


@pytest.mark.parametrize(
    ("notes", "chosen"),
    [
        ((raid_note(0, 7), raid_note(1, 7)), 0),
        ((raid_note(0, 7), raid_note(1, 8)), 0),  # the other one got its note a moment earlier
        ((raid_note(0, 7), raid_note(1, 9)), 1),  # went away and came back
        ((raid_note(0, 7), raid_note(1, 8, failed=1)), 1),
        ((raid_note(0, 9, recovery=4096), raid_note(1, 9)), 1),  # is being copied to
        ((b"", raid_note(1, 3)), 1),
        ((raid_note(0, 9, failed=3), raid_note(1, 9, failed=3)), None),
    ],
)
def test_the_copy_of_a_mirror_that_is_whole_is_taken(
    notes: tuple[bytes, bytes], chosen: int | None, tmp_path: Path
) -> None:
    group = Group(tmp_path)
    group.put(0, 9, notes[0])
    group.put(1, 15, notes[1])
    group.write_thin({1: [], 2: [], 3: []})
    with Opened(*group.save()) as layout:
        found = read_all(layout).get("mixed-twin")
    wanted = [group.get(0, 10, 8) + group.get(0, 20, 8), group.get(1, 16, 16), None]
    assert found == wanted[2 if chosen is None else chosen]
    assert bool(layout.remarks) == (chosen is None)


@pytest.mark.parametrize("missing", [0, 1])
def test_one_disk_of_two_shows_what_is_whole_on_it(missing: int, tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.write_thin({1: [], 2: [], 3: []})
    paths = group.save()
    with Opened(paths[1 - missing]) as layout:
        found = read_all(layout)
    if missing == 0:
        assert found == {"mixed-twin": group.get(1, 16, 16), "mixed-old": group.get(1, 32, 8)}
    else:
        assert found.keys() == {"mixed-twin", "mixed-old", "mixed-base"}
    # One line for each volume that is not there.
    assert len(layout.remarks) == 8 - len(found)
    assert all("physical volume of it is missing" in remark for remark in layout.remarks)


@pytest.mark.parametrize("damaged", [0, 1])
@pytest.mark.parametrize("what", ["head", "text", "ignored"])
def test_metadata_with_a_wrong_checksum_is_that_of_the_other_disk(what: str, damaged: int, tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.write_thin(some_mappings(group.chooser))
    disk = group.disks[damaged]
    if what == "head":
        disk[4096 + 41] ^= 1
    else:
        at = disk.rindex(b"extent_size = 512", 0, MIB)
        disk[at : at + 17] = b"extent_size = 256"
    if what == "ignored":
        # pvchange --metadataignore: what is there is old, and nothing is wrong.
        struct.pack_into("<I", disk, 4096 + 40 + 20, 1)
        struct.pack_into("<I", disk, 4096, lvm_module._sum(bytes(disk[4100 : 4096 + 512])))
    with Opened(*group.save()) as layout:
        says = {"head": "the head of its metadata", "text": "its metadata"}.get(what, "")
        copy = f"{'ab'[damaged]}: {says} has a wrong checksum: another copy of it counts"
        assert layout.remarks == ((copy,) if says else ())
        assert layout.problems == ()
        assert read_all(layout) == group.volumes()


def with_text(change: Callable[[str], str]) -> tuple[list[tuple[int, PhysicalVolume]], str]:
    """Return both physical volumes as members of a group whose text was changed, and the text."""
    members = []
    for number, head in enumerate(HEADS):
        there = read_physical_volume(lambda at, length, head=head: head[at : at + length])  # type: ignore[misc]
        assert there is not None
        at = head.rindex(b"mixed {")
        text = change(head[at : head.index(b"\0", at)].decode())
        members.append((number, replace(there, metadata=parse(text)["mixed"])))
    return members, text


def test_a_physical_volume_that_was_away_is_not_believed(tmp_path: Path) -> None:
    group = Group(tmp_path)
    members, text = with_text(lambda text: re.sub(r"(pv0 \{[^}]*?flags = \[)\]", r'\1"MISSING"]', text))
    assert text.count("MISSING") == 1
    with Opened(*group.save()) as layout:
        table = VolumeTable(layout.table.disks)
        add_groups(table, members, set())
        names = [volume.name for volume in table.volumes]
        assert [volume.name for volume in table.volumes if volume.is_shown] == ["mixed-old", "mixed-twin"]
        assert table.read(2 + names.index("mixed-old"), 0, MIB) == group.get(1, 32, 4)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('type = "raid1"', 'type = "raid5_ls"', "of the type raid5_ls, which is not read"),
        ('type = "mirror"', 'type = "cache"', "of the type cache, which is not read"),
        ('"twin_rmeta_1", "twin_rimage_1"', '"twin_rmeta_1", "twin"', ""),  # itself, as a copy of its own
        ('"old_mimage_0", 0', '"old_mimage_0", 900', "smaller than it says"),
        ("stripe_size = 128", "stripe_size = 0", "make no sense"),
        ("stripe_size = 128", "stripe_size = 384", "make no sense"),
        ("stripe_count = 2", "stripe_count = 0", "another number"),
        ("raid0_lvs = [", 'raid0_lvs = ["mix", ', "another number"),
        ("device_id = 1", "device_id = 77", "has no device 77"),
        ("chunk_size = 128", "chunk_size = 256", "cannot be read"),
        ('thin_pool = "pool"', 'thin_pool = "base"', "is no pool"),
        ('metadata = "pool_tmeta"', 'metadata = "base"', "its metadata is none"),
        ('pool = "pool_tdata"', 'pool = "nothing"', "makes no sense"),
        ("extent_count = 6\n", "extent_count = 600000000000\n", "beyond its disks"),
        ("segment_count = 3", "segment_count = 99999999999999999999", "makes no sense"),
        ('external_origin = "base"', 'external_origin = "late"', "made of itself"),
    ],
)
def test_what_cannot_be_true_is_told_and_costs_that_volume_only(old: str, new: str, says: str, tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.write_thin({1: [(0, 0, 4)], 2: [], 3: []})
    members, text = with_text(lambda text: text.replace(old, new, 1))
    assert new in text
    with Opened(*group.save()) as layout:
        table = VolumeTable(layout.table.disks)
        remarks = add_groups(table, members, set())
        assert says in " ".join(remarks)
        shown = [volume.name for volume in table.volumes if volume.is_shown]
        assert len(shown) + len(remarks) == 8
        assert len(shown) >= 5


def test_old_snapshots_are_named_as_what_they_are(tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.write_thin({1: [], 2: [], 3: []})
    snapshot = """
        snapshot0 {
            status = ["READ", "WRITE", "VISIBLE"]
            segment_count = 1
            segment1 {
                start_extent = 0
                extent_count = 6
                type = "snapshot"
                chunk_size = 8
                origin = "mix"
                cow_store = "base"
            }
        }
    """
    members, _ = with_text(lambda text: text.replace("logical_volumes {", "logical_volumes {" + snapshot))
    with Opened(*group.save()) as layout:
        [remark] = add_groups(VolumeTable(layout.table.disks), members, set())
    assert remark == "the logical volume mixed-base is not shown: it is an old snapshot of mix, which is not read"


def test_garbled_metadata_ends_with_a_remark(tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.write_thin(some_mappings(group.chooser))
    chooser = random.Random(5)
    with Opened(*group.save()) as layout:
        for _ in range(60):

            def garbled(text: str) -> str:
                words = text.split(" ")
                for _ in range(chooser.randrange(1, 6)):
                    at = chooser.randrange(len(words) // 3, len(words))
                    words[at] = chooser.choice(
                        ["0", "1", "99999999999", '"pv1",', '"thin"', '"raid1"', '"mix",', "", "[", "-1"]
                    )
                return " ".join(words)

            try:
                members, _ = with_text(garbled)
            except NotLvm:
                continue
            table = VolumeTable(layout.table.disks)
            add_groups(table, members, set())
            for number in range(2, len(table)):
                size = table.size(number)
                assert len(table.read(number, 0, MIB)) == min(size, MIB)
                assert len(table.read(number, size - 100, MIB)) == min(size, 100)


# Thin metadata by itself.


def pool_of(metadata: bytes | bytearray, blocks: int) -> ThinPool:
    def read(at: int, length: int) -> bytes:
        return bytes(metadata[at : at + length])

    return ThinPool(read, len(metadata), BLOCK, blocks * BLOCK)


def ranges_of(metadata: bytes | bytearray, device: int, blocks: int, size: int) -> list[tuple[int, int, int]]:
    found = Thin(pool_of(metadata, blocks), device, size * BLOCK, (blocks * BLOCK, 0, 0), None)
    return list(found.parts(0, found.size))


def test_trees_of_several_levels_are_followed(tmp_path: Path) -> None:
    chooser = random.Random(6)
    blocks = 100_000
    keys = sorted(chooser.sample(range(400_000), 70_000))
    places = chooser.sample(range(blocks), 70_000)
    one = [(key, place, 1) for key, place in zip(keys, places, strict=True)]
    devices = {number: one[number * 10 : number * 10 + 5] for number in range(2, 400)}
    metadata = thin_metadata(tmp_path, {1: one, **devices}, 16 * MIB, blocks)
    pool = pool_of(metadata, blocks)
    found = Thin(pool, 1, 400_000 * BLOCK, (blocks * BLOCK, 0, 0), None)
    known = dict(zip(keys, places, strict=True))
    for number in (2, 399):
        assert ranges_of(metadata, number, blocks, 400_000)[1] == (BLOCK, 0, devices[number][0][1] * BLOCK)

    def wanted(start: int, length: int) -> list[tuple[int, int, int]]:
        pieces: list[tuple[int, int, int]] = []
        while length:
            count = min(length, BLOCK - start % BLOCK)
            place = known.get(start // BLOCK)
            piece = (count, -1, 0) if place is None else (count, 0, place * BLOCK + start % BLOCK)
            if pieces and (
                piece[1] == -1 == pieces[-1][1] or (piece[1] == 0 and piece[2] == pieces[-1][2] + pieces[-1][0])
            ):
                pieces[-1] = (pieces[-1][0] + count, *pieces[-1][1:])
            else:
                pieces.append(piece)
            start, length = start + count, length - count
        return pieces

    for _ in range(300):
        start, length = chooser.randrange(399_000 * BLOCK), chooser.randrange(1, 40 * BLOCK)
        assert list(found.parts(start, length)) == wanted(start, length)
    assert sum(length for length, *_ in found.parts(0, found.size)) == found.size


def test_a_flipped_bit_of_thin_metadata_is_noticed_or_harmless(tmp_path: Path) -> None:
    chooser = random.Random(7)
    keys = sorted(chooser.sample(range(4000), 1500))
    mapping = [(key, place, 1) for key, place in zip(keys, chooser.sample(range(3000), 1500), strict=True)]
    metadata = bytearray(thin_metadata(tmp_path, {1: mapping, 2: mapping[:20]}, MIB, 3000))
    wanted = ranges_of(metadata, 1, 3000, 4000)
    used = [at for at in range(0, MIB, 4096) if any(metadata[at : at + 4096])]
    noticed = 0
    for _ in range(200):
        at = chooser.choice(used) + chooser.randrange(4096)
        bit = 1 << chooser.randrange(8)
        metadata[at] ^= bit
        try:
            assert ranges_of(metadata, 1, 3000, 4000) == wanted
        except Unreadable:
            noticed += 1
        metadata[at] ^= bit
    assert noticed > 50


def test_thin_metadata_that_lies_with_right_sums_ends(tmp_path: Path) -> None:
    chooser = random.Random(8)
    keys = sorted(chooser.sample(range(4000), 1500))
    mapping = [(key, place, 1) for key, place in zip(keys, chooser.sample(range(3000), 1500), strict=True)]
    plain = thin_metadata(tmp_path, {1: mapping, 2: mapping[:20]}, MIB, 3000)
    used = [at for at in range(4096, MIB, 4096) if any(plain[at : at + 4096])]
    for _ in range(200):
        metadata = bytearray(plain)
        for _ in range(chooser.randrange(1, 4)):
            block = chooser.choice([0, *used])
            word = block + 4 + chooser.randrange(100 if block else 400) * 4
            value = chooser.choice([0, 1, 2, 3, 5, 8, 255, 1 << 31, chooser.randrange(1 << 32)])
            struct.pack_into("<I", metadata, word, value)
            total = thin_module._sum(bytes(metadata[block : block + 4096]))
            struct.pack_into("<I", metadata, block, total ^ (121107 if block else 160774))
        try:
            found = ranges_of(metadata, 1, 3000, 4000)
        except Unreadable:
            continue
        assert sum(length for length, *_ in found) == 4000 * BLOCK
        assert all(offset + length <= 3000 * BLOCK for length, _, offset in found)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda block: struct.pack_into("<I", block, 4, 1), "in need of a check"),
        (lambda block: struct.pack_into("<I", block, 40, 9), "version 9"),
        (lambda block: struct.pack_into("<Q", block, 32, 5), "is none"),
        (lambda block: block.__setitem__(slice(4096, None), b""), "out of it|ends within"),
    ],
)
def test_a_pool_that_cannot_be_trusted_is_named_and_its_volumes_left_out(
    change: Callable[[bytearray], None], says: str, tmp_path: Path
) -> None:
    metadata = bytearray(thin_metadata(tmp_path, {1: [(0, 0, 5)], 2: [], 3: []}))
    change(metadata)
    struct.pack_into("<I", metadata, 0, thin_module._sum(bytes(metadata[:4096])) ^ 160774)
    with pytest.raises(Unreadable, match=says):
        ranges_of(metadata, 1, POOL_BLOCKS, 100)
    group = Group(tmp_path)
    group.put(0, 40, bytes(8 * EXTENT))
    group.put(0, 40, bytes(metadata))
    with Opened(*group.save()) as layout:
        assert len(layout.remarks) == 3
        assert all("its pool pool cannot be read: " in remark for remark in layout.remarks)
        assert len(read_all(layout)) == 5
