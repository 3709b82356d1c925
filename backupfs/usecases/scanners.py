"""The leading side of a backup's scanning processes: forks them, passes tasks and results between them, ends them.

A scanner that waits is answered once: with the result it waits for, else with a task that somebody gave away, else when
either comes. Belongs to the event loop, but for `start`, which comes before it and before any thread.
"""

import mmap
import os
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from backupfs.errors import BackupfsError
from backupfs.forked import Forked, Line, fork
from backupfs.repository.writer import FilledBlock
from backupfs.usecases.archive_counts import Counts
from backupfs.usecases.events import Report
from backupfs.usecases.scanner import (
    Answer,
    Assigned,
    Counted,
    Done,
    End,
    Failed,
    Finished,
    Given,
    OrdinalWanted,
    Returned,
    Root,
    Scanner,
    Waiting,
    Word,
)

# More than these find too little that the leader could keep up with.
MOST_SCANNERS = 4


def scanner_count() -> int:
    """Return how many scanning processes this machine is good for."""
    return min(MOST_SCANNERS, os.cpu_count() or 1)


class _Member:
    """One scanning process, as its leader knows it."""

    __slots__ = ("counts", "ended", "is_waiting", "number", "process", "results")

    def __init__(self, number: int, process: Forked) -> None:
        self.number = number
        self.process = process
        self.counts = Counts()
        self.is_waiting = False
        self.results: deque[Returned] = deque()
        self.ended = False


class Scanners:
    """The scanning processes of one backup."""

    def __init__(self, ordinals: dict[int, int]) -> None:
        """Take the parts; nothing runs before `start`.

        ordinals: the numbers of file systems that are known; the scanners ask for others.
        """
        self._ordinals = ordinals
        self._members: list[_Member] = []
        self._pending: deque[Assigned] = deque()
        self._hungry = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self._root: Root | None = None

    def start(self, count: int, scan: Callable[[Scanner, bool], Root | None]) -> None:
        """Fork the processes.

        scan: (the line to here, whether this one begins) → `/`, from the one that begins.
        """
        for number in range(count):

            def run(line: Line, begins: bool = number == 0) -> None:
                scanner = Scanner(line, self._hungry)
                scanner.send(Finished(scan(scanner, begins)))

            process = fork(run, Failed, [member.process for member in self._members])
            self._members.append(_Member(number, process))

    def distrusts(self) -> bool:
        """Tell whether a scanner met a damaged tree: from then on trees are stored whatever the index knows."""
        return self._hungry[1] != 0

    @property
    def counts(self) -> Counts:
        """What all of them have seen so far."""
        total = Counts()
        for member in self._members:
            total.add(member.counts)
        return total

    async def run(self, take: Callable[[FilledBlock], Awaitable[None]], report: Report) -> Root:
        """Lead until everything was scanned; return `/`.

        take: gets each block that a scanner filled, in order for each scanner.
        Raises: what a scanner raised.
        """
        async with trio.open_nursery() as nursery:
            for member in self._members:
                nursery.start_soon(self._listen, member, take, report)
        assert self._root is not None
        return self._root

    def end(self) -> None:
        """End all processes, whatever they do: they have nothing that could be lost. May be called again."""
        for member in self._members:
            member.process.kill()

    async def _listen(self, member: _Member, take: Callable[[FilledBlock], Awaitable[None]], report: Report) -> None:
        async def handle(message: object) -> None:
            if isinstance(message, FilledBlock):
                await take(message)
            else:
                self._handle(member, message, report)  # type: ignore[arg-type]

        await member.process.listen(handle)
        if not member.ended:
            raise BackupfsError(
                "a scanning process ended before its work did, killed perhaps for want of memory: "
                "run the backup again, what was stored is kept"
            )

    def _handle(self, member: _Member, message: Word, report: Report) -> None:
        match message:
            case Waiting():
                member.is_waiting = True
                self._answer(member)
            case Given(number, task):
                self._pending.append(Assigned(member.number, number, task))
                self._assign()
            case Done(giver, number, result):
                self._members[giver].results.append(Returned(number, result))
                self._answer(self._members[giver])
            case Counted(counts):
                member.counts = counts
            case OrdinalWanted(device):
                _send(member, self._ordinals.setdefault(device, max(self._ordinals.values(), default=-1) + 1))
            case Failed(error):
                member.ended = True
                raise error
            case Finished(root):
                member.ended = True
                if root is not None:
                    self._root = root
                    for other in self._members:
                        self._answer(other)
            case _:
                report(message)

    def _answer(self, member: _Member) -> None:
        """Give a waiting scanner what there is for it."""
        if member.is_waiting:
            if member.results:
                member.is_waiting = False
                _send(member, member.results.popleft())
            elif self._root is not None:
                member.is_waiting = False
                _send(member, End())
        self._assign()

    def _assign(self) -> None:
        """Give tasks to those who wait for one, and note how many still do."""
        waiting = [member for member in self._members if member.is_waiting]
        while waiting and self._pending:
            member = waiting.pop(0)
            member.is_waiting = False
            _send(member, self._pending.popleft())
        self._hungry[0] = len(waiting)


def _send(member: _Member, answer: Answer) -> None:
    member.process.send_now(answer)
