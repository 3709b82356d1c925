"""A scratch copy of an image without a kernel: by a model of its disks."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import pytest
import trio

from backupfs.disks.layout import read_layout
from backupfs.disks.source import open_disk
from backupfs.snapshots.snapshot import Snapshot
from backupfs.snapshots.volumes import shared_volumes
from backupfs.snapshots.walk import shown_volumes
from backupfs.view.filesystem import NoSuchEntry
from backupfs.view.loading import Loader, NotCached
from backupfs.view.scratch import TOP, ReadOnly, ScratchDisks
from tests.builders import new_repository, reopened
from tests.disks.test_logical import BLOCK, Group, Opened, read_all, some_mappings
from tests.disks.test_luks import PASSPHRASE, encrypted
from tests.usecases.test_image import MIB, disk_in, make_image

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class Client:
    """Asks a scratch copy, loading what it misses."""

    def __init__(self, disks: ScratchDisks, loader: Loader) -> None:
        self.disks = disks
        self._loader = loader

    async def ask(self, operation: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        try:
            return operation(*arguments)
        except NotCached as missing:
            return await self._loader.run(missing, operation, *arguments)

    def inode(self, path: bytes) -> int:
        inode = TOP
        for name in path.split(b"/"):
            inode = self.disks.lookup(inode, name).inode
        return inode

    async def read(self, inode: int, offset: int, length: int) -> bytes:
        return bytes(await self.ask(self.disks.read, inode, offset, length))


def scratch_of(*paths: Path, protects: bool = False, **options: object) -> tuple[Client, Snapshot]:
    repository = new_repository()
    snapshot = make_image(repository, *paths, **options)
    repository = reopened(repository)
    loader = Loader(repository)
    shown = shown_volumes(snapshot, repository.trees.load)
    protected = shared_volumes(snapshot.volumes) if protects else ()
    return Client(ScratchDisks(snapshot, shown, protected, loader), loader), snapshot


def test_what_is_written_to_volumes_and_disks_is_read_from_both(tmp_path: Path) -> None:
    path = disk_in(tmp_path / "web1.raw")
    plain = bytearray(path.read_bytes())
    before = bytes(plain)
    client, _ = scratch_of(path)
    places = {b"disks/web1.raw": 0, b"volumes/web1p1.raw": MIB, b"volumes/web1p2.raw": 6 * MIB}
    sizes = {b"disks/web1.raw": len(plain), b"volumes/web1p1.raw": 5 * MIB, b"volumes/web1p2.raw": 40 * MIB}
    chooser = random.Random(3)

    async def run() -> None:
        for _ in range(200):
            name = chooser.choice(list(places))
            inode, base = client.inode(name), places[name]
            offset = chooser.choice([chooser.randrange(sizes[name]), chooser.randrange(0, sizes[name], 4096)])
            length = chooser.choice([1, 511, 4096, 8192, 100_000, 131_072])
            if chooser.random() < 0.5:
                data = chooser.randbytes(length)
                count = await client.ask(client.disks.write, inode, offset, data)
                assert count == min(length, sizes[name] - offset)
                plain[base + offset : base + offset + count] = data[:count]
            else:
                end = min(offset + length, sizes[name])
                assert await client.read(inode, offset, length) == plain[base + offset : base + end]
        for name, base in places.items():
            whole = await client.read(client.inode(name), 0, 1 << 40)
            assert whole == plain[base : base + sizes[name]]
        changes = await client.read(client.inode(b"changes/web1.map"), 0, 1 << 30)
        position = 0
        for line in changes.decode().splitlines()[1:]:
            start, length, kind = line.split()
            low, high = int(start), int(start) + int(length)
            assert low == position
            if kind == "same":
                assert plain[low:high] == before[low:high]
            position = high
        assert position == len(plain)

    trio.run(run)
    assert client.disks.is_changed
    client.disks.close()


def test_names_that_are_not_there_and_places_that_cannot_be_written(tmp_path: Path) -> None:
    client, snapshot = scratch_of(disk_in(tmp_path / "web1.raw"))
    assert [name for name, *_ in client.disks.entries(TOP, 0)] == [b"disks", b"volumes", b"changes"]
    assert [name for name, *_ in client.disks.entries(client.inode(b"volumes"), 1)] == [b"web1p2.raw"]
    for path in (b"nosuch", b"disks/nosuch"):
        with pytest.raises(NoSuchEntry):
            client.inode(path)
    with pytest.raises(NotADirectoryError):
        client.inode(b"disks/web1.raw/below")
    with pytest.raises(NoSuchEntry):
        client.disks.attributes(999)
    for name in (b"disks", b"changes/web1.map"):
        with pytest.raises(ReadOnly):
            client.disks.write(client.inode(name), 0, b"x")
    size = snapshot.volumes[0].size
    assert client.disks.write(client.inode(b"disks/web1.raw"), size, b"behind the end") == 0
    assert not client.disks.is_changed
    header = f"since {snapshot.snapshot_id.hex()}\n0 {size} same\n"
    assert client.disks.read(client.inode(b"changes/web1.map"), 0, 1000) == header.encode()
    client.disks.close()


def test_what_is_encrypted_is_read_and_written_as_plain_bytes(tmp_path: Path) -> None:
    plain = bytearray(random.Random(1).randbytes(MIB))
    path = tmp_path / "disk.raw"
    path.write_bytes(encrypted(tmp_path, bytes(plain)))
    client, snapshot = scratch_of(path, luks_passphrases=(PASSPHRASE,))
    size = snapshot.volumes[1].size
    plain += read_layout([open_disk(os.fsencode(path))], [PASSPHRASE]).reader(1).read(MIB, size)
    chooser = random.Random(2)

    async def run() -> None:
        inode = client.inode(b"volumes/disk_crypt.raw")
        for _ in range(150):
            offset = chooser.choice([chooser.randrange(2 * MIB), chooser.randrange(0, 2 * MIB, 4096)])
            length = chooser.choice([1, 7, 511, 4096, 100_000])
            if chooser.random() < 0.5:
                data = chooser.randbytes(length)
                assert await client.ask(client.disks.write, inode, offset, data) == length
                plain[offset : offset + length] = data
            else:
                assert await client.read(inode, offset, length) == plain[offset : offset + length]
        assert await client.read(inode, 0, 3 * MIB) == plain[: 3 * MIB]
        # The disk that was written to is encrypted as before.
        whole = await client.read(client.inode(b"disks/disk.raw"), 0, 1 << 40)
        (tmp_path / "changed").write_bytes(whole)
        layout = read_layout([open_disk(os.fsencode(tmp_path / "changed"))], [PASSPHRASE])
        assert layout.reader(1).read(0, size) == plain

    trio.run(run)
    client.disks.close()


def test_striped_mirrored_and_thin_volumes_are_there(tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.write_thin(some_mappings(group.chooser))
    client, _ = scratch_of(*group.save())
    wanted = {f"volumes/{name}.raw".encode(): plain for name, plain in group.volumes().items()}

    async def run() -> None:
        found = [name for name, _, _ in client.disks.entries(client.inode(b"volumes"), 0)]
        assert sorted(b"volumes/" + name for name in found) == sorted(wanted)
        for name, plain in wanted.items():
            assert await client.read(client.inode(name), 0, 1 << 40) == plain, name
        # What is mapped can be written, what is not cannot.
        inode, (first, _, _) = client.inode(b"volumes/mixed-thin.raw"), group.mappings[1][5]
        assert await client.ask(client.disks.write, inode, first * BLOCK + 9, b"new") == 3
        assert await client.read(inode, first * BLOCK + 9, 3) == b"new"
        hole = next(at for at in range(256) if at not in {one for one, _, _ in group.mappings[1]})
        with pytest.raises(ReadOnly):
            await client.ask(client.disks.write, inode, hole * BLOCK, b"new")

    trio.run(run)
    client.disks.close()


def test_stripes_can_be_edited_and_what_others_share_cannot(tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.write_thin(some_mappings(group.chooser))
    client, _ = scratch_of(*group.save(), protects=True)
    chooser = random.Random(4)
    plain = {name: bytearray(data) for name, data in group.volumes().items()}

    async def run() -> None:
        for name in ("mixed-mix", "mixed-fast", "mixed-mix", "mixed-fast"):
            inode = client.inode(b"volumes/" + name.encode() + b".raw")
            for _ in range(30):
                offset = chooser.randrange(len(plain[name]) - 200_000)
                data = chooser.randbytes(chooser.choice([1, 5000, 65_536, 200_000]))
                assert await client.ask(client.disks.write, inode, offset, data) == len(data)
                plain[name][offset : offset + len(data)] = data
        for disk in ("a", "b"):
            whole = await client.read(client.inode(f"disks/{disk}.raw".encode()), 0, 1 << 40)
            (tmp_path / f"{disk}.raw").write_bytes(whole)
        for name in ("mixed-twin", "mixed-old", "mixed-thin", "mixed-snap--1", "mixed-late"):
            inode = client.inode(b"volumes/" + name.encode() + b".raw")
            assert not client.disks.attributes(inode).is_writable
            with pytest.raises(ReadOnly):
                client.disks.write(inode, 0, b"x")

    trio.run(run)
    client.disks.close()
    # Found where they are by whoever reads the changed disks anew.
    with Opened(tmp_path / "a.raw", tmp_path / "b.raw") as layout:
        assert read_all(layout) == plain
