"""XFS as mkfs.xfs makes it from a prototype, and damaged at random.

Against the kernel's own view (attributes, ACLs, times) it is compared in tests/usecases/test_kernel_view.py, and
more of it by hand; what was compared stands in docs/performance.rst.
"""

import functools
import os
import random
import struct
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import zstandard

from backupfs.disks.crc32c import SEED, crc32c
from backupfs.disks.filesystem import Entry, Unreadable
from backupfs.disks.xfs import Xfs, _acl, _short_attributes, _unpacked, open_xfs

MIB = 1 << 20
Files = Mapping[str, "bytes | str | tuple[int, int] | Files"]

TREE: Files = {
    "empty": b"",
    "small": b"content",
    "large": random.Random(1).randbytes(3 * MIB + 5),
    "link": "small",
    "long": "x" * 700,
    "device": (300, 70000),
    "d": {"one": b"1", "deep": {"er": {"file": b"deep"}}},
    "many": {f"f{number:05d}": b"%d" % number for number in range(3000)},
    # More than an inode of 2 KiB holds.
    "some": {f"{number:060d}": b"%d" % number for number in range(40)},
}


def prototype(files: Files, folder: Path) -> str:
    """Return what mkfs.xfs makes of a tree; contents go to files in a folder."""
    lines: list[str] = []

    def add(name: str, entry: "bytes | str | tuple[int, int] | Files") -> None:
        if isinstance(entry, bytes):
            path = folder / f"content{len(os.listdir(folder))}"
            path.write_bytes(entry)
            lines.append(f"{name} ---640 1000 2000 {path}")
        elif isinstance(entry, str):
            lines.append(f"{name} l--777 0 0 {entry}")
        elif isinstance(entry, tuple):
            lines.append(f"{name} c--600 0 0 {entry[0]} {entry[1]}")
        else:
            lines.append(f"{name} d--751 5 6")
            for below, inner in entry.items():
                add(below, inner)
            lines.append("$")

    for name, entry in files.items():
        add(name, entry)
    return "\n".join(["/stand/diag", "4872 110", "d--755 0 0", *lines, "$", ""])


@pytest.fixture(scope="module", params=["", "-m crc=0", "-n size=8192", "-b size=1024", "-i size=2048"])
def volume(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xfs")
    (folder / "contents").mkdir()
    (folder / "proto").write_text(prototype(TREE, folder / "contents"))
    path = folder / "volume"
    with open(path, "wb") as file:
        file.truncate(320 * MIB)
    subprocess.run(
        ["mkfs.xfs", "-q", "-f", "-p", folder / "proto", *request.param.split(), path], check=True, capture_output=True
    )
    return path


@functools.cache
def reader_of(path: Path) -> Callable[[int, int], bytes]:
    fd = os.open(path, os.O_RDONLY)
    return lambda at, length: os.pread(fd, length, at)


def opened(path: Path) -> Xfs:
    found = open_xfs(reader_of(path), path.stat().st_size)
    assert found is not None
    return found


def content_of(path: Path, filesystem: Xfs, entry: Entry) -> bytes:
    read = reader_of(path)
    extents = filesystem.extents(entry)
    assert extents is not None
    return b"".join(bytes(length) if at is None else read(at, length) for length, at in extents)


def test_everything_is_as_the_prototype_says(volume: Path) -> None:
    filesystem = opened(volume)

    def compare(directory: Entry, files: Files) -> None:
        found = {entry.name.decode(): entry for entry in filesystem.entries(directory)}
        assert found.keys() == files.keys()
        for name, wanted in files.items():
            entry = found[name]
            assert filesystem.xattrs(entry) == []
            if isinstance(wanted, bytes):
                assert (entry.mode, entry.uid, entry.gid, entry.nlink) == (0o100640, 1000, 2000, 1)
                assert content_of(volume, filesystem, entry) == wanted
            elif isinstance(wanted, str):
                assert (entry.mode, entry.target) == (0o120777, wanted.encode())
            elif isinstance(wanted, tuple):
                assert (entry.mode, entry.device) == (0o020600, wanted)
            else:
                assert (entry.mode, entry.uid, entry.gid) == (0o040751, 5, 6)
                compare(entry, wanted)

    assert filesystem.remarks == ()
    assert filesystem.top().mode == 0o040755
    compare(filesystem.top(), TREE)


def test_a_wrong_checksum_is_told_and_never_read_over(volume: Path) -> None:
    whole = volume.read_bytes()
    filesystem = opened(volume)
    top = {entry.name: entry for entry in filesystem.entries(filesystem.top())}
    large, many = top[b"large"], top[b"many"]
    assert filesystem.extents(many) is not None
    _, block = filesystem.extents(many)[0]  # type: ignore[index]
    assert block is not None

    def problems(at: int) -> set[str]:
        damaged = bytearray(whole)
        damaged[at] ^= 1
        found = Xfs(lambda at, length: bytes(damaged[at : at + length]), len(damaged))
        told = set()
        for entry in found.entries(found.top()):
            told.add(entry.problem)
            try:
                list(found.entries(entry) if entry.is_directory else ())
            except Unreadable as error:
                told.add(str(error))
        return told - {""}

    if large.handle.raw[4] < 3:
        # Version 4 has no sums.
        assert problems(whole.index(large.handle.raw) + 100 + 13) == set()
        return
    # The first block of the first extent, in the inode; and a number in the first block of a directory.
    assert problems(whole.index(large.handle.raw) + 176 + 13) == {f"its inode {large.inode} has a wrong checksum"}
    assert problems(block + 64 + 7) == {"a block of a directory has a wrong checksum"}


def test_what_went_to_a_wrong_place_is_told_and_never_believed(volume: Path) -> None:
    """It has the right sum: a write that was lost, or went elsewhere, leaves such blocks."""
    whole = volume.read_bytes()
    filesystem = opened(volume)
    top = {entry.name: entry for entry in filesystem.entries(filesystem.top())}
    empty, small = top[b"empty"], top[b"small"]
    if small.handle.raw[4] < 3:
        return  # Version 4 does not say what a block is.
    blocks = {}
    for name in (b"many", b"some"):
        extents = filesystem.extents(top[name])
        assert extents is not None
        blocks[name] = extents[0][1] or 0
    size = filesystem._directory_size

    def problems(at: int, data: bytes) -> set[tuple[bytes, str]]:
        moved = bytearray(whole)
        moved[at : at + len(data)] = data
        found = Xfs(lambda at, length: bytes(moved[at : at + length]), len(moved))
        told = set()
        for entry in found.entries(found.top()):
            told.add((entry.name, entry.problem))
            try:
                list(found.entries(entry) if entry.is_directory else ())
            except Unreadable as error:
                told.add((entry.name, str(error)))
        return {(name, problem) for name, problem in told if problem}

    where = whole.index(empty.handle.raw)
    assert problems(where, small.handle.raw) == {(b"empty", f"its inode {empty.inode} is another one, or an old one")}
    wrong = {(b"some", "a block of a directory is another one, or an old one")}
    assert problems(blocks[b"some"], whole[blocks[b"many"] : blocks[b"many"] + size]) == wrong
    # One of another file system that was here before.
    older = bytearray(whole[blocks[b"some"] : blocks[b"some"] + size])
    older[24] ^= 1
    older[4:8] = bytes(4)
    older[4:8] = (crc32c(SEED, bytes(older)) ^ SEED).to_bytes(4, "little")
    assert problems(blocks[b"some"], bytes(older)) == wrong


@pytest.mark.parametrize("goes_round", [False, True])
def test_the_last_record_of_a_journal_may_have_a_large_header(volume: Path, goes_round: bool) -> None:
    """Where the file system was mounted with logbsize=256k, one that was unmounted seemed not to be."""
    whole = bytearray(volume.read_bytes())
    filesystem = opened(volume)
    start, (blocks,) = struct.unpack_from(">Q", whole, 48)[0], struct.unpack_from(">I", whole, 96)
    place, length = filesystem._place(start), blocks * filesystem._block_size
    header, operation = whole[place : place + 512], whole[place + 512 : place + 1024]
    assert header[:4] == b"\xfe\xed\xba\xbe"
    struct.pack_into(">I", header, 8, 2)
    struct.pack_into(">I", header, 320, 256 << 10)
    whole[place : place + length] = bytes(length)
    at = length - 3 * 512 if goes_round else 4096
    for number, sector in enumerate([header, *[bytes(512)] * 7, operation]):
        put = place + (at + number * 512) % length
        whole[put : put + 512] = sector

    def remarks() -> tuple[str, ...]:
        return Xfs(lambda at, length: bytes(whole[at : at + length]), len(whole)).remarks

    assert remarks() == ()
    whole[put + 9] ^= 0x20
    assert "it was not unmounted" in remarks()[0]


def test_a_superblock_with_a_wrong_checksum_is_not_believed(volume: Path) -> None:
    whole = volume.read_bytes()
    if opened(volume)._is_5:
        damaged = bytearray(whole)
        for place in (63, 87, 192, 219):  # the top, the size of a group, the blocks of a directory, features
            damaged[place] ^= 1
            with pytest.raises(Unreadable, match="its superblock has a wrong checksum, a copy is at byte "):
                Xfs(lambda at, length: bytes(damaged[at : at + length]), len(damaged))
            damaged[place] ^= 1


@pytest.mark.parametrize("sums", [True, False])
def test_damage_ends_in_errors_of_its_own(volume: Path, sums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block that a walk reads is hit some time; a walk ends, whatever it meets, also behind the sums."""
    if not sums:
        monkeypatch.setattr(Xfs, "_require_own", lambda *_: None)
    chooser = random.Random(5)
    read = reader_of(volume)
    places: set[int] = set()

    def noted(at: int, length: int) -> bytes:
        places.update(range(at // 512, (at + length + 511) // 512))
        return read(at, length)

    def walk(filesystem: Xfs) -> None:
        stack, seen = [filesystem.top()], set()
        while stack:
            directory = stack.pop()
            for entry in filesystem.entries(directory):
                if entry.problem:
                    raise Unreadable(entry.problem)
                filesystem.xattrs(entry)
                if entry.is_file:
                    filesystem.extents(entry)
                if entry.is_directory and entry.inode not in seen and len(seen) < 1000:
                    seen.add(entry.inode)
                    stack.append(entry)

    size = volume.stat().st_size
    walk(Xfs(noted, size))
    used = sorted(places)
    errors = 0
    for _ in range(60):
        hits = {chooser.choice(used) * 512 + chooser.randrange(512): chooser.randrange(256) for _ in range(300)}

        def damaged(at: int, length: int, hits: dict[int, int] = hits) -> bytes:
            data = bytearray(read(at, length))
            for place, value in hits.items():
                if at <= place < at + len(data):
                    data[place - at] = value
            return bytes(data)

        try:
            walk(Xfs(damaged, size))
        except (Unreadable, struct.error, ValueError, IndexError):
            errors += 1
    assert errors > 5


def test_what_is_no_xfs_is_none_and_what_is_garbled_is_refused() -> None:
    assert open_xfs(lambda at, length: bytes(length), MIB) is None
    with pytest.raises(Unreadable, match="makes no sense"):
        open_xfs(lambda at, length: b"XFSB".ljust(length, b"\0"), MIB)
    with pytest.raises((Unreadable, struct.error)):
        open_xfs(lambda at, length: b"XFSB", MIB)


def test_an_extent_is_taken_apart_as_the_kernel_puts_it_together() -> None:
    offset, block, count = (1 << 54) - 2, (1 << 52) - 3, (1 << 21) - 5
    packed = (1 << 127 | offset << 73 | block << 21 | count).to_bytes(16, "big")
    assert _unpacked(packed, 0) == (offset, block, count, True)


def test_short_attributes_and_acls() -> None:
    entries = [(0, b"one", b"1"), (2, b"SGI_ACL_FILE", b"x" * 40), (4, b"selinux", b"")]
    fork = b"\0\0" + bytes([len(entries), 0])
    for flags, name, value in entries:
        fork += bytes([len(name), len(value), flags]) + name + value
    assert list(_short_attributes(fork + bytes(9))) == entries
    with pytest.raises(Unreadable, match="cut short"):
        list(_short_attributes(fork[:-1]))
    stored = struct.pack(">I", 2) + struct.pack(">IIHH", 1, 0, 6, 0) + struct.pack(">IIHH", 2, 1234, 4, 0)
    assert _acl(stored) == struct.pack("<IHHIHHI", 2, 1, 6, 0xFFFFFFFF, 2, 4, 1234)
    with pytest.raises(Unreadable, match="cut short"):
        _acl(stored[:-1])


def test_an_attribute_may_end_with_its_block() -> None:
    """Made by mkfs.xfs 6.1 and the kernel: `trusted.t` of two bytes stands in the last eight of its block."""
    packed = (Path(__file__).parent / "attributes.xfs.zst").read_bytes()
    plain = zstandard.ZstdDecompressor().decompress(packed, 400 << 20)
    filesystem = open_xfs(lambda offset, length: plain[offset : offset + length], len(plain))
    assert filesystem is not None
    [entry] = filesystem.entries(filesystem.top())
    assert filesystem.xattrs(entry) == [(b"trusted.t", b"\0\1"), (b"user.large", b"v" * 900), (b"user.one", b"1")]


def headed() -> bytearray:
    """Return a volume with blocks of 1 KiB, made by mkfs.xfs 6.1 and the kernel: links to 1020 `y` and 500 `z`, ninety
    attributes on `many`, and a large one on `large`.
    """
    packed = (Path(__file__).parent / "headed.xfs.zst").read_bytes()
    return bytearray(zstandard.ZstdDecompressor().decompress(packed, 400 << 20))


def seen_in(volume: bytearray) -> tuple[dict[bytes, object], set[str]]:
    """Return targets and attributes, and what cannot be read of them."""
    filesystem = open_xfs(lambda offset, length: bytes(volume[offset : offset + length]), len(volume))
    assert filesystem is not None
    found: dict[bytes, object] = {}
    problems = set()
    for entry in filesystem.entries(filesystem.top()):
        try:
            if entry.problem:
                raise Unreadable(entry.problem)
            found[entry.name] = entry.target or filesystem.xattrs(entry)
        except Unreadable as error:
            problems.add(str(error))
    return found, problems


def test_links_and_attributes_in_blocks_with_a_head_of_their_own_are_compared() -> None:
    volume = headed()
    wanted: dict[bytes, object] = {
        b"long": b"y" * 1020, b"short": b"z" * 500,
        b"many": [(b"user.a%03d" % number, b"%d" % number * 30) for number in range(90)],
        b"large": [(b"user.large", b"v" * 9000), (b"user.small", b"1")],
    }  # fmt: skip
    assert seen_in(volume) == (wanted, set())
    # They lie before the journal, which has some of them, too.
    links = [at for at in range(0, MIB, 1024) if volume[at : at + 4] == b"XSLM"]
    values = [at for at in range(0, MIB, 1024) if volume[at : at + 4] == b"XARM"]
    blocks = {kind: [at for at in range(0, MIB, 1024) if volume[at + 8 : at + 10] == magic]
              for kind, magic in (("leaf", b"\x3b\xee"), ("node", b"\x3e\xbe"))}  # fmt: skip
    assert (len(links), len(values), len(blocks["node"])) == (2, 10, 1)
    assert len(blocks["leaf"]) > 5
    damages = {
        "the target of a link has a wrong checksum": [at + 100 for at in links] + [max(links) + 1100],
        "the target of a link has no head that makes sense": links,
        "the value of an attribute has a wrong checksum": [at + 100 for at in values],
        "the value of an attribute has no head that makes sense": values,
        "a block of attributes is none": [at + 9 for at in blocks["leaf"] + blocks["node"]],
        "a block of attributes has a wrong checksum": [at + 70 for at in blocks["leaf"] + blocks["node"]],
    }
    for says, places in damages.items():
        for place in places:
            volume[place] ^= 1
            found, problems = seen_in(volume)
            volume[place] ^= 1
            assert problems == {says}, place
            assert {name: one for name, one in wanted.items() if name in found} == found
            assert len(found) == 3


def test_another_block_of_attributes_or_of_a_value_is_not_believed() -> None:
    """Each has the right sum."""
    for magic, at, says in (
        (b"XARM", 0, "the value of an attribute is another one, or an old one"),
        (b"\x3b\xee", 8, "a block of attributes is another one, or an old one"),
    ):
        volume = headed()
        one, other, *_ = (place for place in range(0, MIB, 1024) if volume.startswith(magic, place + at))
        volume[one : one + 1024] = volume[other : other + 1024]
        assert seen_in(volume)[1] == {says}


def test_a_value_that_looks_like_a_block_of_attributes_adds_none() -> None:
    """Blocks of values lie among those of attributes, and were looked at, too."""
    volume = headed()
    filesystem = open_xfs(lambda offset, length: bytes(volume[offset : offset + length]), len(volume))
    assert filesystem is not None
    [large] = [entry for entry in filesystem.entries(filesystem.top()) if entry.name == b"large"]
    forged = next(at for at in range(0, MIB, 1024) if volume[at + 8 : at + 10] == b"\x3b\xee")
    value = next(at for at in range(0, MIB, 1024) if volume[at : at + 4] == b"XARM")
    volume[value : value + 1024] = volume[forged : forged + 1024]
    with pytest.raises(Unreadable, match="has no head"):
        filesystem.xattrs(large)
