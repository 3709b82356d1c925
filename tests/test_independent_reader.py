"""What the program writes is what docs/format.rst says: a reader and a cutter written from it understand it."""

import hashlib
import math
import os
import random
import re
import socket
from collections.abc import Callable
from pathlib import Path

import independent_reader
import pytest
import trio
from blake3 import blake3
from independent_reader import FILE, SYMLINK, TREE, FormatError, Node, device_of

from backupfs.chunking.cutter import CutSizes, Cutter
from backupfs.codec.keys import KdfCost, Keyring
from backupfs.localfs import reading
from backupfs.repository.local import LocalFolders
from backupfs.repository.repository import Repository
from backupfs.repository.writer import WriteSizes
from backupfs.snapshots import tree
from backupfs.stores.directory import DirectoryStore
from backupfs.usecases.backup import BackupOptions, BackupResult, backup
from backupfs.usecases.forget import forget
from backupfs.usecases.init import init

DOCUMENT = Path(__file__).parent.parent / "docs" / "format.rst"
SMALL = CutSizes(128, 600, 2048)
SMALL_WRITES = WriteSizes(block=16 << 10, pack=64 << 10, checkpoint_packs=3)
LARGE_SET = tuple((b"user.%02d" % number, bytes([number]) * 900) for number in range(20))
MARKED_SIZE = 12_345  # a file of this size seems to have LARGE_SET, which few file systems can hold


def make(folder: Path, sizes: CutSizes = SMALL) -> Repository:
    store = DirectoryStore(folder)
    return init(store, b"secret", "first", LocalFolders(None, None), KdfCost(64, 1, 1), sizes)


def back_up(repository: Repository, source: Path, **options: object) -> BackupResult:
    return backup(repository, [os.fsencode(source)], BackupOptions(**options), lambda _event: None)


def opened(folder: Path, password: bytes = b"secret") -> independent_reader.Repository:
    return independent_reader.Repository(folder, password)


def entries(repository: independent_reader.Repository, root: bytes, source: Path) -> dict[bytes, Node]:
    prefix = os.fsencode(source) + b"/"
    return {path.removeprefix(prefix): node for path, node in repository.walk(root) if path.startswith(prefix)}


def assert_same(repository: independent_reader.Repository, nodes: dict[bytes, Node], source: Path) -> None:
    """Compare every name below a folder of this machine with its node."""
    found = set()
    for folder, directories, files in os.walk(os.fsencode(source)):
        for name in directories + files:
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, os.fsencode(source))
            found.add(relative)
            node, status = nodes[relative], os.lstat(path)
            assert (node.mode, node.uid, node.gid) == (status.st_mode, status.st_uid, status.st_gid)
            assert (node.nlink, node.inode, node.size) == (status.st_nlink, status.st_ino, status.st_size)
            assert (node.mtime_ns, node.ctime_ns) == (status.st_mtime_ns, status.st_ctime_ns)
            if node.type == FILE:
                assert repository.read(node) == Path(os.fsdecode(path)).read_bytes(), path
            elif node.type == SYMLINK:
                assert node.content == os.readlink(path)
            elif node.type in independent_reader.DEVICES:
                assert device_of(node) == (os.major(status.st_rdev), os.minor(status.st_rdev))
            elif node.type != TREE:
                assert node.content == b""
    assert found == nodes.keys()


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader must not depend on where a writer cuts."""
    monkeypatch.setattr(tree, "LEAST_PAGE", 400)
    monkeypatch.setattr(tree, "MOST_PAGE", 1200)


@pytest.fixture
def large_xattrs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = reading.read_xattrs

    def read_xattrs(target: int | bytes, follow: bool = True) -> tuple[tuple[bytes, bytes], ...]:
        marked = isinstance(target, int) and os.fstat(target).st_size == MARKED_SIZE
        return LARGE_SET if marked else real(target, follow)

    monkeypatch.setattr(reading, "read_xattrs", read_xattrs)


def make_hard_cases(source: Path) -> None:
    source.mkdir()
    noise = random.Random(1)
    (source / "empty").touch()
    (source / "empty folder").mkdir()
    for size in (1, 63, 64, 512, 513, 1024, 1025, 70_000):
        (source / f"noise-{size}").write_bytes(noise.randbytes(size))
        (source / f"zeros-{size}").write_bytes(bytes(size))
    (source / "large").write_bytes(noise.randbytes(4_000_000))
    with open(source / "sparse", "wb") as file:
        for start in (0, 1 << 20, 3 << 20, 40 << 20):
            file.seek(start)
            file.write(noise.randbytes(5000))
        file.truncate(50 << 20)
    with open(source / "only a hole", "wb") as file:
        file.truncate(1 << 20)
    (source / "marked").write_bytes(noise.randbytes(MARKED_SIZE))
    (source / os.fsdecode(b"not \xff UTF-8 \n")).write_bytes(b"x")
    (source / ("n" * 255)).write_bytes(b"a long name")
    (source / "target").write_bytes(b"linked" * 200)
    os.link(source / "target", source / "link 1")
    os.link(source / "target", source / "empty folder" / "link 2")
    (source / "symlink").symlink_to("../" * 100 + "nowhere")
    os.mkfifo(source / "fifo")
    # A socket's address is short, so it is bound by way of a descriptor.
    folder = os.open(source, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{folder}/socket")
    os.close(folder)
    os.setxattr(source / "noise-513", "user.comment", b"\0\xff value")
    os.setxattr(source / "empty folder", "user.folder", b"")
    (source / "many").mkdir()
    for number in range(1500):
        (source / "many" / f"{noise.getrandbits(60):x}").write_bytes(b"%d" % number)
    deep = source / "deep"
    for _ in range(60):
        deep.mkdir()
        deep /= "d"
    if os.geteuid() == 0:
        os.mknod(source / "character", 0o020600, os.makedev(1, 3))
        os.mknod(source / "block", 0o060600, os.makedev(259, 1_000_000))
        os.chown(source / "noise-1", 54_321, 54_322)
    (source / "noise-64").chmod(0o4755)
    os.utime(source / "noise-63", ns=(0, -1))
    os.utime(source / "noise-512", ns=(0, 2**33 * 10**9 + 999_999_999))


@pytest.mark.usefixtures("small_pages", "large_xattrs")
def test_hard_cases_are_read_back_byte_for_byte(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_hard_cases(source)
    options = {"host": "earth", "tags": ("b", "a"), "time_ns": 5, "sizes": SMALL_WRITES}
    back_up(make(tmp_path / "repository"), source, **options)
    repository = opened(tmp_path / "repository")
    (snapshot,) = repository.snapshots()
    nodes = entries(repository, snapshot.tree, source)
    assert_same(repository, nodes, source)
    assert (snapshot.host, snapshot.tags, snapshot.time, snapshot.sequence) == ("earth", ["a", "b"], 5, 1)
    assert (snapshot.paths, snapshot.previous, snapshot.traits) == ([os.fsencode(source)], b"", 1)
    assert snapshot.statistics[:2] == [
        sum(node.type != TREE for node in nodes.values()),
        1 + sum(node.type == TREE for node in nodes.values()),
    ]
    # The cases are as hard as they should be.
    assert len(repository.ids("packs/data/")) > 5
    assert len(repository.ids("packs/tree/")) > 1
    assert len(repository.ids("index/data/")) > 2
    assert nodes[b"marked"].xattrs == list(LARGE_SET)
    assert nodes[b"noise-513"].xattrs == [(b"user.comment", b"\0\xff value")]
    assert nodes[b"empty folder"].xattrs == [(b"user.folder", b"")]
    assert nodes[b"noise-512"].content[:1] == b"\x03"
    assert nodes[b"noise-513"].content[:1] == b"\x01"
    assert [kind for _, kind, *_ in nodes[b"large"].content] == [4] * len(nodes[b"large"].content)
    inner_list = independent_reader.read_record(repository.chunk(nodes[b"large"].content[0][2], 2))
    assert inner_list[0][1] == 4, "list pages of one level only"
    assert nodes[b"only a hole"].content == [[1 << 20, 0]]
    assert sum(length for length, data in repository.segments(nodes[b"sparse"]) if data is None) > 45 << 20
    links = {(nodes[name].filesystem, nodes[name].inode) for name in (b"target", b"link 1", b"empty folder/link 2")}
    assert len(links) == 1
    level = independent_reader.read_record(repository.chunk(nodes[b"many"].content, 2))[0]
    assert level >= 2, "pages of too few levels"
    if os.geteuid() == 0:
        assert (nodes[b"target"].owner, nodes[b"noise-1"].owner, nodes[b"noise-1"].group) == (b"root", b"", b"")


def test_a_repository_of_real_sizes_is_read_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "large").write_bytes(random.Random(2).randbytes(9 << 20))
    (source / "small").write_bytes(b"small" * 1000)
    (source / "many").mkdir()
    for number in range(2000):
        (source / "many" / f"file {number}").write_bytes(b"%d" % number)
    back_up(make(tmp_path / "repository", CutSizes()), source)
    repository = opened(tmp_path / "repository")
    nodes = entries(repository, repository.snapshots()[0].tree, source)
    assert_same(repository, nodes, source)
    assert independent_reader.read_record(repository.chunk(nodes[b"many"].content, 2))[0] == 1


@pytest.mark.usefixtures("small_pages")
def test_later_snapshots_share_and_forgotten_ones_are_known(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_hard_cases(source)
    ours = make(tmp_path / "repository")
    first = back_up(ours, source, time_ns=1, sizes=SMALL_WRITES).snapshot
    before = {path: os.lstat(source / path).st_size for path in ("large", "target")}
    with open(source / "large", "r+b") as file:
        file.seek(700_000)
        file.write(b"an edit")
    (source / "many" / "new").write_bytes(b"new" * 1000)
    second = back_up(ours, source, time_ns=2, sizes=SMALL_WRITES).snapshot
    assert first is not None
    assert second is not None
    trio.run(forget, ours, [first.snapshot_id.hex()], False)
    repository = opened(tmp_path / "repository")
    older, newer = repository.snapshots()
    assert (older.is_forgotten, newer.is_forgotten) == (True, False)
    assert newer.parent.hex() == older.snapshot_id
    assert_same(repository, entries(repository, newer.tree, source), source)
    old_nodes = entries(repository, older.tree, source)
    assert b"many/new" not in old_nodes
    assert old_nodes[b"large"].size == before["large"]
    assert b"an edit" not in repository.read(old_nodes[b"large"])
    assert newer.statistics[6] < older.statistics[6] // 10


def test_another_slot_opens_and_a_wrong_password_does_not(tmp_path: Path) -> None:
    ours = make(tmp_path / "repository")
    ours.add_slot("пароль".encode(), "second", KdfCost(128, 2, 2))
    assert opened(tmp_path / "repository", "пароль".encode()).keys == opened(tmp_path / "repository").keys
    with pytest.raises(FormatError, match="no key slot"):
        opened(tmp_path / "repository", b"Secret")


# The examples and test vectors of the document itself.


def test_the_worked_example_of_the_document_reads(tmp_path: Path) -> None:
    example = DOCUMENT.read_text().partition("A worked example\n====")[2]
    title, dump_lines = r"``(config|[^`\n]+/[0-9a-f]{64})``", r"((?: +\d+  [0-9a-f]+\n)+)"
    objects = re.findall(rf"^{title}\n+::\n\n{dump_lines}", example, re.MULTILINE)
    assert len(objects) == 7
    for key, dump in objects:
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes.fromhex("".join(line.split()[1] for line in dump.splitlines())))
    repository = opened(tmp_path, b"example")
    (snapshot,) = repository.snapshots()
    nodes = entries(repository, snapshot.tree, Path("/tmp/example"))
    assert repository.read(nodes[b"long"]) == b"All work and no play makes Jack a dull boy.\n" * 16
    assert repository.read(nodes[b"short"]) == b"hello\n"
    assert nodes[b"link"].content == b"short"
    top = repository.root(snapshot)
    assert top is not None
    assert (top.mode, top.nlink, top.mtime_ns, top.ctime_ns, top.owner) == (0o40755, 1, 0, 0, b"root")
    for key in repository.keys.values():
        assert key.hex() in example
    for chunk_id in (*repository.data_chunks, *repository.tree_chunks):
        assert chunk_id.hex() in example


def cuts_by_the_document(data: bytes, key: bytes, sizes: tuple[int, int, int], masks: dict[int, int]) -> list[int]:
    """Cut as the section "Cutter" says."""
    least, average, most = sizes
    derived = blake3(b"backupfs 1 file cuts", key=key).digest()
    seed = int.from_bytes(derived[:8], "little") & ((1 << 63) - 1) or 1
    table = [int.from_bytes(hashlib.md5(bytes([b]) * 64).digest()[:8], "big") ^ seed for b in range(256)]
    bits = round(math.log2(average))
    ends, start = [], 0
    while start < len(data):
        left = len(data) - start
        length = end = min(left, most)
        if left > least:
            middle, value = min(average, end) & ~1, 0
            for i in range(least & ~1, end & ~1):
                value = (2 * value + table[data[start + i]]) & ((1 << 64) - 1)
                if value & masks[bits + 1 if i < middle else bits - 1] == 0:
                    length = i
                    break
        start += length
        ends.append(start)
    return ends


def test_the_cutter_cuts_as_the_document_says() -> None:
    section = DOCUMENT.read_text().partition("\nCutter\n======")[2].partition("A worked example\n")[0]
    masks = {int(k): int(mask, 16) for k, mask in re.findall(r"(\d+) +``([0-9a-f]{16})``", section)}
    assert masks.keys() == set(range(7, 25))
    keys = {"00010203...1f": bytes(range(32)), "00000000...00": bytes(32), "ffffffff...ff": b"\xff" * 32}
    vectors = re.findall(r"   key (\S+), min (\d+), avg (\d+), max (\d+), n (\d+):\n((?: {6}[\d ]+\n)+)", section)
    assert len(vectors) == 5
    for name, least, average, most, n, numbers in vectors:
        data, sizes = blake3(b"backupfs cutter test").digest(length=int(n)), (int(least), int(average), int(most))
        ends = [int(number) for number in numbers.split()]
        cutter = Cutter(CutSizes(*sizes), Keyring((("cutter", 0, keys[name]),)).file_cut_seed())
        position, found = 0, []
        for piece in cutter.cut(reader_of(data)):
            position += len(piece)
            found.append(position)
        assert found == ends
        seed = blake3(b"backupfs 1 file cuts", key=keys[name]).digest()[7::-1]
        assert (int.from_bytes(seed, "big") & (1 << 63) - 1).to_bytes(8, "big").hex() in section
        if len(data) < 100_000:
            assert cuts_by_the_document(data, keys[name], sizes, masks) == ends


def test_names_cut_tree_pages_as_the_document_says() -> None:
    listed = DOCUMENT.read_text().partition("those of level 0 are\n")[2].partition("\n\n")[0]
    key = blake3(b"backupfs 1 page cuts", key=bytes(range(32))).digest()
    assert Keyring((("cutter", 0, bytes(range(32))),)).page_cut_key() == key
    names = [b"file-%d" % number for number in range(2000)]
    expected = [name for name in names if blake3(name, key=key).digest()[0] == 0]
    assert [name.encode() for name in re.findall(r"file-\d+", listed)] == expected
    builder = tree.TreeBuilder(key, lambda data: blake3(data).digest())
    assert [name for name in names if builder._cuts_after(name, 0)] == expected


def reader_of(data: bytes) -> Callable[[memoryview], int]:
    position = 0

    def read_into(buffer: memoryview) -> int:
        nonlocal position
        part = data[position : position + len(buffer)]
        buffer[: len(part)] = part
        position += len(part)
        return len(part)

    return read_into
