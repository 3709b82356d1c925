"""The leading side of a backup's scanning processes: forks them, passes tasks and results between them, ends them.

A scanner that waits is answered once: with the result it waits for, else with a task that somebody gave away, else when
either comes. Belongs to the event loop, but for `start`, which comes before it and before any thread.
"""

import contextlib
import ctypes
import fcntl
import logging
import mmap
import os
import pickle
import signal
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from backupfs.errors import BackupfsError
from backupfs.repository.writer import FilledBlock
from backupfs.usecases.archive_counts import Counts
from backupfs.usecases.events import Report
from backupfs.usecases.scanner import (
    LENGTH_SIZE,
    Answer,
    Assigned,
    Counted,
    Done,
    End,
    Failed,
    Finished,
    Given,
    Logged,
    Message,
    OrdinalWanted,
    Returned,
    Root,
    Scanner,
    Waiting,
    Word,
    be_scanner,
    write_message,
)

# More than these find too little that the leader could keep up with.
MOST_SCANNERS = 4
_RECEIVE_SIZE = 1 << 16
_F_SETPIPE_SZ = 1031
_PIPE_SIZE = 1 << 20  # what an ordinary user may have; a block's ids fit in several times
_PR_SET_PDEATHSIG = 1


def scanner_count() -> int:
    """Return how many scanning processes this machine is good for."""
    return min(MOST_SCANNERS, os.cpu_count() or 1)


class _Member:
    """One scanning process, as its leader knows it."""

    __slots__ = ("counts", "ended", "incoming", "is_waiting", "number", "outgoing", "pid", "results")

    def __init__(self, number: int, pid: int, incoming: int, outgoing: int) -> None:
        self.number = number
        self.pid = pid
        self.incoming = incoming
        self.outgoing = outgoing
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
            to_scanner, to_leader = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
            leader = os.getpid()
            pid = os.fork()
            if pid == 0:
                _prepare_child(leader)
                for other in self._members:
                    os.close(other.incoming)
                    os.close(other.outgoing)
                os.close(to_scanner[1])
                os.close(to_leader[0])
                scanner = Scanner(to_scanner[0], to_leader[1], self._hungry)
                be_scanner(scanner, lambda line, begins=number == 0: scan(line, begins))  # type: ignore[misc]
            os.close(to_scanner[0])
            os.close(to_leader[1])
            _widen(to_leader[0])
            self._members.append(_Member(number, pid, to_leader[0], to_scanner[1]))

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
        """End all processes, whatever they do. May be called again."""
        for member in self._members:
            if member.pid:
                # It has nothing that could be lost.
                os.kill(member.pid, signal.SIGKILL)
                os.waitpid(member.pid, 0)
                member.pid = 0
                os.close(member.outgoing)
                if member.incoming >= 0:
                    os.close(member.incoming)

    async def _listen(self, member: _Member, take: Callable[[FilledBlock], Awaitable[None]], report: Report) -> None:
        received = bytearray()
        line, member.incoming = trio.lowlevel.FdStream(member.incoming), -1
        async with line:
            while part := await line.receive_some(_RECEIVE_SIZE):
                received += part
                while len(received) >= LENGTH_SIZE:
                    end = LENGTH_SIZE + int.from_bytes(received[:LENGTH_SIZE], "little")
                    if len(received) < end:
                        break
                    message: Message = pickle.loads(received[LENGTH_SIZE:end])
                    del received[:end]
                    if isinstance(message, FilledBlock):
                        await take(message)
                    else:
                        self._handle(member, message, report)
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
                _send(member, self._ordinals.setdefault(device, len(self._ordinals)))
            case Logged(logger, level, text):
                logging.getLogger(logger).log(level, "%s", text)
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
    # It waits for this, so the pipe is empty and read: writing does not block for long.
    with contextlib.suppress(BrokenPipeError):  # its end shows on the other line
        write_message(member.outgoing, answer)


def _prepare_child(leader: int) -> None:
    # Ctrl-C goes to the whole group; the leader decides what follows from it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != leader:
        os._exit(1)


def _widen(pipe: int) -> None:
    try:
        fcntl.fcntl(pipe, _F_SETPIPE_SZ, _PIPE_SIZE)
    except OSError:
        return  # the user has many of them open already
