"""btrfs that is damaged shows what it had, from a copy that is whole, or says what cannot be read."""

import random
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backupfs.disks import explorer
from backupfs.disks.btrfs_sums import sums_of
from backupfs.disks.filesystem import READ, Entry, Filesystem, Unreadable
from backupfs.disks.free_space_btrfs import free_ranges
from tests.builders import File, Symlink, Tree, build
from tests.usecases.test_image_files import MIB

SIZE = 128 * MIB
NODE = 16 << 10
SUPERBLOCK = 64 << 10
Walked = dict[bytes, tuple[object, ...]]

PACKED = random.Random(2).randbytes(60_000).hex().encode()[: 96 << 10]
TREE: Tree = {
    b"inline": File(b"the content" * 20, xattrs={"user.one": b"1"}),
    b"link": Symlink(b"inline"),
    b"packed": File((lambda data: data + bytes(-len(data) % 4096))(zlib.compress(PACKED))),
    b"many": {b"f%04d" % number: File(b"%d" % number * 9) for number in range(300)},
}


def volume_of(folder: Path, *options: str) -> bytearray:
    source, path = build(TREE, folder / "source"), folder / "volume"
    with open(path, "wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mkfs.btrfs", "-q", *options, "--rootdir", source, path], check=True, capture_output=True)
    return bytearray(path.read_bytes())


def opened(volume: bytearray, noted: "set[int] | None" = None) -> Filesystem:
    def read(offset: int, length: int) -> bytes:
        if noted is not None and length == NODE:
            noted.add(offset)
        return bytes(volume[offset : offset + length])

    found = explorer.open_filesystem(read, len(volume))
    assert found is not None
    return found


def walked(volume: bytearray, noted: "set[int] | None" = None) -> tuple[Walked, list[str]]:
    """Return all that is shown, and what of it is said to be unreadable, as a backup would list it."""
    found: Walked = {}
    problems: list[str] = []

    def content(filesystem: Filesystem, file: Entry) -> bytes:
        data = filesystem.data(file)
        parts = b""
        for length, place in filesystem.extents(file) or []:
            if place == READ:
                end = len(parts) + length
                while len(parts) < end:
                    parts += next(data)
            else:
                parts += bytes(length) if place is None else volume[place : place + length]
        return parts

    def add(filesystem: Filesystem, directory: Entry, path: bytes) -> None:
        def entries() -> Iterator[Entry]:
            try:
                yield from filesystem.entries(directory)
            except Exception as error:
                problems.append(str(error))

        for entry in entries():
            name = path + b"/" + entry.name
            if entry.problem:
                problems.append(entry.problem)
                continue
            try:
                xattrs = filesystem.xattrs(entry)
                data = content(filesystem, entry) if entry.is_file else b""
                found[name] = entry.mode, entry.uid, entry.size, entry.mtime_ns, entry.target, xattrs, data
            except Exception as error:
                problems.append(str(error))
            if entry.is_directory:
                add(filesystem, entry, name)

    try:
        filesystem = opened(volume, noted)
        add(filesystem, filesystem.top(), b"")
    except Exception as error:
        problems.append(str(error))
    return found, problems


def blocks_of(volume: bytearray) -> list[int]:
    """Return where the blocks are that a walk reads."""
    noted: set[int] = set()
    walked(volume, noted)
    return sorted(noted)


def copies_of(volume: bytearray, places: list[int]) -> list[list[int]]:
    """Return where the copies of blocks are, of each its own too."""
    found: dict[bytes, list[int]] = {bytes(volume[place : place + NODE]): [] for place in places}
    for at in range(0, len(volume), NODE):
        if (copies := found.get(bytes(volume[at : at + NODE]))) is not None:
            copies.append(at)
    return list(found.values())


def change(volume: bytearray, places: list[int], edit: "Callable[[bytearray], None]") -> None:
    """Change the copies of a block, and make their sums right."""
    block = volume[places[0] : places[0] + NODE]
    edit(block)
    sums = sums_of(bytes(volume[SUPERBLOCK : SUPERBLOCK + 4096]))
    total = sums.of(bytes(block[32:]))
    block[: len(total)] = total
    for at in places:
        volume[at : at + NODE] = block


def items_of(block: bytearray, kind: int) -> Iterator[int]:
    """Yield where the items of a type are in a leaf."""
    (count,) = struct.unpack_from("<I", block, 96)
    for number in range(count if not block[100] else 0):
        _, own, _, offset, _ = struct.unpack_from("<QBQII", block, 101 + number * 25)
        if own == kind:
            yield 101 + offset


@pytest.mark.parametrize("kind", ["crc32c", "xxhash", "sha256", "blake2"])
def test_a_copy_that_is_whole_counts_and_nothing_wrong_is_shown(kind: str, tmp_path: Path) -> None:
    volume = volume_of(tmp_path, "--csum", kind)
    wanted, problems = walked(volume)
    assert problems == []
    assert len(wanted) == len(TREE) + 300
    places = blocks_of(volume)
    assert len(places) > 6
    damaged = bytearray(volume)
    for place in places:
        # In an item, and among the keys.
        damaged[place + NODE - 150] ^= 1
        damaged[place + 101 + 3] ^= 4
    assert walked(damaged) == (wanted, [])
    for copies in copies_of(volume, places):
        assert len(copies) == 2
        for copy in copies:
            volume[copy + NODE - 150] ^= 1
        found, problems = walked(volume)
        for copy in copies:
            volume[copy + NODE - 150] ^= 1
        assert set(problems) == {"a block of its trees has a wrong checksum"}
        assert found.items() <= wanted.items()


def test_a_block_of_an_older_time_does_not_count(tmp_path: Path) -> None:
    """A write that one of two copies never got leaves an old block with the right sum."""
    volume = volume_of(tmp_path)
    wanted = walked(volume)
    damaged = bytearray(volume)

    def edit(block: bytearray) -> None:
        (generation,) = struct.unpack_from("<Q", block, 80)
        struct.pack_into("<Q", block, 80, generation - 1)
        for at in items_of(block, 1):
            block[at + 52] ^= 0o7  # the mode

    for place in blocks_of(volume):
        change(damaged, [place], edit)
    assert damaged != volume
    assert walked(damaged) == wanted


@pytest.mark.parametrize("kind", ["crc32c", "xxhash"])
def test_another_superblock_counts_where_the_first_is_damaged(kind: str, tmp_path: Path) -> None:
    volume = volume_of(tmp_path, "--csum", kind)
    wanted = walked(volume)
    volume[SUPERBLOCK + 80] ^= 1  # the root of all trees
    assert walked(volume) == wanted
    volume[(64 << 20) + 80] ^= 1
    assert walked(volume) == ({}, ["no copy of its superblock has the right checksum"])


@pytest.mark.parametrize("kind", ["crc32c", "sha256"])
def test_what_is_unpacked_is_compared_with_its_sums(kind: str, tmp_path: Path) -> None:
    """mkfs.btrfs 6.2 packs nothing: a file that is what zlib made is said to be packed."""
    volume = volume_of(tmp_path, "--csum", kind, "--data", "dup", "--metadata", "dup")
    plain, _ = walked(volume)
    packed = plain[b"/packed"][-1]
    assert isinstance(packed, bytes)

    def edit(block: bytearray) -> None:
        for at in items_of(block, 108):
            if block[at + 20] == 1 and struct.unpack_from("<Q", block, at + 8) == (len(packed),):
                struct.pack_into("<QB", block, at + 8, len(PACKED), 1)
                struct.pack_into("<Q", block, at + 45, len(PACKED))
        for at in items_of(block, 1):
            if struct.unpack_from("<Q", block, at + 16) == (len(packed),):
                struct.pack_into("<Q", block, at + 16, len(PACKED))

    for copies in copies_of(volume, blocks_of(volume)):
        change(volume, copies, edit)
    wanted, problems = walked(volume)
    assert problems == []
    assert wanted[b"/packed"][-1] == PACKED
    places = [at for at in range(0, len(volume), 4096) if volume[at : at + 64] == packed[:64]]
    assert len(places) == 2
    # Different sectors of the two copies: all of the file is there.
    volume[places[0] + 9000] ^= 1
    volume[places[1] + 3] ^= 1
    assert walked(volume) == (wanted, [])
    volume[places[1] + 9001] ^= 1
    found, problems = walked(volume)
    assert problems == ["what it is unpacked from has a wrong checksum"]
    assert found == {name: one for name, one in wanted.items() if name != b"/packed"}


def test_free_space_is_what_a_copy_that_is_whole_says(tmp_path: Path) -> None:
    volume, noted = volume_of(tmp_path), set[int]()

    def free() -> list[tuple[int, int]]:
        def read(offset: int, length: int) -> bytes:
            if length == NODE:
                noted.add(offset)
            return bytes(volume[offset : offset + length])

        return list(free_ranges(read, len(volume)) or ())

    wanted = free()
    assert wanted
    places = copies_of(volume, sorted(noted))
    for one, _ in places:
        volume[one + NODE - 150] ^= 1
    assert free() == wanted
    for _, other in places:
        volume[other + NODE - 150] ^= 1
    with pytest.raises(Unreadable, match="a block of a tree has a wrong checksum"):
        free()
