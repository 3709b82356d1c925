"""Running the event loop so that an interrupt ends it soon, whatever it waits for.

The first interrupt cancels what runs; it may still put down what must not be lost. Whoever cannot wait for that
interrupts once more, which ends the process on the spot. The command line has SIGTERM and SIGHUP arrive as SIGINT.
"""

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar, TypeVarTuple

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
    return trio.run(_run, function, arguments, stop)


async def _run(
    function: Callable[[*Arguments], Awaitable[Result]], arguments: tuple[*Arguments], stop: Callable[[], None]
) -> Result:
    scope, watches = trio.CancelScope(), trio.Event()
    trio.lowlevel.spawn_system_task(_watch, scope, stop, watches)
    await watches.wait()
    try:
        with scope:
            return await function(*arguments)
    except BaseException as error:
        if scope.cancel_called:
            raise KeyboardInterrupt from error
        raise
    raise KeyboardInterrupt


async def _watch(scope: trio.CancelScope, stop: Callable[[], None], watches: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGINT) as signals:
        watches.set()
        async for _ in signals:
            break
        scope.cancel()
        stop()
        with trio.move_on_after(_QUIET_S):
            async for _ in signals:
                _end()
        sys.stderr.write("\nbackupfs: interrupted; ending, once more ends at once\n")
        async for _ in signals:
            _end()


def _end() -> NoReturn:
    # Forked processes end with this one; threads are not asked.
    os._exit(EXIT_INTERRUPTED)
