"""The leading side of a restore's writing processes: forks them, hands out ranges, takes the results, ends them.

Writing small files is system calls and Python around them, which threads would do one at a time. Belongs to the event
loop, but for `start`, which comes before it and before any thread.
"""

import os
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from backupfs.errors import BackupfsError
from backupfs.forked import Forked, Line, fork
from backupfs.repository.fetch import PackRange
from backupfs.usecases.restore_items import Use
from backupfs.usecases.restore_range import Failed, SharedRanges, Written

# More than these would wait for the one who walks.
MOST_WRITERS = 4
# Ranges that a process has: one that it writes, and the next, so that it never waits for it.
RANGES_EACH = 2

Ready = tuple[PackRange[Use], int, bytes]  # a range, the slot that it holds, its work as a message
Settle = Callable[[PackRange[Use], Written], Awaitable[None]]


def writer_count() -> int:
    """Return how many writing processes this machine is good for."""
    return min(MOST_WRITERS, os.cpu_count() or 1)


class _Member:
    """One writing process, as its leader knows it."""

    def __init__(self, process: Forked) -> None:
        self.process = process
        self.under_way: deque[tuple[PackRange[Use], int]] = deque()  # in the order in which they were sent
        self.room = trio.Semaphore(RANGES_EACH)


class Writers:
    """The writing processes of one restore."""

    def __init__(self, shared: SharedRanges) -> None:
        """Take the memory that ranges are handed over in; nothing runs before `start`."""
        self._shared = shared
        self._members: list[_Member] = []
        self.lost_one = False  # one was killed, and may have left a temporary file
        self._free_slots, self.free = trio.open_memory_channel[int](shared.count)
        for slot in range(shared.count):
            self._free_slots.send_nowait(slot)

    def start(self, count: int, run: Callable[[int, Line], None]) -> None:
        """Fork the processes.

        run: (number of the process, the line to here) → does what comes over the line.
        """
        for number in range(count):
            others = [member.process for member in self._members]
            self._members.append(_Member(fork(lambda line, number=number: run(number, line), Failed, others)))  # type: ignore[misc]

    def give_back(self, slot: int) -> None:
        """Make a slot free; nobody may look at it any more."""
        self._free_slots.send_nowait(slot)

    def run_in(self, nursery: trio.Nursery, ready: "trio.MemoryReceiveChannel[Ready]", settle: Settle) -> None:
        """Hand out ranges, in tasks of a nursery, until there are no more; the tasks raise what a process raised.

        settle: takes each range when it was written.
        """
        for member in self._members:
            send, messages = trio.open_memory_channel[bytes](RANGES_EACH)
            nursery.start_soon(self._feed, member, ready.clone(), send)
            nursery.start_soon(member.process.send_all, messages)
            nursery.start_soon(self._listen, member, settle)
        ready.close()

    async def _feed(
        self, member: _Member, ready: "trio.MemoryReceiveChannel[Ready]", send: "trio.MemorySendChannel[bytes]"
    ) -> None:
        async with ready, send:
            while True:
                await member.room.acquire()
                try:
                    wanted, slot, message = await ready.receive()
                except trio.EndOfChannel:
                    return
                member.under_way.append((wanted, slot))
                await send.send(message)

    async def _listen(self, member: _Member, settle: Settle) -> None:
        async def take(message: object) -> None:
            if isinstance(message, Failed):
                raise message.error
            assert isinstance(message, Written)
            wanted, slot = member.under_way.popleft()
            self.give_back(slot)
            member.room.release()
            await settle(wanted, message)

        await member.process.listen(take)
        if member.under_way:
            self.lost_one = True
            raise BackupfsError(
                "a writing process ended before its work did, killed perhaps for want of memory: "
                "run the restore again with --overwrite if-changed"
            )

    def end(self) -> None:
        """End all processes: each leaves no file half written under its own name, and no temporary one of its own."""
        self._shared.stop()
        for member in self._members:
            member.process.forget_lines()
        for member in self._members:
            member.process.wait()
