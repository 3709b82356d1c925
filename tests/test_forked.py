"""Forked processes: interrupts around the fork are not lost, and messages are what was sent."""

import os
import signal

import pytest
import trio

from backupfs import forked
from backupfs.forked import Line, encoded, fork
from tests.processes import children_of_this_process


def test_an_interrupt_at_the_moment_of_a_fork_is_raised_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fork

    def interrupted() -> int:
        parent = os.getpid()
        pid = real()
        if os.getpid() == parent:
            # As from a terminal, while Python's own hooks run.
            os.kill(parent, signal.SIGINT)
            assert signal.SIGINT in signal.sigpending()
        return pid

    monkeypatch.setattr(os, "fork", interrupted)
    # What runs in the background of a shell has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fork(lambda line: line.receive(), str, [])
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    for pid in children_of_this_process():
        os.kill(int(pid), signal.SIGKILL)
        os.waitpid(int(pid), 0)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_fork_leaves_the_interrupts_as_they_were_on_both_sides() -> None:
    def run(line: Line) -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        line.send([signal.SIGINT in blocked, signal.getsignal(signal.SIGINT) == signal.SIG_IGN])

    process = fork(run, str, [])
    said: list[object] = []

    async def take(message: object) -> None:
        said.append(message)

    trio.run(process.listen, take)
    process.wait()
    assert said == [[False, True]]


def test_many_messages_of_any_size_arrive_whole_and_in_order() -> None:
    sizes = [0, 1, 100, 70_000, 3_000_000, 5, 0, 1_500_000]

    def run(line: Line) -> None:
        for _ in sizes:
            data = line.receive()
            assert isinstance(data, bytes)
            line.send((len(data), data[::-1]))

    process = fork(run, lambda error: error, [])
    wanted = [os.urandom(size) for size in sizes]
    got: list[object] = []

    async def take(message: object) -> None:
        got.append(message)

    async def talk() -> None:
        send, messages = trio.open_memory_channel[bytes](1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.send_all, messages)
            nursery.start_soon(process.listen, take)
            async with send:
                for data in wanted:
                    await send.send(encoded(data))

    trio.run(talk)
    process.wait()
    assert got == [(len(data), data[::-1]) for data in wanted]


def test_what_is_told_soon_waits_for_the_rest_and_goes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "_GATHER_S", float("inf"))
    incoming, outgoing = os.pipe()
    os.set_blocking(incoming, False)
    line = Line(-1, outgoing)
    for number in range(30):
        line.send_soon(number)
    with pytest.raises(BlockingIOError):
        os.read(incoming, 1)
    line.send("last")
    assert os.read(incoming, 1 << 16) == b"".join(map(encoded, [*range(30), "last"]))
    line.send("alone")
    assert os.read(incoming, 1 << 16) == encoded("alone")
    # No more is held back than a pipe takes, and nothing for long.
    line.send_soon(bytes(2000))
    monkeypatch.setattr(forked, "_MOST_GATHERED", 1000)
    with pytest.raises(BlockingIOError):
        os.read(incoming, 1)
    line.send_soon(bytes(10))
    assert os.read(incoming, 1 << 17).endswith(encoded(bytes(10))[-10:])
    monkeypatch.setattr(forked, "_GATHER_S", 0.0)
    line.send_soon("at once")
    assert os.read(incoming, 1 << 17).endswith(encoded("at once"))
    os.close(incoming)
    os.close(outgoing)
