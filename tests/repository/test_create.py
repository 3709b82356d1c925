"""Making a repository where others do the same, over a store whose conditional puts are not atomic."""

from collections.abc import Callable

import pytest

from backupfs.errors import RepositoryExists, RepositoryLocked, StoreUnavailable
from backupfs.stores.memory import MemoryStore
from backupfs.stores.passing import PassingStore
from backupfs.stores.store import Store
from tests.builders import new_repository, reopened


class FarStore(PassingStore):
    """Takes every put, and calls others just before or after one of some key; once."""

    def __init__(self, inner: Store, begin: str = "", before: Callable[[], object] = lambda: None) -> None:
        super().__init__(inner)
        self._begin = begin
        self._before: Callable[[], object] | None = before
        self._after: Callable[[], object] | None = None

    @property
    def is_far(self) -> bool:
        return True

    def after(self, begin: str, call: Callable[[], object]) -> "FarStore":
        self._begin, self._before, self._after = begin, None, call
        return self

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        is_it = bool(self._begin) and key.startswith(self._begin)
        before, after = self._before, self._after
        if is_it:
            self._begin = ""
            if before is not None:
                before()
        self.inner.put(key, data)
        if is_it and after is not None:
            after()


def refused(store: Store) -> None:
    with pytest.raises(RepositoryLocked, match="another init makes a repository"):
        new_repository(FarStore(store))


@pytest.mark.parametrize("begin", ["config", "keys/"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_another_init_between_any_two_steps_leaves_one_repository_at_most(begin: str, when: str) -> None:
    inner = MemoryStore()
    made: list[Store] = []

    def other() -> None:
        try:
            new_repository(FarStore(inner))
        except (RepositoryExists, RepositoryLocked):
            return
        made.append(inner)

    store = FarStore(inner, begin, other) if when == "before" else FarStore(inner).after(begin, other)
    try:
        new_repository(store)
    except RepositoryLocked:
        pass
    else:
        made.append(store)
    assert len(made) == 1
    # Its password opens it, and nothing of the other is left.
    reopened(FarStore(inner))
    assert len(list(inner.list("keys/"))) == 1


def test_two_that_find_each_other_both_give_way() -> None:
    inner = MemoryStore()
    inner.put("keys/" + "ab" * 32, b"of another who is as far")
    refused(inner)
    assert [info.key for info in inner.list("")] == ["keys/" + "ab" * 32]
    inner.delete("keys/" + "ab" * 32)
    reopened(new_repository(FarStore(inner)))


def test_one_that_was_killed_is_in_the_way_for_five_minutes() -> None:
    time_ns = 10**18
    inner = MemoryStore(lambda: time_ns)
    inner.put("keys/" + "ab" * 32, b"of one that was killed")
    time_ns += 5 * 60 * 10**9 - 1
    refused(inner)
    time_ns += 1
    reopened(new_repository(FarStore(inner)))


def test_a_config_that_could_not_be_put_leaves_the_slot_that_may_belong_to_it() -> None:
    class Failing(FarStore):
        def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
            super().put(key, data)
            if key == "config":
                raise StoreUnavailable("the answer was lost")

    inner = MemoryStore()
    with pytest.raises(StoreUnavailable):
        new_repository(Failing(inner))
    # It was stored all the same.
    reopened(FarStore(inner))
