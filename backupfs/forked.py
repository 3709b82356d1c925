"""Processes that are forked from this one, each with a line of messages to it and one back.

Python runs one thread at a time; work that is Python and system calls scales by processes only. Forked ones have all
that was opened before, so nothing is set up twice, and messages are plain Python values.
Fork while the process has one thread: a lock that another holds would stay locked in the child.
The side that forks reads in an event loop, the forked side waits for one message after the other.
"""

import contextlib
import ctypes
import fcntl
import io
import logging
import os
import pickle
import select
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, NoReturn, TypeVar, cast

import trio

Result = TypeVar("Result")

_LENGTH_SIZE = 4
_RECEIVE_SIZE = 1 << 18
_F_SETPIPE_SZ = 1031
_PIPE_SIZE = 1 << 20  # what an ordinary user may have
_PR_SET_PDEATHSIG = 1
_MOST_UNTRUSTED = 256 << 20
# Small messages that are gathered, in bytes and seconds, before they are written at once: a write wakes up the other.
_MOST_GATHERED = 64 << 10
_GATHER_S = 0.1
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LeaderGone(BaseException):
    """The process that forked this one is there no more, or wants nothing more of it. Nobody is to handle it."""


class Line:
    """The forked process's end: what it is told, and what it tells."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._gathered = bytearray()
        self._sent_at = 0.0

    @property
    def descriptors(self) -> tuple[int, int]:
        """What this process must keep open for it."""
        return self._incoming, self._outgoing

    def send(self, message: object) -> None:
        """Tell the leader something, and all that was to be told soon. Raises: LeaderGone."""
        data = encoded(message)
        if self._gathered:
            data, self._gathered = bytes(self._gathered) + data, bytearray()
        try:
            _write(self._outgoing, data)
        except BrokenPipeError:
            raise LeaderGone from None

    def send_soon(self, message: object) -> None:
        """Tell the leader something, together with what comes right after it: `send` ends that. Raises: LeaderGone.

        For processes of one thread.
        """
        now = time.monotonic()
        if len(self._gathered) > _MOST_GATHERED or now - self._sent_at > _GATHER_S:
            self._sent_at = now
            self.send(message)
        else:
            self._gathered += encoded(message)

    def receive(self) -> object:
        """Wait for the next message. Raises: LeaderGone."""
        return pickle.loads(self._read(int.from_bytes(self._read(_LENGTH_SIZE), "little")))

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = os.read(self._incoming, length - len(data))
            if not part:
                raise LeaderGone
            data += part
        return data


class Forked:
    """The leader's end of the line to one forked process."""

    def __init__(self, pid: int, incoming: int, outgoing: int) -> None:
        self.pid = pid
        self._incoming = incoming
        self._outgoing = outgoing

    @property
    def incoming(self) -> int:
        """The descriptor of what it says."""
        return self._incoming

    def send_now(self, message: object) -> None:
        """Send a message to a process that waits for one: its line is empty, so this does not block for long."""
        with contextlib.suppress(BrokenPipeError):  # its end shows on the other line
            _write(self._outgoing, encoded(message))

    async def send_all(self, messages: "trio.MemoryReceiveChannel[bytes]") -> None:
        """Send messages, `encoded` before, as fast as the process takes them; it is told the end by their end."""
        line, self._outgoing = trio.lowlevel.FdStream(self._outgoing), -1
        async with messages, line:
            # A process that is gone shows on the other line.
            with contextlib.suppress(trio.BrokenResourceError):
                async for message in messages:
                    await line.send_all(message)

    def messages(self, patience_s: float, kinds: Sequence[type]) -> Iterator[object]:
        """Yield what a process sends that is not to be trusted, until it closes its end; without an event loop.

        kinds: the classes of messages that are taken: any other could do anything here.
        Raises: TimeoutError when it sends nothing for so long; pickle.UnpicklingError for what is no such message.
        """
        allowed = {(kind.__module__, kind.__qualname__): kind for kind in (*kinds, _Logged)}
        received = bytearray()
        # Not select(2), which knows the first 1,024 descriptors only.
        waiting = select.poll()
        waiting.register(self._incoming, select.POLLIN)
        while True:
            if not waiting.poll(patience_s * 1000):
                raise TimeoutError
            part = os.read(self._incoming, _RECEIVE_SIZE)
            if not part:
                return
            received += part
            if len(received) > _MOST_UNTRUSTED:
                raise pickle.UnpicklingError("a message is larger than is believed")
            yield from _taken(received, lambda data: _Restricted(data, allowed).load())

    async def listen(self, take: Callable[[object], Awaitable[None]]) -> None:
        """Pass on what the process sends, until it closes its end; lines of its log go to the log here."""
        received = bytearray()
        line, self._incoming = trio.lowlevel.FdStream(self._incoming), -1
        async with line:
            while part := await line.receive_some(_RECEIVE_SIZE):
                received += part
                for message in _taken(received):
                    await take(message)

    def forget_lines(self) -> None:
        """Close this end of the lines."""
        for pipe in (self._incoming, self._outgoing):
            if pipe >= 0:
                os.close(pipe)
        self._incoming = self._outgoing = -1

    def kill(self) -> None:
        """End the process, whatever it does. May be called again."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> None:
        """Wait until the process has ended. May be called again."""
        if self.pid:
            os.waitpid(self.pid, 0)
            self.pid = 0
        self.forget_lines()


def fork(run: Callable[[Line], None], failed: Callable[[Exception], object], others: Sequence[Forked]) -> Forked:
    """Fork a process that does one thing and ends.

    run: what it does.
    failed: makes the message that tells the leader of an exception out of `run`.
    others: processes forked before, whose lines are none of its business.
    """
    to_child, to_leader = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    leader = os.getpid()
    # Python calls hooks of its own around a fork, and an interrupt that is raised in one of them is lost.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        pid = os.fork()
        if pid == 0:
            _prepare_child(leader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if pid == 0:
        for other in others:
            other.forget_lines()
        os.close(to_child[1])
        os.close(to_leader[0])
        _be_child(Line(to_child[0], to_leader[1]), run, failed)
    os.close(to_child[0])
    os.close(to_leader[1])
    for pipe in (to_child[1], to_leader[0]):
        _widen(pipe)
    return Forked(pid, to_leader[0], to_child[1])


class _Answer(NamedTuple):
    """What a forked call came to."""

    value: object
    error: Exception | None


def call(function: Callable[[Callable[[object], None]], Result], take: Callable[[object], None]) -> Result:
    """Run a function in a forked process, and return what it returns: its threads and memory end with it.

    function: gets what passes on messages, which go to `take` here. Both and the result can be pickled.
    Without an event loop. Raises: what the function raises; ChildProcessError when the process ended without a word.
    """

    def run(line: Line) -> None:
        line.send(_Answer(function(line.send), None))

    process = fork(run, lambda error: _Answer(None, error), ())
    try:
        received = bytearray()
        while part := os.read(process.incoming, _RECEIVE_SIZE):
            received += part
            for message in _taken(received):
                if not isinstance(message, _Answer):
                    take(message)
                elif message.error is not None:
                    raise message.error
                else:
                    return cast("Result", message.value)
        raise ChildProcessError("a process ended without a word")
    finally:
        process.kill()


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the one that forked it ends, however that ends.

    It stays through an exec, so that it can be set for another program.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _prepare_child(leader: int) -> None:
    # Ctrl-C goes to the whole group; the leader decides what follows from it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    if os.getppid() != leader:
        os._exit(1)


def _be_child(line: Line, run: Callable[[Line], None], failed: Callable[[Exception], object]) -> NoReturn:
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_Forwarder(line))
    code = 1
    try:
        run(line)
        code = 0
    except LeaderGone:
        pass
    except Exception as error:
        with contextlib.suppress(LeaderGone):
            line.send(failed(_portable(error)))
    finally:
        os._exit(code)


class _Logged(NamedTuple):
    """A line for the leader's log."""

    logger: str
    level: int
    text: str


class _Forwarder(logging.Handler):
    """Sends the lines of the log to the leader, whose handlers decide."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        """Send one line."""
        self._line.send(_Logged(record.name, record.levelno, record.getMessage()))


class _Restricted(pickle.Unpickler):
    """Makes nothing but plain values and messages of known kinds."""

    def __init__(self, data: memoryview, allowed: Mapping[tuple[str, str], type]) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed

    def find_class(self, module_name: str, global_name: str, /) -> type:
        """Return a class that is allowed. Raises: pickle.UnpicklingError."""
        try:
            return self._allowed[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is no message") from None


def _taken(received: bytearray, decode: Callable[[memoryview], object] = pickle.loads) -> Iterator[object]:
    """Take whole messages out of what was received; lines of a log go to the log here."""
    while len(received) >= _LENGTH_SIZE:
        end = _LENGTH_SIZE + int.from_bytes(received[:_LENGTH_SIZE], "little")
        if len(received) < end:
            return
        with memoryview(received) as view:
            message = decode(view[_LENGTH_SIZE:end])
        del received[:end]
        if isinstance(message, _Logged):
            logging.getLogger(message.logger).log(message.level, "%s", message.text)
        else:
            yield message


def encoded(message: object) -> bytes:
    """Return a message as it goes over a line."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return len(data).to_bytes(_LENGTH_SIZE, "little") + data


def _write(pipe: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(pipe, view) :]


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent, with what led to it as its note."""
    import traceback

    error.add_note("in a forked process:\n" + "".join(traceback.format_tb(error.__traceback__)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _widen(pipe: int) -> None:
    try:
        fcntl.fcntl(pipe, _F_SETPIPE_SZ, _PIPE_SIZE)
    except OSError:
        return  # the user has many of them open already
