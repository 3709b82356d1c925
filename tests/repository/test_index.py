"""The index against a dictionary: segments, runs, merges, duplicates, caches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.codec.keys import new_keyring
from backupfs.codec.sealing import HEADER, Kind, hash_object
from backupfs.errors import DamagedObject, ObjectMissing
from backupfs.ids import ChunkId, ObjectId
from backupfs.repository import index as index_module
from backupfs.repository import layout
from backupfs.repository.index import Index, merged_windows
from backupfs.repository.marks import Marks
from backupfs.repository.pack import ROW, PackRef
from backupfs.repository.run import Location, open_run, run_in_memory, write_run
from backupfs.repository.segment import PAGE_ROWS, Segment, decode_segment, encode_segment, renumber, sort_rows
from backupfs.stores.memory import MemoryStore
from backupfs.stores.passing import PassingStore

KEYRING = new_keyring()
KIND = Kind.DATA_INDEX

Model = dict[ChunkId, set[Location]]


def pack_ref(number: int) -> PackRef:
    return PackRef(ObjectId(hash_object(b"pack %d" % number)), 1000 + number, bytes([number % 256]) * HEADER.size)


def chunk_id(number: int) -> ChunkId:
    return ChunkId(hash_object(b"chunk %d" % number))


def segment_of(rows: list[tuple[ChunkId, int, int]], packs: list[int]) -> Segment:
    """rows: (chunk, which of the packs, offset)."""
    data = b"".join(ROW.pack(chunk, pack, 48 + offset, 100, offset, 7) for chunk, pack, offset in rows)
    return Segment(sort_rows(data), tuple(pack_ref(number) for number in packs))


def add_to(model: Model, segment: Segment) -> None:
    for chunk, pack, block, stored, offset, length in ROW.iter_unpack(segment.rows):
        model.setdefault(ChunkId(chunk), set()).add(Location(segment.packs[pack], block, stored, offset, length))


def put(store: MemoryStore, segment: Segment) -> ObjectId:
    data = encode_segment(KIND, KEYRING, segment)
    segment_id = hash_object(data)
    store.put(layout.key_of(KIND, segment_id), data)
    return segment_id


def assert_equal(index: Index, model: Model) -> None:
    for chunk, places in model.items():
        assert set(index.find(chunk)) == places
        assert {location for _, location in index.locate(chunk)} == places
        assert index.has(chunk)
    for number in range(3):
        absent = chunk_id(10**9 + number)
        assert not index.has(absent)
        assert list(index.find(absent)) == []
    seen: Model = {}
    for run, window in index.windows(50):
        add_to(seen, Segment(window, run.packs))
    assert seen == model
    positions = [position for chunk in model for position, _ in index.locate(chunk)]
    assert len(positions) == len(set(positions))
    assert all(0 <= position < index.count for position in positions)


segments = st.lists(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=120),
    min_size=1,
    max_size=14,
)


@given(segments, st.booleans(), st.integers(1, 200))
def test_an_index_is_a_dictionary_of_sets(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[list[tuple[int, int, int]]], cached: bool, merge_rows: int
) -> None:
    store, model = MemoryStore(), Model()
    cache = tmp_path_factory.mktemp("index") if cached else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_MERGE_ROWS", merge_rows)
        index = Index(store, KIND, KEYRING, cache)
        for number, rows in enumerate(drawn):
            packs = [number * 2 + at for at in range(4)]  # segments share packs
            segment = segment_of([(chunk_id(chunk), pack, offset) for chunk, pack, offset in rows], packs)
            add_to(model, segment)
            if number % 3:
                index.add(segment, put(store, segment))
            else:
                put(store, segment)
                assert index.refresh()
        assert not index.refresh()
        assert_equal(index, model)
        assert_equal(again := Index(store, KIND, KEYRING, cache), {})
        again.refresh()
        assert_equal(again, model)
        third = Index(store, KIND, KEYRING, None)
        third.refresh()
        assert_equal(third, model)


def test_lookups_stay_right_while_runs_are_merged(tmp_path: Path) -> None:
    store, model = MemoryStore(), Model()
    index = Index(store, KIND, KEYRING, tmp_path)
    for number in range(40):
        segment = segment_of([(chunk_id(number * 97 + at), 0, at % 5) for at in range(200)], [number])
        index.add(segment, put(store, segment))
        add_to(model, segment)
    assert len(list(tmp_path.glob("*.run"))) <= 9
    assert not list(tmp_path.glob(".*"))
    assert_equal(index, model)
    assert index.packs().keys() == {pack_ref(number).pack_id for number in range(40)}
    reopened = Index(store, KIND, KEYRING, tmp_path)
    reopened.refresh()
    assert_equal(reopened, model)


def test_many_copies_of_one_chunk_are_all_found() -> None:
    rows = [(chunk_id(1), 0, offset) for offset in range(500)] + [(chunk_id(at), 0, 0) for at in range(2, 400)]
    run = run_in_memory(segment_of(rows, [0]), frozenset())
    assert len(list(run.find(chunk_id(1)))) == 500
    assert len(list(run.find(chunk_id(2)))) == 1


def test_a_cache_of_segments_that_are_gone_is_not_used(tmp_path: Path) -> None:
    store = MemoryStore()
    kept = put(store, segment_of([(chunk_id(1), 0, 0)], [0]))
    gone = put(store, segment_of([(chunk_id(2), 0, 0)], [1]))
    Index(store, KIND, KEYRING, tmp_path).refresh()
    store.delete(layout.key_of(KIND, gone))
    index = Index(store, KIND, KEYRING, tmp_path)
    index.refresh()
    assert index.has(chunk_id(1))
    assert not index.has(chunk_id(2))
    assert [path.stem for path in tmp_path.glob("*.run")] == [kept.hex()]


@pytest.mark.expected_log("cannot be written")
def test_without_a_cache_folder_everything_stays_in_memory(tmp_path: Path) -> None:
    store = MemoryStore()
    put(store, segment_of([(chunk_id(1), 0, 0)], [0]))
    (tmp_path / "file").write_bytes(b"")
    index = Index(store, KIND, KEYRING, tmp_path / "file" / "cache")
    index.refresh()
    assert index.has(chunk_id(1))


@pytest.mark.expected_log("goes on without it")
def test_a_segment_that_is_listed_and_not_given_is_asked_for_again(caplog: pytest.LogCaptureFixture) -> None:
    """A mount that goes on for months must not do without it for so long."""

    class Late(PassingStore):
        missing = 2

        def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
            if self.missing:
                self.missing -= 1
                raise ObjectMissing(f"object {key} is not there")
            return super().get(key, start=start, length=length)

    store = MemoryStore()
    segment_id = put(store, segment_of([(chunk_id(1), 0, 0)], [0]))
    index = Index(Late(store), KIND, KEYRING, None)
    for _ in range(2):
        assert not index.refresh()
        assert list(index.damaged) == [layout.key_of(KIND, segment_id)]
    assert len(caplog.records) == 1
    assert index.refresh()
    assert index.damaged == {}
    assert index.has(chunk_id(1))


@pytest.mark.expected_log("goes on without it")
def test_a_segment_under_another_ones_name_is_left_out() -> None:
    store = MemoryStore()
    first = put(store, segment_of([(chunk_id(1), 0, 0)], [0]))
    second = put(store, segment_of([(chunk_id(2), 0, 0)], [1]))
    store.put(layout.key_of(KIND, first), store.get(layout.key_of(KIND, second)))
    index = Index(store, KIND, KEYRING, None)
    index.refresh()
    assert list(index.damaged) == [layout.key_of(KIND, first)]
    assert index.has(chunk_id(2))
    store.delete(layout.key_of(KIND, first))
    index.refresh()
    assert not index.damaged


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 2), st.integers(0, 9)), max_size=300))
def test_a_segment_decodes_to_what_was_encoded(drawn: list[tuple[int, int, int]]) -> None:
    segment = segment_of([(chunk_id(chunk), pack, offset) for chunk, pack, offset in drawn], [1, 2, 3])
    data = bytes(encode_segment(KIND, KEYRING, segment))
    assert decode_segment(data, KIND, KEYRING, "it") == segment


def test_a_segment_of_several_pages_decodes_and_is_sorted() -> None:
    segment = segment_of([(chunk_id(at), 0, 0) for at in range(2 * PAGE_ROWS + 5)], [0])
    data = bytes(encode_segment(KIND, KEYRING, segment))
    assert decode_segment(data, KIND, KEYRING, "it") == segment
    ids = [row[0] for row in ROW.iter_unpack(segment.rows)]
    assert ids == sorted(ids)
    for at in range(0, len(data), 997):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises(DamagedObject):
            decode_segment(changed, KIND, KEYRING, "it")


@given(st.integers(0, 2**31 - 1), st.lists(st.integers(0, 2**31), max_size=5))
def test_ordinals_of_packs_move_and_nothing_else(first: int, ordinals: list[int]) -> None:
    rows = b"".join(ROW.pack(chunk_id(1), ordinal, 1, 2, 3, 4) for ordinal in ordinals)
    moved = list(ROW.iter_unpack(renumber(rows, first)))
    assert moved == [(chunk_id(1), ordinal + first, 1, 2, 3, 4) for ordinal in ordinals]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 129, 1000])
@pytest.mark.parametrize("window", [1, 63, 64, 65, 1000])
def test_a_run_file_is_the_run_that_was_written(tmp_path: Path, size: int, window: int) -> None:
    segment = segment_of([(chunk_id(at), 0, 0) for at in range(size)], [0])
    step = window * ROW.size
    path = tmp_path / "a.run"
    sources = frozenset([ObjectId(bytes(32))])
    write_run(path, (segment.rows[at : at + step] for at in range(0, size * ROW.size, step)), segment.packs, sources)
    run = open_run(path)
    assert run.is_intact()
    assert (run.count, run.packs, run.sources) == (size, segment.packs, sources)
    assert b"".join(run.windows(7)) == segment.rows
    for at in range(size):
        ((number, location),) = run.locate(chunk_id(at))
        assert segment.rows[number * ROW.size :][:32] == chunk_id(at)
        assert location.pack == pack_ref(0)
    assert not run.has(chunk_id(size))
    os.unlink(path)
    assert size == 0 or run.has(chunk_id(0))


def test_a_garbled_run_file_is_noticed(tmp_path: Path) -> None:
    segment = segment_of([(chunk_id(at), 0, 0) for at in range(100)], [0])
    path = tmp_path / "a.run"
    write_run(path, iter([segment.rows]), segment.packs, frozenset())
    data = path.read_bytes()
    for at in range(0, len(data), 37):
        path.write_bytes(data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :])
        try:
            assert not open_run(path).is_intact()
        except DamagedObject:
            continue


@pytest.mark.expected_log("it is made again")
def test_a_garbled_run_is_never_merged_into_a_sound_one(tmp_path: Path) -> None:
    store, model = MemoryStore(), Model()
    index = Index(store, KIND, KEYRING, tmp_path)
    for number in range(20):
        segment = segment_of([(chunk_id(number * 97 + at), 0, at % 5) for at in range(50)], [number])
        if number == 8:
            for path in tmp_path.glob("*.run"):
                data = bytearray(path.read_bytes())
                data[ROW.size * 7 + 3] ^= 1
                path.write_bytes(data)
        index.add(segment, put(store, segment))
        add_to(model, segment)
    assert list(tmp_path.glob("merged-*"))
    assert_equal(index, model)
    again = Index(store, KIND, KEYRING, tmp_path)
    again.refresh()
    assert_equal(again, model)


@pytest.mark.expected_log("it is made again")
def test_a_garbled_run_that_cannot_be_deleted_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, model = MemoryStore(), Model()
    segment = segment_of([(chunk_id(at), 0, at) for at in range(50)], [0])
    put(store, segment)
    add_to(model, segment)
    Index(store, KIND, KEYRING, tmp_path).refresh()
    (path,) = tmp_path.glob("*.run")
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(index_module, "_forget_path", lambda path: None)
    index = Index(store, KIND, KEYRING, tmp_path)
    index.refresh()
    assert index.drop_garbled_runs()
    assert_equal(index, model)


def test_merging_holds_a_few_windows_only(tmp_path: Path) -> None:
    """Four runs of 100,000 rows are 21 MB; merging them takes less, in a process of its own that says its peak."""
    script = f"""
import os, resource, sys
from pathlib import Path
from backupfs.repository import index
from backupfs.repository.pack import ROW
from backupfs.repository.run import open_run, write_run
from tests.repository.test_index import pack_ref
index._MERGE_ROWS = 1 << 12
parts = []
for number in range(4):
    rows = b"".join(sorted(os.urandom(32) + ROW.pack(b"", 0, 1, 2, 3, 4)[32:] for _ in range(100_000)))
    path = Path({str(tmp_path)!r}) / f"{{number}}.run"
    write_run(path, iter([rows]), (pack_ref(number),), frozenset())
    del rows
    parts.append(open_run(path))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = 0
last = b""
for window in index.merged_windows(parts):
    assert last < window
    total += len(window)
    last = window[-ROW.size:]
assert total == 4 * 100_000 * ROW.size
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    project = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=project)
    grown_kib = int(done.stdout)
    assert grown_kib < 8 << 10


def test_merged_rows_are_those_of_all_runs_each_once() -> None:
    same = segment_of([(chunk_id(at), 0, 0) for at in range(300)], [0])
    runs = [run_in_memory(same, frozenset()), run_in_memory(segment_of([(chunk_id(5), 0, 1)], [9]), frozenset())]
    rows = b"".join(merged_windows(runs))
    assert len(rows) == 301 * ROW.size
    assert {row[1] for row in ROW.iter_unpack(rows)} == {0, 1}


@given(st.sets(st.integers(0, 20_000)), st.integers(0, 20_000))
def test_marks_are_a_set_of_positions(positions: set[int], count: int) -> None:
    marks = Marks(count)
    for position in positions:
        marks.add(position)
    assert len(marks) == len(positions)
    assert all(position in marks for position in positions)
    assert all((position in marks) == (position in positions) for position in range(0, 20_001, 13))
