"""Epochs of keys: each role counts for itself."""

import os
from pathlib import Path

import pytest

from backupfs.codec.keys import DATA, INDEX, SEALING_ROLES, TREE, Keyring, new_keyring
from backupfs.codec.sealing import HEADER
from backupfs.errors import WrongPassword
from backupfs.repository import layout
from backupfs.repository.local import LocalFolders
from backupfs.repository.repository import Repository, open_repository
from backupfs.snapshots import notes
from backupfs.snapshots.listing import load_snapshots
from backupfs.stores.directory import DirectoryStore
from tests import independent_reader
from tests.builders import CHEAP, NOWHERE, File, back_up, build, contents_of, new_repository, noise, run_check

NEW = b"the password of the slot with the new key"


def rotated(repository: Repository, role: str) -> Repository:
    """Return the repository as who has a slot with a newer key of one role opens it."""
    keyring = Keyring((*repository.keyring.keys, (role, 1, os.urandom(32))))
    store, local = repository.store, LocalFolders(None, None)
    Repository(store, repository.config, keyring, repository.slot_id, local).add_slot(NEW, "new", CHEAP)
    opened = open_repository(store, NEW, NOWHERE)
    opened.load_indexes()
    return opened


def epochs(repository: Repository) -> dict[str, set[int]]:
    """Return the epochs of the headers of all sealed objects, by the place of their keys."""
    found: dict[str, set[int]] = {}
    for info in repository.store.list(""):
        if info.key != layout.CONFIG and not info.key.startswith(layout.KEYS):
            _, _, _, _, _, epoch, _, _ = HEADER.unpack(repository.store.get(info.key, start=0, length=HEADER.size))
            place = layout.NOTES.rstrip("/") if info.key.startswith(layout.NOTES) else os.path.dirname(info.key)
            found.setdefault(place, set()).add(epoch)
    return found


def test_a_keyring_counts_epochs_by_role() -> None:
    keyring = Keyring((*new_keyring().keys, (DATA, 1, bytes(32)), (DATA, 7, bytes(32))))
    assert {role: keyring.epoch(role) for role in SEALING_ROLES} == {"tree": 0, "data": 7, "index": 0, "maintain": 0}


def test_where_one_role_alone_was_rotated_backups_are_written_and_read(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "repository")
    store.create()
    old = new_repository(store)
    source = build({"a": File(noise(1, 20_000))}, tmp_path / "source")
    before = back_up(old, source)
    repository = rotated(old, DATA)
    build({"b": File(noise(2, 20_000))}, tmp_path / "source" / "more")
    after = back_up(repository, source)
    notes.put_note(repository, notes.new_note(before.snapshot_id, notes.FORGET))
    found = epochs(repository)
    assert found.pop("packs/data") == {0, 1}
    assert set().union(*found.values()) == {0}
    assert len(found) == 5
    again = open_repository(store, NEW, NOWHERE)
    again.load_indexes()
    assert [snapshot.snapshot_id for snapshot in load_snapshots(again).snapshots] == [after.snapshot_id]
    kept = contents_of(again, after)
    assert {path[len(source) :] for path, entry in kept.items() if entry and entry.content} >= {b"/a", b"/more/b"}
    assert [kept[source + path].content for path in (b"/a", b"/more/b")] == [noise(1, 20_000), noise(2, 20_000)]  # type: ignore[union-attr]
    assert run_check(again).damaged == 0
    other = independent_reader.Repository(tmp_path / "repository", NEW)
    (snapshot,) = (found for found in other.snapshots() if not found.is_forgotten)
    files = {path: other.read(node) for path, node in other.walk(snapshot.tree) if node.type == independent_reader.FILE}
    assert files == {source + b"/a": noise(1, 20_000), source + b"/more/b": noise(2, 20_000)}


@pytest.mark.parametrize("role", [TREE, INDEX])
def test_any_role_may_be_the_one(role: str, tmp_path: Path) -> None:
    source = build({"a": File(noise(1, 20_000))}, tmp_path / "source")
    old = new_repository()
    back_up(old, source)
    repository = rotated(old, role)
    build({"b": File(noise(2, 20_000))}, tmp_path / "source" / "more")
    snapshot = back_up(repository, source)
    rotated_places = {TREE: {"packs/tree", "snapshots"}, INDEX: {"index/data", "index/tree"}}[role]
    assert {place for place, numbers in epochs(repository).items() if 1 in numbers} == rotated_places
    assert all(entry is not None and entry.content is not None for entry in contents_of(repository, snapshot).values())


def test_a_slot_without_the_new_key_says_so(tmp_path: Path) -> None:
    source = build({"a": File(noise(1, 20_000))}, tmp_path / "source")
    old = new_repository()
    snapshot = back_up(rotated(old, DATA), source)
    old.load_indexes()
    with pytest.raises(WrongPassword, match="data key of epoch 1"):
        contents_of(old, snapshot)
