"""The one door from the event loop to threads.

Two pools, so that slow stores never starve computing: `io` and `request` wait for files and networks, `cpu` computes
with the GIL released (compression, sealing, hashing). Calls pass values and return values. A hop costs about 60 µs:
hop per block or per directory, never per small file.
"""

import ctypes
import os
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

CPU_THREADS = os.cpu_count() or 1
IO_THREADS = 16

_limiters: dict[str, trio.CapacityLimiter] = {}

# glibc hands blocks of a MiB back to the kernel at each free and faults their pages in again at each malloc, which
# costs more than what is done with them (measured: decrypting a MiB 0.05 ms into memory used before, 0.45 ms into new).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
KEPT_BYTES = 64 << 20
# Every thread would otherwise keep freed blocks in a heap of its own.
_ARENAS = 1


def keep_freed_memory(kept: int = KEPT_BYTES) -> None:
    """Ask the C library to reuse freed blocks instead of returning each to the kernel; harmless where it cannot.

    kept: bytes at the end of the heap that stay when they are free.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_ARENA_MAX, _ARENAS)
    mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, kept)


def return_freed_memory() -> None:
    """Give the kernel back what is free between blocks in use, where many of them were freed just now."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)


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
