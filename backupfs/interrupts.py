"""Running the event loop so that an interrupt ends it soon, whatever it waits for.

The first interrupt cancels what runs; it may still put down what must not be lost. Whoever cannot wait for that
interrupts once more, which ends the process on the spot. The command line has SIGTERM and SIGHUP arrive as SIGINT.

An exception that came up just anywhere while an event loop is set up or taken down would break it, or be lost; so an
interrupt is only noted, from before the loop begins until after it has ended.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import TypeVar, TypeVarTuple

import trio

from backupfs.errors import EXIT_INTERRUPTED

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

# What ends sooner needs no word about it.
_QUIET_S = 0.5


def run(
    function: Callable[[*Arguments], Awaitable[Result]],
    *arguments: *Arguments,
    stop: Callable[[], None] = lambda: None,
) -> Result:
    """Run an asynchronous function in an event loop, in the main thread, and return what it returns.

    stop: called at the first interrupt; ends what waits in threads.
    Raises: KeyboardInterrupt after an interrupt, whatever came of it; what the function raises.
    """
    interrupt = _Interrupt()
    before = signal.signal(signal.SIGINT, interrupt.note)
    try:
        return trio.run(_run, function, arguments, stop, interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupt.came:
            raise KeyboardInterrupt


class _Interrupt:
    """Whether an interrupt came, which an event loop that listens can wait for."""

    def __init__(self) -> None:
        self.came = False
        self._tell: Callable[[], None] = lambda: None

    def note(self, _number: int, _frame: FrameType | None) -> None:
        """Handle the signal; a second one ends the process."""
        if self.came:
            # Forked processes end with this one; threads are not asked.
            os._exit(EXIT_INTERRUPTED)
        self.came = True
        # The last moments of a loop; whoever began it looks at what was noted.
        with contextlib.suppress(trio.RunFinishedError):
            self._tell()

    async def wait(self) -> None:
        told, token = trio.Event(), trio.lowlevel.current_trio_token()
        self._tell = lambda: token.run_sync_soon(told.set)
        if not self.came:
            await told.wait()


async def _run(
    function: Callable[[*Arguments], Awaitable[Result]],
    arguments: tuple[*Arguments],
    stop: Callable[[], None],
    interrupt: _Interrupt,
) -> Result:
    scope = trio.CancelScope()
    trio.lowlevel.spawn_system_task(_end_on, interrupt, scope, stop)
    with scope:
        return await function(*arguments)
    raise KeyboardInterrupt


async def _end_on(interrupt: _Interrupt, scope: trio.CancelScope, stop: Callable[[], None]) -> None:
    await interrupt.wait()
    scope.cancel()
    stop()
    await trio.sleep(_QUIET_S)
    sys.stderr.write("\nbackupfs: interrupted; ending, once more ends at once\n")
