"""A store that tries again what may go better the next time, around one that tries once."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from backupfs.errors import ObjectExists, ObjectMissing, StoreFull, StoreMissing, StoreUnavailable
from backupfs.stores.passing import PassingStore
from backupfs.stores.store import ArchiveState, LastingListing, ObjectInfo, Store

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

# Seconds between tries, each with up to as much again at random: clients that failed together must not come back
# together. In all a minute and a quarter at most, in which a server restarts.
_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
# Where each try takes long, as with a server that takes connections and says nothing, none begins after so long. A slow
# transfer that breaks off is tried again all the same.
_MOST_S = 90.0
_LEAST_TRIES = 3
# After one was given up, others get one try for so long, until any goes well: who reads a file in a mount asks for the
# same again and again.
_DOWN_S = 30.0
# From this pause on the user is told, or when this much time is gone.
_QUIET_S = 2.0
_QUIET_FOR_S = 10.0


class RetryingStore(PassingStore):
    """Passes everything on; what fails with StoreUnavailable is tried again, but for a full or missing store."""

    def __init__(
        self,
        inner: Store,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the store inside.

        sleep, clock: take and give seconds.
        """
        super().__init__(inner)
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._clock = clock
        self._down_since: float | None = None  # when one was given up; None: since then something went well

    def create(self) -> None:
        """Make the place."""
        self._try(self.inner.create)

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """Store an object; one whose answer was lost, or that came twice, is not mistaken for somebody else's."""

        def put() -> None:
            try:
                self.inner.put(key, data, if_absent=if_absent)
            except ObjectExists as error:
                try:
                    is_mine = self.inner.get(key) == data
                except ObjectMissing:
                    raise StoreUnavailable(f"{error}, and is not") from error
                if not is_mine:
                    raise

        self._try(put)

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return a range of an object."""
        return self._try(lambda: self.inner.get(key, start=start, length=length))

    def size(self, key: str) -> int:
        """Return the length of an object."""
        return self._try(lambda: self.inner.size(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield objects; a listing that breaks off goes on, or is begun anew, and what was yielded is passed over."""
        last = ""
        is_anew = False
        found: Iterator[ObjectInfo] | None = None

        def step() -> ObjectInfo | None:
            nonlocal found, is_anew
            try:
                if found is None:
                    found = self.inner.list(prefix)
                for info in found:
                    if not is_anew or info.key > last:
                        return info
            except StoreUnavailable:
                if not isinstance(found, LastingListing):
                    found, is_anew = None, True
                raise
            return None

        while (info := self._try(step)) is not None:
            last = info.key
            yield info

    def now(self) -> int:
        """Return the store's time."""
        return self._try(self.inner.now)

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._try(lambda: self.inner.delete(key))

    def archive_state(self, key: str) -> ArchiveState:
        """Tell whether an object can be read now."""
        return self._try(lambda: self.inner.archive_state(key))

    def thaw(self, key: str, days: int, tier: str) -> None:
        """Have an archived object made readable."""
        self._try(lambda: self.inner.thaw(key, days, tier))

    def stop(self) -> None:
        """End pauses; nothing is tried again from now on."""
        self._stopped.set()
        super().stop()

    def _try(self, call: Callable[[], Result]) -> Result:
        started = self._clock()
        is_down = self._down_since is not None and started - self._down_since < _DOWN_S
        pauses = iter(_PAUSES_S)
        tries = 0
        while True:
            tries += 1
            try:
                result = call()
                self._down_since = None
                return result
            except (StoreFull, StoreMissing):
                raise
            except StoreUnavailable as error:
                pause_s = next(pauses, None)
                now = self._clock()
                spent_s = now - started
                if pause_s is None or is_down or (tries >= _LEAST_TRIES and spent_s + pause_s > _MOST_S):
                    self._down_since = now
                    count = f"{tries} tries" if tries > 1 else "1 try"
                    raise StoreUnavailable(f"{error} ({count} in {spent_s:.0f} s)") from error
                if not self._stopped.is_set():
                    # What goes by in a moment is nobody's business.
                    is_quiet = pause_s < _QUIET_S and spent_s < _QUIET_FOR_S
                    _log.log(logging.INFO if is_quiet else logging.WARNING, "%s; trying again", error)
                    self._sleep(pause_s * (1 + random.random()))
                if self._stopped.is_set():
                    raise
