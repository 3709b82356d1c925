"""The event loop of a mount is quick, and still an event loop.

The mount tests serve from a child process, which is this file run as a program: a client in a thread of the server's
own process could hang beyond SIGKILL.
"""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyfuse3
import pyfuse3.asyncio
import pytest
import trio
import trio.testing

from backupfs.fuse import polling
from backupfs.fuse.polling import PollingWait, SpareLock, SpinRate, polled_event_loop

NULL_FS = Path(__file__).parents[2] / "scripts" / "null_fs.py"

# Far beyond what any test needs: a server that hangs is killed, which frees its clients.
LIFE_S = 60

# Eight clients that ask without pause, so many times each: between them the descriptor is nearly always readable.
HAMMER = """
import os, sys
print("begun", flush=True)
for _ in range(3):
    os.fork()
for _ in range(int(sys.argv[2])):
    os.stat(sys.argv[1])
while True:
    try:
        assert os.wait()[1] == 0
    except ChildProcessError:
        break
"""


class Reporting(pyfuse3.Operations):
    """Files made of answers: each stat and each read of one is a request."""

    NAMES = (b"report", b"slow", b"go")

    def __init__(self) -> None:
        super().__init__()
        self.ticks = self.hops = self.requests = self.longest = 0
        self._gone = trio.Event()

    async def getattr(self, inode, ctx=None):
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = inode
        attributes.entry_timeout = attributes.attr_timeout = 0
        attributes.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o444
        return attributes

    async def lookup(self, parent_inode, name, ctx=None):
        if name not in self.NAMES:
            raise pyfuse3.FUSEError(errno.ENOENT)
        self.requests += 1
        return await self.getattr(pyfuse3.ROOT_INODE + 1 + self.NAMES.index(name))

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def read(self, fh, off, size):
        """Answer `slow` once `go` was read, and `report` with the counts since the last report."""
        if off:
            return b""
        name = self.NAMES[fh - pyfuse3.ROOT_INODE - 1]
        if name == b"slow":
            await self._gone.wait()
        elif name == b"go":
            self._gone.set()
        else:
            report = f"{self.ticks} {self.hops} {max(self.longest, self.requests)}"
            self.ticks = self.hops = self.requests = self.longest = 0
            return report.encode()
        return name

    async def tick(self) -> None:
        """Count turns, and the most lookups between two of them: that does not depend on the machine's load."""
        while True:
            await trio.sleep(0.001)
            self.longest = max(self.longest, self.requests)
            self.requests = 0
            self.ticks += 1

    async def hop(self) -> None:
        while True:
            await trio.to_thread.run_sync(time.sleep, 0.001)
            self.hops += 1


async def serve(operations: Reporting) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(operations.tick)
        nursery.start_soon(operations.hop)
        nursery.start_soon(terminate_on_signal)
        with polled_event_loop():
            await pyfuse3.main()
        nursery.cancel_scope.cancel()


async def terminate_on_signal() -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            pyfuse3.terminate()


@contextmanager
def served(mountpoint: Path, *program: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the end of the block, by then it must have ended or be unmounted."""
    mountpoint.mkdir()
    command = ["timeout", "--foreground", "--signal=KILL", str(LIFE_S), sys.executable, *program]
    with subprocess.Popen(command) as server:
        try:
            while not mountpoint.is_mount():
                assert server.poll() is None, f"no mount: is there a /dev/fuse ({os.path.exists('/dev/fuse')})?"
                time.sleep(0.01)
            yield server
        finally:
            # The mount of a server that died is one that `is_mount` does not see.
            subprocess.run(["fusermount3", "-u", "-z", mountpoint], stderr=subprocess.DEVNULL, check=False)
            server.wait(LIFE_S)


@pytest.fixture
def reporting(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    with served(tmp_path / "mnt", __file__, tmp_path / "mnt") as server:
        yield tmp_path / "mnt", server


def client(*command: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)


def output(process: subprocess.Popen[bytes]) -> bytes:
    return process.communicate(timeout=LIFE_S)[0]


@pytest.mark.fuse
@pytest.mark.parametrize("options", [[], ["--plain"]], ids=["polled", "plain"])
def test_the_null_file_system_shows_its_tree_and_ends_at_umount(tmp_path: Path, options: list[str]) -> None:
    tree = tmp_path / "tree"
    (tree / "many").mkdir(parents=True)
    for number in range(300):
        (tree / "many" / f"file {number}").write_bytes(os.urandom(number * 10))
    (tree / "large").write_bytes(os.urandom(3 << 20))
    (tree / "link").symlink_to("many/file 7")
    with served(tmp_path / "mnt", NULL_FS, tree, tmp_path / "mnt", *options) as server:
        compare = client("diff", "--recursive", "--no-dereference", tree, tmp_path / "mnt")
        assert (output(compare), compare.returncode) == (b"", 0)
    assert server.returncode == 0


@pytest.mark.fuse
def test_other_tasks_and_threads_go_on_while_a_mount_is_hammered(reporting) -> None:
    mountpoint, _ = reporting
    output(client("cat", mountpoint / "report"))
    hammer = client(sys.executable, "-c", HAMMER, mountpoint / "slow", "1000")
    output(hammer)
    assert hammer.returncode == 0
    ticks, hops, longest = map(int, output(client("cat", mountpoint / "report")).split())
    assert min(ticks, hops) > 10
    # Some 50 are served in a millisecond, a worker that lets nobody run serves thousands of the 8,000.
    assert longest < 1000


@pytest.mark.fuse
def test_requests_are_served_while_the_handlers_of_others_wait(reporting) -> None:
    mountpoint, _ = reporting
    waiting = [client("cat", mountpoint / "slow") for _ in range(20)]
    assert output(client("stat", "--format=%F", mountpoint)) == b"directory\n"
    assert output(client("cat", mountpoint / "go")) == b"go"
    assert [output(process) for process in waiting] == [b"slow"] * 20


@pytest.mark.fuse
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "hammered"])
def test_terminate_ends_the_mount(reporting, busy: bool) -> None:
    mountpoint, server = reporting
    clients = [client(sys.executable, "-c", HAMMER, mountpoint / "slow", "1000000000")] if busy else []
    for process in clients:
        assert process.stdout.readline() == b"begun\n"
    output(client("cat", mountpoint / "report"))
    server.terminate()
    assert server.wait(LIFE_S) == 0
    assert mountpoint.stat().st_dev == mountpoint.parent.stat().st_dev
    for process in clients:
        output(process)


def run(test: Callable[[], Coroutine[None, None, None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(LIFE_S):
            await test()

    trio.run(bounded)


def test_a_free_lock_with_a_spare_behind_it_costs_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "BUSY_S", LIFE_S)
    lock = SpareLock()
    order = []

    async def spare() -> None:
        async with lock:
            order.append("spare")

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(spare)
                await trio.testing.wait_all_tasks_blocked()
            for _ in range(3):
                with trio.testing.assert_no_checkpoints():
                    async with lock:
                        order.append("first")

    run(test)
    assert order == ["first", "first", "first", "spare"]


def test_a_lock_without_a_spare_costs_a_checkpoint_so_that_one_can_come() -> None:
    async def test() -> None:
        lock = SpareLock()
        for _ in range(3):
            with trio.testing.assert_checkpoints():
                async with lock:
                    pass

    run(test)


def test_a_lock_taken_for_long_without_a_checkpoint_costs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "BUSY_S", 0)
    lock = SpareLock()

    async def spare() -> None:
        async with lock:
            pass

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(spare)
                await trio.testing.wait_all_tasks_blocked()
            with trio.testing.assert_checkpoints():
                async with lock:
                    pass

    run(test)


def test_one_task_at_a_time_has_the_lock_and_all_get_it() -> None:
    lock = SpareLock()
    inside, turns = [], []

    async def worker(number: int) -> None:
        for _ in range(10):
            async with lock:
                inside.append(number)
                if number % 2:
                    await trio.lowlevel.checkpoint()
                assert inside == [number]
                inside.clear()
            turns.append(number)

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(7):
                nursery.start_soon(worker, number)

    run(test)
    assert sorted(turns) == sorted(list(range(7)) * 10)


@pytest.mark.parametrize("woken", [False, True], ids=["parked", "woken"])
def test_a_cancelled_waiter_leaves_the_lock_to_the_next(woken: bool) -> None:
    """Also if it is cancelled after the release woke it, before it could run."""
    lock = SpareLock()
    entered = []

    async def waiter(name: str, scope: trio.CancelScope) -> None:
        with scope:
            async with lock:
                await trio.lowlevel.checkpoint()
                entered.append(name)

    async def test() -> None:
        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(waiter, "cancelled", scope)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(waiter, "next", trio.CancelScope())
                await trio.testing.wait_all_tasks_blocked()
                if not woken:
                    scope.cancel()
            scope.cancel()

    run(test)
    assert entered == ["next"]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def test_a_readable_descriptor_is_waited_for_without_a_checkpoint(ends) -> None:
    near, far = ends

    async def test() -> None:
        wait = PollingWait()
        far.send(b"x")
        with trio.testing.assert_no_checkpoints():
            await wait.wait_readable(near.fileno())
        assert near.recv(1) == b"x"
        far.close()
        with trio.testing.assert_no_checkpoints():
            await wait.wait_readable(near.fileno())
        assert near.recv(1) == b""

    run(test)


def test_a_descriptor_that_becomes_readable_later_is_parked_for(ends) -> None:
    near, far = ends

    async def test() -> None:
        wait = PollingWait()
        for _ in range(100):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait.wait_readable, near.fileno())
                await trio.testing.wait_all_tasks_blocked()
                far.send(b"x")
            assert near.recv(1) == b"x"

    run(test)


def test_a_parked_wait_can_be_cancelled_and_done_again(ends) -> None:
    near, far = ends

    async def test() -> None:
        wait = PollingWait()
        with trio.move_on_after(0.001) as scope:
            await wait.wait_readable(near.fileno())
        assert scope.cancelled_caught
        far.send(b"x")
        await wait.wait_readable(near.fileno())

    run(test)


def test_a_parked_wait_ends_when_the_descriptor_is_about_to_be_closed(ends) -> None:
    near, _ = ends

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_the_end)
            await trio.testing.wait_all_tasks_blocked()
            trio.lowlevel.notify_closing(near.fileno())

    async def wait_for_the_end() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await PollingWait().wait_readable(near.fileno())

    run(test)


def test_one_wait_after_the_other_may_be_for_another_descriptor(ends) -> None:
    near, far = ends

    async def test() -> None:
        wait = PollingWait()
        far.send(b"x")
        await wait.wait_readable(near.fileno())
        near.send(b"y")
        near.recv(1)
        with trio.testing.assert_no_checkpoints():
            await wait.wait_readable(far.fileno())

    run(test)


def test_spins_are_given_up_while_they_find_nothing_and_resumed_when_they_do() -> None:
    spins = SpinRate()
    assert all(spins.pays() for _ in range(100))
    for _ in range(100):
        spins.record(False)
    assert 1 <= sum(spins.pays() for _ in range(100)) <= 10
    for _ in range(20):
        spins.record(True)
    assert all(spins.pays() for _ in range(100))


def test_pyfuse3_has_another_trio_while_the_loop_is_polled() -> None:
    with polled_event_loop():
        assert pyfuse3.trio.Lock is SpareLock
        assert pyfuse3.trio.lowlevel.wait_readable != trio.lowlevel.wait_readable
        assert pyfuse3.trio.open_nursery is trio.open_nursery
        assert pyfuse3.trio.lowlevel.notify_closing is trio.lowlevel.notify_closing
    assert pyfuse3.trio is trio


def test_pyfuse3_without_trio_as_its_attribute_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pyfuse3, "trio")
    with polled_event_loop():
        assert not hasattr(pyfuse3, "trio")


def test_pyfuse3_in_asyncio_mode_is_left_alone() -> None:
    pyfuse3.asyncio.enable()
    try:
        with polled_event_loop():
            assert pyfuse3.trio is pyfuse3.asyncio
    finally:
        pyfuse3.asyncio.disable()


if __name__ == "__main__":
    # So long a spin never parks while a client asks: other tasks run only because a busy worker lets them.
    polling.SPIN_S = 0.01
    served_operations = Reporting()
    pyfuse3.init(served_operations, sys.argv[1], {"fsname=reporting", "ro"})
    try:
        trio.run(serve, served_operations)
    finally:
        pyfuse3.close()
