"""Images of disks: what is stored, what comes back, what a second one costs."""

import os
import random
import subprocess
from functools import partial
from pathlib import Path

import pytest
import trio

from backupfs.disks.source import RawDisk, attached_disks, open_disk
from backupfs.errors import SourceError, UsageError
from backupfs.repository.repository import Repository
from backupfs.snapshots.snapshot import IMAGE, Snapshot
from backupfs.snapshots.walk import find_path
from backupfs.usecases import image as image_module
from backupfs.usecases.dump import read_file
from backupfs.usecases.events import Event, Remark
from backupfs.usecases.image import ImageOptions, image
from backupfs.usecases.image_scan import DISK_CHUNK
from backupfs.usecases.restore import RestoreOptions, restore
from backupfs.usecases.storing import BackupResult
from tests.builders import SMALL, ignore, new_repository, reopened, run_check

MIB = 1 << 20
TABLE = b"label: gpt\nsize=5M\nsize=40M\n"


def disk_in(path: Path, seed: int = 1, size: int = 70 * MIB, table: bytes = TABLE) -> Path:
    """Make a disk of two partitions: some data, some of it twice, most of it holes or zeros."""
    chooser = random.Random(seed)
    with open(path, "wb") as file:
        file.truncate(size)
    subprocess.run(["sfdisk", "-q", path], input=table, check=True)
    with open(path, "r+b") as file:
        for _ in range(20):
            file.seek(chooser.randrange(MIB, size - MIB))
            file.write(
                chooser.choice([chooser.randbytes(chooser.randrange(1, 200_000)), bytes(300_000), b"same" * 9000])
            )
        file.seek(size - 9)
        file.write(b"the  end.")
    return path


def run_image(repository: Repository, *paths: Path | str, report=ignore, **options: object) -> BackupResult:
    sources = [open_disk(os.fsencode(path)) for path in paths]
    try:
        return image(repository, sources, ImageOptions(sizes=SMALL, **options), report)  # type: ignore[arg-type]
    finally:
        for source in sources:
            source.close()


def make_image(repository: Repository, *paths: Path, **options: object) -> Snapshot:
    snapshot = run_image(repository, *paths, **options).snapshot
    assert snapshot is not None
    return snapshot


def bytes_of(repository: Repository, snapshot: Snapshot, path: str) -> bytes:
    node = find_path(snapshot, os.fsencode(path), repository.trees.load)
    return b"".join(map(bytes, read_file(repository, node, snapshot.volumes)))


@pytest.mark.parametrize("scanners", [1, 3])
def test_a_disk_comes_back_bit_for_bit_and_its_partitions_are_files(
    scanners: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_module, "scanner_count", lambda: scanners)
    path = disk_in(tmp_path / "web1.raw", size=150 * MIB + 512 * 3)
    repository = new_repository()
    snapshot = make_image(repository, path)
    repository = reopened(repository)
    plain = path.read_bytes()
    assert (snapshot.kind, snapshot.image, [disk.name for disk in snapshot.disks]) == (IMAGE, snapshot.host, ["web1"])
    assert bytes_of(repository, snapshot, "/disks/web1.raw") == plain
    assert bytes_of(repository, snapshot, "/volumes/web1p1.raw") == plain[MIB : 6 * MIB]
    assert bytes_of(repository, snapshot, "/volumes/web1p2.raw") == plain[6 * MIB : 46 * MIB]
    assert not run_check(repository, read_data=True).damaged


def test_zeros_and_holes_are_not_stored_and_data_sizes_say_so(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with open(path, "wb") as file:
        file.truncate(100 * MIB)
        file.seek(30 * MIB + 5)
        file.write(b"x")
        file.seek(40 * MIB)
        file.write(bytes(3 * MIB))
    repository = new_repository()
    result = run_image(repository, path)
    assert result.snapshot is not None
    assert (result.data.chunks, result.data.plain_bytes) == (1, DISK_CHUNK)
    [volume] = result.snapshot.volumes
    assert (volume.size, volume.data_size) == (100 * MIB, DISK_CHUNK)
    # The same without holes.
    subprocess.run(["cp", "--sparse=never", path, tmp_path / "full"], check=True)
    assert run_image(repository, tmp_path / "full").data.chunks == 0


def test_the_next_image_stores_the_chunks_that_changed(tmp_path: Path) -> None:
    path = disk_in(tmp_path / "disk.raw")
    repository = new_repository()
    first = make_image(repository, path, name="web")
    unchanged = run_image(repository, path, name="web")
    assert (unchanged.data.chunks, unchanged.parent) == (0, first.snapshot_id)
    with open(path, "r+b") as file:
        for at in (10 * MIB + 7, 20 * MIB, 20 * MIB + DISK_CHUNK - 1):
            file.seek(at)
            file.write(b"changed")
    changed = run_image(repository, path, name="web")
    assert changed.data.chunks == 3
    assert changed.snapshot is not None
    assert bytes_of(repository, changed.snapshot, "/disks/disk.raw") == path.read_bytes()
    assert bytes_of(repository, first, "/disks/disk.raw") != path.read_bytes()


def test_several_disks_are_one_image_and_need_different_names(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    paths = [disk_in(tmp_path / "vda.img"), disk_in(tmp_path / "vdb.qcow2.img", 2), disk_in(tmp_path / "a/vda", 3)]
    repository = new_repository()
    with pytest.raises(UsageError, match="would both be vda"):
        run_image(repository, *paths)
    snapshot = make_image(repository, *paths[:2])
    assert [disk.source for disk in snapshot.disks] == [os.fsencode(path) for path in paths[:2]]
    assert snapshot.paths == tuple(os.fsencode(path) for path in paths[:2])
    for name, path in (("vda", paths[0]), ("vdb.qcow2", paths[1])):
        assert bytes_of(repository, snapshot, f"/disks/{name}.raw") == path.read_bytes()
    assert [volume.name for volume in snapshot.volumes] == [
        "vda",
        "vdb.qcow2",
        "vda1",
        "vda2",
        "vdb.qcow2p1",
        "vdb.qcow2p2",
    ]


def test_volumes_are_restored_and_verified(tmp_path: Path) -> None:
    path = disk_in(tmp_path / "disk.raw")
    repository = new_repository()
    snapshot = make_image(repository, path)
    options = RestoreOptions(verify=True)
    result = trio.run(partial(restore, repository, snapshot, b"/", os.fsencode(tmp_path / "out"), options, ignore))
    assert (result.errors, result.damaged, result.files) == (0, 0, 4)
    assert (tmp_path / "out/disks/disk.raw").read_bytes() == path.read_bytes()
    assert (tmp_path / "out/volumes/disk2.raw").read_bytes() == path.read_bytes()[6 * MIB : 46 * MIB]
    assert (tmp_path / "out/disks/disk.raw").stat().st_blocks * 512 < 20 * MIB


def test_a_disk_that_shrinks_or_cannot_be_read_ends_the_image(tmp_path: Path) -> None:
    path = disk_in(tmp_path / "disk.raw")
    source = open_disk(os.fsencode(path))
    os.truncate(path, 30 * MIB)
    repository = new_repository()
    shrunk = pytest.RaisesExc(SourceError, match="smaller")
    with pytest.RaisesGroup(shrunk, flatten_subgroups=True, allow_unwrapped=True):
        image(repository, [source], ImageOptions(sizes=SMALL), ignore)
    source.close()
    assert not list(repository.store.list("snapshots/"))


@pytest.mark.parametrize(
    ("path", "says"), [("/nosuch", "No such file"), ("/dev/null", "is no disk"), ("/tmp", "is no disk|directory")]
)
def test_what_is_no_disk_is_refused(path: str, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        open_disk(path.encode())


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SourceError, match="is no disk"):
        open_disk(os.fsencode(tmp_path / "fifo"))


def test_an_image_has_a_name_that_a_folder_can_have(tmp_path: Path) -> None:
    for name in ("..", "a/b", " "):
        with pytest.raises(UsageError, match="letters, digits"):
            run_image(new_repository(), disk_in(tmp_path / "disk"), name=name)


def test_an_empty_file_and_a_name_that_is_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(SourceError, match="no bytes"):
        open_disk(os.fsencode(tmp_path / "empty"))
    (tmp_path / "some").write_bytes(b"some")
    with pytest.raises(UsageError, match="NAME="):
        open_disk(os.fsencode(tmp_path / "some"), "../x")


def test_disks_of_this_machine_are_told_apart_from_what_is_made_of_them(tmp_path: Path) -> None:
    for name, sectors in (("vda", 8), ("sdb", 4), ("loop0", 8), ("dm-0", 8), ("sr0", 8), ("sdc", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(f"{sectors}\n")
    assert attached_disks(tmp_path) == {"sdb": 2048, "vda": 4096}
    assert attached_disks(tmp_path / "nosuch") == {}


def test_disks_that_are_not_in_the_image_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    monkeypatch.setattr(image_module, "attached_disks", lambda: {"vdz": 5 << 30})
    # A file's own disks are another machine's.
    run_image(new_repository(), disk_in(tmp_path / "disk"), report=events.append)
    assert not [event for event in events if isinstance(event, Remark) and "attached" in event.text]
    monkeypatch.setattr(RawDisk, "device", 5)
    run_image(new_repository(), tmp_path / "disk", report=events.append)
    assert sum("vdz (5.0 GiB) is attached" in event.text for event in events if isinstance(event, Remark)) == 1
