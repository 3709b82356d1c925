"""Make pyfuse3's event loop quick: look for the next request before going to sleep over it.

For each request pyfuse3 takes a lock and waits for the kernel's descriptor, which in trio costs two turns of the
event loop, an epoll_wait and a sleep of the processor, though a client mostly asks again within some 20 µs.
pyfuse3 finds trio in its own module attribute `pyfuse3.trio` (made so that its asyncio mode can put something else
there), and `polled_event_loop` puts a namespace there that is trio but for these two: the wait polls before it parks,
the lock costs nothing while it is free. What stays as it was: other tasks run (at the latest after `BUSY_S`),
cancellation, `pyfuse3.terminate`, and several requests at once when handlers wait.

All of it belongs to the trio thread: code between two awaits is atomic and needs no lock of its own.
"""

import select
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from types import ModuleType, TracebackType

import pyfuse3
import trio

# The time after which a busy worker lets other tasks run. One turn costs some 15 µs; a timer of 1 ms is then late by
# 0.1 ms in the median and by 1 ms in the 99th percentile, as in the plain loop.
BUSY_S = 0.001

# How long to go on polling before parking. `find` with stat over 54,800 entries and `cp -a` of 3,800 files on two quiet
# cores: plain 2.4 and 1.0 s; poll once 1.9 and 0.9; spin of 25 µs 1.5–2.1 and 1.0; 50 µs 1.2 and 0.6; 75 µs 1.15 and
# 0.6; 100 and 150 µs no better, and each costs the server less CPU than the plain loop (1.1 against 1.6 s).
SPIN_S = 75e-6


@contextmanager
def polled_event_loop() -> Iterator[None]:
    """Let pyfuse3 poll while inside: `with polled_event_loop(): await pyfuse3.main()`.

    Enter it before `pyfuse3.main`, leave it after. Where pyfuse3 is in asyncio mode, or a version that no longer
    looks for trio in its module attribute, nothing is changed and the loop is as fast as pyfuse3 makes it.
    """
    if getattr(pyfuse3, "trio", None) is not trio:
        yield
        return
    # The attribute is not among pyfuse3's typed names.
    pyfuse3.trio = _Overlay(  # type: ignore[attr-defined]
        trio, Lock=SpareLock, lowlevel=_Overlay(trio.lowlevel, wait_readable=PollingWait().wait_readable)
    )
    try:
        yield
    finally:
        pyfuse3.trio = trio  # type: ignore[attr-defined]


class _Overlay:
    """A module with some names replaced; every other name is the module's own."""

    def __init__(self, module: ModuleType, **replaced: object) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


class SpinRate:
    """Tells whether spinning pays, from how the last spins ended.

    Where other processes want the processors, a spin keeps the client itself from running: nothing is found, and both
    lose the time. How long a wait parked would not tell that, only a real try does; so one is made now and then.
    """

    # A spin that found a request counts 1 in the running rate, another 0: the last two dozen count.
    _WEIGHT = 1 / 16
    # On quiet cores nine spins in ten find a request, on busy ones next to none.
    _PAYS = 0.5
    # While it does not pay, one wait in so many spins: 2 µs a request, and some 10 ms until spinning is resumed.
    _TRY_EVERY = 32

    def __init__(self) -> None:
        self._rate = 1.0
        self._refused = 0

    def pays(self) -> bool:
        """Tell whether to spin in this wait; call it once in each."""
        if self._rate >= self._PAYS:
            return True
        self._refused = (self._refused + 1) % self._TRY_EVERY
        return self._refused == 0

    def record(self, found: bool) -> None:
        """Count one spin."""
        self._rate += (found - self._rate) * self._WEIGHT


class PollingWait:
    """Waits for a descriptor by polling, and by parking in trio when that finds nothing; for one task at a time."""

    def __init__(self) -> None:
        self._fd = -1
        self._poll = select.poll()
        self._spins = SpinRate()

    async def wait_readable(self, fd: int) -> None:
        """Return when `fd` is readable or its other end is gone: without a checkpoint if that is so, or soon.

        Raises: trio.ClosedResourceError if `trio.lowlevel.notify_closing(fd)` is called meanwhile.
        """
        if fd != self._fd:
            self._fd, self._poll = fd, select.poll()
            self._poll.register(fd, select.POLLIN)
        if not (self._poll.poll(0) or (self._spins.pays() and self._spin())):
            await trio.lowlevel.wait_readable(fd)

    def _spin(self) -> bool:
        # Each poll releases the GIL, so that threads which decode blocks come in between.
        end = perf_counter() + SPIN_S
        found = self._poll.poll(0)
        while not found and perf_counter() < end:
            found = self._poll.poll(0)
        self._spins.record(bool(found))
        return bool(found)


class SpareLock:
    """The lock that pyfuse3's workers take to wait for a request; `async with` is all it can do.

    A release wakes a waiter but leaves the lock free until that one runs. So a worker whose handler did not wait takes
    the lock again at once, with no change of tasks, and one whose handler waits is replaced by the spare.
    """

    def __init__(self) -> None:
        self._held = False
        self._arriving = 0
        self._lot = trio.lowlevel.ParkingLot()
        self._busy_until = 0.0

    async def __aenter__(self) -> None:
        """Take the lock: without a checkpoint if it is free, a spare waits and the last one was not long ago."""
        # Without a spare pyfuse3 starts one more worker at each request: let the newest run, and stand here.
        if self._held or not self._arriving or perf_counter() > self._busy_until:
            await self._take_turns()
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the lock free and wake who waited longest."""
        self._held = False
        self._lot.unpark()

    async def _take_turns(self) -> None:
        # The checkpoint is here and not in the wait for the descriptor: after it pyfuse3 looks whether the session has
        # ended, and a `terminate` between that look and parking would not wake the worker.
        self._arriving += 1
        try:
            if not self._held:
                await trio.lowlevel.checkpoint()
            while self._held:
                await self._lot.park()
        finally:
            self._arriving -= 1
        self._busy_until = perf_counter() + BUSY_S
