"""The scanning side of a backup: a process that walks and reads, and shares its work with others of its kind.

Walking and reading are Python of a few system calls a file; in threads they would wait for each other and for whoever
compresses. So they run in processes that were forked from the one that leads the backup, which compresses and stores.
A scanner speaks to its leader only: it sends blocks and events, and when it has nothing to do it says so and gets one
answer, a task or the result of a task it gave away. It never waits without having said so, and while it waits for a
result it takes tasks: two scanners that wait for each other work for each other.
Nothing here is kept when a scanner is killed, and nothing is lost: only its leader writes.
"""

import logging
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from backupfs.ids import ChunkId
from backupfs.repository.writer import FilledBlock
from backupfs.snapshots.node import Xattrs
from backupfs.usecases.archive_counts import Counts
from backupfs.usecases.events import Event

# A task that is taken while waiting adds to Python's stack. At this depth nothing is given away any more, so nobody
# waits without being ready for a task: each that was given away finds somebody in the end, its giver if nobody else.
MOST_NESTED = 16
LENGTH_SIZE = 4


@dataclass(frozen=True, slots=True)
class Task:
    """Some directories in one directory, to be stored by somebody else."""

    path: bytes  # of the directory they are in
    identity: tuple[int, int]  # its (st_dev, st_ino)
    names: tuple[bytes, ...]
    parents: tuple[ChunkId | None, ...]  # trees to compare them with
    wants_xattrs: bool


# (tree, xattrs) of each directory; None: the directory they are in cannot be found by its path any more.
Result = tuple[tuple[ChunkId, Xattrs], ...] | None


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
class Logged:
    """A line for the log."""

    logger: str
    level: int
    text: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The scanner cannot go on: the whole backup ends with this error."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Finished:
    """Everything was stored; the scanner ends."""

    root: Root | None  # of the one that began


Word = Event | Waiting | Given | Done | OrdinalWanted | Counted | Logged | Failed | Finished
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


def write_message(pipe: int, message: Message | Answer) -> None:
    """Write a message, after its length. Raises: BrokenPipeError."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    view = memoryview(len(data).to_bytes(LENGTH_SIZE, "little") + data)
    while view:
        view = view[os.write(pipe, view) :]


class Ended(Exception):
    """The leader has no more work."""


class Scanner:
    """The scanning end of the line to the leader."""

    def __init__(self, incoming: int, outgoing: int, hungry: memoryview) -> None:
        """Take the parts.

        hungry: its first byte says how many scanners wait for a task; kept by the leader.
        """
        self._incoming = incoming
        self._outgoing = outgoing
        self._hungry = hungry
        self._run: Callable[[Task], Result] | None = None
        self._given = 0
        self.nested = 0
        self._results: dict[int, Result] = {}

    def send(self, message: Message) -> None:
        """Tell the leader something; ends this process if there is none."""
        try:
            write_message(self._outgoing, message)
        except BrokenPipeError:
            os._exit(1)

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
        length = int.from_bytes(self._read(LENGTH_SIZE), "little")
        answer: Answer = pickle.loads(self._read(length))
        return answer

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = os.read(self._incoming, length - len(data))
            if not part:
                os._exit(1)  # there is no leader any more
            data += part
        return data


def be_scanner(scanner: Scanner, scan: Callable[[Scanner], Root | None]) -> NoReturn:
    """Be a scanning process to its end.

    scan: does everything, and returns `/` in the process that began with it.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_Forwarder(scanner))
    code = 1
    try:
        scanner.send(Finished(scan(scanner)))
        code = 0
    except Exception as error:
        scanner.send(Failed(_portable(error)))
    finally:
        os._exit(code)


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent, with what led to it as its note."""
    import traceback

    error.add_note("in a scanning process:\n" + "".join(traceback.format_tb(error.__traceback__)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class _Forwarder(logging.Handler):
    """Sends the lines of the log to the leader, whose handlers decide."""

    def __init__(self, scanner: Scanner) -> None:
        super().__init__()
        self._scanner = scanner

    def emit(self, record: logging.LogRecord) -> None:
        """Send one line."""
        self._scanner.send(Logged(record.name, record.levelno, record.getMessage()))
