"""The scanning side of a backup: a process that walks and reads, and shares its work with others of its kind.

Walking and reading are Python of a few system calls a file; in threads they would wait for each other and for whoever
compresses. So they run in processes that were forked from the one that leads the backup, which compresses and stores.
A scanner speaks to its leader only: it sends blocks and events, and when it has nothing to do it says so and gets one
answer, a task or the result of a task it gave away. It never waits without having said so, and while it waits for a
result it takes tasks: two scanners that wait for each other work for each other.
Nothing here is kept when a scanner is killed, and nothing is lost: only its leader writes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backupfs.forked import Line
from backupfs.ids import ChunkId
from backupfs.repository.writer import FilledBlock
from backupfs.snapshots.node import Xattrs
from backupfs.usecases.archive_counts import Counts
from backupfs.usecases.events import Event

# A task that is taken while waiting adds to Python's stack. At this depth nothing is given away any more, so nobody
# waits without being ready for a task: each that was given away finds somebody in the end, its giver if nobody else.
MOST_NESTED = 16


# What is given away, and what comes back, is between those who give and who do it.
Task = Any
Result = Any


@dataclass(frozen=True, slots=True)
class Root:
    """`/` as it was stored: the one directory that is in none."""

    tree: ChunkId
    row: bytes
    owner: bytes
    group: bytes
    xattrs: Xattrs | bytes


# What a scanner sends, beside blocks and events.


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing to do: answer with a task, a result or the end."""


@dataclass(frozen=True, slots=True)
class Given:
    """A task that another scanner may have."""

    number: int
    task: Task


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a task that was assigned."""

    giver: int
    number: int
    result: Result


@dataclass(frozen=True, slots=True)
class OrdinalWanted:
    """Answer with the number of a file system within the snapshot."""

    device: int


@dataclass(frozen=True, slots=True)
class Counted:
    """What this scanner has seen so far."""

    counts: Counts


@dataclass(frozen=True, slots=True)
class Failed:
    """The scanner cannot go on: the whole backup ends with this error."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Finished:
    """Everything was stored; the scanner ends."""

    root: Root | None  # of the one that began


Word = Event | Waiting | Given | Done | OrdinalWanted | Counted | Failed | Finished
Message = FilledBlock | Word


# What a scanner is sent.


@dataclass(frozen=True, slots=True)
class Assigned:
    """A task that scanner `giver` gave away."""

    giver: int
    number: int
    task: Task


@dataclass(frozen=True, slots=True)
class Returned:
    """The result of a task that this scanner gave away."""

    number: int
    result: Result


@dataclass(frozen=True, slots=True)
class End:
    """Hand out what is left and end."""


Answer = Assigned | Returned | End | int


class Ended(Exception):
    """The leader has no more work."""


class Scanner:
    """The scanning end of the line to the leader."""

    def __init__(self, line: Line, hungry: memoryview) -> None:
        """Take the parts.

        hungry: shared by all; its first byte says how many scanners wait for a task and is kept by the leader, the
        second is set by whoever meets a damaged tree.
        """
        self._line = line
        self._hungry = hungry
        self._run: Callable[[Task], Result] | None = None
        self._given = 0
        self.nested = 0
        self._results: dict[int, Result] = {}

    def send(self, message: Message) -> None:
        """Tell the leader something."""
        self._line.send(message)

    def distrust(self) -> None:
        """Let all processes store trees again, also those that the index knows."""
        self._hungry[1] = 1

    def distrusts(self) -> bool:
        """Tell whether one of them met a damaged tree."""
        return self._hungry[1] != 0

    def is_wanted(self) -> bool:
        """Tell whether somebody waits for a task. Costs next to nothing."""
        return self._hungry[0] > 0 and self.nested < MOST_NESTED

    def give(self, task: Task) -> int:
        """Give a task away, and return the number to ask for its result by."""
        self._given += 1
        self.send(Given(self._given, task))
        return self._given

    def result_of(self, number: int) -> Result:
        """Return the result of a task that was given away; while it is not there, work for others."""
        while number not in self._results:
            self._work()
        return self._results.pop(number)

    def ordinal(self, device: int) -> int:
        """Return the number of a file system within the snapshot."""
        self.send(OrdinalWanted(device))
        answer = self._receive()
        assert isinstance(answer, int)
        return answer

    def serve(self, run: Callable[[Task], Result]) -> None:
        """Set what does a task."""
        self._run = run

    def work_to_the_end(self) -> None:
        """Do tasks until the leader has no more."""
        try:
            while True:
                self._work()
        except Ended:
            return

    def _work(self) -> None:
        self.send(Waiting())
        answer = self._receive()
        match answer:
            case Assigned(giver, number, task):
                assert self._run is not None
                self.nested += 1
                self.send(Done(giver, number, self._run(task)))
                self.nested -= 1
            case Returned(number, result):
                self._results[number] = result
            case _:
                raise Ended

    def _receive(self) -> Answer:
        answer = self._line.receive()
        assert isinstance(answer, Assigned | Returned | End | int)
        return answer
