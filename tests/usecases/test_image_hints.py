"""Images by maps of what changed: what is not read, and what happens when a map is wrong."""

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backupfs.disks.hints import Claim, Hints, parse_hints
from backupfs.disks.source import DiskSource, open_disk
from backupfs.errors import UsageError
from backupfs.ids import short
from backupfs.repository.repository import Repository
from backupfs.snapshots.snapshot import FREE_LEFT_OUT, Snapshot
from backupfs.usecases import image as image_module
from backupfs.usecases import image_hints
from backupfs.usecases.events import Event, Remark
from backupfs.usecases.image_hints import DiskBefore, DiskHints, image_of_hints, load_hints, look
from backupfs.usecases.image_scan import DISK_CHUNK
from tests.builders import back_up, new_repository, reopened, run_check
from tests.usecases.test_image import bytes_of, make_image, run_image

MIB = 1 << 20
SIZE = 70 * MIB + 512 * 3


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk of random bytes, zeros and holes."""
    chooser = random.Random(5)
    path = tmp_path / "vda.raw"
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for at in range(0, SIZE, 2 * MIB):
            file.seek(at)
            file.write(chooser.randbytes(min(MIB, SIZE - at)))
        file.seek(11 * MIB)
        file.write(bytes(MIB))
    return path


def write(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def hints_of(text: str, size: int = SIZE) -> dict[str, Hints]:
    return {"vda": parse_hints(text.encode(), size, "changes.map")}


def all_but(at: int, length: int, snapshot: Snapshot) -> str:
    """Return a map that says that only one part changed."""
    end = at + length
    return f"since {short(snapshot.snapshot_id)}\n0 {at} same\n{at} {length} data\n{end} {SIZE - end} same\n"


def remarks_of(events: list[Event]) -> str:
    return " ".join(event.text for event in events if isinstance(event, Remark))


@pytest.mark.parametrize("scanners", [1, 3])
def test_an_image_by_a_map_is_the_disk_and_stores_what_changed(
    scanners: int, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_module, "scanner_count", lambda: scanners)
    repository = new_repository()
    first = make_image(repository, disk)
    write(disk, 20 * MIB + 5, b"changed")
    events: list[Event] = []
    result = run_image(repository, disk, hints=hints_of(all_but(20 * MIB, 4096, first)), report=events.append)
    assert result.snapshot is not None
    assert (result.data.chunks, result.parent) == (1, first.snapshot_id)
    assert bytes_of(reopened(repository), result.snapshot, "/disks/vda.raw") == disk.read_bytes()
    # It is the same as if all had been read, list pages and all.
    assert make_image(repository, disk).volumes == result.snapshot.volumes
    assert "by the map changes.map, 0.07 of 0.07 GiB of the disk vda need not be read; 64 chunks" in remarks_of(events)
    assert not run_check(repository, read_data=True).damaged


def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be looked at."""
    monkeypatch.setattr(image_hints, "_LEAST", 0)
    monkeypatch.setattr(image_hints, "_MOST", 0)


def test_what_a_map_says_is_not_read(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown by a map that lies about one chunk, when none is looked at."""
    unseen(monkeypatch)
    repository = new_repository()
    first = make_image(repository, disk)
    plain = bytearray(disk.read_bytes())
    write(disk, 20 * MIB, os.urandom(DISK_CHUNK))
    write(disk, SIZE - 5, b"end..")
    lie = make_image(repository, disk, hints=hints_of(all_but(SIZE - 512, 512, first)))
    plain[-5:] = b"end.."
    assert bytes_of(repository, lie, "/disks/vda.raw") == plain
    zero = make_image(repository, disk, hints=hints_of(f"{40 * MIB} {MIB} zero"))
    plain[20 * MIB : 20 * MIB + DISK_CHUNK] = disk.read_bytes()[20 * MIB : 20 * MIB + DISK_CHUNK]
    plain[40 * MIB : 41 * MIB] = bytes(MIB)
    assert bytes_of(repository, zero, "/disks/vda.raw") == plain


@pytest.mark.parametrize("claim", ["same", "zero"])
def test_a_map_that_is_wrong_costs_reading_the_disk_and_is_said_loudly(claim: str, disk: Path) -> None:
    repository = new_repository()
    first = make_image(repository, disk)
    # All chunks that are claimed are others: whichever are looked at, it shows.
    write(disk, 30 * MIB, os.urandom(2 * MIB))
    events: list[Event] = []
    text = f"since {short(first.snapshot_id)}\n{30 * MIB} {2 * MIB} {claim}"
    snapshot = make_image(repository, disk, hints=hints_of(text), report=events.append)
    assert "THE MAP changes.map IS WRONG: the disk vda is another at byte 31,4" in remarks_of(events)
    assert bytes_of(repository, snapshot, "/disks/vda.raw") == disk.read_bytes()


def test_a_map_of_one_disk_says_nothing_of_others(disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "vdb"
    other.write_bytes(os.urandom(2 * MIB))
    repository = new_repository()
    first = make_image(repository, disk, other)
    write(other, MIB, os.urandom(MIB))
    write(disk, 0, os.urandom(MIB))
    snapshot = make_image(repository, disk, other, hints=hints_of(all_but(0, MIB, first)))
    assert bytes_of(repository, snapshot, "/disks/vda.raw") == disk.read_bytes()
    assert bytes_of(repository, snapshot, "/disks/vdb.raw") == other.read_bytes()


def test_a_map_counts_from_the_image_that_it_names_and_no_other(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unseen(monkeypatch)
    repository = new_repository()
    first = make_image(repository, disk)
    before = disk.read_bytes()
    write(disk, 20 * MIB, os.urandom(DISK_CHUNK))
    make_image(repository, disk)
    # Not from the last one: the chunk that differs between the two comes from the first.
    snapshot = make_image(repository, disk, hints=hints_of(all_but(0, 4096, first)))
    assert snapshot.parent == first.snapshot_id
    assert bytes_of(repository, snapshot, "/disks/vda.raw") == before


def test_what_a_map_cannot_count_from_is_refused_before_anything_is_read(disk: Path) -> None:
    repository = new_repository()
    first, second = make_image(repository, disk), make_image(repository, disk)
    files = back_up(repository, disk)
    text = all_but(0, 4096, first)
    for hints, says in (
        (hints_of(text.replace(short(first.snapshot_id), "0" * 16)), "there is no snapshot 0000"),
        (hints_of(all_but(0, 4096, files)), "is no image of disks"),
        ({"vdb": hints_of(text)["vda"]}, "has no disk vdb: call the disk as it was called there"),
        ({**hints_of(text), "x": hints_of(all_but(0, 4096, second))["vda"]}, "count from different images"),
    ):
        with pytest.raises(UsageError, match=says):
            run_image(repository, disk, hints=hints)
    with pytest.raises(UsageError, match="--force compares with no image"):
        run_image(repository, disk, hints=hints_of(text), force=True)


def test_a_disk_that_grew_or_shrank_is_read_where_the_image_has_no_chunk_of_it(disk: Path) -> None:
    repository = new_repository()
    first = make_image(repository, disk)
    # The map says that its last chunk, a short one, is the same, and what came behind.
    os.truncate(disk, SIZE + 5 * MIB)
    text = f"since {short(first.snapshot_id)}\n0 {SIZE + 5 * MIB} same\n"
    snapshot = make_image(repository, disk, hints=hints_of(text, SIZE + 5 * MIB))
    assert bytes_of(repository, snapshot, "/disks/vda.raw") == disk.read_bytes()
    # Cut as ever, too.
    assert make_image(repository, disk).volumes == snapshot.volumes
    for size in (SIZE + 3 * MIB + 7, SIZE - 9 * MIB - 1):
        os.truncate(disk, size)
        write(disk, size - 3, b"end")
        text = f"since {short(first.snapshot_id)}\n0 {SIZE - 10 * MIB} same\n"
        snapshot = make_image(repository, disk, hints=hints_of(text, size))
        assert bytes_of(repository, snapshot, "/disks/vda.raw") == disk.read_bytes()


@pytest.mark.expected_log("is not in memory")
def test_what_is_missing_in_the_repository_is_read(disk: Path) -> None:
    repository = new_repository()
    first = make_image(repository, disk)
    for info in list(repository.store.list("packs/data/"))[::2]:
        repository.store.delete(info.key)
    repository = reopened(repository)
    snapshot = make_image(repository, disk, hints=hints_of(all_but(0, 4096, first)))
    assert bytes_of(reopened(repository), snapshot, "/disks/vda.raw") == disk.read_bytes()


@pytest.mark.expected_log("is damaged")
def test_where_the_image_is_damaged_the_disk_is_read(disk: Path) -> None:
    repository = new_repository()
    first = make_image(repository, disk)
    for info in list(repository.store.list("packs/tree/")):
        data = bytearray(repository.store.get(info.key))
        data[len(data) // 2] ^= 1
        repository.store.put(info.key, bytes(data))
    repository = reopened(repository)
    snapshot = make_image(repository, disk, hints=hints_of(all_but(0, 4096, first)))
    assert bytes_of(reopened(repository), snapshot, "/disks/vda.raw") == disk.read_bytes()


def test_those_who_are_trusted_are_not_looked_after(disk: Path) -> None:
    repository = new_repository()
    first = make_image(repository, disk)
    before = disk.read_bytes()
    write(disk, 0, os.urandom(MIB))
    hints = Hints(((0, SIZE, Claim.SAME),), first.snapshot_id.hex(), is_trusted=True)
    events: list[Event] = []
    result = run_image(repository, disk, hints={"vda": hints}, report=events.append)
    assert (remarks_of(events), result.data.chunks) == ("vda: no file system that is known", 0)
    assert result.snapshot is not None
    assert bytes_of(repository, result.snapshot, "/disks/vda.raw") == before


class Zeros(DiskSource):
    """A disk without a byte that is not zero, which notes what is read."""

    form = "raw"

    def __init__(self, size: int) -> None:
        super().__init__("vda", b"/dev/vda")
        self.size = size
        self.read_at: list[int] = []

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.read_at.append(offset)
        buffer[:] = bytes(len(buffer))

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        yield start, end

    def descriptors(self) -> list[int]:
        return []

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("chunks", "looks"), [(10, 10), (60, 60), (5000, 64), (20_000, 200), (500_000, 4096)])
def test_one_in_a_hundred_is_looked_at_but_no_less_than_64_and_no_more_than_4096(chunks: int, looks: int) -> None:
    size = chunks * 2 * DISK_CHUNK
    spans = tuple((at, at + 5 * DISK_CHUNK, Claim.ZERO) for at in range(0, size, 10 * DISK_CHUNK))
    first, second = Zeros(size), Zeros(size)
    for source in (first, second):
        assert look(DiskHints(Hints(spans), None), source, DISK_CHUNK, bytes(32)) == image_hints.Looked(looks, None)
        assert source.read_at == sorted({*source.read_at})
        assert all(at // DISK_CHUNK % 10 < 5 and at % DISK_CHUNK == 0 for at in source.read_at)
    assert (first.read_at != second.read_at) == (looks < chunks)


def before_of(repository: Repository, snapshot: Snapshot) -> DiskBefore:
    load, index = repository.trees.load, repository.data_index
    return DiskBefore(snapshot, snapshot.volumes[0], load, index, DISK_CHUNK, lambda: None)


def test_zeros_of_an_image_whose_free_space_was_left_out_say_nothing_of_a_disk(disk: Path) -> None:
    repository = new_repository()
    snapshot = make_image(repository, disk)
    left_out = before_of(repository, replace(snapshot, traits=snapshot.traits | FREE_LEFT_OUT))
    hints = Hints(((0, SIZE, Claim.SAME),))
    everything = [DiskHints(hints, before).taken(0, 4 * MIB, Claim.SAME) for before in (
        before_of(repository, snapshot), left_out,
    )]  # fmt: skip
    holes, none = ([(start, end) for start, end, stands in found if not stands] for found in everything)
    assert holes == none == [(MIB, 2 * MIB), (3 * MIB, 4 * MIB)]
    trusted = DiskHints(replace(hints, is_trusted=True), left_out)
    assert (MIB, 2 * MIB, b"") in list(trusted.taken(0, 4 * MIB, Claim.SAME))
    assert (MIB, 2 * MIB, None) in list(DiskHints(hints, left_out).taken(0, 4 * MIB, Claim.SAME))


def test_chunks_that_the_index_lacks_are_read(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = new_repository()
    snapshot = make_image(repository, disk)
    monkeypatch.setattr(repository.data_index, "_runs", [])
    assert list(before_of(repository, snapshot).taken(0, 2 * MIB, True)) == [(0, MIB, None), (MIB, 2 * MIB, b"")]


def test_maps_are_told_apart_by_the_names_of_disks(disk: Path, tmp_path: Path) -> None:
    sources = [open_disk(os.fsencode(disk)), open_disk(os.fsencode(disk), "vdb")]
    path = os.fsencode(tmp_path / "map")
    (tmp_path / "map").write_text("0 4096 zero\n")
    assert load_hints([("vdb", path)], "", sources)["vdb"].spans == ((0, 4096, Claim.ZERO),)
    assert load_hints([("", path)], "", sources[:1]).keys() == {"vda"}
    for maps, says in (
        ([("", path)], "there are several disks: give one of vda, vdb, as in DISK=FILE"),
        ([("sda", path)], "there is no disk sda"),
        ([("vda", path)] * 2, "has two maps"),
    ):
        with pytest.raises(UsageError, match=says):
            load_hints(maps, "", sources)
    for source in sources:
        source.close()
    assert image_of_hints({}, None) is None  # type: ignore[arg-type]
