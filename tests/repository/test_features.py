"""Features that were added after a repository was made: what an older program may still do."""

from collections.abc import Callable
from pathlib import Path

import pytest

from backupfs.errors import UnknownVersion
from backupfs.repository.config import unknown_features
from backupfs.repository.repository import Repository
from backupfs.snapshots import notes
from tests.builders import CHEAP, File, back_up, build, contents_of, copy_of, keys_of, new_repository, reopened


def with_feature(repository: Repository, key: str) -> Repository:
    store = copy_of(repository.store)
    store.put(f"features/{key}", b"whatever it needs")
    return reopened(store)


def test_a_compatible_feature_is_ignored(tmp_path: Path) -> None:
    source = build({"a": File(b"1")}, tmp_path / "source")
    repository = with_feature(new_repository(), "compatible/colour")
    assert contents_of(repository, back_up(repository, source))[source + b"/a"] is not None


@pytest.mark.parametrize(
    "key", ["incompatible/time-travel", "unheard-of/time-travel", "time-travel", "compatible", "Compatible/time-travel"]
)
def test_a_feature_that_readers_must_know_keeps_them_out(key: str) -> None:
    with pytest.raises(UnknownVersion, match=key.rpartition("/")[2]):
        with_feature(new_repository(), key)


def test_a_feature_that_writers_must_know_leaves_a_repository_to_read(tmp_path: Path) -> None:
    source = build({"a": File(b"1")}, tmp_path / "source")
    made = new_repository()
    snapshot = back_up(made, source)
    repository = with_feature(made, "read-compatible/appending")
    assert contents_of(repository, snapshot)[source + b"/a"] is not None
    before = keys_of(repository.store)
    writers: list[Callable[[], object]] = [
        lambda: back_up(repository, source, force=True),
        lambda: repository.add_slot(b"another", "another", CHEAP),
        lambda: repository.remove_slot(repository.slot_id),
        lambda: notes.put_note(repository, notes.new_note(snapshot.snapshot_id, notes.FORGET)),
    ]
    for write in writers:
        with pytest.raises(UnknownVersion, match="appending"):
            write()
    assert keys_of(repository.store) == before


def test_features_of_the_config_and_beside_it_count_alike() -> None:
    config = new_repository().config
    assert unknown_features(config, []) == (set(), set())
    added = [("compatible", "a"), ("read-compatible", "b"), ("incompatible", "c"), ("other", "d"), ("", "e")]
    assert unknown_features(config, added) == ({"c", "d", "e"}, {"b"})
