"""Stores around a store: they count, fail, die or dawdle, and otherwise keep the contract of the store inside."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from backupfs.errors import StoreUnavailable
from backupfs.stores.passing import PassingStore
from backupfs.stores.store import ObjectInfo, Store

Result = TypeVar("Result")


class Crash(BaseException):
    """The process died here: no `except Exception` may catch it, and no later call reaches the store."""


class AroundStore(PassingStore):
    """Hands every call to the store inside through `around`, which the wrappers below replace."""

    def around(self, verb: str, key: str, call: Callable[[], Result]) -> Result:
        return call()

    def create(self) -> None:
        self.around("create", "", self.inner.create)

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        self.around("put", key, lambda: self.inner.put(key, data, if_absent=if_absent))

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        return self.around("get", key, lambda: self.inner.get(key, start=start, length=length))

    def size(self, key: str) -> int:
        return self.around("size", key, lambda: self.inner.size(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        # Read to the end inside, so that "after the call" means after the listing.
        return iter(self.around("list", prefix, lambda: tuple(self.inner.list(prefix))))

    def now(self) -> int:
        return self.around("now", "", self.inner.now)

    def delete(self, key: str) -> None:
        self.around("delete", key, lambda: self.inner.delete(key))


class CountingStore(AroundStore):
    """Counts the calls of each verb, also those that fail, and the bytes of those that succeed."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self.calls: Counter[str] = Counter()
        self.bytes_put = 0
        self.bytes_got = 0

    def around(self, verb: str, key: str, call: Callable[[], Result]) -> Result:
        with self._lock:
            self.calls[verb] += 1
        return call()

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        super().put(key, data, if_absent=if_absent)
        with self._lock:
            self.bytes_put += memoryview(data).nbytes

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        data = super().get(key, start=start, length=length)
        with self._lock:
            self.bytes_got += len(data)
        return data


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong: `Fault("put", 3, after=True)` loses the response of the third put."""

    verb: str
    at: int  # the n-th call that fits, from 1
    prefix: str = ""  # only calls whose key starts with it fit
    times: int = 1  # so many calls in a row fail
    after: bool = False  # the call reaches the store inside first, and only its response is lost
    kills: bool = False  # a Crash; from then on every call is one


class FaultyStore(AroundStore):
    """Lets calls fail by rules, each counting on its own the calls that fit it."""

    def __init__(self, inner: Store, *rules: Fault) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._seen = dict.fromkeys(rules, 0)
        self.dead = False

    def around(self, verb: str, key: str, call: Callable[[], Result]) -> Result:
        due = self._due(verb, key)
        if due is None:
            return call()
        if due.after:
            call()
        moment = f"{'after' if due.after else 'before'} {verb} {key}"
        if due.kills:
            self.dead = True
            raise Crash(f"killed {moment}")
        raise StoreUnavailable(f"failed by rule {moment}")

    def _due(self, verb: str, key: str) -> Fault | None:
        with self._lock:
            if self.dead:
                raise Crash(f"{verb} {key} by a process that is dead")
            found = None
            for rule, seen in self._seen.items():
                if rule.verb == verb and key.startswith(rule.prefix):
                    self._seen[rule] = seen + 1
                    if rule.at <= seen + 1 < rule.at + rule.times:
                        found = found or rule
            return found


class SlowStore(AroundStore):
    """Waits before every call, as a distant store does; `sleep` may be replaced by one that only records."""

    def __init__(self, inner: Store, latency_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
        super().__init__(inner)
        self._latency_s = latency_s
        self._sleep = sleep

    def around(self, verb: str, key: str, call: Callable[[], Result]) -> Result:
        self._sleep(self._latency_s)
        return call()
