"""Images without the free space of file systems: smaller, and what is in use is all there."""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backupfs.disks import checkers
from backupfs.disks.btrfs_sums import sums_of
from backupfs.disks.checkers import check_volume
from backupfs.disks.filesystem import Read
from backupfs.disks.free_space import FreeSpace
from backupfs.disks.hints import Claim, Hints
from backupfs.disks.layout import Layout
from backupfs.disks.ranges import joined
from backupfs.disks.source import DiskSource, open_disk
from backupfs.disks.table import VolumeTable
from backupfs.errors import MountError
from backupfs.snapshots.snapshot import FREE_LEFT_OUT, Snapshot
from backupfs.snapshots.volumes import Ranges, Stripes
from backupfs.usecases import image_free
from backupfs.usecases.events import Event, FileSkipped, Remark
from tests.builders import File, Sparse, Tree, build, new_repository, reopened, run_check, snapshot_of
from tests.disks.test_xfs import Files, prototype
from tests.usecases.test_image import bytes_of, run_image
from tests.usecases.test_image_files import restored

MIB = 1 << 20
SIZE = 72 * MIB
CONTENT: Tree = {
    "large": File(random.Random(1).randbytes(3 * MIB + 17)),
    "tiny": File(b"x"),
    "sparse": Sparse(20 * MIB, {0: b"start", 9 * MIB: b"island" * 9999}),
    "d": {f"f{number}": File(random.Random(number).randbytes(number * 97)) for number in range(300)},
}
PLAIN: Tree = {**{name: CONTENT[name] for name in ("large", "tiny")}, "d": CONTENT["d"]}

Make = Callable[[bytes, Path], None]


def run(*words: str | bytes | Path, **options: object) -> None:
    subprocess.run(words, check=True, capture_output=True, **options)  # type: ignore[call-overload]


def ext(kind: str, *options: str) -> Make:
    def make(source: bytes, path: Path) -> None:
        run(f"mkfs.{kind}", "-q", "-F", "-E", "nodiscard", *options, "-d", source, path)

    return make


def xfs(*options: str) -> Make:
    def make(source: bytes, path: Path) -> None:
        grow(path, 320 * MIB)
        contents = path.parent / "contents"
        contents.mkdir()
        (path.parent / "prototype").write_text(prototype(contents_of(source), contents))
        run("mkfs.xfs", "-q", "-f", "-K", *options, "-p", path.parent / "prototype", path)

    return make


def grow(path: Path, size: int) -> None:
    with open(path, "ab") as file:
        file.write(random.Random(8).randbytes(size - path.stat().st_size))


def contents_of(folder: bytes) -> Files:
    return {
        entry.name.decode(): contents_of(entry.path) if entry.is_dir() else Path(os.fsdecode(entry.path)).read_bytes()
        for entry in os.scandir(folder)
    }


def btrfs(*options: str) -> Make:
    def make(source: bytes, path: Path) -> None:
        grow(path, 144 * MIB)
        run("mkfs.btrfs", "-q", "-f", "-K", *options, "--rootdir", source, path)

    return make


def ntfs(source: bytes, path: Path) -> None:
    run("mkntfs", "-q", "-F", "-Q", path)
    for name in (b"large", b"tiny"):
        run("ntfscp", "-q", path, source + b"/" + name, name)


def fat(bits: int) -> Make:
    def make(source: bytes, path: Path) -> None:
        if bits == 12:
            os.truncate(path, 14 * MIB)
        run("mkfs.vfat", "-F", str(bits), *(["-s", "1"] if bits == 32 else []), path)
        run("mcopy", "-s", "-i", path, source + b"/large", source + b"/tiny", source + b"/d", "::")
        run("mdel", "-i", path, "::/d/f7")

    return make


def _through_mount(path: Path, source: bytes) -> None:
    """Copy a tree into a file system by way of the kernel, with much that is deleted again."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    mountpoint = path.parent / "mnt"
    mountpoint.mkdir()
    run("mount", "-o", "loop", path, mountpoint)
    try:
        (mountpoint / "gone").mkdir()
        for number in range(400):
            (mountpoint / f"gone/{number}").write_bytes(os.urandom(number * 500))
        run("cp", "-a", source + b"/.", mountpoint)
        for number in range(0, 400, 2):
            (mountpoint / f"gone/{number}").unlink()
    finally:
        run("umount", mountpoint)


def mounted(make: Make) -> Make:
    def both(source: bytes, path: Path) -> None:
        make(source, path)
        _through_mount(path, source)

    return both


OLD = "^metadata_csum,^64bit,^flex_bg,^sparse_super,^resize_inode"
CASES: dict[str, tuple[Make, Tree]] = {
    "ext4": (ext("ext4"), CONTENT),
    "ext4, small blocks": (ext("ext4", "-b", "1024"), CONTENT),
    "ext4 as it once was": (
        ext("ext4", "-O", OLD, "-I", "128"),
        CONTENT,
    ),
    "ext4 of few copies": (ext("ext4", "-O", "sparse_super2,^resize_inode"), CONTENT),
    "ext3": (ext("ext3"), CONTENT),
    "ext2": (ext("ext2", "-g", "8192"), CONTENT),
    "ext4, mounted": (mounted(ext("ext4", "-b", "1024")), CONTENT),
    "xfs": (xfs(), CONTENT),
    "xfs, mounted": (mounted(xfs()), CONTENT),
    "xfs, small blocks": (xfs("-b", "size=1024", "-m", "rmapbt=1"), CONTENT),
    "xfs, version 4": (xfs("-m", "crc=0"), CONTENT),
    "btrfs": (btrfs(), CONTENT),
    "btrfs, mounted": (mounted(btrfs("--mixed")), CONTENT),
    "ntfs": (ntfs, PLAIN),
    "fat32": (fat(32), PLAIN),
    "fat16": (fat(16), PLAIN),
    "fat12": (fat(12), PLAIN),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A disk on which everything was once written to."""
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(9).randbytes(SIZE))
    return path


def remarks_of(events: list[Event]) -> str:
    return " ".join(event.text for event in events if isinstance(event, Remark))


@pytest.mark.fuse
@pytest.mark.parametrize("case", CASES)
def test_free_space_is_left_out_and_all_files_are_there(case: str, path: Path, tmp_path: Path) -> None:
    make, content = CASES[case]
    source = build(content, tmp_path / "source")
    make(source, path)
    repository = new_repository()
    events: list[Event] = []
    result = run_image(repository, path, skips_free=True, report=events.append)
    snapshot = result.snapshot
    assert snapshot is not None
    assert not [event for event in events if isinstance(event, FileSkipped)]
    assert "of disk, " in remarks_of(events), remarks_of(events)
    assert snapshot.traits & FREE_LEFT_OUT
    size = path.stat().st_size
    assert result.data.plain_bytes < (12 if case == "fat12" else 45) * MIB
    assert snapshot.volumes[0].data_size < (11 if case == "fat12" else 45) * MIB
    # The file system's own check, and every file by the reader and from the dumped disk, again by the reader.
    repository = reopened(repository)
    dumped = tmp_path / "dumped.raw"
    dumped.write_bytes(bytes_of(repository, snapshot, "/disks/disk.raw"))
    assert dumped.stat().st_size == size
    assert check_volume(dumped, size, is_writable=False).sound
    again = run_image(repository, f"{dumped}").snapshot
    assert again is not None
    found = restored(repository, snapshot, "/files/disk", tmp_path / "out")
    wanted = {name: one.content for name, one in snapshot_of(source).items() if one.kind == "file"}
    if case.startswith("fat"):
        del wanted[b"d/f7"]
    if case == "ntfs":
        wanted = {name: wanted[name] for name in (b"large", b"tiny")}
    files = {name: one.content for name, one in found.items() if one.kind == "file"}
    assert {name: files.get(name) for name in wanted} == wanted
    dumped_files = restored(repository, again, "/files/dumped", tmp_path / "again")
    assert {name: one.content for name, one in dumped_files.items() if one.kind == "file"} == files
    assert not run_check(repository, read_data=True).damaged
    # It costs nothing to make it again.
    assert run_image(repository, path, skips_free=True).data.chunks == 0


def image_of(path: Path, **options: object) -> tuple[Snapshot, str, bytes]:
    """Return (image, what was said, the disk as it is in it)."""
    repository, events = new_repository(), list[Event]()
    snapshot = run_image(repository, path, skips_free=True, report=events.append, **options).snapshot
    assert snapshot is not None
    return snapshot, remarks_of(events), bytes_of(repository, snapshot, "/disks/disk.raw")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A disk with ext4 in it, free space of random bytes."""
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(9).randbytes(24 * MIB))
    ext("ext4")(build(PLAIN, tmp_path / "source"), path)
    return path


def place_of(path: Path, name: str) -> int:
    done = subprocess.run(["debugfs", "-R", f"blocks {name}", path], capture_output=True, check=True)
    return int(done.stdout.split()[0]) * int(_block_size(path))


def _block_size(path: Path) -> int:
    return 1024 << int.from_bytes(path.read_bytes()[1024 + 0x18 : 1024 + 0x1C], "little")


@pytest.mark.fuse
@pytest.mark.parametrize("what", ["data of a file", "metadata", "a directory"])
def test_a_reader_that_takes_what_is_in_use_for_free_is_found_out(
    what: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = {"data of a file": place_of(small, "large"), "metadata": 64 << 10, "a directory": place_of(small, "d")}[what]
    start = at - at % 4096

    def lies(_read: Read, _size: int) -> FreeSpace:
        return FreeSpace("ext4", iter([(start, start + (256 << 10))]))

    monkeypatch.setattr(image_free, "find_free_space", lies)
    if what == "a directory":
        # Its own check is to pass: the walk has to find it.
        monkeypatch.setattr(
            image_free, "check_volume", lambda *_, **__: checkers.Checked("ext2/3/4", sound=True, words="", output=b"")
        )
    snapshot, said, disk = image_of(small)
    assert "disk is stored whole" in said
    expected = {
        "data of a file": "the file large lies where",
        "metadata": "with zeros there its check fails: ext2/3/4",
        "a directory": "lies where",
    }
    assert expected[what] in said
    assert disk == small.read_bytes()
    assert not snapshot.traits & FREE_LEFT_OUT


@pytest.mark.fuse
def test_without_its_check_a_volume_is_stored_whole(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkers.shutil, "which", lambda program: None if program == "e2fsck" else "/bin/true")
        snapshot, said, disk = image_of(small)
        assert "e2fsck is missing: install e2fsprogs" in said
        assert (disk, snapshot.traits & FREE_LEFT_OUT) == (small.read_bytes(), 0)

    def refused(*_arguments: object) -> object:
        raise MountError("there is no /dev/fuse")

    monkeypatch.setattr(image_free, "presented", refused)
    snapshot, said, disk = image_of(small)
    assert "cannot be shown to ext4's own check: there is no /dev/fuse" in said
    assert (disk, snapshot.traits & FREE_LEFT_OUT) == (small.read_bytes(), 0)


def dirty_ext(path: Path) -> None:
    run("debugfs", "-w", "-R", "feature needs_recovery", path)


def failed_ext(path: Path) -> None:
    run("debugfs", "-w", "-R", "ssv state 3", path)


def dirty_fat(path: Path) -> None:
    write(path, 0x41, b"\1")


def dirty_ntfs(path: Path) -> None:
    data = path.read_bytes()
    (sector, per_cluster), table = (512, data[13]), int.from_bytes(data[48:56], "little")
    place = table * sector * per_cluster + 3 * 1024
    record = data[place : place + 1024]
    at = record.index(b"\x70\0\0\0", 56)
    write(path, place + at + record[at + 20] + 10, b"\1")


def dirty_btrfs(path: Path) -> None:
    block = bytearray(path.read_bytes()[64 << 10 :][:4096])
    block[98] = 1  # of where its log is
    total = sums_of(bytes(block)).of(bytes(block[32:]))
    write(path, 64 << 10, total + bytes(block[len(total) :]))


def write(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize(
    ("case", "spoil", "says"),
    [
        ("ext4", dirty_ext, "it was not unmounted"),
        ("ext4", failed_ext, "the kernel found errors in it"),
        ("fat32", dirty_fat, "it was not unmounted"),
        ("ntfs", dirty_ntfs, "marked as not unmounted"),
        ("btrfs", dirty_btrfs, "it was not unmounted"),
    ],
)
def test_what_was_not_unmounted_is_stored_whole(
    case: str, spoil: Callable[[Path], None], says: str, path: Path, tmp_path: Path
) -> None:
    CASES[case][0](build(PLAIN, tmp_path / "source"), path)
    spoil(path)
    snapshot, said, disk = image_of(path)
    assert says in said
    assert disk == path.read_bytes()
    assert not snapshot.traits & FREE_LEFT_OUT


@pytest.mark.fuse
def test_gaps_tables_and_volumes_without_a_known_file_system_are_kept(small: Path, tmp_path: Path) -> None:
    plain = bytearray(random.Random(4).randbytes(64 * MIB))
    path = tmp_path / "disk.raw"
    volume = small.read_bytes()
    path = tmp_path / "whole" / "disk.raw"
    path.parent.mkdir()
    plain[4 * MIB : 28 * MIB] = volume
    path.write_bytes(plain)
    run("sfdisk", "-q", "--no-tell-kernel", path, input=b"label: gpt\nstart=8192,size=49152\nstart=65536,size=20480\n")
    snapshot, said, disk = image_of(path)
    plain = bytearray(path.read_bytes())
    assert "disk2 is stored whole, its free space too: it holds no file system whose free space can be told" in said
    assert "of disk1, 0.0" in said
    assert disk[: 4 * MIB] == plain[: 4 * MIB]
    assert disk[28 * MIB :] == plain[28 * MIB :]
    assert disk[4 * MIB : 28 * MIB] != plain[4 * MIB : 28 * MIB]
    assert [volume.data_size == volume.size for volume in snapshot.volumes] == [False, False, True]


@pytest.mark.fuse
def test_a_map_of_changes_and_free_space_go_together(small: Path) -> None:
    repository = new_repository()
    whole = run_image(repository, small, skips_free=True).snapshot
    assert whole is not None
    size = small.stat().st_size
    hints = {"disk": Hints(((0, size, Claim.SAME),), whole.snapshot_id.hex(), source="map")}
    again = run_image(repository, small, skips_free=True, hints=hints).snapshot
    assert again is not None
    assert again.volumes == whole.volumes
    # Without --skip-free the disk's own bytes are in the image, whatever the one before left out.
    full = run_image(repository, small, hints=hints).snapshot
    assert full is not None
    assert bytes_of(repository, full, "/disks/disk.raw") == small.read_bytes()
    assert not full.traits & FREE_LEFT_OUT


def layout_of(source: DiskSource, *volumes: Ranges | Stripes) -> Layout:
    table = VolumeTable([source])
    numbers = [table.add(f"v{number}", made_of) for number, made_of in enumerate(volumes)]
    return Layout(table, tuple(numbers), ())


def test_what_is_free_in_one_volume_and_in_use_in_another_is_kept(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1000))
    source = open_disk(os.fsencode(tmp_path / "disk"))
    # Two that lie over each other, as two snapshots do, the second in two parts; and one of which nothing is known.
    layout = layout_of(source, Ranges([(500, 0, 0)]), Ranges([(100, 0, 300), (200, 0, 0)]), Ranges([(50, 0, 20)]))
    free = {1: [(0, 400)], 2: [(0, 50), (90, 200)]}
    # Of the second volume 0–50 is 300–350 of the disk, 90–100 is 390–400, and 100–200 is 0–100.
    expected = joined([(0, 20), (70, 100), (200, 350), (390, 400)])
    assert image_free.free_of_disk(layout, 0, free) == expected
    assert image_free.free_of_disk(layout, 0, {}) == []
    # What lies scattered may be anywhere in what it is made of.
    scattered = Stripes(10, [(30, 0, 80), (30, 0, 300)])
    layout = layout_of(source, Ranges([(500, 0, 0)]), scattered)
    assert image_free.free_of_disk(layout, 0, {1: [(0, 400)]}) == [(0, 80), (110, 300), (330, 400)]
    source.close()


def test_a_reader_that_speaks_of_what_is_behind_the_end_is_not_believed(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_free, "find_free_space", lambda *_: FreeSpace("ext4", iter([(0, 1 << 40)])))
    _, said, disk = image_of(small)
    assert "what is behind its end is free" in said
    assert disk == small.read_bytes()

    def fails(_read: Read, _size: int) -> Iterator[tuple[int, int]]:
        raise RecursionError("it is garbled")

    monkeypatch.setattr(image_free, "find_free_space", fails)
    assert "stored whole, its free space too: it is garbled" in image_of(small)[1]
