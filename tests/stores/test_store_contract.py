"""One suite that every store and every wrapper passes; it also looks behind the store's back."""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from backupfs.errors import DamagedObject, ObjectExists, ObjectMissing, StoreError, StoreUnavailable, UsageError
from backupfs.stores.caching import CachingStore
from backupfs.stores.directory import DirectoryStore
from backupfs.stores.memory import MemoryStore
from backupfs.stores.opening import open_store
from backupfs.stores.retrying import RetryingStore
from backupfs.stores.store import MAX_KEY_LENGTH, ObjectInfo, Store, is_key, validate_key
from tests.buckets import BUCKET, bucket_of, client_of
from tests.faults import CountingStore, Crash, Fault, FaultyStore, SlowStore
from tests.servers import Server

MIB = 1 << 20

BAD_KEYS = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "../a",
    "a/../b",
    "a/..",
    ".tmp/a",
    "a/.b",
    "a b",
    "a\n",
    "a\0",
    "a\\b",
    "ä",
    "\udc80",
    "a" * (MAX_KEY_LENGTH + 1),
]
GOOD_KEYS = ["a", "a/b", "config", "a.b", "a..b", "-", "_", "A-Z_0.9/x", "a" * MAX_KEY_LENGTH]


@dataclass(frozen=True)
class Subject:
    store: Store
    behind: Callable[[], dict[str, bytes]]  # the objects as somebody sees them who does not ask the store


def _memory() -> Subject:
    store = MemoryStore()
    return Subject(store, lambda: {key: content for key, (content, _) in store._objects.items()})


def _directory(root: Path) -> Subject:
    store = DirectoryStore(root)
    store.create()

    def files() -> dict[str, bytes]:
        found = {}
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder, name)
                found[path.relative_to(root).as_posix()] = path.read_bytes()
        return found

    return Subject(store, files)


def _bucket(server: Server) -> Subject:
    """Return a fresh prefix of a bucket, and a look at it with a client of its own."""
    prefix = f"test-{next(_numbers)}"
    # As users have it: servers close connections now and then, most of all when many come at once.
    store = RetryingStore(bucket_of(server, prefix))
    store.create()

    def objects() -> dict[str, bytes]:
        client = client_of(server)
        found = {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix + "/"):
            for entry in page.get("Contents", ()):
                body = client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
                found[entry["Key"].removeprefix(prefix + "/")] = body
        return found

    return Subject(store, objects)


_numbers = itertools.count()
SERVERS = ["swift", "swift_tls", "swift_old", "swift_old_tls", "seaweedfs"]


@pytest.fixture(params=["memory", "directory", "counting", "faulty", "slow", "retrying", "caching", *SERVERS])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    if request.param in SERVERS:
        inner = _bucket(request.getfixturevalue(request.param))
    else:
        inner = _memory() if request.param == "memory" else _directory(tmp_path / "root")
    wrapped: dict[str, Callable[[Store], Store]] = {
        "counting": CountingStore,
        "faulty": FaultyStore,
        "slow": lambda store: SlowStore(store, 0.1, sleep=lambda _: None),
        "retrying": lambda store: RetryingStore(store, sleep=lambda _: None),
        "caching": lambda store: CachingStore(store, tmp_path / "cache", ("snapshots/",), ("packs/tree/",), MIB),
    }
    store = wrapped[request.param](inner.store) if request.param in wrapped else inner.store
    yield Subject(store, inner.behind)
    store.close()


@pytest.fixture
def store(subject: Subject) -> Store:
    return subject.store


def keys(store: Store, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def test_a_put_object_is_read_back_and_lies_in_the_store_byte_for_byte(subject: Subject) -> None:
    subject.store.put("packs/data/ab", b"\x00content\xff")
    assert subject.store.get("packs/data/ab") == b"\x00content\xff"
    assert subject.store.size("packs/data/ab") == 9
    assert subject.behind() == {"packs/data/ab": b"\x00content\xff"}


def test_a_put_replaces_the_whole_object(subject: Subject) -> None:
    subject.store.put("a", b"long content")
    subject.store.put("a", b"short")
    assert subject.store.get("a") == b"short"
    assert subject.behind() == {"a": b"short"}


def test_an_empty_object_is_an_object(subject: Subject) -> None:
    subject.store.put("leases/x/end", b"")
    assert subject.store.get("leases/x/end") == b""
    assert subject.store.size("leases/x/end") == 0
    assert [(info.key, info.size) for info in subject.store.list("")] == [("leases/x/end", 0)]
    assert subject.behind() == {"leases/x/end": b""}


@pytest.mark.parametrize(
    "data",
    [
        bytearray(b"abcdef"),
        memoryview(b"xabcdefx")[1:7],
        memoryview(bytearray(b"abcdef")),
        memoryview(b"abcdef").cast("H"),
    ],
    ids=["bytearray", "slice", "writable view", "view of words"],
)
def test_any_buffer_can_be_put(subject: Subject, data: bytearray | memoryview) -> None:
    subject.store.put("a", data)
    assert subject.behind() == {"a": b"abcdef"}
    assert subject.store.size("a") == 6


def test_a_buffer_belongs_to_its_owner_again_after_a_put(store: Store) -> None:
    data = bytearray(b"first")
    store.put("a", data)
    data[:] = b"second, and longer"
    assert store.get("a") == b"first"


def test_a_buffer_belongs_to_its_owner_again_after_a_put_that_failed(store: Store) -> None:
    data = bytearray(b"first")
    store.put("a", b"other")
    with pytest.raises(ObjectExists) as caught:
        store.put("a", data, if_absent=True)
    data.clear()
    assert caught.value.__traceback__ is not None


def test_a_large_object_is_read_back_whole_and_by_range(subject: Subject) -> None:
    data = bytearray(os.urandom(MIB) * 40)
    subject.store.put("packs/data/large", data)
    assert subject.store.size("packs/data/large") == 40 * MIB
    assert subject.store.get("packs/data/large") == data
    assert subject.store.get("packs/data/large", start=39 * MIB + 5, length=100) == data[39 * MIB + 5 :][:100]
    assert subject.behind()["packs/data/large"] == data


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, None, b"0123456789"),
        (0, 10, b"0123456789"),
        (3, 4, b"3456"),
        (9, 1, b"9"),
        (7, None, b"789"),
        (10, None, b""),
        (10, 0, b""),
        (4, 0, b""),
    ],
)
def test_a_range_within_the_object_is_returned(store: Store, start: int, length: int | None, expected: bytes) -> None:
    store.put("a", b"0123456789")
    assert store.get("a", start=start, length=length) == expected


@pytest.mark.parametrize(("start", "length"), [(0, 11), (9, 2), (10, 1), (11, 0), (11, None), (0, 1 << 62)])
def test_a_range_past_the_end_is_damage_and_names_the_object(store: Store, start: int, length: int | None) -> None:
    store.put("packs/data/ab", b"0123456789")
    with pytest.raises(DamagedObject, match="packs/data/ab"):
        store.get("packs/data/ab", start=start, length=length)


@pytest.mark.parametrize(("start", "length"), [(-1, None), (-1, 1), (0, -1)])
def test_a_negative_range_is_the_callers_bug(store: Store, start: int, length: int | None) -> None:
    store.put("a", b"0123456789")
    with pytest.raises(ValueError, match="negative"):
        store.get("a", start=start, length=length)


def test_an_object_that_is_not_there_is_missing_and_named(store: Store) -> None:
    store.put("packs/data/ab", b"x")
    for key in ("packs/data/cd", "packs/tree/ab", "packs", "packs/data", "packs/data/ab/c", "packs/data/a"):
        with pytest.raises(ObjectMissing, match=f"{key} "):
            store.get(key)
        with pytest.raises(ObjectMissing, match=f"{key} "):
            store.get(key, start=5, length=5)
        with pytest.raises(ObjectMissing, match=f"{key} "):
            store.size(key)


def test_a_put_if_absent_never_replaces(subject: Subject) -> None:
    subject.store.put("config", b"first", if_absent=True)
    with pytest.raises(ObjectExists, match="config"):
        subject.store.put("config", b"second", if_absent=True)
    assert subject.behind() == {"config": b"first"}


def test_a_put_if_absent_succeeds_again_after_a_delete(store: Store) -> None:
    store.put("config", b"first", if_absent=True)
    store.delete("config")
    store.put("config", b"second", if_absent=True)
    assert store.get("config") == b"second"


def test_a_deleted_object_is_gone_and_its_neighbours_stay(subject: Subject) -> None:
    subject.store.put("leases/x/1", b"1")
    subject.store.put("leases/x/2", b"2")
    subject.store.delete("leases/x/1")
    with pytest.raises(ObjectMissing):
        subject.store.get("leases/x/1")
    assert keys(subject.store) == ["leases/x/2"]
    assert subject.behind() == {"leases/x/2": b"2"}


def test_deleting_what_is_absent_is_fine(subject: Subject) -> None:
    subject.store.put("packs/data/ab", b"x")
    for key in ("a", "packs/data/cd", "no/such/folder", "packs", "packs/data", "packs/data/ab/c"):
        subject.store.delete(key)
    assert subject.behind() == {"packs/data/ab": b"x"}


def test_a_fresh_store_lists_nothing(store: Store) -> None:
    assert keys(store) == []
    assert keys(store, "packs/") == []


def test_a_listing_is_sorted_by_key_and_not_folder_by_folder(store: Store) -> None:
    names = ["a/b", "a-b", "a.b", "a0", "a/b-c", "a/c/d", "a/c-d", "A", "_", "b", "aa/b", "9"]
    for name in names:
        store.put(name, name.encode())
    assert keys(store) == sorted(names)
    assert keys(store, "a") == sorted(name for name in names if name.startswith("a"))
    assert [info.size for info in store.list("")] == [len(name) for name in sorted(names)]


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("", ["packs/data/aa", "packs/data/ab", "packs/tree/aa", "packsx"]),
        ("p", ["packs/data/aa", "packs/data/ab", "packs/tree/aa", "packsx"]),
        ("packs", ["packs/data/aa", "packs/data/ab", "packs/tree/aa", "packsx"]),
        ("packs/", ["packs/data/aa", "packs/data/ab", "packs/tree/aa"]),
        ("packs/d", ["packs/data/aa", "packs/data/ab"]),
        ("packs/data", ["packs/data/aa", "packs/data/ab"]),
        ("packs/data/", ["packs/data/aa", "packs/data/ab"]),
        ("packs/data/ab", ["packs/data/ab"]),
        ("packs/data/ab/", []),
        ("packs/data/abc", []),
        ("packs/zzz/", []),
        ("packsx/", []),
        ("/", []),
        ("/packs/", []),
        ("packs//", []),
        ("packs//data/", []),
        ("./packs/", []),
        (".", []),
        ("../", []),
        ("../root/packs/", []),
        ("packs/../packs/", []),
        ("packs/*", []),
        ("packs/\0", []),
        ("\0/packs", []),
        ("ä", []),
        ("a" * 5000, []),
        ("a" * 5000 + "/", []),
    ],
)
def test_a_prefix_is_plain_text(store: Store, prefix: str, expected: list[str]) -> None:
    for key in ("packs/data/aa", "packs/data/ab", "packs/tree/aa", "packsx"):
        store.put(key, b"x")
    assert keys(store, prefix) == expected


def test_a_listing_tells_size_and_a_time_within_the_put_by_the_stores_clock(store: Store) -> None:
    before_ns = store.now()
    store.put("a", b"12345")
    after_ns = store.now()
    (info,) = store.list("a")
    assert info == ObjectInfo("a", 5, info.modified_ns)
    counts_in_ns = 10**9 if before_ns % 10**9 == after_ns % 10**9 == 0 else 0
    assert before_ns <= info.modified_ns <= after_ns + counts_in_ns


def test_asking_for_the_time_leaves_nothing_behind(subject: Subject) -> None:
    subject.store.now()
    assert keys(subject.store) == []
    assert subject.behind() == {}


def test_a_listing_may_be_read_while_its_objects_are_deleted(store: Store) -> None:
    for number in range(20):
        store.put(f"trash/{number:02}", b"x")
    for info in store.list("trash/"):
        store.delete(info.key)
    assert keys(store) == []


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_bad_key_is_refused_by_every_verb(subject: Subject, key: str) -> None:
    for call in (
        lambda: subject.store.put(key, b"x"),
        lambda: subject.store.get(key),
        lambda: subject.store.size(key),
        lambda: subject.store.delete(key),
        lambda: validate_key(key),
    ):
        with pytest.raises(StoreError, match="cannot be the key") as caught:
            call()
        assert str(caught.value).isprintable()
    assert not is_key(key)
    assert subject.behind() == {}


@pytest.mark.parametrize("key", GOOD_KEYS)
def test_a_good_key_passes_every_verb(store: Store, key: str) -> None:
    validate_key(key)
    store.put(key, b"x")
    assert keys(store) == [key]
    assert store.get(key) == b"x"
    store.delete(key)
    assert keys(store) == []


def test_creating_a_store_again_keeps_its_objects(subject: Subject) -> None:
    subject.store.put("a", b"x")
    subject.store.create()
    assert subject.behind() == {"a": b"x"}


def test_closing_twice_is_fine(store: Store) -> None:
    store.close()
    store.close()


def test_the_url_is_there_for_messages(store: Store) -> None:
    assert store.url
    with pytest.raises(ObjectMissing) as caught:
        store.get("a")
    assert store.url in str(caught.value)


def test_many_threads_put_distinct_objects_and_none_is_lost(subject: Subject) -> None:
    expected = {f"leases/{number % 7}/{number}": str(number).encode() * 100 for number in range(200)}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(subject.store.put, expected.keys(), expected.values()))
    assert subject.behind() == expected
    assert keys(subject.store) == sorted(expected)


def test_readers_see_one_whole_object_while_many_threads_replace_it(subject: Subject) -> None:
    contents = [bytes([number]) * (30_000 + 7_000 * number) for number in range(8)]
    subject.store.put("packs/data/ab", contents[0])
    writing = threading.Event()
    writing.set()

    def write(content: bytes) -> None:
        for _ in range(10):
            subject.store.put("packs/data/ab", content)

    def read() -> int:
        count = 0
        while writing.is_set() or not count:
            try:
                assert subject.store.get("packs/data/ab") in contents
            except ObjectMissing:
                # Swift looks for a file that another put has just removed. Nothing in a repository is replaced.
                assert subject.store.is_far
            assert [info.key for info in subject.store.list("")] == ["packs/data/ab"]
            count += 1
        return count

    with ThreadPoolExecutor(12) as pool:
        readers = [pool.submit(read) for _ in range(4)]
        try:
            list(pool.map(write, contents))
        finally:
            writing.clear()
        assert all(reader.result() for reader in readers)
    assert subject.behind()["packs/data/ab"] in contents


def test_many_threads_putting_one_object_if_absent_leave_the_content_of_one_that_was_told_so(subject: Subject) -> None:
    start = threading.Barrier(16)

    def put(number: int) -> bool:
        start.wait()
        try:
            subject.store.put("config", bytes([number]) * 1000, if_absent=True)
        except ObjectExists:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(put, range(16)))
    content = subject.behind()["config"]
    assert content == content[:1] * 1000
    assert won[content[0]]
    assert subject.behind() == {"config": content}


def test_a_memory_store_takes_its_time_from_the_clock_given() -> None:
    times = iter([10, 20, 30])
    store = MemoryStore(clock=lambda: next(times))
    store.put("a", b"")
    store.put("b", b"")
    assert [info.modified_ns for info in store.list("")] == [10, 20]
    assert store.now() == 30


def test_a_counting_store_counts_calls_and_bytes() -> None:
    store = CountingStore(MemoryStore())
    store.put("a", memoryview(b"12345678").cast("Q"))
    store.get("a", start=2, length=3)
    with pytest.raises(ObjectMissing):
        store.get("b")
    keys(store)
    assert store.calls == {"put": 1, "get": 2, "list": 1}
    assert (store.bytes_put, store.bytes_got) == (8, 3)


def test_a_fault_before_the_store_stores_nothing_and_the_next_call_succeeds() -> None:
    store = FaultyStore(MemoryStore(), Fault("put", 2))
    store.put("a", b"1")
    with pytest.raises(StoreUnavailable):
        store.put("b", b"2")
    store.put("c", b"3")
    assert keys(store) == ["a", "c"]


def test_a_fault_after_the_store_loses_only_the_response() -> None:
    store = FaultyStore(MemoryStore(), Fault("put", 1, after=True))
    with pytest.raises(StoreUnavailable):
        store.put("a", b"1")
    assert store.get("a") == b"1"


def test_a_fault_counts_only_the_calls_that_fit_its_prefix_and_lasts_as_told() -> None:
    store = FaultyStore(MemoryStore(), Fault("put", 2, prefix="packs/", times=2))
    outcomes = []
    for key in ("packs/1", "index/1", "packs/2", "index/2", "packs/3", "packs/4"):
        try:
            store.put(key, b"")
            outcomes.append(key)
        except StoreUnavailable:
            outcomes.append("failed")
    assert outcomes == ["packs/1", "index/1", "failed", "index/2", "failed", "packs/4"]


def test_a_killed_process_makes_no_further_call() -> None:
    inner = MemoryStore()
    store = FaultyStore(inner, Fault("put", 1, kills=True, after=True))
    with pytest.raises(Crash):
        store.put("a", b"1")
    for call in (lambda: store.put("b", b"2"), lambda: store.delete("a"), lambda: store.list("")):
        with pytest.raises(Crash):
            call()
    assert keys(inner) == ["a"]


def test_a_slow_store_waits_before_each_call() -> None:
    waits: list[float] = []
    store = SlowStore(MemoryStore(), 0.2, sleep=waits.append)
    store.put("a", b"1")
    store.get("a")
    keys(store)
    assert waits == [0.2, 0.2, 0.2]


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/srv/backup", "/srv/backup"),
        ("/srv//backup/", "/srv/backup"),
        ("/srv/host:disk", "/srv/host:disk"),
        ("file:///srv/backup", "/srv/backup"),
        ("FILE:///srv/my%20backup", "/srv/my backup"),
        ("file:///srv/%C3%A4%FF", "/srv/ä\udcff"),
    ],
)
def test_a_path_or_file_url_opens_a_folder(url: str, path: str) -> None:
    store = open_store(url)
    assert isinstance(store, DirectoryStore)
    assert store.url == path
    assert open_store(store.url).url == path


def test_a_relative_path_is_made_absolute_and_a_tilde_is_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("repo").url == str(tmp_path / "repo")
    assert open_store("~/repo").url == str(tmp_path / "~" / "repo")
    assert open_store("./host:repo").url == str(tmp_path / "host:repo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://b", "s3://BUCKET"),
        ("S3:bucket", "s3://BUCKET"),
        ("sftp://host/path", "file:///"),
        ("sftp:host:/path", "file:///"),
        ("host:path", "./host:path"),
        ("file://host/path", "three slashes"),
        ("file:path", "three slashes"),
        ("file:///a%00b", "file:///"),
        ("", "an empty text"),
        ("s3://\x1b[31m", "s3://BUCKET"),
    ],
)
def test_what_is_no_store_is_refused_with_what_is_possible(url: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(url)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
