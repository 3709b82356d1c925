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

# The time after which a busy worker lets other tasks run.
BUSY_S = 0.001

# How long to go on polling before parking.
SPIN_S = 50e-6

# A spin that ended with a request counts 1 in the running rate, another 0; below `_PAYS` there are no spins, but for
# one in `_TRY_EVERY` waits: only a real try tells whether the client would have run beside a spinning server.
_WEIGHT = 1 / 16
_PAYS = 0.5
_TRY_EVERY = 32


@contextmanager
def polled_event_loop() -> Iterator[None]:
    """Let pyfuse3 poll while inside: `with polled_event_loop(): await pyfuse3.main()`.

    Enter it before `pyfuse3.main`, leave it after. Where pyfuse3 is in asyncio mode, or a version that no longer
    looks for trio in its module attribute, nothing is changed and the loop is as fast as pyfuse3 makes it.
    """
    if getattr(pyfuse3, "trio", None) is not trio:
        yield
        return
    pyfuse3.trio = _Overlay(
        trio, Lock=SpareLock, lowlevel=_Overlay(trio.lowlevel, wait_readable=PollingWait().wait_readable)
    )
    try:
        yield
    finally:
        pyfuse3.trio = trio


class _Overlay:
    """A module with some names replaced; every other name is the module's own."""

    def __init__(self, module: ModuleType, **replaced: object) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


class PollingWait:
    """Waits for a descriptor by polling, and by parking in trio when that finds nothing."""

    def __init__(self) -> None:
        self._fd = -1
        self._poll = select.poll()
        self._rate = 1.0
        self._unspun = 0

    async def wait_readable(self, fd: int) -> None:
        """Return when `fd` is readable, or its other end is gone; without a checkpoint if that is soon.

        One task at a time. Raises: trio.ClosedResourceError after `trio.lowlevel.notify_closing(fd)`.
        """
        if fd != self._fd:
            self._fd, self._poll = fd, select.poll()
            self._poll.register(fd, select.POLLIN)
        if not (self._poll.poll(0) or (self._spin_pays() and self._spin())):
            await trio.lowlevel.wait_readable(fd)

    def _spin_pays(self) -> bool:
        if self._rate >= _PAYS:
            return True
        self._unspun = (self._unspun + 1) % _TRY_EVERY
        return not self._unspun

    def _spin(self) -> bool:
        # Each poll releases the GIL, so threads that decode blocks go on meanwhile.
        poll = self._poll.poll
        end = perf_counter() + SPIN_S
        found = poll(0)
        while not found and perf_counter() < end:
            found = poll(0)
        self._rate += (bool(found) - self._rate) * _WEIGHT
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
