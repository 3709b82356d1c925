"""What is kept on this machine, what of it is believed, and how much there may be."""

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3

from backupfs.errors import DamagedObject, ObjectMissing
from backupfs.stores import kept_files
from backupfs.stores.caching import PART_SIZE, CachingStore
from backupfs.stores.kept_files import KeptFiles
from backupfs.stores.memory import MemoryStore
from backupfs.stores.store import Store
from tests.faults import CountingStore

PACK = os.urandom(5 * PART_SIZE + 1000)
PACK_KEY = "packs/tree/" + "ab" * 32
SMALL = b"a snapshot"
SMALL_KEY = "snapshots/" + blake3(SMALL).hexdigest()


@pytest.fixture
def far() -> CountingStore:
    store = CountingStore(MemoryStore())
    store.inner.put(PACK_KEY, PACK)
    store.inner.put(SMALL_KEY, SMALL)
    return store


def cached(far: Store, folder: Path, limit: int = 1 << 30) -> CachingStore:
    return CachingStore(far, folder, ("snapshots/", "notes/"), ("packs/tree/",), limit)


def test_a_small_object_is_fetched_once_by_all_processes(far: CountingStore, tmp_path: Path) -> None:
    for _ in range(3):
        store = cached(far, tmp_path / "cache")
        assert store.get(SMALL_KEY) == SMALL
        assert store.get(SMALL_KEY, start=2, length=3) == SMALL[2:5]
        with pytest.raises(DamagedObject, match="cut short"):
            store.get(SMALL_KEY, start=2, length=30)
    assert far.calls == {"get": 1}


def test_parts_of_a_large_object_are_fetched_once_and_ranges_are_exact(far: CountingStore, tmp_path: Path) -> None:
    cached(far, tmp_path / "cache").get(PACK_KEY, start=0, length=len(PACK))
    far.calls.clear()
    store = cached(far, tmp_path / "cache")
    for start in (0, 1, PART_SIZE - 1, PART_SIZE, 3 * PART_SIZE + 17, 5 * PART_SIZE, len(PACK) - 1):
        for length in (1, 2, 1000, PART_SIZE, 2 * PART_SIZE + 1):
            if start + length <= len(PACK):
                assert store.get(PACK_KEY, start=start, length=length) == PACK[start : start + length]
    assert far.calls == {}
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("step", [1000, 300_000, PART_SIZE])
def test_reading_in_order_takes_few_requests(step: int, far: CountingStore, tmp_path: Path) -> None:
    store = cached(far, tmp_path / "cache")
    for start in range(0, len(PACK), step):
        length = min(step, len(PACK) - start)
        assert store.get(PACK_KEY, start=start, length=length) == PACK[start : start + length]
    assert far.calls["get"] <= 4
    assert far.bytes_got <= len(PACK) + PART_SIZE


def test_a_range_in_one_part_fetches_that_part_only(far: CountingStore, tmp_path: Path) -> None:
    cached(far, tmp_path / "cache").get(PACK_KEY, start=2 * PART_SIZE + 5, length=100)
    assert (far.calls["get"], far.bytes_got) == (1, PART_SIZE)


def test_a_range_past_the_end_is_damage(far: CountingStore, tmp_path: Path) -> None:
    store = cached(far, tmp_path / "cache")
    for start, length in ((len(PACK) - 5, 6), (len(PACK), 1), (9 * PART_SIZE, 5)):
        for _ in range(2):
            with pytest.raises(DamagedObject, match="cut short"):
                store.get(PACK_KEY, start=start, length=length)
    with pytest.raises(ObjectMissing):
        store.get("packs/tree/" + "cd" * 32, start=0, length=5)


def test_what_was_put_is_not_fetched(far: CountingStore, tmp_path: Path) -> None:
    store = cached(far, tmp_path / "cache")
    key, data = "packs/tree/" + "ef" * 32, bytearray(os.urandom(2 * PART_SIZE + 5))
    store.put(key, data)
    small = b"another"
    store.put("notes/x/" + blake3(small).hexdigest(), small)
    assert cached(far, tmp_path / "cache").get(key, start=5, length=2 * PART_SIZE) == data[5:][: 2 * PART_SIZE]
    assert store.get("notes/x/" + blake3(small).hexdigest()) == small
    assert far.calls == {"put": 2}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: data + b"x",
        lambda data: bytes([data[0] ^ 1]) + data[1:],
    ],
    ids=["short", "empty", "flipped", "long", "checksum"],
)
@pytest.mark.expected_log("is damaged; it is fetched again")
def test_a_garbled_file_is_fetched_again(damage: Callable[[bytes], bytes], far: CountingStore, tmp_path: Path) -> None:
    store = cached(far, tmp_path / "cache")
    store.get(SMALL_KEY)
    store.get(PACK_KEY, start=0, length=10)
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(damage(path.read_bytes()))
    far.calls.clear()
    for _ in range(2):
        assert store.get(SMALL_KEY) == SMALL
        assert store.get(PACK_KEY, start=0, length=10) == PACK[:10]
    assert far.calls == {"get": 2}


def test_a_part_that_came_short_is_not_kept_nor_believed_where_it_was(
    far: CountingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(key: str, *, start: int = 0, length: int | None = None) -> bytes:
        return far.inner.get(key, start=start, length=length)[:-100]

    with monkeypatch.context() as patch:
        patch.setattr(far, "get", short)
        with pytest.raises(DamagedObject, match="cut short"):
            cached(far, tmp_path / "cache").get(PACK_KEY, start=0, length=1000)
    assert cached(far, tmp_path / "cache").get(PACK_KEY, start=0, length=PART_SIZE) == PACK[:PART_SIZE]
    # Also not one that an earlier version kept.
    poison = len(PACK).to_bytes(8, "little") + PACK[: PART_SIZE - 100]
    KeptFiles(tmp_path / "cache", 1 << 30).keep(PACK_KEY.rpartition("/")[2] + "-0", poison)
    assert cached(far, tmp_path / "cache").get(PACK_KEY, start=0, length=PART_SIZE) == PACK[:PART_SIZE]


@pytest.mark.parametrize("size", [2 * PART_SIZE + 300, 7 * PART_SIZE, len(PACK) - 1, len(PACK) + 1])
def test_a_wrong_size_that_a_caller_told_is_dropped_with_what_is_kept(
    size: int, far: CountingStore, tmp_path: Path
) -> None:
    """A garbled index told it; the parts that were kept by it then failed every later process, too."""
    start, length = 2 * PART_SIZE + 200, len(PACK) - 2 * PART_SIZE - 200
    store = cached(far, tmp_path / "cache")
    store.note_size(PACK_KEY, size)
    with pytest.raises(DamagedObject, match="cut short"):
        store.get(PACK_KEY, start=start, length=length)
    # Another process finds what was kept by the wrong size, and has the right one.
    for one in (cached(far, tmp_path / "cache"), store):
        one.note_size(PACK_KEY, len(PACK))
        with contextlib.suppress(DamagedObject):
            one.get(PACK_KEY, start=start, length=length)
        # As whoever meets damage does.
        one.forget(PACK_KEY)
        assert one.get(PACK_KEY, start=start, length=length) == PACK[start:]


def test_an_object_that_is_not_what_its_name_says_is_not_kept(far: CountingStore, tmp_path: Path) -> None:
    far.inner.put(SMALL_KEY, b"swapped")
    store = cached(far, tmp_path / "cache")
    assert store.get(SMALL_KEY) == b"swapped"
    far.inner.put(SMALL_KEY, SMALL)
    assert store.get(SMALL_KEY) == SMALL


def test_the_folder_may_go_at_any_time(far: CountingStore, tmp_path: Path) -> None:
    store = cached(far, tmp_path / "cache")
    for _ in range(2):
        assert store.get(SMALL_KEY) == SMALL
        assert store.get(PACK_KEY, start=0, length=len(PACK)) == PACK
        for path in (tmp_path / "cache").iterdir():
            path.unlink()
        (tmp_path / "cache").rmdir()
    assert far.calls["get"] == 4


def test_a_folder_that_cannot_be_written_is_passed_over(far: CountingStore, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    store = cached(far, tmp_path / "cache")
    for _ in range(2):
        assert store.get(SMALL_KEY) == SMALL
        assert store.get(PACK_KEY, start=0, length=len(PACK)) == PACK


def test_what_was_not_used_longest_goes_when_there_is_too_much(
    far: CountingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_files, "_LOOK_EVERY", 1)
    store = cached(far, tmp_path / "cache", limit=3 * (PART_SIZE + 100))
    old = time.time() - 10 * kept_files._MARK_AGE_S
    store.get(SMALL_KEY)
    for part in (0, 2, 4):
        store.get(PACK_KEY, start=part * PART_SIZE, length=1)
        for path in (tmp_path / "cache").iterdir():
            if path.stat().st_mtime > old + 100:
                os.utime(path, (old + part, old + part))
    store.get(PACK_KEY, start=0, length=1)  # used just now
    store.get(PACK_KEY, start=5 * PART_SIZE, length=1)
    names = {path.name.rpartition("-")[2] for path in (tmp_path / "cache").iterdir()}
    assert names == {"0", "4", "5"}
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 3 * (PART_SIZE + 100)


def test_leftovers_of_dead_processes_go(far: CountingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_files, "_LOOK_EVERY", 1)
    (tmp_path / "cache").mkdir()
    dead, fresh = tmp_path / "cache" / ".x.1.2.tmp", tmp_path / "cache" / ".y.1.2.tmp"
    dead.write_bytes(b"")
    fresh.write_bytes(b"")
    os.utime(dead, (1, 1))
    cached(far, tmp_path / "cache").get(SMALL_KEY)
    assert not dead.exists()
    assert fresh.exists()


def test_a_deleted_object_is_kept_no_longer(far: CountingStore, tmp_path: Path) -> None:
    store = cached(far, tmp_path / "cache")
    store.get(SMALL_KEY)
    store.get(PACK_KEY, start=0, length=len(PACK))
    store.delete(SMALL_KEY)
    store.delete(PACK_KEY)
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(ObjectMissing):
        store.get(SMALL_KEY)


def test_many_threads_and_stores_share_a_folder(far: CountingStore, tmp_path: Path) -> None:
    stores = [cached(far, tmp_path / "cache", limit=2 * PART_SIZE) for _ in range(3)]

    def read(number: int) -> bool:
        start = number * 77_777 % (len(PACK) - 100_000)
        return stores[number % 3].get(PACK_KEY, start=start, length=100_000) == PACK[start : start + 100_000]

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(read, range(300)))
