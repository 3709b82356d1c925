"""Notes: append-only, destructive ones under the maintain key only."""

import pytest

from backupfs.codec.records import encode_record
from backupfs.codec.sealing import Kind, hash_object, seal_record
from backupfs.errors import DamagedObject, UnknownVersion
from backupfs.ids import SnapshotId
from backupfs.repository.repository import Repository
from backupfs.snapshots.notes import FORGET, Note, load_note, put_note
from tests.builders import keys_of, new_repository

SNAPSHOT = SnapshotId(hash_object(b"a snapshot"))


def filed(repository: Repository, kind: Kind, record: list, about: bytes = SNAPSHOT) -> str:  # type: ignore[type-arg]
    """File a note's record under any key and return its place."""
    data = seal_record(kind, repository.keyring, encode_record(record))
    key = f"notes/{about.hex()}/{hash_object(data).hex()}"
    repository.store.put(key, data)
    return key


@pytest.mark.parametrize("kind", [FORGET, "remark"])
def test_a_note_reads_back(kind: str) -> None:
    repository = new_repository()
    note = Note(SNAPSHOT, kind, 5, "host", (b"x", 7, ["y"]))
    put_note(repository, note)
    (key,) = keys_of(repository.store, "notes/")
    assert load_note(repository, key) == note


def test_forgetting_needs_the_maintain_key() -> None:
    repository = new_repository()
    key = filed(repository, Kind.NOTE, [1, SNAPSHOT, FORGET, 5, "host", []])
    with pytest.raises(DamagedObject, match="maintain"):
        load_note(repository, key)


def test_a_note_in_another_snapshots_place_is_damage() -> None:
    repository = new_repository()
    key = filed(repository, Kind.NOTE, [1, SNAPSHOT, "remark", 5, "host", []], bytes(32))
    with pytest.raises(DamagedObject, match="another snapshot"):
        load_note(repository, key)


def test_a_later_note_asks_for_an_upgrade() -> None:
    repository = new_repository()
    key = filed(repository, Kind.NOTE, [2, "whatever"])
    with pytest.raises(UnknownVersion, match="upgrade backupfs"):
        load_note(repository, key)


@pytest.mark.parametrize("record", [[], [1], [1, b"", "remark", 5, "host", None], ["x"]])
def test_what_is_no_note_is_damage(record: list) -> None:  # type: ignore[type-arg]
    repository = new_repository()
    key = filed(repository, Kind.NOTE, record)
    with pytest.raises(DamagedObject):
        load_note(repository, key)
