"""Key slots in a store that is far: listings lag, and what comes may be garbled on its way."""

from collections.abc import Iterator
from functools import partial

import pytest
import trio

from backupfs.errors import ObjectMissing, UsageError
from backupfs.repository import layout
from backupfs.repository.repository import open_repository
from backupfs.stores.passing import PassingStore
from backupfs.stores.store import ObjectInfo, Store
from backupfs.usecases import keys
from tests.builders import CHEAP, NOWHERE, new_repository, reopened


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "KdfCost", lambda: CHEAP)


class Stale(PassingStore):
    """Its listings show what was there when it was made; the first `garbled` answers have a bit flipped."""

    is_far = True  # type: ignore[assignment]
    garbled = 0

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.shown = {info.key for info in inner.list("")}

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return (info for info in super().list(prefix) if info.key in self.shown)

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        data = super().get(key, start=start, length=length)
        if self.garbled and key.startswith(layout.KEYS):
            self.garbled -= 1
            return data[:-1] + bytes([data[-1] ^ 1])
        return data


@pytest.mark.parametrize("garbled", [0, 1])
def test_a_password_is_changed_though_the_listing_does_not_show_the_new_slot(garbled: int) -> None:
    first = new_repository()
    repository = reopened(first.store)
    store = Stale(first.store)
    repository.store = store
    store.garbled = garbled
    added = trio.run(partial(keys.change_password, repository, b"new"))
    assert (added.name, added.own) == ("first", False)
    assert open_repository(first.store, b"new", NOWHERE).slot_id == added.slot_id
    with pytest.raises(ObjectMissing):
        first.store.get(layout.slot_key(repository.slot_id))


def test_the_own_slot_is_there_though_the_listing_does_not_show_it() -> None:
    first = new_repository()
    other = first.add_slot(b"other", "other", CHEAP)
    repository = reopened(first.store)
    store = Stale(first.store)
    repository.store = store
    store.shown.discard(layout.slot_key(repository.slot_id))
    listed = trio.run(keys.list_slots, repository)
    assert {(slot.slot_id, slot.own) for slot in listed} == {(repository.slot_id, True), (other, False)}
    assert trio.run(keys.remove_slot, repository, "other").slot_id == other
    with pytest.raises(UsageError, match="last key slot"):
        trio.run(keys.remove_slot, repository, "first")


def test_a_slot_that_somebody_removed_meanwhile_is_told_in_one_line() -> None:
    repository = new_repository()
    repository.store.delete(layout.slot_key(repository.slot_id))
    with pytest.raises(ObjectMissing):
        trio.run(partial(keys.change_password, repository, b"new"))
