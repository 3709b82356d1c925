"""Stored volumes read as disks: any part of them, in this process and in one that can reach no repository."""

import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.disks import sandbox
from backupfs.disks.layout import read_layout
from backupfs.errors import DamagedObject, SourceError
from backupfs.forked import Line, fork
from backupfs.ids import SnapshotId
from backupfs.snapshots.snapshot import IMAGE, Snapshot, Statistics
from backupfs.snapshots.volumes import DISK, RANGES, Volume
from backupfs.stores.directory import DirectoryStore
from backupfs.usecases.stored_disk import StoredDisk
from tests.builders import folders_in, new_repository, reopened
from tests.disks.test_luks import PASSPHRASE, encrypted
from tests.usecases.test_image import MIB, disk_in, make_image


def stored(tmp_path: Path) -> tuple[bytes, list[StoredDisk]]:
    path = disk_in(tmp_path / "disk.raw", size=70 * MIB + 512 * 3)
    (tmp_path / "store").mkdir()
    repository = new_repository(DirectoryStore(tmp_path / "store"), folders_in(tmp_path))
    snapshot = make_image(repository, path)
    repository = reopened(repository)
    return path.read_bytes(), [StoredDisk(repository, snapshot, number) for number in range(len(snapshot.volumes))]


def test_any_part_of_a_stored_volume_is_what_was_there(tmp_path: Path) -> None:
    plain, disks = stored(tmp_path)
    contents = [plain, plain[MIB : 6 * MIB], plain[6 * MIB : 46 * MIB]]
    assert [disk.size for disk in disks] == [len(content) for content in contents]
    assert [disk.path.partition(b":")[2] for disk in disks[:2]] == [b"/disks/disk.raw", b"/volumes/disk1.raw"]
    chooser = random.Random(3)
    for disk, content in zip(disks, contents, strict=True):
        assert disk.read(0, disk.size) == content
        for _ in range(300):
            at, length = chooser.randrange(disk.size), chooser.choice((1, 512, 70_000, 5 * MIB))
            assert disk.read(at, length) == content[at : at + length]
    assert [volume.name for volume in read_layout(disks[:1]).volumes] == ["disk1", "disk2"]


def test_an_encrypted_volume_is_read_as_plain_bytes(tmp_path: Path) -> None:
    plain = os.urandom(MIB)
    path = tmp_path / "disk.raw"
    path.write_bytes(encrypted(tmp_path, plain))
    repository = new_repository()
    snapshot = make_image(repository, path, luks_passphrases=(PASSPHRASE,))
    disk = StoredDisk(reopened(repository), snapshot, 1)
    assert disk.read(0, MIB) == plain
    chooser = random.Random(3)
    for _ in range(100):
        at, length = chooser.randrange(MIB), chooser.choice((1, 7, 512, 70_000))
        assert disk.read(at, length)[: MIB - at] == plain[at : at + length]


def test_what_is_in_no_range_of_data_is_zero(tmp_path: Path) -> None:
    plain, disks = stored(tmp_path)
    at = data = 0
    for low, high in disks[0].data_ranges(0, len(plain)):
        assert at <= low < high
        assert not any(plain[at:low])
        data += high - low
        at = high
    assert not any(plain[at:])
    assert data < 20 * MIB
    chooser = random.Random(4)
    whole = [*disks[0].data_ranges(0, len(plain))]
    for _ in range(100):
        start, end = sorted(chooser.randrange(len(plain)) for _ in range(2))
        clipped = [(max(low, start), min(high, end)) for low, high in whole if low < end and high > start]
        assert [*disks[0].data_ranges(start, end)] == clipped


@given(data=st.data())
def test_reading_goes_through_volumes_of_volumes(data: st.DataObject) -> None:
    """Volumes of inline bytes and holes need no repository's data, so many of them can be tried."""
    plain, content = b"", []
    for _ in range(data.draw(st.integers(1, 5))):
        part = data.draw(st.binary(min_size=1, max_size=30))
        hole = data.draw(st.integers(1, 9))
        content += [[len(part), 3, part], [hole, 0]]
        plain += part + bytes(hole)
    volumes, plains = [Volume("a", DISK, len(plain), len(plain), content)], [plain]
    for number in range(1, 4):
        ranges, plain = [], b""
        for _ in range(data.draw(st.integers(1, 4))):
            below = data.draw(st.integers(0, number - 1))
            start = data.draw(st.integers(0, len(plains[below]) - 1))
            length = data.draw(st.integers(1, len(plains[below]) - start))
            ranges.append((length, below, start))
            plain += plains[below][start : start + length]
        volumes.append(Volume(f"v{number}", RANGES, len(plain), len(plain), b"", tuple(ranges)))
        plains.append(plain)
    repository = REPOSITORY
    disk = StoredDisk(repository, snapshot_of(*volumes), 3)
    start = data.draw(st.integers(0, disk.size))
    length = data.draw(st.integers(0, disk.size - start))
    assert disk.read(start, length) == plains[3][start : start + length]
    for low, high in disk.data_ranges(0, disk.size):
        plain = plain[:low] + bytes(high - low) + plain[high:]
    assert not any(plain)


def snapshot_of(*volumes: Volume) -> Snapshot:
    return Snapshot(
        IMAGE, bytes(16), "host", 1, b"", 0, 0, (), (), b"", b"", Statistics(), volumes=volumes,
        snapshot_id=SnapshotId(bytes(32)),
    )  # type: ignore[arg-type]  # fmt: skip


REPOSITORY = new_repository()


def test_a_place_outside_of_the_disk_and_a_content_that_does_not_add_up_are_refused() -> None:
    disk = StoredDisk(REPOSITORY, snapshot_of(Volume("a", DISK, 10, 10, [[10, 3, b"0123456789"]])), 0)
    for offset, length in ((-1, 1), (5, 6), (11, 0)):
        with pytest.raises(SourceError, match="ends at 10"):
            disk.read_into(memoryview(bytearray(length)), offset)
    short = StoredDisk(REPOSITORY, snapshot_of(Volume("a", DISK, 11, 10, [[10, 3, b"0123456789"]])), 0)
    with pytest.raises(DamagedObject, match="add up"):
        short.read(0, 11)


def test_a_confined_process_reads_through_another_one_and_hears_of_damage(tmp_path: Path) -> None:
    plain, [disk, *_] = stored(tmp_path)
    disk._repository.data.keep_at_most(64 << 10)

    def run(line: Line) -> None:
        kept = disk.descriptors()
        sandbox.confine([*kept, *line.descriptors])
        try:
            (tmp_path / "written").write_bytes(b"")
        except PermissionError:
            line.send("confined")
        for at in (0, 6 * MIB - 7, disk.size - 9):
            line.send(disk.read(at, 3 * MIB))
        line.send("read")
        line.receive()
        refused = 0
        for at in range(0, disk.size, 4 * MIB):
            try:
                line.send(disk.read(at, 4 * MIB))
            except SourceError as error:
                line.send(str(error))
                refused += 1
        line.send(refused)

    process = fork(run, str, [])
    messages = process.messages(60, [])
    assert next(messages) == "confined"
    for at in (0, 6 * MIB - 7, disk.size - 9):
        assert next(messages) == plain[at : at + 3 * MIB]
    assert next(messages) == "read"
    shutil.rmtree(tmp_path / "store/packs/data")
    process.send_now("go on")
    *parts, refused = messages
    process.wait()
    told = [part for part in parts if isinstance(part, str)]
    assert refused == len(told) > 0
    assert all("packs/data" in text for text in told)
    assert all(
        any(part == plain[at : at + 4 * MIB] for at in range(0, len(plain), 4 * MIB))
        for part in parts
        if isinstance(part, bytes)
    )


def test_what_reads_for_a_process_ends_with_it(tmp_path: Path) -> None:
    _, [disk, *_] = stored(tmp_path)
    assert disk.descriptors() == disk.descriptors()
    assert disk._server is not None
    pid = disk._server.pid
    assert disk.read(512, 8) == b"EFI PART"
    disk.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert disk.read(512, 8) == b"EFI PART"
