"""Check beyond plain damage (tests/test_damage.py): stores that fail, writers that wrote nonsense, parts, bounds."""

import os
import stat
import threading
from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from backupfs.codec.records import encode_record
from backupfs.codec.sealing import Kind, hash_object
from backupfs.errors import AccessDenied, DamagedObject, ObjectArchived, ObjectMissing, StoreError, UsageError
from backupfs.ids import ChunkId, SnapshotId, short
from backupfs.repository import layout
from backupfs.repository.pack import ROW, Block, compress_block, encode_pack
from backupfs.repository.repository import Repository
from backupfs.repository.segment import Segment, encode_segment, sort_rows
from backupfs.snapshots.content import CHUNK, HOLE, LIST, SINGLE_MARK, Content
from backupfs.snapshots.listing import load_snapshot, load_snapshots, put_snapshot
from backupfs.snapshots.node import STAT_ROW
from backupfs.snapshots.notes import new_note, put_note
from backupfs.snapshots.snapshot import FILES, Snapshot, Statistics
from backupfs.snapshots.tree import TreeBuilder
from backupfs.stores.memory import MemoryStore
from backupfs.stores.store import ObjectInfo
from backupfs.usecases.backup import backup
from backupfs.usecases.check import CheckOptions, check
from backupfs.usecases.events import Event, Remark, ignore
from backupfs.usecases.findings import MOST_FINDINGS, MOST_PATHS, Findings, Severity
from backupfs.usecases.forget import forget
from backupfs.usecases.verify import VerifyOptions, verify
from tests.builders import (
    NOWHERE,
    File,
    back_up,
    build,
    copy_of,
    folders_in,
    keys_of,
    new_repository,
    noise,
    reopened,
    run_check,
    small_options,
)
from tests.faults import AroundStore, Fault, FaultyStore

Result = TypeVar("Result")

TREE = {f"f{number}": File(noise(number, 5000)) for number in range(30)} | {"d": {"e": {"x": File(b"x")}}}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> MemoryStore:
    repository = new_repository()
    back_up(repository, build(TREE, tmp_path_factory.mktemp("check") / "source"))
    return copy_of(repository.store)


# Stores that fail.


@pytest.mark.parametrize("prefix", ["packs/data/", "packs/tree/", "snapshots/", "notes/", "keys/"])
@pytest.mark.parametrize("read_data", [False, True])
def test_a_listing_that_fails_is_a_finding_and_the_rest_is_checked(
    stored: MemoryStore, prefix: str, read_data: bool
) -> None:
    repository = reopened(stored)
    repository.store = FaultyStore(stored, Fault("list", 1, prefix=prefix, times=99))
    result = run_check(repository, read_data=read_data)
    assert (result.damaged, result.unread, result.snapshots_hit) == (False, 1, ())
    found = next(finding for finding in result.findings if finding.key == prefix)
    assert "failed by rule" in found.what
    assert found.severity == Severity.UNREAD
    if prefix != "snapshots/":
        assert result.entries > 30
        assert len(result.findings) == 1
        assert found.paths == ()


@pytest.mark.parametrize("prefix", ["packs/data/", "packs/tree/"])
def test_a_pack_that_cannot_be_read_now_is_named_and_the_rest_is_checked(stored: MemoryStore, prefix: str) -> None:
    repository = reopened(stored)
    repository.store = FaultyStore(stored, Fault("get", 1, prefix=prefix))
    result = run_check(repository, read_data=True)
    assert (result.damaged, result.unread, result.archived, result.snapshots_hit) == (False, 1, 0, ())
    ((severity, key, paths),) = ((one.severity, one.key, one.paths) for one in result.findings)
    assert (severity, paths) == (Severity.UNREAD, ())
    assert key.startswith(prefix)
    assert result.packs_read == result.packs - 1


@pytest.mark.parametrize("prefix", ["snapshots/", "notes/"])
def test_a_snapshot_or_a_note_that_cannot_be_read_now_is_named_and_the_others_are_checked(
    stored: MemoryStore, prefix: str
) -> None:
    store = copy_of(stored)
    first = keys_of(store, "snapshots/")[0]
    second = put_snapshot(reopened(store), replace(load_snapshot(reopened(store), _id_in(first)), sequence=2))
    put_note(reopened(store), new_note(second.snapshot_id, "remark"))
    repository = reopened(store)
    key = keys_of(store, prefix)[0]
    repository.store = FaultyStore(store, Fault("get", 1, prefix=key, times=9))
    result = run_check(repository)
    assert [(finding.severity, finding.key) for finding in result.findings] == [(Severity.UNREAD, key)]
    assert result.snapshots == (1 if prefix == "snapshots/" else 2)
    assert result.entries > 30


def _id_in(key: str) -> SnapshotId:
    return SnapshotId(bytes.fromhex(key[-64:]))


@pytest.mark.parametrize("prefix", ["", "packs/", "packs/data/", "index/"])
def test_a_store_that_gives_nothing_any_more_ends_the_check_with_its_own_error(
    stored: MemoryStore, prefix: str
) -> None:
    repository = reopened(stored)
    store = RefusingStore(stored, prefix)
    repository.store = store
    with pytest.raises(AccessDenied, match="refused"):
        run_check(repository, read_data=True)
    assert store.refused <= 3 + 8  # those who read packs at once


class RefusingStore(AroundStore):
    """Shows all in listings and gives nothing below a prefix."""

    def __init__(self, inner: MemoryStore, prefix: str) -> None:
        super().__init__(inner)
        self.prefix = prefix
        self.refused = 0

    def around(self, verb: str, key: str, call: Callable[[], Result]) -> Result:
        if verb == "get" and key.startswith(self.prefix):
            self.refused += 1
            raise AccessDenied(f"object {key} is refused")
        return call()


class ArchivingStore(AroundStore):
    """Objects below a prefix are archived."""

    def __init__(self, inner: MemoryStore, prefix: str) -> None:
        super().__init__(inner)
        self.prefix = prefix

    def around(self, verb: str, key: str, call: Callable[[], Result]) -> Result:
        if verb == "get" and key.startswith(self.prefix):
            raise ObjectArchived(f"object {key} is in GLACIER")
        return call()


class StaleStore(AroundStore):
    """A listing leaves some objects out, or says that they are longer than they are; they are there all the same."""

    is_far = True  # type: ignore[assignment]

    def __init__(self, inner: MemoryStore, keys: Container[str], longer: int | None = None) -> None:
        super().__init__(inner)
        self.keys = keys
        self.longer = longer

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for info in super().list(prefix):
            if info.key not in self.keys:
                yield info
            elif self.longer is not None:
                yield replace(info, size=info.size + self.longer)


@pytest.mark.parametrize("read_data", [False, True])
@pytest.mark.parametrize("longer", [None, 1], ids=["left out", "another size"])
def test_what_a_listing_that_is_stale_says_of_a_pack_is_no_damage(
    stored: MemoryStore, longer: int | None, read_data: bool
) -> None:
    store = copy_of(stored)
    first, *others = keys_of(store, "packs/")
    repository = reopened(store)
    repository.store = StaleStore(store, {first, *keys_of(store, "keys/")}, longer)
    result = run_check(repository, read_data=read_data)
    assert (result.findings, result.snapshots_hit) == ((), ())
    assert result.packs_read == (len(others) + 1 if read_data else 0)
    # What is not there when it is asked for is missing.
    store.delete(first)
    result = run_check(repository, read_data=read_data)
    assert [(finding.severity, finding.key) for finding in result.findings] == [(Severity.DAMAGE, first)]
    assert "it is missing" in result.findings[0].what


def test_a_pack_that_nobody_could_ask_for_is_unread(stored: MemoryStore) -> None:
    first = keys_of(stored, "packs/data/")[0]
    repository = reopened(stored)
    repository.store = FaultyStore(StaleStore(stored, {first}), Fault("size", 1, "packs/", times=10))
    result = run_check(repository)
    assert [(finding.severity, finding.key) for finding in result.findings] == [(Severity.UNREAD, first)]
    assert (result.damaged, result.unread) == (False, 1)


def test_what_is_listed_and_gone_is_no_damage_where_nobody_needs_it(stored: MemoryStore) -> None:
    """A key slot that was removed, and a pack of an interrupted run that somebody deleted."""

    class Late(StaleStore):
        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            gone = [f"{prefix}{'ab' * 32}"] if prefix in ("keys/", "packs/data/", "packs/tree/") else []
            return iter(sorted([*super().list(prefix), *(ObjectInfo(key, 500, 1) for key in gone)], key=str))

    repository = reopened(stored)
    repository.store = Late(stored, ())
    result = run_check(repository, read_data=True)
    assert (result.damaged, result.unread) == (False, 0)
    # What opens the repository is needed.
    store = copy_of(stored)
    own = layout.slot_key(repository.slot_id)
    repository.store = FaultyStore(StaleStore(store, ()), Fault("put", 9))
    store.delete(own)
    assert [finding.key for finding in run_check(repository).findings] == [own]


@pytest.mark.parametrize("times", [1, 9])
def test_a_config_that_was_garbled_on_its_way_is_read_again(stored: MemoryStore, times: int) -> None:
    class Garbling(StaleStore):
        left = times

        def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
            data = super().get(key, start=start, length=length)
            if key != layout.CONFIG or not self.left:
                return data
            self.left -= 1
            return data[:-1] + bytes([data[-1] ^ 1])

    repository = reopened(stored)
    repository.store = Garbling(stored, ())
    assert run_check(repository).damaged == (times > 1)


@pytest.mark.expected_log("is not there; (it is fetched again|the index goes on without it)")
@pytest.mark.parametrize("prefix", ["packs/data/", "packs/tree/", "index/", "snapshots/", "notes/", "keys/", "config"])
def test_an_object_that_is_not_there_once_is_asked_for_again(stored: MemoryStore, prefix: str) -> None:
    class Forgetful(StaleStore):
        asked = 0

        def around(self, what: str, key: str, call: Callable[[], Result]) -> Result:
            if what == "get" and key.startswith(prefix):
                self.asked += 1
                if self.asked == 1:
                    raise ObjectMissing(f"object {key} is not there")
            return call()

    store = copy_of(stored)
    repository = reopened(store)
    (snapshot,) = load_snapshots(repository).snapshots
    put_note(repository, new_note(snapshot.snapshot_id, "remark"))
    for read_data in (True, False):
        repository = reopened(store)
        repository.store = Forgetful(store, ())
        assert run_check(repository, read_data=read_data).findings == ()


@pytest.mark.parametrize("prefix", ["packs/data/", "packs/tree/", "packs/"])
def test_what_is_archived_is_counted_and_is_no_damage(stored: MemoryStore, prefix: str) -> None:
    repository = reopened(stored)
    repository.store = ArchivingStore(stored, prefix)
    whole = run_check(reopened(stored), read_data=True)
    packs = len(keys_of(stored, prefix))
    result = run_check(repository, read_data=True)
    assert (result.damaged, result.unread, result.archived, result.snapshots_hit) == (False, packs, packs, ())
    assert result.packs_read == whole.packs - packs
    assert all(finding.severity == Severity.UNREAD for finding in result.findings)
    assert len(result.findings) == (2 if prefix == "packs/" else 1)
    assert "archived" in result.findings[0].what
    assert "not read" in result.findings[0].what
    if prefix == "packs/data/":
        assert result.entries == whole.entries
        # Without its data nothing is asked for.
        assert run_check(repository).findings == ()


def test_damage_is_found_beside_what_is_archived(stored: MemoryStore) -> None:
    store = copy_of(stored)
    first, second, *_ = keys_of(store, "packs/data/")
    data = bytearray(store.get(first))
    data[len(data) // 2] ^= 1
    store.put(first, data)
    repository = reopened(store)
    repository.store = ArchivingStore(store, second)
    result = run_check(repository, read_data=True)
    assert [(finding.severity, finding.key) for finding in result.findings] == [
        (Severity.DAMAGE, first),
        (Severity.UNREAD, "packs/data/"),
    ]
    assert result.snapshots_hit
    assert result.archived == 1


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize(
    ("wrapper", "error"), [(ArchivingStore, ObjectArchived), (RefusingStore, StoreError)], ids=["archived", "refused"]
)
def test_what_nobody_can_look_at_is_no_failed_verification(
    stored: MemoryStore, wrapper: type[ArchivingStore], error: type[Exception], level: int
) -> None:
    repository = reopened(stored)
    (snapshot,) = load_snapshots(repository).snapshots
    repository.store = wrapper(stored, "packs/data/" if level else "packs/tree/")
    with pytest.raises(error, match=r"archived|refused"):
        verify(repository, snapshot, VerifyOptions(level=level), ignore)


def test_a_pack_that_was_noted_stays_so_while_nobody_can_read_it(tmp_path: Path) -> None:
    folders = folders_in(tmp_path)
    repository = new_repository(folders=folders)
    back_up(repository, build(TREE, tmp_path / "source"))
    store = copy_of(repository.store)
    key = keys_of(store, "packs/data/")[0]
    whole = store.get(key)
    store.put(key, whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run_check(reopened(store, folders), read_data=True).noted_packs == 1
    again = reopened(store, folders)
    again.store = ArchivingStore(store, key)
    assert run_check(again, read_data=True).noted_packs == 1
    store.put(key, whole)
    assert run_check(reopened(store, folders), read_data=True).noted_packs == 0


class RecordingStore(AroundStore):
    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.listed: list[str] = []

    def around(self, verb: str, key: str, call: Callable[[], Result]) -> Result:
        if verb == "list":
            self.listed.append(key)
        return call()


def test_a_backup_that_runs_meanwhile_is_no_damage(stored: MemoryStore) -> None:
    """Packs, index, snapshot is the order of puts; a check lists in the reverse order, so it sees all it needs."""
    repository = reopened(stored)
    repository.store = store = RecordingStore(stored)
    run_check(repository)
    order = [store.listed.index(prefix) for prefix in ("snapshots/", "index/tree/", "packs/tree/")]
    assert order == sorted(order)
    order = [store.listed.index(prefix) for prefix in ("snapshots/", "index/data/", "packs/data/")]
    assert order == sorted(order)


def test_a_cancelled_check_ends_and_leaves_nothing(stored: MemoryStore, tmp_path: Path) -> None:
    class CancellingStore(AroundStore):
        def around(self, verb: str, key: str, call: Callable[[], Result]) -> Result:
            if verb == "get" and key.startswith("packs/"):
                trio.from_thread.run_sync(scope.cancel)
            return call()

    repository = reopened(stored, folders_in(tmp_path))
    repository.store = CancellingStore(stored)
    scope = trio.CancelScope()

    async def main() -> None:
        with scope:
            await check(repository, CheckOptions(read_data=True), ignore)

    trio.run(main)
    assert scope.cancelled_caught
    assert not list((tmp_path / "cache").glob("check-*"))


# Parts.


def test_slices_read_every_pack_once(stored: MemoryStore) -> None:
    repository = reopened(stored)
    total = run_check(repository).packs
    assert total > 3
    for of in (1, 2, 7):
        results = [run_check(repository, subset=f"{which}/{of}") for which in range(1, of + 1)]
        assert sum(result.packs_read for result in results) == total
        assert not any(result.damaged for result in results)
    assert run_check(repository, subset="100%").packs_read == total
    assert run_check(repository, subset="0.0001%").packs_read <= 1


@pytest.mark.parametrize("subset", ["", "5", "0%", "101%", "-1%", "nan%", "x%", "0/3", "4/3", "1/0", "1/2/3", "a/b"])
def test_a_part_that_cannot_be_understood_is_refused(stored: MemoryStore, subset: str) -> None:
    with pytest.raises(UsageError, match="5%"):
        run_check(reopened(stored), subset=subset)


def test_a_slice_finds_the_damage_in_its_own_packs_only(stored: MemoryStore) -> None:
    store = copy_of(stored)
    key = keys_of(store, "packs/data/")[0]
    data = bytearray(store.get(key))
    data[100] ^= 1
    store.put(key, data)
    repository = reopened(store)
    results = [run_check(repository, subset=f"{which}/5") for which in range(1, 6)]
    assert [result.damaged for result in results].count(True) == 1
    (damaged,) = (result for result in results if result.damaged)
    assert [finding.key for finding in damaged.findings] == [key]
    assert damaged.findings[0].paths


# What is there and needed by nobody, and what is needed and gone.


def test_packs_of_an_interrupted_run_are_information(stored: MemoryStore) -> None:
    store = copy_of(stored)
    repository = reopened(store)
    filed(repository, Kind.DATA_PACK, [b"nobody's"], indexed=False)
    for read_data in (False, True):
        result = run_check(repository, read_data=read_data)
        assert not result.damaged
        (finding,) = result.findings
        assert (finding.severity, finding.key) == (Severity.INFORMATION, "packs/data/")
        assert result.unnamed_packs == 1
        assert result.unnamed_bytes > 100


def test_a_snapshot_that_is_gone_is_damage_until_that_is_known(tmp_path: Path) -> None:
    repository = new_repository(folders=folders_in(tmp_path))
    source = build(TREE, tmp_path / "source")
    stored = [back_up(repository, source) for _ in range(3)]
    keys = [f"snapshots/{snapshot.snapshot_id.hex()}" for snapshot in stored]

    def checked() -> list[tuple[Severity, str]]:
        return [(finding.severity, finding.key) for finding in run_check(reopened(repository)).findings]

    assert checked() == []
    repository.store.delete(keys[2])
    assert checked() == [(Severity.DAMAGE, keys[2])]
    # Later ones do not hide it: its number is not given again, and the next one names it.
    events: list[Event] = []
    fourth = backup(reopened(repository), [source], small_options(), events.append).snapshot
    assert fourth is not None
    assert (fourth.sequence, fourth.previous) == (4, stored[2].snapshot_id)
    assert ["snapshot 3 of the host" in event.text for event in events if isinstance(event, Remark)] == [True]
    fifth = back_up(reopened(repository), source)
    assert (fifth.sequence, fifth.previous) == (5, fourth.snapshot_id)
    assert checked() == [(Severity.DAMAGE, keys[2])]
    # Nor does forgetting what names it.
    trio.run(forget, reopened(repository), [fourth.snapshot_id.hex()], False)
    assert checked() == [(Severity.DAMAGE, keys[2])]
    # Somebody says that it is known.
    trio.run(forget, reopened(repository), [keys[2][10:20]], False)
    assert checked() == []
    # A forgotten one may go.
    repository.store.delete(f"snapshots/{fourth.snapshot_id.hex()}")
    assert checked() == []
    # With all of them gone, the next one says so, wherever it is looked at.
    for key in keys_of(repository.store, "snapshots/"):
        repository.store.delete(key)
    last = f"snapshots/{fifth.snapshot_id.hex()}"
    assert checked() == [(Severity.DAMAGE, "snapshots/"), (Severity.DAMAGE, last)]
    sixth = back_up(reopened(repository), source)
    assert sixth.sequence == 6
    elsewhere = reopened(repository, folders=folders_in(tmp_path / "elsewhere"))
    findings = run_check(elsewhere).findings
    assert [finding.key for finding in findings] == ["snapshots/", last]
    assert "snapshots 1 to 2 of the host" in findings[0].what
    # Those whose ids nobody knows have names to forget them by.
    names = [finding.what.split("`")[1].split()[-1] for finding in findings]
    trio.run(forget, elsewhere, names, False)
    assert checked() == []
    assert load_snapshots(reopened(repository)).find("latest") == sixth


@pytest.mark.expected_log
@pytest.mark.parametrize("prefix", ["index/data/", "index/tree/"])
@pytest.mark.parametrize("has_cache", [True, False])
def test_the_way_out_of_a_damaged_index_segment_is_as_it_says(tmp_path: Path, prefix: str, has_cache: bool) -> None:
    folders = folders_in(tmp_path) if has_cache else replace(folders_in(tmp_path), cache=None)
    repository = new_repository(folders=folders)
    source = build(TREE, tmp_path / "source")
    back_up(repository, source)
    key = max(keys_of(repository.store, prefix), key=repository.store.size)
    count = len(keys_of(repository.store, prefix))
    repository.store.put(key, repository.store.get(key)[:-1])
    result = run_check(reopened(repository))
    [what] = [finding.what for finding in result.findings if finding.key == key]
    assert "the packs are read instead; delete the object, and the next backup" in what
    assert result.snapshots_hit == ()
    assert all("names it anew" in finding.what for finding in result.findings if finding.key != key)
    repository.store.delete(key)
    back_up(reopened(repository), source)
    assert run_check(reopened(repository)).findings == ()
    assert len(keys_of(repository.store, prefix)) == count


@pytest.mark.expected_log
def test_the_way_out_of_a_damaged_note_is_as_it_says(tmp_path: Path) -> None:
    repository = new_repository(folders=folders_in(tmp_path))
    source = build(TREE, tmp_path / "source")
    first, second = back_up(repository, source), back_up(repository, source)
    trio.run(forget, repository, [first.snapshot_id.hex()], False)
    [key] = keys_of(repository.store, "notes/")
    repository.store.put(key, repository.store.get(key)[:-1])
    [finding] = run_check(reopened(repository)).findings
    assert finding.key == key
    assert "a snapshot was forgotten: forget again what shows again, then the object" in finding.what
    assert load_snapshots(repository).snapshots == [first, second]
    trio.run(forget, repository, [first.snapshot_id.hex()], False)
    repository.store.delete(key)
    assert run_check(reopened(repository)).findings == ()
    assert load_snapshots(repository).snapshots == [second]


def test_backups_of_a_host_that_run_at_once_have_numbers_of_their_own(tmp_path: Path) -> None:
    repository = new_repository(folders=folders_in(tmp_path))
    source = build(TREE, tmp_path / "source")
    first = back_up(repository, source)
    made: list[Snapshot] = []
    lock = threading.Lock()  # puts are made from several threads

    class Meanwhile(AroundStore):
        def around(self, verb: str, key: str, call: Callable[[], Result]) -> Result:
            with lock:
                if verb == "put" and not made:
                    other = replace(first, sequence=2, previous=first.snapshot_id, time_ns=first.time_ns + 1)
                    made.append(put_snapshot(repository, other))
                    load_snapshots(repository).note_seen()
            return call()

    Path(os.fsdecode(source), "more").write_bytes(noise(99, 9000))
    last = back_up(reopened(Meanwhile(repository.store), folders_in(tmp_path)), source)
    assert (last.sequence, last.previous) == (3, made[0].snapshot_id)
    assert not run_check(reopened(repository)).damaged


# Writers that wrote nonsense: everything authenticates, and still something is wrong.


def filed(repository: Repository, kind: Kind, chunks: list[bytes], *, indexed: bool = True) -> list[ChunkId]:
    """Put chunks, one block each, into a pack of their own and return their ids."""
    id_key_is_tree = kind == Kind.TREE_PACK
    reader = repository.trees if id_key_is_tree else repository.data
    ids = [reader.chunk_id(chunk) for chunk in chunks]
    blocks = [
        compress_block(Block((chunk_id,), (len(chunk),), (chunk,)), 1)
        for chunk_id, chunk in zip(ids, chunks, strict=True)
    ]
    pack = encode_pack(kind, repository.keyring, bytes(16), blocks)
    repository.store.put(layout.key_of(kind, pack.ref.pack_id), pack.data)
    if indexed:
        put_segment(repository, kind, Segment(sort_rows(pack.rows), (pack.ref,)))
    return ids


def put_segment(repository: Repository, kind: Kind, segment: Segment) -> None:
    index_kind = Kind.TREE_INDEX if kind == Kind.TREE_PACK else Kind.DATA_INDEX
    data = encode_segment(index_kind, repository.keyring, segment)
    repository.store.put(layout.key_of(index_kind, hash_object(data)), data)


def snapshot_with(
    repository: Repository, content: Content, size: int, mode: int = stat.S_IFREG, pages: list[bytes] | None = None
) -> Snapshot:
    """Put a snapshot of two entries, /bad and /good, and return it."""
    saved: list[bytes] = list(pages or [])

    def save(data: bytes) -> ChunkId:
        saved.append(data)
        return repository.trees.chunk_id(data)

    builder = TreeBuilder(bytes(32), save)
    for name, row_mode, row_size, row_content in ((b"bad", mode, size, content), (b"good", stat.S_IFREG, 0, b"")):
        row = STAT_ROW.pack(row_mode, 0, 0, 1, 1, row_size, 0, 0, 0, 0)
        builder.add(name, row, row_content, 0, (), 0, (0, b""), (0, b""))
    root = builder.finish()
    filed(repository, Kind.TREE_PACK, saved)
    return put_snapshot(
        repository, Snapshot(FILES, bytes(16), "h", 1, b"", 5, 5, (b"/bad",), (), b"", root, Statistics())
    )


CHUNK_BYTES = b"eleven byte"


@pytest.mark.parametrize(
    ("make", "size", "mode", "text"),
    [
        (lambda chunk, _page: SINGLE_MARK + chunk, 12, stat.S_IFREG, "has 11 bytes instead of 12"),
        (lambda _chunk, _page: b"", 5, stat.S_IFREG, "no known form"),
        (lambda _chunk, _page: b"\x03four", 5, stat.S_IFREG, "no known form"),
        (lambda _chunk, _page: b"\x09", 5, stat.S_IFREG, "no known form"),
        (lambda chunk, _page: [[11, CHUNK, chunk], [1, HOLE]], 13, stat.S_IFREG, "do not add up"),
        (lambda chunk, _page: [[10, CHUNK, chunk]], 10, stat.S_IFREG, "has 11 bytes instead of 10"),
        (lambda _chunk, page: [[12, LIST, page]], 12, stat.S_IFREG, "do not add up"),
        (lambda _chunk, _page: [[12, 7]], 12, stat.S_IFREG, "no known kind"),
        (lambda _chunk, _page: ["x"], 12, stat.S_IFREG, "malformed"),
        (lambda _chunk, _page: b"short", 0, stat.S_IFDIR, "directory without a tree"),
    ],
)
def test_a_page_that_says_something_impossible_is_damage_at_its_path(
    make: Callable[[bytes, bytes], Content], size: int, mode: int, text: str
) -> None:
    repository = new_repository()
    (chunk,) = filed(repository, Kind.DATA_PACK, [CHUNK_BYTES])
    page = encode_record([[11, CHUNK, chunk]])
    snapshot = snapshot_with(repository, make(chunk, repository.trees.chunk_id(page)), size, mode, [page])
    result = run_check(repository)
    (finding,) = result.findings
    assert finding.severity == Severity.DAMAGE
    assert text in finding.what
    assert finding.key.startswith("packs/tree/")
    assert finding.snapshots == (short(snapshot.snapshot_id),)
    assert finding.paths == (b"/bad",)
    assert finding.paths_total == 1


def test_what_is_right_is_no_finding() -> None:
    repository = new_repository()
    (chunk,) = filed(repository, Kind.DATA_PACK, [CHUNK_BYTES])
    page = encode_record([[11, CHUNK, chunk]])
    snapshot_with(repository, [[11, LIST, repository.trees.chunk_id(page)]], 11, pages=[page])
    assert run_check(repository, read_data=True).findings == ()


@pytest.mark.parametrize("read_data", [False, True])
@pytest.mark.parametrize("position", [2, 3, 4, 5], ids=["offset", "stored length", "offset in block", "length"])
def test_an_index_that_points_beside_the_chunk_is_damage(position: int, read_data: bool) -> None:
    repository = new_repository()
    chunk_id = repository.data.chunk_id(CHUNK_BYTES)
    pack = encode_pack(
        Kind.DATA_PACK, repository.keyring, bytes(16), [compress_block(Block((chunk_id,), (11,), (CHUNK_BYTES,)), 1)]
    )
    repository.store.put(layout.key_of(Kind.DATA_PACK, pack.ref.pack_id), pack.data)
    row = list(ROW.unpack(pack.rows))
    row[position] += 1000
    put_segment(repository, Kind.DATA_PACK, Segment(ROW.pack(*row), (pack.ref,)))
    snapshot_with(repository, SINGLE_MARK + chunk_id, 11)
    result = run_check(repository, read_data=read_data)
    if position == 4 and not read_data:
        assert not result.damaged  # only reading tells
        return
    assert result.damaged
    assert {path for finding in result.findings for path in finding.paths} == {b"/bad"}


def test_an_object_that_is_none_of_a_repository_is_information() -> None:
    repository = new_repository()
    repository.store.put("keys/README", b"hello")
    result = run_check(repository)
    assert [(finding.severity, finding.key) for finding in result.findings] == [(Severity.INFORMATION, "keys/README")]


def test_a_chunk_that_two_directories_share_names_both_paths(tmp_path: Path) -> None:
    same = File(noise(1, 2000))
    source = build({"a": {"x": same}, "b": {"x": same, "y": File(noise(2, 2000))}}, tmp_path / "source")
    repository = new_repository()
    first = back_up(repository, source)
    second = back_up(repository, source, force=True)
    for key in keys_of(repository.store, "packs/data/"):
        repository.store.delete(key)
    (finding,) = run_check(reopened(repository)).findings
    assert finding.what == "it is missing"
    assert finding.snapshots == tuple(
        short(snapshot.snapshot_id) for snapshot in sorted((first, second), key=lambda snapshot: snapshot.time_ns)
    )
    assert [path.removeprefix(source) for path in finding.paths] == [b"/a/x", b"/b/x", b"/b/y"]
    assert finding.paths_total == 3


def test_it_needs_no_local_folder_and_no_loaded_index(stored: MemoryStore) -> None:
    repository = Repository(stored, *_parts(reopened(stored)))
    assert repository.data_index.count == 0
    assert run_check(repository, read_data=True).findings == ()
    assert repository.data_index.count == 0


def _parts(repository: Repository) -> tuple:  # type: ignore[type-arg]
    return repository.config, repository.keyring, repository.slot_id, NOWHERE


# Bounds.


def test_findings_are_bounded() -> None:
    findings = Findings()
    for number in range(MOST_FINDINGS + 7):
        findings.damage(f"packs/data/{number:05}", "it is missing")
    findings.add(Severity.INFORMATION, "packs/data/00000", "something else")
    for text in range(10):
        findings.damage("packs/data/00001", f"text {text}")
    for snapshot in ("first", "second"):
        for number in range(100):
            findings.hit("packs/data/00002", snapshot, b"%s-%d" % (snapshot.encode(), number))
    findings.hit("packs/data/00002", "third", b"one")
    findings.hit("nothing is known of it", "first", b"x")
    listed = findings.listed()
    assert len(listed) == MOST_FINDINGS
    assert findings.omitted == 7
    by_key = {finding.key: finding for finding in listed}
    assert by_key["packs/data/00000"].severity == Severity.DAMAGE
    assert "8 more" in by_key["packs/data/00001"].what
    found = by_key["packs/data/00002"]
    assert found.snapshots == ("first", "second", "third")
    assert len(found.paths) == MOST_PATHS
    assert found.paths_total == 100


def test_the_worst_findings_come_first() -> None:
    findings = Findings()
    findings.add(Severity.INFORMATION, "a", "x")
    findings.add(Severity.WARNING, "b", "x")
    assert not findings.damaged
    findings.damage("c", "x")
    findings.add(Severity.DAMAGE, "a", "y")
    assert [finding.key for finding in findings.listed()] == ["a", "c", "b"]
    assert findings.damaged
    assert replace(findings.listed()[0], what="x; y") == findings.listed()[0]


class Meanwhile(AroundStore):
    """Lets something else happen, once, when the first pack (or what the prefix says) is put."""

    def __init__(self, inner: MemoryStore, happens: Callable[[], object], prefix: str = "packs/") -> None:
        super().__init__(inner)
        self._prefix = prefix
        self._happens: Callable[[], object] | None = happens

    def around(self, verb: str, key: str, call: Callable[[], Result]) -> Result:
        if verb == "put" and key.startswith(self._prefix) and (happens := self._happens) is not None:
            self._happens = None
            other = threading.Thread(target=happens)
            other.start()
            other.join()
        return call()


@pytest.mark.parametrize("lost", [0, 1])
def test_of_two_backups_at_once_each_is_missed_when_it_is_lost(tmp_path: Path, lost: int) -> None:
    store = MemoryStore()
    here = folders_in(tmp_path / "here")
    source = build(TREE, tmp_path / "source")
    first = back_up(new_repository(store, here), source)

    def other() -> None:
        twin = replace(first, sequence=2, previous=first.snapshot_id, time_ns=first.time_ns + 1)
        put_snapshot(reopened(store, here), twin)
        # The other program remembers what it made.
        load_snapshots(reopened(store, here)).note_seen()

    back_up(reopened(Meanwhile(store, other, "snapshots/"), here), source)
    twins = sorted(one.snapshot_id for one in load_snapshots(reopened(store)).snapshots if one.sequence == 2)
    assert len(twins) == 2
    key = f"snapshots/{twins[lost].hex()}"
    data = store.get(key)
    store.delete(key)
    # This machine knows both, and goes on to know them.
    for _ in range(2):
        assert [one.key for one in run_check(reopened(store, here)).findings] == [key]
    with pytest.raises(DamagedObject, match=r"latest may be another.*snapshot 2 of the host.*is gone"):
        load_snapshots(reopened(store, here)).find("latest")
    # The next one names both, lost or not, so that everybody knows.
    third = back_up(reopened(store, here), source)
    assert sorted((third.previous, *third.beside)) == twins
    elsewhere = load_snapshots(reopened(store))
    assert [loss.snapshot_id for loss in elsewhere.losses()] == [twins[lost]]
    assert elsewhere.snapshots[-1] == third
    store.put(key, data)
    assert load_snapshots(reopened(store, here)).losses() == []
    assert not run_check(reopened(store)).damaged


def test_what_another_host_makes_during_a_backup_is_not_taken_for_lost(tmp_path: Path) -> None:
    store = MemoryStore()
    here = folders_in(tmp_path / "here")
    source = build(TREE, tmp_path / "source")
    first = back_up(new_repository(store, here), source)
    made: list[Snapshot] = []
    is_sound: list[bool] = []

    def others() -> None:
        one = put_snapshot(reopened(store), replace(first, host="other", host_id=b"o" * 16))
        two = put_snapshot(reopened(store), replace(one, sequence=2, previous=one.snapshot_id))
        made.extend([one, two])
        # Another program on this machine looks at the repository, too, and remembers what it sees.
        is_sound.append(not run_check(reopened(store, here)).damaged)

    events: list[Event] = []
    (tmp_path / "source" / "new").write_bytes(noise(5, 500))
    assert backup(reopened(Meanwhile(store, others), here), [source], small_options(), events.append).snapshot
    assert is_sound == [True]
    assert [event for event in events if isinstance(event, Remark)] == []
    # It does tell of what is lost of the other.
    store.delete(f"snapshots/{made[1].snapshot_id.hex()}")
    backup(reopened(store, here), [source], small_options(), events.append)
    assert ["snapshot 2 of the host other" in event.text for event in events if isinstance(event, Remark)] == [True]
