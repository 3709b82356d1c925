"""Every object of a small repository, damaged in every way: reading gives the right bytes or DamagedObject, and check
names the object, the snapshots and the paths."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from backupfs.codec.sealing import FRAME, HEADER, TRAILER, Kind, hash_object
from backupfs.errors import DamagedObject, NotARepository, RepositoryError, UnknownVersion
from backupfs.ids import ChunkId, SnapshotId, short
from backupfs.repository import layout
from backupfs.repository.pack import ROW, blocks_of, read_directory
from backupfs.repository.repository import Repository
from backupfs.snapshots import notes
from backupfs.snapshots.listing import load_snapshot, load_snapshots
from backupfs.stores.memory import MemoryStore
from backupfs.usecases.check import CheckResult
from backupfs.usecases.findings import Finding, Severity
from backupfs.usecases.forget import forget
from tests.builders import (
    CHEAP,
    Directory,
    File,
    Hardlink,
    Kept,
    Sparse,
    Symlink,
    all_contents,
    back_up,
    build,
    copy_of,
    folders_in,
    keys_of,
    new_repository,
    noise,
    reopened,
    run_check,
)

pytestmark = pytest.mark.expected_log(
    r"^(WARNING|ERROR) backupfs\.(repository\.(index|chunks)|snapshots\.listing): .*"
    r"(damage|cut short|is not in|upgrade)"
)

Contents = dict[bytes, dict[bytes, Kept | None]]


@dataclass(frozen=True)
class Small:
    """A small repository and what is in it."""

    store: MemoryStore
    contents: Contents


TREE = {
    "a": File(noise(1, 700)),
    "big": File(noise(2, 60_000)),
    "empty": File(),
    "inline": File(b"few bytes"),
    "many": {f"file-{number:03}": File(noise(number, 1200)) for number in range(30)},
    "deep": {
        "d": {"e": Directory({"x": File(noise(3, 3000)), "l": Symlink(b"../../a")}, xattrs={"user.k": noise(4, 3000)})}
    },
    "hard": Hardlink("a"),
    "sparse": Sparse(1 << 20, {70_000: noise(6, 9000)}),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    base = tmp_path_factory.mktemp("damage")
    source = build(TREE, base / "source")
    repository = new_repository(folders=folders_in(base))
    first = back_up(repository, source, tags=("first",))
    Path(os.fsdecode(source), "many", "file-007").write_bytes(noise(77, 2000))
    Path(os.fsdecode(source), "new").write_bytes(noise(78, 30_000))
    back_up(repository, source)
    doomed = back_up(repository, os.path.join(source, b"deep"))
    notes.put_note(repository, notes.new_note(doomed.snapshot_id, notes.FORGET))
    notes.put_note(repository, notes.Note(first.snapshot_id, "remark", 1, "host", ("hello",)))
    repository.add_slot(b"other", "second", CHEAP)
    return Small(copy_of(repository.store), all_contents(reopened(repository.store)))


def finding_of(result: CheckResult, key: str) -> Finding | None:
    return next((finding for finding in result.findings if finding.key == key), None)


def test_an_undamaged_repository_has_no_findings(small: Small) -> None:
    repository = reopened(copy_of(small.store))
    for options in ({}, {"read_data": True}, {"subset": "1/2"}, {"subset": "50%"}):
        result = run_check(repository, **options)
        assert result.findings == ()
        assert not result.damaged
        assert result.snapshots == 2
    assert len(keys_of(small.store, "packs/data/")) >= 4
    assert len(keys_of(small.store, "packs/tree/")) >= 3


# Ways of damage: a name, and what becomes of an object's bytes; None is none at all.

Damage = Callable[[bytes, bytes], bytes | None]


def flipped(at: Callable[[bytes], int], bit: int = 0) -> Damage:
    def damage(data: bytes, _other: bytes) -> bytes:
        where = at(data)
        return data[:where] + bytes([data[where] ^ 1 << bit]) + data[where + 1 :]

    return damage


DAMAGES: dict[str, Damage] = {
    "magic flipped": flipped(lambda data: 1),
    "format flipped": flipped(lambda data: 4, 1),
    "kind flipped": flipped(lambda data: 5),
    "suite flipped": flipped(lambda data: 6, 1),
    "key form flipped": flipped(lambda data: 7),
    "epoch flipped": flipped(lambda data: 8),
    "reserved flipped": flipped(lambda data: 13),
    "salt flipped": flipped(lambda data: 20, 7),
    "frame's magic flipped": flipped(lambda data: HEADER.size),
    "frame's codec flipped": flipped(lambda data: HEADER.size + 5),
    "frame's length flipped": flipped(lambda data: HEADER.size + 8),
    "first body flipped": flipped(lambda data: HEADER.size + FRAME.size + 3, 3),
    "first quarter flipped": flipped(lambda data: len(data) // 4),
    "middle flipped": flipped(lambda data: len(data) // 2, 5),
    "directory flipped": flipped(lambda data: len(data) - TRAILER.size - 20),
    "tag flipped": flipped(lambda data: len(data) - TRAILER.size - 1),
    "trailer's offset flipped": flipped(lambda data: len(data) - TRAILER.size),
    "trailer's padding flipped": flipped(lambda data: len(data) - 10),
    "last byte flipped": flipped(lambda data: len(data) - 1, 6),
    "last byte cut off": lambda data, _: data[:-1],
    "half cut off": lambda data, _: data[: len(data) // 2],
    "header cut": lambda data, _: data[:20],
    "emptied": lambda _data, _other: b"",
    "longer": lambda data, _: data + b"\0",
    "missing": lambda _data, _other: None,
    "swapped": lambda _data, other: other,
}


METADATA_CHECKED = {
    "magic flipped",
    "first body flipped",
    "middle flipped",
    "directory flipped",
    "half cut off",
    "missing",
}


def damaged_copy(small: Small, key: str, damage: Damage) -> MemoryStore:
    store = copy_of(small.store)
    prefix = key.rpartition("/")[0]
    others = [other for other in keys_of(store, prefix) if other != key and other.rpartition("/")[0] == prefix]
    data = store.get(key)
    changed = damage(data, store.get(others[0]) if others else data[::-1])
    if changed is None:
        store.delete(key)
    else:
        store.put(key, changed)
    return store


def wrong_entries(small: Small, contents: Contents) -> Iterator[tuple[bytes, bytes]]:
    """Compare what was read with what was there; yield (snapshot, path) of what is damaged, allow nothing wrong."""
    for snapshot_id, expected in small.contents.items():
        found = contents.get(snapshot_id)
        if found is None:
            continue
        broken = [path.removesuffix(b"/?") for path, entry in found.items() if entry is None]
        for path in broken:
            yield snapshot_id, path
        for path, entry in found.items():
            if entry is not None and entry.content is None:
                assert entry.node == expected[path].node  # type: ignore[union-attr]
                yield snapshot_id, path
            elif entry is not None:
                assert entry == expected[path], path
        for path in expected.keys() - found.keys():
            assert any(path.startswith(above + b"/") for above in broken), path


def open_damaged(store: MemoryStore) -> Repository:
    return reopened(store)


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_packs_and_indexes_never_give_wrong_bytes_and_check_names_them(small: Small, name: str) -> None:
    for key in keys_of(small.store, "packs/") + keys_of(small.store, "index/"):
        store = damaged_copy(small, key, DAMAGES[name])
        contents = all_contents(open_damaged(store))
        assert contents.keys() == small.contents.keys()
        hits = set(wrong_entries(small, contents))
        assert not (key.startswith("index/") and hits), f"{key}: what an index says can be had from the packs"
        for read_data in (True, False) if name in METADATA_CHECKED else (True,):
            result = run_check(open_damaged(store), read_data=read_data)
            compare_with_hits(result, key, name, hits, read_data)


def compare_with_hits(
    result: CheckResult, key: str, name: str, hits: set[tuple[bytes, bytes]], read_data: bool
) -> None:
    found = finding_of(result, key)
    if name == "missing" and key.startswith("index/"):
        # Nobody names an index object; but its packs are named by none now.
        if result.damaged:
            assert all(finding.key.startswith("packs/") for finding in result.findings)
            assert any("no index names it" in finding.what for finding in result.findings)
        else:
            assert result.unnamed_packs
        return
    is_seen_anyway = key.startswith("index/") or name in ("missing", "emptied", "longer") or "cut" in name
    if read_data or is_seen_anyway:
        assert result.damaged, (key, name)
        assert found is not None
        assert found.severity == Severity.DAMAGE
    if read_data or (hits and is_seen_anyway):
        assert found is not None
        assert {short(snapshot) for snapshot, _ in hits} == set(found.snapshots), (key, name, found)
        assert len({path for _, path in hits}) == len(found.paths) or found.paths_total > len(found.paths)
        assert set(found.paths) <= {path or b"/" for _, path in hits}
    elif hits and key.startswith("packs/tree/"):
        assert found is not None
        assert set(found.paths) <= {path or b"/" for _, path in hits}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_snapshots_and_notes_leave_the_others_readable(small: Small, name: str) -> None:
    whole = load_snapshots(open_damaged(small.store))
    forgotten = {f"snapshots/{snapshot_id.hex()}" for snapshot_id in whole.forgotten}
    assert len(forgotten) == 1
    for key in keys_of(small.store, "snapshots/") + keys_of(small.store, "notes/"):
        store = damaged_copy(small, key, DAMAGES[name])
        repository = open_damaged(store)
        contents = all_contents(repository)
        assert not list(wrong_entries(small, contents))
        if key.startswith("snapshots/"):
            assert small.contents.keys() - contents.keys() <= {bytes.fromhex(key[-64:])}
        result = run_check(repository)
        if name == "missing":
            # Notes that nobody refers to are not missed, nor is what was forgotten.
            assert result.damaged == (key.startswith("snapshots/") and key not in forgotten)
            continue
        found = finding_of(result, key)
        if name == "swapped" and key.startswith("notes/"):
            assert result.damaged == (found is not None)
            continue
        assert result.damaged == (key not in forgotten)
        assert found is not None
        if key.startswith("snapshots/"):
            assert found.snapshots == (() if key in forgotten else (key[10:18],))
            with pytest.raises(DamagedObject):
                load_snapshot(repository, SnapshotId(bytes.fromhex(key[-64:])))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_config_or_key_slot_is_said_and_never_opens_something_else(small: Small, name: str) -> None:
    for key in ["config", *keys_of(small.store, "keys/")]:
        store = damaged_copy(small, key, DAMAGES[name])
        whole = reopened(copy_of(small.store))
        if key in ("config", layout.slot_key(whole.slot_id)):
            with pytest.raises(NotARepository if (key, name) == ("config", "missing") else RepositoryError):
                open_damaged(store)
        else:
            assert not list(wrong_entries(small, all_contents(open_damaged(store))))
        # Whoever has it open already learns of it from check.
        result = run_check(Repository(store, whole.config, whole.keyring, whole.slot_id, whole.local))
        missing_other = name == "missing" and key not in ("config", layout.slot_key(whole.slot_id))
        assert result.damaged != missing_other
        assert (finding_of(result, key) is not None) != missing_other


def test_a_repository_without_index_reads_from_its_packs(small: Small) -> None:
    store = copy_of(small.store)
    for key in keys_of(store, "index/"):
        store.delete(key)
    repository = reopened(store)
    assert all_contents(repository) == small.contents
    result = run_check(repository)
    assert result.damaged
    worst = [finding for finding in result.findings if finding.severity == Severity.DAMAGE]
    assert {finding.key for finding in worst} <= set(keys_of(store, "packs/"))
    assert all(finding.paths == () for finding in result.findings)
    assert run_check(repository, read_data=True).damaged


def test_all_data_lost_names_every_file_with_data_and_counts_them(small: Small) -> None:
    store = copy_of(small.store)
    for key in keys_of(store, "packs/data/"):
        store.delete(key)
    result = run_check(reopened(store))
    assert {finding.key for finding in result.findings} == set(keys_of(small.store, "packs/data/"))
    assert sum(finding.paths_total for finding in result.findings) > 20
    assert all(len(finding.paths) <= 20 for finding in result.findings)


def test_a_chunk_that_is_nowhere_names_its_paths(small: Small) -> None:
    store = copy_of(small.store)
    for key in keys_of(store, "packs/data/") + keys_of(store, "index/data/"):
        store.delete(key)
    result = run_check(reopened(store))
    (found,) = result.findings
    assert found.key == "packs/data/"
    assert "in no index and in no pack" in found.what
    assert found.paths_total > 30


def test_damage_in_one_of_two_copies_hits_no_path(small: Small) -> None:
    store = copy_of(small.store)
    whole = reopened(store)
    # Written again by a client that did not know the index: every chunk has two copies now.
    lost = {key: store.get(key) for key in keys_of(store, "index/")}
    for key in lost:
        store.delete(key)
    blind = reopened(store)
    source = next(iter(load_snapshots(whole).snapshots)).paths[0]
    back_up(blind, source, force=True)
    for key, data in lost.items():
        store.put(key, data)
    for key in keys_of(small.store, "packs/data/"):
        store.delete(key)
    repository = reopened(store)
    latest = load_snapshots(repository).snapshots[1]
    assert all_contents(repository)[latest.snapshot_id] == small.contents[latest.snapshot_id]
    result = run_check(repository)
    assert {finding.key for finding in result.findings} == set(keys_of(small.store, "packs/data/"))
    assert {snapshot for finding in result.findings for snapshot in finding.snapshots} == {
        short(load_snapshots(repository).snapshots[0].snapshot_id)
    }


# The local cache.


@pytest.mark.parametrize("damage", ["deleted", "emptied", "cut", "first", "middle", "samples", "last", "zeros"])
def test_a_garbled_or_lost_cache_file_is_made_again(small: Small, tmp_path: Path, damage: str) -> None:
    folders = folders_in(tmp_path)
    store = copy_of(small.store)
    reopened(store, folders)
    files = sorted((tmp_path / "cache").rglob("*.run"))
    assert files
    for file in files:
        data = file.read_bytes()
        middle = len(data) // 2
        match damage:
            case "deleted":
                file.unlink()
            case "emptied":
                file.write_bytes(b"")
            case "cut":
                file.write_bytes(data[:-1])
            case "first":
                file.write_bytes(bytes([data[0] ^ 255]) + data[1:])
            case "middle":
                file.write_bytes(
                    data[:middle] + bytes(byte ^ 255 for byte in data[middle : middle + 60]) + data[middle + 60 :]
                )
            case "samples":
                file.write_bytes(data[:-300] + bytes(byte ^ 255 for byte in data[-300:-64]) + data[-64:])
            case "last":
                file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            case "zeros":
                file.write_bytes(bytes(len(data) - 64) + data[-64:])
    repository = reopened(store, folders)
    assert all_contents(repository) == small.contents
    assert not run_check(repository).damaged  # it trusts no cache
    assert all_contents(reopened(store, folders)) == small.contents
    assert not list((tmp_path / "cache").glob("check-*"))


@pytest.mark.expected_log
@pytest.mark.parametrize("at", [0, 4, 5, 6, 7, 8, 20])
def test_a_garbled_header_in_a_cache_file_costs_no_read(small: Small, tmp_path: Path, at: int) -> None:
    folders = folders_in(tmp_path)
    store = copy_of(small.store)
    repository = reopened(store, folders)
    indexes = repository.data_index, repository.tree_index
    chunk_ids = [[row[0] for _, window in index.windows() for row in ROW.iter_unpack(window)] for index in indexes]
    headers = [pack.header for index in indexes for pack in index.packs().values()]
    for file in (tmp_path / "cache").rglob("*.run"):
        data = file.read_bytes()
        for header in headers:
            data = data.replace(header, header[:at] + bytes([header[at] ^ 2]) + header[at + 1 :])
        file.write_bytes(data)
    repository = reopened(store, folders)
    for reader, ids in zip((repository.data, repository.trees), chunk_ids, strict=True):
        for chunk_id in ids:
            assert reader.load(ChunkId(chunk_id))
    assert all_contents(reopened(store, folders)) == small.contents


# Objects from the future.


def rewritten(store: MemoryStore, key: str, at: int, value: int) -> str:
    """Change one byte of the header and name the object by its new bytes, as a later version would have written it."""
    data = bytearray(store.get(key))
    data[at] = value
    store.delete(key)
    new_key = key[:-64] + hash_object(data).hex()
    store.put(new_key, data)
    return new_key


@pytest.mark.parametrize(("at", "value"), [(4, 2), (6, 3), (7, 1)], ids=["format", "suite", "key form"])
def test_objects_from_the_future_ask_for_an_upgrade(small: Small, at: int, value: int) -> None:
    for prefix in ("snapshots/", "notes/", "index/data/", "index/tree/"):
        store = copy_of(small.store)
        key = rewritten(store, keys_of(store, prefix)[0], at, value)
        repository = reopened(store)
        if prefix == "snapshots/":
            with pytest.raises(UnknownVersion, match="upgrade backupfs"):
                load_snapshot(repository, SnapshotId(bytes.fromhex(key[-64:])))
        if prefix == "notes/":
            with pytest.raises(UnknownVersion, match="upgrade backupfs"):
                notes.load_note(repository, key)
        # What can be read without it is read.
        assert not list(wrong_entries(small, all_contents(repository)))
        found = finding_of(run_check(repository), key)
        assert found is not None
        assert "upgrade backupfs" in found.what


def test_a_snapshot_from_the_future_is_no_damage_and_not_forgotten(small: Small) -> None:
    store = copy_of(small.store)
    latest = load_snapshots(reopened(store)).snapshots[-1]
    key = rewritten(store, f"snapshots/{latest.snapshot_id.hex()}", 4, 2)
    found = finding_of(run_check(reopened(store)), key)
    assert found is not None
    assert found.severity == Severity.WARNING
    assert found.snapshots == ()
    assert found.what.endswith("upgrade backupfs")
    with pytest.raises(UnknownVersion, match="upgrade backupfs; it is not damaged"):
        trio.run(forget, reopened(store), [key[-64:-50]], False)
    assert keys_of(store, "notes/") == keys_of(small.store, "notes/")


@pytest.mark.parametrize(("at", "value"), [(4, 2), (6, 3)], ids=["format", "suite"])
def test_a_pack_from_the_future_asks_for_an_upgrade(small: Small, at: int, value: int) -> None:
    store = copy_of(small.store)
    key = rewritten(store, keys_of(store, "packs/data/")[0], at, value)
    with pytest.raises(UnknownVersion, match="upgrade backupfs"):
        read_directory(store, key, store.size(key), Kind.DATA_PACK, reopened(store).keyring)


@pytest.mark.parametrize(("at", "value"), [(7, ord("2")), (9, 2)], ids=["magic", "format"])
def test_a_config_from_the_future_asks_for_an_upgrade(small: Small, at: int, value: int) -> None:
    store = copy_of(small.store)
    data = bytearray(store.get("config"))
    data[at] = value
    store.put("config", data)
    with pytest.raises(UnknownVersion, match="upgrade backupfs"):
        reopened(store)


def test_a_flipped_bit_hits_only_the_files_of_its_block(small: Small) -> None:
    whole = reopened(copy_of(small.store))
    key = max(keys_of(small.store, "packs/data/"), key=small.store.size)
    found_in = read_directory(small.store, key, small.store.size(key), Kind.DATA_PACK, whole.keyring)
    spans = list(blocks_of(found_in.rows))
    assert len(spans) > 2
    store = damaged_copy(small, key, flipped(lambda data: spans[1].offset + 40))
    hits = set(wrong_entries(small, all_contents(reopened(store))))
    found = finding_of(run_check(reopened(store), read_data=True), key)
    assert found is not None
    assert f"at {spans[1].offset}" in found.what
    assert {path for _, path in hits} == set(found.paths)
