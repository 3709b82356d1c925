"""Notes: a snapshot is forgotten while it has a forget note that no undelete names, whatever the clocks say."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from backupfs.codec.records import Encodable, Field, encode_record
from backupfs.codec.sealing import Kind, hash_object, seal_record
from backupfs.ids import SnapshotId
from backupfs.repository import layout
from backupfs.repository.repository import Repository
from backupfs.snapshots import notes
from backupfs.snapshots.listing import load_snapshots, put_snapshot
from backupfs.snapshots.snapshot import FILES, Snapshot, Statistics
from backupfs.stores.directory import DirectoryStore
from tests import independent_reader
from tests.builders import PASSWORD, new_repository


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    store = DirectoryStore(tmp_path / "repository")
    store.create()
    return new_repository(store)


def put(repository: Repository, number: int = 1) -> SnapshotId:
    """Store a snapshot of nothing: notes do not look at trees."""
    snapshot = Snapshot(
        FILES,
        b"h" * 16,
        "earth",
        number,
        b"",
        number,
        number,
        (b"/",),
        (),
        b"",
        b"t" * 32,
        Statistics(),  # type: ignore[arg-type]
    )
    return put_snapshot(repository, snapshot).snapshot_id


def note(repository: Repository, snapshot_id: SnapshotId, kind: str, *arguments: Field, time_ns: int = 0) -> bytes:
    """Put a note and return its id."""
    before = ids_of(repository, snapshot_id)
    notes.put_note(repository, replace(notes.new_note(snapshot_id, kind), arguments=arguments, time_ns=time_ns))
    (new,) = ids_of(repository, snapshot_id) - before
    return new


def ids_of(repository: Repository, snapshot_id: SnapshotId) -> set[bytes]:
    found = {layout.id_in_key(info.key) for info in repository.store.list(layout.note_prefix(snapshot_id))}
    return {note_id for note_id in found if note_id is not None}


def is_forgotten(repository: Repository, snapshot_id: SnapshotId) -> bool:
    """Ask the program and the independent reader, which must agree."""
    ours = snapshot_id not in [snapshot.snapshot_id for snapshot in load_snapshots(repository).snapshots]
    assert isinstance(repository.store, DirectoryStore)
    other = independent_reader.Repository(Path(repository.store.url.removeprefix("file://")), PASSWORD)
    (theirs,) = [found.is_forgotten for found in other.snapshots() if found.snapshot_id == snapshot_id.hex()]
    assert ours == theirs
    return ours


def test_an_undelete_takes_back_the_notes_that_it_names(repository: Repository) -> None:
    snapshot_id, other = put(repository, 1), put(repository, 2)
    first = note(repository, snapshot_id, notes.FORGET)
    assert is_forgotten(repository, snapshot_id)
    assert not is_forgotten(repository, other)
    note(repository, snapshot_id, notes.UNDELETE, first)
    assert not is_forgotten(repository, snapshot_id)


def test_who_forgets_anew_is_not_taken_back_by_what_came_before(repository: Repository) -> None:
    snapshot_id = put(repository)
    first = note(repository, snapshot_id, notes.FORGET)
    note(repository, snapshot_id, notes.UNDELETE, first)
    second = note(repository, snapshot_id, notes.FORGET)
    assert is_forgotten(repository, snapshot_id)
    note(repository, snapshot_id, notes.UNDELETE, second)
    assert not is_forgotten(repository, snapshot_id)


def test_each_of_several_notes_must_be_named(repository: Repository) -> None:
    snapshot_id = put(repository)
    held = [note(repository, snapshot_id, notes.FORGET) for _ in range(3)]
    note(repository, snapshot_id, notes.UNDELETE, *held[:2])
    assert is_forgotten(repository, snapshot_id)
    note(repository, snapshot_id, notes.UNDELETE, held[2])
    assert not is_forgotten(repository, snapshot_id)


@pytest.mark.parametrize("times", [*permutations([-1, 0, 1 << 62])])
def test_no_clock_decides(times: tuple[int, int, int], repository: Repository) -> None:
    snapshot_id = put(repository)
    first = note(repository, snapshot_id, notes.FORGET, time_ns=times[0])
    note(repository, snapshot_id, notes.UNDELETE, first, time_ns=times[1])
    assert not is_forgotten(repository, snapshot_id)
    note(repository, snapshot_id, notes.FORGET, time_ns=times[2])
    assert is_forgotten(repository, snapshot_id)


def test_an_undelete_that_names_nothing_of_this_snapshot_does_nothing(repository: Repository) -> None:
    snapshot_id, other = put(repository, 1), put(repository, 2)
    first = note(repository, snapshot_id, notes.FORGET)
    note(repository, snapshot_id, notes.UNDELETE)
    note(repository, snapshot_id, notes.UNDELETE, bytes(32), b"", first[:-1], first.hex(), 7, None)
    note(repository, other, notes.UNDELETE, first)
    assert is_forgotten(repository, snapshot_id)


@pytest.mark.parametrize("kind", [notes.FORGET, notes.UNDELETE])
@pytest.mark.expected_log("needs the maintain key")
def test_a_note_that_is_not_under_the_maintain_key_changes_nothing(kind: str, repository: Repository) -> None:
    """Who may only add backups could otherwise make them vanish, or keep them from vanishing."""
    snapshot_id = put(repository)
    named: list[Encodable] = [note(repository, snapshot_id, notes.FORGET)] if kind == notes.UNDELETE else []
    record = encode_record([1, snapshot_id, kind, 0, "earth", named])
    data = seal_record(Kind.NOTE, repository.keyring, record)
    repository.store.put(layout.note_prefix(snapshot_id) + hash_object(data).hex(), data)
    assert is_forgotten(repository, snapshot_id) == (kind == notes.UNDELETE)
    assert len(load_snapshots(repository).damaged) == 1


def test_notes_of_later_versions_are_passed_over(repository: Repository) -> None:
    snapshot_id = put(repository)
    note(repository, snapshot_id, "pin", "for ever")
    assert not is_forgotten(repository, snapshot_id)
