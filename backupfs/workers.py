"""The one door from the event loop to threads.

Two pools, so that slow stores never starve computing: `io` and `request` wait for files and networks, `cpu` computes
with the GIL released (compression, sealing, hashing). Calls pass values and return values. A hop costs about 60 µs:
hop per block or per directory, never per small file.
"""

import os
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

CPU_THREADS = os.cpu_count() or 1
IO_THREADS = 16

_limiters: dict[str, trio.CapacityLimiter] = {}


def _limiter(name: str, threads: int) -> trio.CapacityLimiter:
    if name not in _limiters:
        _limiters[name] = trio.CapacityLimiter(threads)
    return _limiters[name]


async def io(function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
    """Run a blocking call of a file system in a thread."""
    return await trio.to_thread.run_sync(function, *arguments, limiter=_limiter("io", IO_THREADS))


async def request(function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
    """Run a call to a store in a thread; one that may not answer for long is left behind when cancelled.

    The thread goes on then, until the process ends: nobody else may need what the function changes.
    """
    return await trio.to_thread.run_sync(
        function, *arguments, limiter=_limiter("io", IO_THREADS), abandon_on_cancel=True
    )


async def cpu(function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
    """Run a computation that releases the GIL in a thread, as many at once as there are processors."""
    return await trio.to_thread.run_sync(function, *arguments, limiter=_limiter("cpu", CPU_THREADS))
