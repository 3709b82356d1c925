"""The view without a kernel: caches, numbers, reads, what is loaded and what is not."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import pytest
import trio
import trio.testing

from backupfs.errors import DamagedObject
from backupfs.repository.repository import Repository
from backupfs.snapshots.listing import load_snapshots
from backupfs.stores.memory import MemoryStore
from backupfs.view import content, pages
from backupfs.view.filesystem import TOP, Attributes, MountFilter, NoSuchEntry, SnapshotView
from backupfs.view.freshness import Freshness, Stale
from backupfs.view.loading import Loader, NotCached
from tests.builders import File, Hardlink, Sparse, Symlink, back_up, build, new_repository, noise, reopened
from tests.faults import CountingStore

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class Client:
    """Asks a view, loading what it misses, and counts how often that was."""

    def __init__(self, repository: Repository, nursery: trio.Nursery | None = None, **filters: object) -> None:
        self.loader = Loader(repository, nursery)
        self.listed = load_snapshots(repository)
        self.view = SnapshotView(repository, self.listed, MountFilter(**filters), self.loader)  # type: ignore[arg-type]
        self.missed = 0

    async def ask(self, operation: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        try:
            return operation(*arguments)
        except NotCached as missing:
            self.missed += 1
            return await self.loader.run(missing, operation, *arguments)

    async def walk(self, path: bytes) -> Attributes:
        inode, found = TOP, self.view.attributes(TOP)
        for name in path.strip(b"/").split(b"/"):
            looked = await self.ask(self.view.lookup, inode, name)
            if looked is None:
                raise NoSuchEntry
            found, inode = looked, looked.inode
            if stat.S_ISLNK(found.mode):
                target = await self.ask(self.view.target, inode)
                found = await self.walk(target)
                inode = found.inode
        return found

    async def entries(self, inode: int) -> list[tuple[bytes, Attributes]]:
        handle = await self.ask(self.view.open_directory, inode)
        found: list[tuple[bytes, Attributes]] = []
        start = 0
        while True:
            window = await self.ask(self._window, handle, start)
            if not window:
                break
            found += [(name, attributes) for name, attributes, _ in window]
            start = window[-1][2]
        self.view.close_directory(handle)
        return found

    def _window(self, handle: int, start: int) -> list[tuple[bytes, Attributes, int]]:
        found = []
        for entry in self.view.entries(handle, start):
            found.append(entry)
            if len(found) == 7:
                break
        return found

    async def read(self, inode: int, offset: int = 0, length: int = 1 << 30) -> bytes:
        return bytes(await self.ask(self.view.read, inode, offset, length))


def in_snapshot(path: Path) -> bytes:
    return b"latest" + os.fsencode(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


def test_a_walk_finds_what_was_backed_up(source: Path) -> None:
    build(
        {"d": {f"{n:04}": File(b"%d" % n) for n in range(2500)}, "l": Symlink(b"d/0001"), "h": Hardlink("d/0007")},
        source,
    )
    repository = new_repository()
    back_up(repository, source)

    async def look() -> None:
        client = Client(reopened(repository))
        top = await client.walk(in_snapshot(source))
        below = await client.entries((await client.walk(in_snapshot(source / "d"))).inode)
        assert [name for name, _ in below] == [b"%04d" % n for n in range(2500)]
        inodes = {found.inode for _, found in below}
        assert len(inodes) == 2500
        # Numbers lead back to their entries, without a walk.
        for name, found in below:
            again = await client.ask(client.view.attributes, found.inode)
            assert again == found
            assert await client.read(found.inode) == b"%d" % int(name)
        assert (await client.walk(in_snapshot(source / "h"))).inode == dict(below)[b"0007"].inode
        path = await client.ask(client.view.path_of, below[3][1].inode)
        assert path == b"/latest" + os.fsencode(source) + b"/d/0003"
        assert await client.ask(client.view.lookup, top.inode, b"absent") is None

    trio.run(look)


def test_a_directory_of_many_pages_is_listed_and_looked_up(source: Path) -> None:
    names = [b"%05d-%s" % (n, b"x" * 150) for n in range(4000)]
    build({b"d": {name: File() for name in names}}, source)
    repository = new_repository()
    back_up(repository, source)

    async def look() -> None:
        client = Client(reopened(repository))
        directory = await client.walk(in_snapshot(source / "d"))
        below = await client.entries(directory.inode)
        assert [name for name, _ in below] == names
        assert len({found.inode >> pages.POSITION_BITS for _, found in below}) > 2
        for name, found in below[::97]:
            assert await client.ask(client.view.lookup, directory.inode, name) == found
        for name in (b"", b"0", b"zzz", names[5] + b"!"):
            assert await client.ask(client.view.lookup, directory.inode, name) is None

    trio.run(look)


def test_what_caches_can_answer_is_never_loaded_again(source: Path) -> None:
    build({f"{n}": File(noise(n, 900)) for n in range(50)}, source)
    repository = new_repository(CountingStore(MemoryStore()))
    back_up(repository, source)
    store = repository.store
    assert isinstance(store, CountingStore)

    async def look() -> None:
        client = Client(reopened(repository))
        for _ in range(2):
            for name, found in await client.entries((await client.walk(in_snapshot(source))).inode):
                assert await client.read(found.inode) == noise(int(name), 900)
            first, client.missed = client.missed, 0
        # 45 kB of files in blocks of 8 KiB, and a handful of pages.
        assert first == 0
        gets = store.calls["get"]
        assert len(await client.entries((await client.walk(in_snapshot(source))).inode)) == 50
        assert store.calls["get"] == gets

    trio.run(look)


@pytest.mark.parametrize("size", [0, 1, 400, 4096, 20_000, 300_000])
def test_any_range_of_a_file_is_read(source: Path, size: int) -> None:
    plain = noise(size, size)
    build({"f": File(plain)}, source)
    repository = new_repository()
    back_up(repository, source)

    async def look() -> None:
        client = Client(reopened(repository))
        found = await client.walk(in_snapshot(source / "f"))
        assert found.size == size
        assert found.blocks == -(-size // 512)
        for offset in (0, 1, size // 2, max(0, size - 1), size, size + 10):
            for length in (1, 511, 4096, 70_000, 1 << 20):
                assert await client.read(found.inode, offset, length) == plain[offset : offset + length]

    trio.run(look)


def test_holes_are_zeros_and_take_no_blocks(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "WINDOW_SIZE", 64 << 10)
    monkeypatch.setattr(content, "_MOST_PIECES", 5)
    size = 2_000_000
    data = {offset: noise(offset, 5000) for offset in range(100_000, size, 300_000)}
    build({"f": Sparse(size, data)}, source)
    wanted = (source / "f").read_bytes()
    repository = new_repository()
    back_up(repository, source)

    async def look() -> None:
        client = Client(reopened(repository))
        found = await client.walk(in_snapshot(source / "f"))
        assert found.blocks <= (source / "f").stat().st_blocks
        assert found.blocks * 512 >= 5000 * len(data)
        assert await client.read(found.inode) == wanted
        for offset in range(0, size, 77_777):
            assert await client.read(found.inode, offset, 50_000) == wanted[offset : offset + 50_000]

    trio.run(look)


def test_tiny_caches_only_cost_time(source: Path) -> None:
    files = {f"{n}": File(noise(n, 30_000)) for n in range(12)}
    build({"a": files, "b": files}, source)
    repository = new_repository()
    back_up(repository, source)

    async def look() -> None:
        opened = reopened(repository)
        opened.trees.keep_at_most(1)
        opened.data.keep_at_most(1)
        client = Client(opened)
        client.view._table = pages.PageTable(client.loader, 1)
        for directory in ("a", "b"):
            for name, found in await client.entries((await client.walk(in_snapshot(source / directory))).inode):
                assert await client.read(found.inode) == noise(int(name), 30_000)

    trio.run(look)


def test_clients_that_want_the_same_block_fetch_it_once(source: Path) -> None:
    build({f"{n}": File(noise(n, 1000)) for n in range(7)}, source)
    repository = new_repository(CountingStore(MemoryStore()))
    back_up(repository, source)
    store = repository.store
    assert isinstance(store, CountingStore)

    async def look() -> None:
        client = Client(reopened(repository))
        below = await client.entries((await client.walk(in_snapshot(source))).inode)
        before = store.calls["get"]
        async with trio.open_nursery() as nursery:
            for _, found in below:
                nursery.start_soon(client.read, found.inode)
        assert store.calls["get"] == before + 1

    trio.run(look)


def test_a_sequential_read_is_read_ahead_and_a_random_one_is_not(source: Path) -> None:
    size = 400_000
    build({"f": File(noise(3, size))}, source)
    repository = new_repository()
    back_up(repository, source)

    async def look() -> None:
        for sequential in (True, False):
            async with trio.open_nursery() as nursery:
                client = Client(reopened(repository), nursery)
                found = await client.walk(in_snapshot(source / "f"))
                offsets = range(0, size, 8192)
                client.missed = 0
                for offset in offsets if sequential else reversed(offsets):
                    await client.read(found.inode, offset, 8192 if sequential else 4096)
                    for _ in range(50):
                        if not client.loader._ahead:
                            break
                        await trio.sleep(0.001)
                assert (client.missed < 10) == sequential

    trio.run(look)


def test_files_of_a_directory_are_read_ahead(source: Path) -> None:
    build({f"{n:03}": File(noise(n, 2000)) for n in range(200)}, source)
    repository = new_repository()
    back_up(repository, source)

    async def look() -> None:
        async with trio.open_nursery() as nursery:
            client = Client(reopened(repository), nursery)
            below = await client.entries((await client.walk(in_snapshot(source))).inode)
            client.missed = 0
            for _, found in below:
                await client.read(found.inode)
                while client.loader._ahead:
                    await trio.sleep(0.001)
            # 400 kB in blocks of 8 KiB are some 50 blocks, in a dozen packs.
            assert client.missed < 25

    trio.run(look)


@pytest.mark.expected_log("is damaged")
def test_damage_is_an_error_of_what_it_hits(source: Path) -> None:
    build({"a": File(noise(1, 30_000)), "b": File(noise(2, 30_000))}, source)
    repository = new_repository()
    back_up(repository, source)
    store = repository.store
    data = [info.key for info in store.list("packs/data/")]
    damaged = bytearray(store.get(data[0]))
    damaged[200] ^= 1
    store.put(data[0], damaged)

    async def look() -> None:
        client = Client(reopened(repository))
        broken = 0
        for name, number in ((b"a", 1), (b"b", 2)):
            found = await client.walk(in_snapshot(source) + b"/" + name)
            try:
                assert await client.read(found.inode) == noise(number, 30_000)
            except DamagedObject:
                broken += 1
        assert broken == 1

    trio.run(look)


def test_the_list_is_read_again_when_it_is_looked_at_and_not_before(source: Path) -> None:
    build({"f": File(b"1")}, source)
    repository = new_repository(CountingStore(MemoryStore()))
    first = back_up(repository, source)
    store = repository.store
    assert isinstance(store, CountingStore)
    clock = trio.testing.MockClock()

    async def look() -> None:
        async with trio.open_nursery() as nursery:
            client = Client(repository)
            view = client.view
            view.freshness = Freshness(repository, client.listed, view.rearrange, nursery, 5.0)
            folder = view.lookup(TOP, b"snapshots")
            assert folder is not None
            lists = store.calls["list"]
            clock.jump(100)
            assert store.calls["list"] == lists
            with pytest.raises(Stale):
                view.lookup(folder.inode, first.time_name.encode())
            await view.freshness.refreshed()
            assert store.calls["list"] > lists
            assert view.lookup(folder.inode, first.time_name.encode()) is not None
            with pytest.raises(NoSuchEntry):
                view.lookup(folder.inode, b"absent")

    trio.run(look, clock=clock)


def test_unknown_numbers_are_no_entries(source: Path) -> None:
    build({"f": File(b"1")}, source)
    repository = new_repository()
    back_up(repository, source)

    async def look() -> None:
        client = Client(reopened(repository))
        found = await client.walk(in_snapshot(source / "f"))
        for inode in (0, 2, 65535, found.inode + 1, found.inode + (1 << 16), 1 << 56, (1 << 56) + 999):
            with pytest.raises(NoSuchEntry):
                await client.ask(client.view.attributes, inode)
        with pytest.raises(NotADirectoryError):
            await client.ask(client.view.lookup, found.inode, b"x")

    trio.run(look)
