"""What is tried again, how often, and what is not."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

from backupfs.errors import AccessDenied, ObjectExists, StoreFull, StoreMissing, StoreUnavailable
from backupfs.stores.memory import MemoryStore
from backupfs.stores.retrying import RetryingStore
from backupfs.stores.store import Store
from tests.faults import AroundStore, CountingStore, Fault, FaultyStore

Result = TypeVar("Result")

VERBS: dict[str, Callable[[Store], object]] = {
    "put": lambda store: store.put("b", b"2"),
    "get": lambda store: store.get("a"),
    "size": lambda store: store.size("a"),
    "list": lambda store: list(store.list("")),
    "now": lambda store: store.now(),
    "delete": lambda store: store.delete("a"),
    "create": lambda store: store.create(),
}


def around(inner: Store) -> tuple[RetryingStore, list[float]]:
    pauses: list[float] = []
    return RetryingStore(inner, sleep=pauses.append), pauses


@pytest.mark.expected_log("failed by rule .*; trying again")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("times", [1, 7])
@pytest.mark.parametrize("verb", VERBS)
def test_what_fails_for_a_while_succeeds(verb: str, times: int, after: bool) -> None:
    inner = MemoryStore()
    inner.put("a", b"1")
    store, pauses = around(FaultyStore(inner, Fault(verb, 1, times=times, after=after)))
    VERBS[verb](store)
    assert len(pauses) == times
    assert pauses == sorted(pauses) or times == 1
    assert 0 < sum(pauses) < 120


def test_a_stop_ends_pauses_and_tries_but_what_begins_later_is_tried() -> None:
    inner = MemoryStore()
    counting = CountingStore(FaultyStore(inner, Fault("put", 1, times=100)))
    store = RetryingStore(counting)
    with ThreadPoolExecutor(1) as pool:
        putting = pool.submit(store.put, "b", b"2")
        while not counting.calls["put"]:
            time.sleep(0.001)
        store.stop()
        with pytest.raises(StoreUnavailable):
            putting.result()
    tried = counting.calls["put"]
    assert tried < 8
    with pytest.raises(StoreUnavailable):
        store.put("b", b"2")
    assert counting.calls["put"] == tried + 1


@pytest.mark.expected_log("failed by rule .*; trying again")
@pytest.mark.parametrize("verb", VERBS)
def test_what_fails_on_and_on_is_an_error_that_says_how_often_it_was_tried(verb: str) -> None:
    inner = MemoryStore()
    inner.put("a", b"1")
    store, pauses = around(FaultyStore(inner, Fault(verb, 1, times=100)))
    with pytest.raises(StoreUnavailable, match=r"failed by rule .* \(8 tries in 0 s\)"):
        VERBS[verb](store)
    assert len(pauses) == 7


@pytest.mark.expected_log("stalled; trying again")
@pytest.mark.parametrize(("try_s", "tries", "most_s"), [(0.0, 8, 80), (30.0, 3, 100), (13.0, 6, 120), (600.0, 3, 1810)])
def test_a_server_that_stalls_is_given_up_in_time_and_a_slow_transfer_is_tried_again(
    try_s: float, tries: int, most_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    told_at: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        if any(record.levelname == "WARNING" for record in caplog.records):
            told_at.append(now)
        now += seconds

    class Stalling(AroundStore):
        tries = 0

        def around(self, verb: str, key: str, call: Callable[[], object]) -> object:  # type: ignore[override]
            nonlocal now
            self.tries += 1
            now += try_s
            raise StoreUnavailable("stalled")

    inner = Stalling(MemoryStore())
    with pytest.raises(StoreUnavailable, match=r"stalled \(\d tries in \d+ s\)"):
        RetryingStore(inner, sleep, lambda: now).get("a")
    assert abs(inner.tries - tries) <= (try_s == 13.0)
    assert now < most_s
    # The first word comes early.
    assert told_at[0] <= max(try_s, 10.0)


@pytest.mark.parametrize("error", [StoreFull("full"), StoreMissing("gone"), AccessDenied("no")])
def test_what_trying_again_does_not_mend_is_told_at_once(error: Exception) -> None:
    class Failing(AroundStore):
        def around(self, verb: str, key: str, call: Callable[[], object]) -> object:  # type: ignore[override]
            raise error

    store, pauses = around(Failing(MemoryStore()))
    for call in VERBS.values():
        with pytest.raises(type(error)):
            call(store)
    assert pauses == []


def test_a_put_whose_answer_was_lost_is_not_taken_for_somebody_elses() -> None:
    inner = MemoryStore()
    store, _ = around(FaultyStore(inner, Fault("put", 1, after=True)))
    store.put("config", b"mine", if_absent=True)
    assert inner.get("config") == b"mine"
    # Nor is one that came twice.
    store.put("config", b"mine", if_absent=True)
    with pytest.raises(ObjectExists):
        store.put("config", b"other", if_absent=True)


@pytest.mark.expected_log("and is not; trying again")
def test_an_object_that_is_said_to_be_there_and_is_not_is_put_again() -> None:
    class Conflicting(AroundStore):
        left = 2

        def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
            if self.left:
                self.left -= 1
                raise ObjectExists(f"object {key} is there already")
            self.inner.put(key, data, if_absent=if_absent)

    inner = Conflicting(MemoryStore())
    store, pauses = around(inner)
    store.put("config", b"mine", if_absent=True)
    assert inner.get("config") == b"mine"
    assert len(pauses) == 2
    inner.delete("config")
    inner.left = 100
    with pytest.raises(StoreUnavailable, match="is there already, and is not"):
        around(inner)[0].put("config", b"mine", if_absent=True)


@pytest.mark.expected_log("stalled; trying again")
def test_after_one_was_given_up_others_get_one_try_until_any_goes_well() -> None:
    now = 0.0
    is_down = True

    class Down(AroundStore):
        tries = 0

        def around(self, verb: str, key: str, call: Callable[[], Result]) -> Result:
            nonlocal now
            self.tries += 1
            if is_down:
                now += 30.0
                raise StoreUnavailable("stalled")
            return call()

    inner = Down(MemoryStore())
    store = RetryingStore(inner, lambda _: None, lambda: now)
    for tries in (3, 1, 1):
        inner.tries = 0
        with pytest.raises(StoreUnavailable, match=r"stalled \(\d tr"):
            store.get("a")
        assert inner.tries == tries
        now += 20.0
    # Nobody asked for a while.
    now += 31.0
    inner.tries = 0
    with pytest.raises(StoreUnavailable):
        store.get("a")
    assert inner.tries == 3
    is_down = False
    store.put("a", b"1")
    is_down = True
    inner.tries = 0
    with pytest.raises(StoreUnavailable):
        store.get("a")
    assert inner.tries == 3


def test_somebody_elses_object_is_not_taken_for_the_one_that_was_put() -> None:
    inner = MemoryStore()
    inner.put("config", b"theirs")
    store, _ = around(FaultyStore(inner, Fault("put", 1)))
    with pytest.raises(ObjectExists):
        store.put("config", b"mine", if_absent=True)
    assert inner.get("config") == b"theirs"


def test_a_listing_that_breaks_off_yields_each_object_once() -> None:
    class Breaking(AroundStore):
        left = 3

        def list(self, prefix: str):  # type: ignore[no-untyped-def]
            for number, info in enumerate(self.inner.list(prefix)):
                if number == 5 and self.left:
                    self.left -= 1
                    raise StoreUnavailable("broken off")
                yield info

    inner = MemoryStore()
    for number in range(12):
        inner.put(f"a/{number:02}", b"")
    store, pauses = around(Breaking(inner))
    assert [info.key for info in store.list("a/")] == [f"a/{number:02}" for number in range(12)]
    assert len(pauses) == 3


def test_nothing_is_done_twice_that_did_not_fail() -> None:
    counting = CountingStore(MemoryStore())
    store, pauses = around(counting)
    counting.inner.put("a", b"1")
    for call in VERBS.values():
        call(store)
    assert set(counting.calls.values()) == {1}
    assert pauses == []


@pytest.mark.expected_log("WARNING .*failed by rule before get a; trying again")
def test_the_user_is_told_of_what_takes_longer_than_a_moment(caplog: pytest.LogCaptureFixture) -> None:
    inner = MemoryStore()
    inner.put("a", b"1")
    for times, warnings in ((3, 0), (4, 1), (6, 3)):
        caplog.clear()
        store, _ = around(FaultyStore(inner, Fault("get", 1, times=times)))
        store.get("a")
        assert len([record for record in caplog.records if record.levelname == "WARNING"]) == warnings
