"""Restores over real trees: what comes back, what is left alone, and what never happens."""

import errno
import multiprocessing
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from backupfs.codec.compression import DEFAULT_LEVEL
from backupfs.codec.records import encode_record
from backupfs.codec.sealing import Kind
from backupfs.errors import PathNotFound, SourceError, StoreUnavailable, UsageError
from backupfs.ids import ChunkId
from backupfs.localfs import reading, writing
from backupfs.localfs.exclude import parse_pattern
from backupfs.localfs.selection import SelectionRules
from backupfs.repository import fetch
from backupfs.repository.pack import Block
from backupfs.repository.repository import Repository
from backupfs.repository.writer import PackWriter
from backupfs.snapshots import tree as tree_module
from backupfs.snapshots.node import STAT_ROW
from backupfs.snapshots.snapshot import Snapshot, Statistics
from backupfs.snapshots.tree import leaf_pages
from backupfs.snapshots.walk import find_path, tree_of
from backupfs.stores.directory import DirectoryStore
from backupfs.usecases import archive_context, restore_files, restore_verify
from backupfs.usecases import restore as restore_module
from backupfs.usecases.events import Deleted, Event, FileSkipped, Progress, Remark
from backupfs.usecases.restore import RestoreOptions, RestoreResult, restore
from backupfs.usecases.restore_range import RangeWriter, Work, Written
from tests.builders import (
    OLD_NS,
    Directory,
    Entry,
    File,
    Hardlink,
    Sparse,
    Special,
    Symlink,
    Tree,
    back_up,
    build,
    folders_in,
    new_repository,
    reopened,
    snapshot_of,
)
from tests.descriptors import open_files
from tests.faults import CountingStore, Fault, FaultyStore

ROOT = os.geteuid() == 0
# What others than root are told wherever a tree has anything of root's.
OWNERS_KEPT = (
    None if ROOT else Remark("only root can give files to their owners: they belong to the user who restored them")
)
NTFS = shutil.which("lowntfs-3g")
as_root = pytest.mark.skipif(not ROOT, reason="only root can make these")


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def run_restore(
    repository: Repository, snapshot: Snapshot, path: str | bytes | Path, target: str | bytes | Path, **options: object
) -> tuple[RestoreResult, list[Event]]:
    events: list[Event] = []
    result = trio.run(
        restore,
        repository,
        snapshot,
        os.fsencode(path),
        os.fsencode(target),
        RestoreOptions(**options),  # type: ignore[arg-type]
        events.append,
    )
    return result, [event for event in events if not isinstance(event, Progress | Deleted) and event != OWNERS_KEPT]


def saved(tmp_path: Path, tree: Tree) -> tuple[Repository, Snapshot, bytes]:
    source = build(tree, tmp_path / "source")
    repository = new_repository()
    return repository, back_up(repository, source), source


def below(seen: dict[bytes, object]) -> dict[bytes, object]:
    """Return what is below the top of a tree."""
    return {path: entry for path, entry in seen.items() if path}


def temporaries(path: str | bytes | Path) -> list[str]:
    return [
        os.path.join(top, name)
        for top, directories, files in os.walk(os.fsdecode(path))
        for name in directories + files
        if name.startswith(".backupfs-")
    ]


BIG = noise(300_000)

EVERYWHERE: dict[str, Entry] = {
    "empty file": {"a": File(b"")},
    "inline": {"a": File(b"x" * 512)},
    "one chunk": {"a": File(b"x" * 513)},
    "many chunks": {"a": File(BIG)},
    "same bytes at many places": {"a": File(BIG), "b": File(BIG), "c": File(BIG + BIG)},
    "empty directory": {"d": {"e": {}}},
    "directory times": {"d": Directory({"e": Directory({"f": File(b"1")}, mtime_ns=5)}, mtime_ns=7)},
    "names of any bytes": {b"\xff\xfe": File(b"1"), b"a\nb\t\x01": File(b"2"), "ü" * 100: {b"\x80": File(b"3")}},
    "long names": {"n" * 255: {"m" * 255: File(b"1")}},
    "names that look like ours": {".backupfs-0": File(b"1"), ".backupfs-d": {}},
    "symlinks": {"a": Symlink(b"../b"), "b": Symlink(b"/\xff"), "c": Symlink(b"x" * 4000), "d": Symlink(b"d")},
    "before 1970": {"a": File(b"1", mtime_ns=-1), "b": File(b"1", mtime_ns=-1_500_000_001)},
    "after 2106": {"a": File(b"1", mtime_ns=5_000_000_000_123_456_789)},
    "modes": {
        "a": File(b"1", mode=0o000 if ROOT else 0o444),
        "b": File(BIG, mode=0o400),
        "c": File(b"1", mode=0o777),
        "d": Directory({"x": File(b"1")}, mode=0o555),
        "e": Directory({"x": File(b"1")}, mode=0o1777),
        "f": Directory({"x": File(b"1")}, mode=0o700),
    },
    "set-id": {
        "a": File(b"1", mode=0o4755),
        "b": File(BIG, mode=0o2755),
        "c": Directory({"x": File(b"1")}, mode=0o2775),
        "d": File(b"", mode=0o6711),
    },
    "user attributes": {
        "a": File(b"1", xattrs={"user.a": b"1", "user.b": b"\0\xff"}),
        "b": File(BIG, mode=0o400, xattrs={"user.large": b"x" * 1000, "user.other": b"y" * 1000}),
        "d": Directory({}, xattrs={"user.d": b""}),
    },
    "fifo and socket": {"p": Special(), "s": Special(stat.S_IFSOCK, mode=0o600)},
    "hole at the end": {"a": Sparse(1 << 20, {0: b"x"})},
    "hole at the start": {"a": Sparse((1 << 20) + 1, {1 << 20: b"x"})},
    "only a hole": {"a": Sparse(1 << 20)},
    "holes between": {"a": Sparse(3 << 20, {1 << 20: BIG, 2 << 20: noise(5000)})},
    "hardlinks": {
        "a": File(b"1"), "b": {"a2": Hardlink("a"), "a3": Hardlink("a")},
        "c": File(BIG), "d": {"c2": Hardlink("c")}, "z": Hardlink("c"),
        "e": File(noise(2000)), "e2": Hardlink("e"),
    },
    "hardlinked symlink": {"a": Symlink(b"x"), "b": Hardlink("a")},
}  # fmt: skip
BY_ROOT: dict[str, Entry] = {
    "owners": {"a": File(b"1", owner=(12345, 54321)), "b": File(BIG, owner=(1, 2)), "c": File(b"", owner=(0, 7))},
    "set-id of others": {"a": File(b"1", owner=(12345, 54321), mode=0o6755)},
    "devices": {"c": Special(stat.S_IFCHR, device=(1, 3)), "b": Special(stat.S_IFBLK, device=(300, 70000))},
    "capabilities": {
        "a": File(b"1", owner=(99, 0), xattrs={
            "security.capability": bytes.fromhex("0100000200040000000000000000000000000000"),
            "trusted.x": b"1",
        })
    },
}  # fmt: skip
CASES = EVERYWHERE | (BY_ROOT if ROOT else {})


# All of them in one tree, but for those that name places from the top.
TOGETHER = {key: entry for key, entry in CASES.items() if not key.startswith("hardlink")}


@pytest.mark.parametrize("tree", CASES.values(), ids=CASES.keys())
def test_what_was_backed_up_comes_back(tree: Tree, tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, tree)
    result, events = run_restore(repository, snapshot, source, tmp_path / "made" / "target", verify=True)
    assert snapshot_of(tmp_path / "made" / "target") == snapshot_of(source)
    assert events == []
    assert (result.errors, result.damaged) == (0, 0)
    assert result.verified == len(snapshot_of(source)) - 1


@pytest.mark.parametrize("tree", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("overwrite", ["always", "if-changed"])
def test_a_second_restore_changes_nothing(tree: Tree, overwrite: str, tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, tree)
    run_restore(repository, snapshot, source, tmp_path / "target")
    result, events = run_restore(
        repository, snapshot, source, tmp_path / "target", overwrite=overwrite, delete=True, verify=True
    )
    assert below(snapshot_of(tmp_path / "target")) == below(snapshot_of(source))
    assert (events, result.errors, result.deleted) == ([], 0, 0)
    if overwrite == "if-changed":
        assert (result.files, result.size) == (0, 0)


def test_a_large_set_of_attributes_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_context, "_MOST_XATTRS", 10)
    xattrs = {"user.a": b"x" * 500, "user.b": b"y"}
    repository, snapshot, source = saved(tmp_path, {"a": File(b"1", xattrs=xattrs), "d": Directory({}, xattrs=xattrs)})
    result, _ = run_restore(repository, snapshot, source, tmp_path / "target", verify=True)
    assert snapshot_of(tmp_path / "target") == snapshot_of(source)
    assert result.verified == 2


@as_root
def test_acls_come_back(tmp_path: Path) -> None:
    tree = {"a": File(b"1", mode=0o640), "d": {"x": File(BIG)}, "new": {"y": File(b"2"), "z": {}}, "p": Special()}
    source = build(tree, tmp_path / "source")
    entries = [(1, 6, 0xFFFFFFFF), (2, 4, 1234), (4, 4, 0xFFFFFFFF), (16, 6, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF)]
    acl = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + permissions.to_bytes(2, "little") + who.to_bytes(4, "little")
        for tag, permissions, who in entries
    )
    os.setxattr(source + b"/a", "system.posix_acl_access", acl)
    os.setxattr(source + b"/d", "system.posix_acl_default", acl)
    repository = new_repository()
    snapshot = back_up(repository, source)
    # Where the target gives an ACL to what is made in it, the files have theirs and no other.
    target = build({"d": {}}, tmp_path / "target")
    os.setxattr(target, "system.posix_acl_default", acl)
    _result, events = run_restore(repository, snapshot, source, target)
    assert events == []
    assert below(snapshot_of(target)) == below(snapshot_of(source))


@as_root
def test_a_group_that_the_target_would_give_is_not_taken(tmp_path: Path) -> None:
    repository, snapshot, source = saved(
        tmp_path, {"a": File(b"1"), "b": File(BIG), "d": {"x": File(b"2")}, "l": Symlink(b"a"), "p": Special()}
    )
    (tmp_path / "target").mkdir()
    os.chown(tmp_path / "target", 0, 4321)
    os.chmod(tmp_path / "target", 0o2775)
    run_restore(repository, snapshot, source, tmp_path / "target")
    assert below(snapshot_of(tmp_path / "target")) == below(snapshot_of(source))


def test_depth_beyond_any_path(tmp_path: Path) -> None:
    depth = 600
    source = os.fsencode(tmp_path / "source")
    os.mkdir(source)
    fd = os.open(source, os.O_RDONLY)
    name = b"d" * 20
    for level in range(depth):
        with open(os.open(b"file", os.O_WRONLY | os.O_CREAT, dir_fd=fd), "wb") as file:
            file.write(noise(3000, level))
        os.mkdir(name, dir_fd=fd)
        below_fd = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below_fd
    os.close(fd)
    repository = new_repository()
    snapshot = back_up(repository, source)
    result, events = run_restore(repository, snapshot, source, tmp_path / "target", verify=True)
    assert (result.files, result.directories, events) == (depth, depth, [])
    assert result.verified == 2 * depth
    fds = [os.open(tmp_path / "target", os.O_RDONLY), os.open(source, os.O_RDONLY)]
    for _ in range(depth):
        deeper = [os.open(name, os.O_RDONLY, dir_fd=fd) for fd in fds]
        for fd in fds:
            os.close(fd)
        fds = deeper
        ours, theirs = (os.fstat(fd) for fd in fds)
        assert (ours.st_mode, ours.st_mtime_ns) == (theirs.st_mode, theirs.st_mtime_ns)
    # And all of it can be deleted again.
    build({"empty": {}}, tmp_path / "other")
    other = back_up(repository, tmp_path / "other")
    result, events = run_restore(repository, other, tmp_path / "other", tmp_path / "target", delete=True)
    assert (os.listdir(tmp_path / "target"), events, result.deleted) == (["empty"], [], 2 * depth)
    for fd in fds:
        os.close(fd)
    subprocess.run(["rm", "-rf", source], check=True)


def test_an_island_in_8_gib_of_hole_costs_nothing(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {"a": Sparse(8 << 30, {5 << 30: b"island"})})
    run_restore(repository, snapshot, source, tmp_path / "target")
    status = os.stat(tmp_path / "target" / "a")
    assert (status.st_size, status.st_blocks * 512 <= 64 << 10) == (8 << 30, True)
    with open(tmp_path / "target" / "a", "rb") as file:
        file.seek(5 << 30)
        assert file.read(6) == b"island"


def test_sparse_makes_holes_of_zeros(tmp_path: Path) -> None:
    content = BIG[:5000] + bytes(1 << 20) + BIG[:5000] + bytes(1 << 20)
    repository, snapshot, source = saved(tmp_path, {"a": File(content)})
    run_restore(repository, snapshot, source, tmp_path / "plain")
    run_restore(repository, snapshot, source, tmp_path / "sparse", sparse=True, verify=True)
    assert (tmp_path / "sparse" / "a").read_bytes() == content == (tmp_path / "plain" / "a").read_bytes()
    assert os.stat(tmp_path / "plain" / "a").st_blocks * 512 >= len(content)
    assert os.stat(tmp_path / "sparse" / "a").st_blocks * 512 < 300 << 10


@given(
    parts=st.lists(st.tuples(st.sampled_from(["data", "zeros", "hole"]), st.integers(1, 40_000)), max_size=8),
    sparse=st.booleans(),
    windows=st.sampled_from([1, 3, 10_000]),
)
def test_any_content_comes_back(
    parts: list[tuple[str, int]], sparse: bool, windows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("content")
    (tmp_path / "source").mkdir()
    with open(tmp_path / "source" / "a", "wb") as file:
        for number, (kind, length) in enumerate(parts):
            if kind == "hole":
                file.seek(length, os.SEEK_CUR)
            else:
                file.write(noise(length, number) if kind == "data" else bytes(length))
        file.truncate()
    repository = new_repository()
    snapshot = back_up(repository, tmp_path / "source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore_files, "_MOST_WANTED", windows)
        run_restore(repository, snapshot, tmp_path / "source", tmp_path / "target", sparse=sparse, verify=True)
    assert (tmp_path / "target" / "a").read_bytes() == (tmp_path / "source" / "a").read_bytes()
    assert snapshot_of(tmp_path / "target", holes=False) == snapshot_of(tmp_path / "source", holes=False)
    assert os.stat(tmp_path / "target" / "a").st_blocks <= os.stat(tmp_path / "source" / "a").st_blocks + 8


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (restore_files, "_MOST_WANTED", 1),
        (restore_files, "_LEAST_WANTED", 1),
        (restore_files, "_LEAST_WANTED_BYTES", 1),
        (restore_files, "_SLICE_S", 0),
        (writing, "_MOST_OPEN", 2),
        (fetch, "MOST_GAP", 0),
        (fetch, "MOST_RANGE", 1),
        (restore_module, "writer_count", lambda: 1),
        (restore_module, "writer_count", lambda: 8),
        (restore_module, "_FETCHERS", 1),
        (restore_module, "RANGES_EACH", 1),
        (restore_files, "PAUSE", 1),
    ],
)
def test_no_bound_changes_what_comes_back(
    module: ModuleType, name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, value)
    tree = TOGETHER | {"a": File(BIG), "b": {"c": {"d": {"a": Hardlink("a")}, "e": File(b"1")}, "f": Hardlink("a")}}
    repository, snapshot, source = saved(tmp_path, tree)
    open_before = open_files()
    result, events = run_restore(repository, snapshot, source, tmp_path / "target", verify=True)
    assert snapshot_of(tmp_path / "target") == snapshot_of(source)
    assert (events, result.errors) == ([], 0)
    assert open_files() - open_before == set()


def side_by_side(monkeypatch: pytest.MonkeyPatch, writers: int) -> None:
    """Let many small ranges be written by several processes, none of which goes on before each has begun."""
    monkeypatch.setattr(fetch, "MOST_RANGE", 1)
    monkeypatch.setattr(restore_module, "writer_count", lambda: writers)
    real, begun = RangeWriter.write, multiprocessing.get_context("fork").Barrier(writers)
    waited: list[int] = []

    def meeting(writer: RangeWriter, work: Work) -> Written:
        if not waited:
            waited.append(1)
            begun.wait(10)
        return real(writer, work)

    monkeypatch.setattr(RangeWriter, "write", meeting)


def test_several_processes_write_into_the_same_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_MOST_OPEN_APART", 1)
    tree: dict[str, Entry] = {
        f"d{n}": {"e": {f"f{m}": File(noise(700 + 90 * m, 100 * n + m), mode=0o640 - m) for m in range(30)}}
        for n in range(8)
    }
    repository, snapshot, source = saved(tmp_path, TOGETHER | tree)
    side_by_side(monkeypatch, 4)
    open_before = open_files()
    result, events = run_restore(repository, snapshot, source, tmp_path / "target", verify=True)
    assert snapshot_of(tmp_path / "target") == snapshot_of(source)
    assert (events, result.errors) == ([], 0)
    assert open_files() - open_before == set()


def test_each_file_that_several_processes_cannot_write_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree: dict[str, Entry] = {f"small{n:02}": File(noise(3000, n)) for n in range(40)}
    tree |= {f"large{n}": File(noise(300_000, 100 + n)) for n in range(4)}
    repository, snapshot, source = saved(tmp_path, tree)
    side_by_side(monkeypatch, 4)

    real = os.write

    def failing(fd: int, *arguments: object) -> int:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "write", failing)
    monkeypatch.setattr(os, "pwrite", failing)
    result, events = run_restore(repository, snapshot, source, tmp_path / "target")
    assert sorted(events, key=repr) == [
        FileSkipped(os.fsencode(tmp_path) + b"/target/" + name.encode(), "Input/output error") for name in sorted(tree)
    ]
    assert (result.errors, result.damaged, os.listdir(tmp_path / "target")) == (len(tree), 0, [])


def test_a_directory_that_becomes_a_symlink_is_not_followed_by_those_who_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree: dict[str, Entry] = {f"d{n}": {f"f{m}": File(noise(3000, 10 * n + m)) for m in range(8)} for n in range(4)}
    repository, snapshot, source = saved(tmp_path, tree)
    side_by_side(monkeypatch, 4)
    outside = build({}, tmp_path / "outside")
    target = tmp_path / "target"
    real = restore_files.Restorer.take_window

    def replacing(restorer: restore_files.Restorer) -> object:
        for n in (0, 2):
            os.rename(target / f"d{n}", tmp_path / f"moved{n}")
            os.symlink(outside, target / f"d{n}")
        return real(restorer)

    monkeypatch.setattr(restore_files.Restorer, "take_window", replacing)
    result, events = run_restore(repository, snapshot, source, target)
    lost = {os.fsencode(target) + b"/d%d/f%d" % (n, m) for n in (0, 2) for m in range(8)}
    assert lost <= {event.path for event in events}
    assert result.errors == len({event.path for event in events}) == len(events)
    assert os.listdir(outside) == os.listdir(tmp_path / "moved0") == []
    assert sorted(os.listdir(target / "d1")) == [f"f{m}" for m in range(8)]


def test_one_file_keeps_its_name(tmp_path: Path) -> None:
    repository, snapshot, source = saved(
        tmp_path, {"d": {"a": File(BIG, mode=0o640), "b": File(b"2"), "l": Symlink(b"x")}}
    )
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").touch()
    for name in (b"a", b"l"):
        run_restore(repository, snapshot, source + b"/d/" + name, tmp_path / "target", delete=True, verify=True)
    assert sorted(os.listdir(tmp_path / "target")) == ["a", "l", "mine"]
    assert snapshot_of(tmp_path / "target" / "a") == snapshot_of(source + b"/d/a")


def test_the_root_brings_the_way_to_the_sources(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {"a": File(b"1")})
    result, events = run_restore(repository, snapshot, "/", tmp_path / "target", verify=True)
    assert snapshot_of(os.fsencode(tmp_path / "target") + source) == snapshot_of(source)
    assert (events, result.errors) == ([], 0)


def test_an_existing_target_keeps_its_metadata_and_a_new_one_gets_the_directorys(tmp_path: Path) -> None:
    source = build({"d": Directory({"a": File(b"1")}, mode=0o711, mtime_ns=77)}, tmp_path / "source")
    repository = new_repository()
    snapshot = back_up(repository, source)
    (tmp_path / "old").mkdir(mode=0o750)
    run_restore(repository, snapshot, source + b"/d", tmp_path / "old")
    run_restore(repository, snapshot, source + b"/d", tmp_path / "new")
    old, new = os.stat(tmp_path / "old"), os.stat(tmp_path / "new")
    assert stat.S_IMODE(old.st_mode) == 0o750
    assert (stat.S_IMODE(new.st_mode), new.st_mtime_ns) == (0o711, 77)


def test_the_target_itself_may_be_a_symlink(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {"a": File(b"1")})
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    run_restore(repository, snapshot, source, tmp_path / "link")
    assert (tmp_path / "real" / "a").read_bytes() == b"1"
    assert (tmp_path / "link").is_symlink()


# What is in the target already.


@pytest.mark.parametrize(
    ("overwrite", "expected"),
    [
        ("always", "snapshot snapshot snapshot snapshot"),
        ("if-changed", "snapshot target snapshot snapshot"),
        ("if-newer", "snapshot target target snapshot"),
        ("never", "snapshot target target target"),
    ],
)
def test_overwrite(overwrite: str, expected: str, tmp_path: Path) -> None:
    names = ["new", "same", "newer", "older"]
    repository, snapshot, source = saved(tmp_path, {name: File(b"snapshot") for name in names})
    target = build(
        {
            "same": File(b"target!!"),
            "newer": File(b"target", mtime_ns=OLD_NS + 1),
            "older": File(b"target", mtime_ns=OLD_NS - 1),
        },
        tmp_path / "target",
    )
    result, events = run_restore(repository, snapshot, source, target, overwrite=overwrite)
    found = [(tmp_path / "target" / name).read_text().rstrip("!") for name in names]
    assert found == expected.split()
    assert (result.unchanged, result.files, events) == (found.count("target"), found.count("snapshot"), [])


def test_a_wrong_word_for_overwrite_is_refused(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {})
    with pytest.raises(UsageError, match="if-newer"):
        run_restore(repository, snapshot, source, tmp_path / "target", overwrite="sometimes")


def test_an_unchanged_file_gets_its_metadata_back_without_being_written(tmp_path: Path) -> None:
    repository, snapshot, source = saved(
        tmp_path, {"a": File(b"1" * 1000, mode=0o4755), "b": File(BIG, xattrs={"user.a": b"1"}), "p": Special()}
    )
    run_restore(repository, snapshot, source, tmp_path / "target")
    inodes = [os.stat(tmp_path / "target" / name).st_ino for name in "abp"]
    os.chmod(tmp_path / "target" / "a", 0o600)
    os.chmod(tmp_path / "target" / "p", 0o600)
    os.setxattr(tmp_path / "target" / "b", "user.a", b"2")
    os.setxattr(tmp_path / "target" / "b", "user.b", b"2")
    result, _ = run_restore(repository, snapshot, source, tmp_path / "target", overwrite="if-changed", verify=True)
    assert snapshot_of(tmp_path / "target") == snapshot_of(source)
    assert inodes == [os.stat(tmp_path / "target" / name).st_ino for name in "abp"]
    assert (result.unchanged, result.verified) == (3, 3)


FOREIGN = {"user.mine": b"1", "system.posix_acl_access": bytes.fromhex(
    "0200000001000600ffffffff02000400feff000004000400ffffffff10000400ffffffff20000400ffffffff"
)}  # fmt: skip


def test_an_unchanged_file_loses_attributes_and_acls_that_the_snapshot_lacks(tmp_path: Path) -> None:
    tree: Tree = {"a": File(b"1", mode=0o644), "b": File(b"1", mode=0o644, xattrs={"user.a": b"1"})}
    repository, snapshot, source = saved(tmp_path, {**tree, "p": Special(mode=0o644)})
    target = tmp_path / "target"
    run_restore(repository, snapshot, source, target)
    for name in "ab":
        for attribute, value in FOREIGN.items():
            os.setxattr(target / name, attribute, value)
    os.setxattr(target / "p", "system.posix_acl_access", FOREIGN["system.posix_acl_access"])
    result, _ = run_restore(repository, snapshot, source, target, overwrite="if-changed", verify=True)
    assert snapshot_of(target) == snapshot_of(source)
    assert (result.unchanged, result.verified, result.errors) == (3, 3, 0)
    changed = [os.stat(target / name).st_ctime_ns for name in "abp"]
    run_restore(repository, snapshot, source, target, overwrite="if-changed")
    assert changed == [os.stat(target / name).st_ctime_ns for name in "abp"]


@pytest.mark.parametrize("attribute", FOREIGN)
def test_verify_finds_attributes_that_the_snapshot_lacks(
    attribute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, snapshot, source = saved(tmp_path, {"a": File(b"1", mode=0o644), "d": Directory({}, mode=0o644)})
    target = tmp_path / "target"

    def add(_verifier: object) -> None:
        for name in "ad":
            os.setxattr(target / name, attribute, FOREIGN[attribute])
            os.utime(target / name, ns=(OLD_NS, OLD_NS))

    monkeypatch.setattr(restore_verify.Verifier, "sync", add)
    result, events = run_restore(repository, snapshot, source, target, verify=True)
    assert (result.verified, result.errors) == (0, 2)
    assert all(attribute in event.reason for event in events)  # type: ignore[union-attr]


def test_a_lost_link_is_made_again_when_only_changes_are_written(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {"a": File(BIG), "b": Hardlink("a"), "c": Hardlink("a")})
    run_restore(repository, snapshot, source, tmp_path / "target")
    os.unlink(tmp_path / "target" / "b")
    (tmp_path / "target" / "b").write_bytes(BIG)
    os.utime(tmp_path / "target" / "b", ns=(OLD_NS, OLD_NS))
    result, _ = run_restore(repository, snapshot, source, tmp_path / "target", overwrite="if-changed", verify=True)
    assert below(snapshot_of(tmp_path / "target")) == below(snapshot_of(source))
    assert (result.files, result.unchanged) == (1, 2)


OBSTACLES: dict[str, tuple[Tree, Tree]] = {
    "file for an empty directory": ({"x": File(BIG)}, {"x": {}}),
    "file for a symlink": ({"x": File(b"1")}, {"x": Symlink(b"/etc/passwd")}),
    "file for a fifo": ({"x": File(b"1")}, {"x": Special()}),
    "symlink for a file": ({"x": Symlink(b"y")}, {"x": File(b"1")}),
    "symlink for an empty directory": ({"x": Symlink(b"y")}, {"x": {}}),
    "directory for a file": ({"x": {"y": File(b"1")}}, {"x": File(b"1")}),
    "directory for a symlink to a directory": ({"x": {"y": File(b"1")}}, {"x": Symlink(b"z"), "z": {}}),
    "directory for a directory": ({"x": Directory({"y": File(b"1")}, mode=0o700)}, {"x": {"y": {}}}),
    "hardlinks over another order": ({"x": File(b"1"), "y": Hardlink("x")}, {"y": File(b"2"), "x": Hardlink("y")}),
}


@pytest.mark.parametrize(("tree", "there"), OBSTACLES.values(), ids=OBSTACLES.keys())
def test_what_stands_in_the_way_is_replaced(tree: Tree, there: Tree, tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, tree)
    target = build(there, tmp_path / "target")
    result, events = run_restore(repository, snapshot, source, target, delete=True, verify=True)
    assert below(snapshot_of(target)) == below(snapshot_of(source))
    assert (events, result.errors) == ([], 0)


@pytest.mark.parametrize(("tree", "there"), OBSTACLES.values(), ids=OBSTACLES.keys())
def test_nothing_that_stands_in_the_way_is_touched_with_never(tree: Tree, there: Tree, tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, tree)
    target = build(there, tmp_path / "target")
    before = snapshot_of(target)
    run_restore(repository, snapshot, source, target, overwrite="never", verify=True)
    after = snapshot_of(target)
    assert {path: after[path] for path in before if path} == below(before)


def test_a_full_directory_in_the_place_of_a_file_goes_only_with_delete(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {"x": File(b"1"), "y": File(b"2")})
    target = build({"x": {"mine": File(b"3")}}, tmp_path / "target")
    result, events = run_restore(repository, snapshot, source, target)
    assert events == [
        FileSkipped(target + b"/x", "a directory that is not empty stands in its place; --delete removes it")
    ]
    assert (result.errors, result.damaged, result.files) == (1, 0, 1)
    assert (tmp_path / "target" / "x" / "mine").exists()
    result, events = run_restore(repository, snapshot, source, target, delete=True)
    assert (events, result.files) == ([], 2)
    assert (tmp_path / "target" / "x").read_bytes() == b"1"


@pytest.mark.expected_log
@pytest.mark.parametrize("size", [3000, 300_000])
def test_a_directory_goes_only_when_the_file_for_its_place_is_whole(size: int, tmp_path: Path) -> None:
    tree: Tree = {"x": File(noise(size)), "y": Hardlink("x"), "z": File(b"1")}
    repository, snapshot, source = saved(tmp_path, tree)
    there: Tree = {name: {"mine": File(b"3"), "d": {"e": File(b"4")}} for name in "xyz"}
    target = build(there, tmp_path / "target")
    before = snapshot_of(target)
    good = {key: repository.store.get(key) for key in data_packs(repository)}
    for key, data in good.items():
        repository.store.put(key, data[:40] + bytes(len(data) - 40))
    result, _ = run_restore(reopened(repository), snapshot, source, target, delete=True)
    after = snapshot_of(target)
    assert (result.errors, result.files, result.deleted) == (2, 1, 4)
    assert {path: entry for path, entry in after.items() if path[:1] in (b"x", b"y")} == {
        path: entry for path, entry in before.items() if path[:1] in (b"x", b"y")
    }
    assert after[b"z"] == snapshot_of(source)[b"z"]
    for key, data in good.items():
        repository.store.put(key, data)
    result, events = run_restore(reopened(repository), snapshot, source, target, delete=True, verify=True)
    assert (result.errors, result.files, result.deleted, result.verified, events) == (0, 3, 8, 3, [])
    assert below(snapshot_of(target)) == below(snapshot_of(source))
    assert temporaries(target) == []


def test_a_file_stays_where_the_directory_for_its_place_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, snapshot, source = saved(tmp_path, {"x": {"y": File(b"1")}})
    target = build({"x": File(b"2")}, tmp_path / "target")

    def failing(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EMLINK, "Too many links")

    monkeypatch.setattr(os, "mkdir", failing)
    _, events = run_restore(repository, snapshot, source, target)
    assert events == [FileSkipped(target + b"/x", "Too many links")]
    assert os.listdir(target) == [b"x"]
    assert (tmp_path / "target" / "x").read_bytes() == b"2"


@pytest.mark.parametrize("overwrite", ["always", "never"])
@pytest.mark.parametrize("delete", [False, True])
def test_a_dry_run_says_what_the_real_run_does_about_what_stands_in_the_way(
    delete: bool, overwrite: str, tmp_path: Path
) -> None:
    tree: dict[str, Entry] = {
        "big": File(BIG), "chunk": File(b"1" * 600), "empty": File(b"1"), "inline": File(b"1"), "kept": File(b"1"),
        "link": Symlink(b"x"), "other": Hardlink("chunk"), "over a file": {"x": File(b"1")}, "pipe": Special(),
        "same": File(b"1"),
    }  # fmt: skip
    repository, snapshot, source = saved(tmp_path, tree)
    there: dict[str, Entry] = {
        **{name: {"mine": File(b"3"), "d": {"e": File(b"4")}} for name in tree},
        "empty": {}, "kept": {"x.log": File(b"1"), "y": File(b"2")}, "over a file": File(b"2"), "same": File(b"3"),
        "strange": {"x": File(b"1"), "x.log": File(b"1")},
    }  # fmt: skip
    target = build(there, tmp_path / "target")
    before = snapshot_of(target)
    told = []
    for dry_run in (True, False):
        assert snapshot_of(target) == before
        events: list[Event] = []
        options = RestoreOptions(
            delete=delete, dry_run=dry_run, overwrite=overwrite, exclude=(parse_pattern(b"*.log"),)
        )
        result = trio.run(restore, repository, snapshot, source, target, options, events.append)
        told.append(
            (
                sorted(event.path for event in events if isinstance(event, Deleted)),
                sorted((event.path, event.reason) for event in events if isinstance(event, FileSkipped)),
                (result.files, result.directories, result.size, result.unchanged, result.deleted, result.errors),
            )
        )
    assert told[0] == told[1]
    if overwrite == "always":
        assert len(told[0][0]) == (7 if delete else 0)
        assert result.deleted == (6 * 4 + 1 if delete else 0)
        assert result.errors == (1 if delete else 7)
        # Nothing of what stays goes.
        assert {path for path in snapshot_of(target) if path[:4] == b"kept"} == {b"kept", b"kept/x.log", b"kept/y"}
        assert temporaries(target) == []


def test_delete_removes_what_the_snapshot_lacks_and_nothing_else(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {"d": {"a": File(b"1")}, "e": {"b": File(b"2")}})
    outside = build({"precious": File(b"!")}, tmp_path / "outside")
    target = build(
        {
            "d": {
                "old": File(b"x"),
                "deep": {"er": {"x": File(b"y")}},
                "link": Symlink(outside),
                "cache": {"k": File(b"1")},
            },
            "gone": {"x": File(b"y"), "cache": {"k": File(b"1")}},
            "kept.log": File(b"z"),
        },
        tmp_path / "target",
    )
    options = {"delete": True, "exclude": (parse_pattern(b"*.log"), parse_pattern(b"/d/cache"))}
    planned, _ = run_restore(repository, snapshot, source, target, **options, dry_run=True)
    assert planned.deleted == 9
    assert (tmp_path / "target" / "gone" / "x").exists()
    result, events = run_restore(repository, snapshot, source, target, **options)
    assert set(below(snapshot_of(target))) == {b"d", b"d/a", b"d/cache", b"d/cache/k", b"e", b"e/b", b"kept.log"}
    assert (events, result.deleted) == ([], 9)
    assert (tmp_path / "outside" / "precious").exists()


def test_what_is_deleted_is_named_and_in_a_dry_run_too(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {"a": File(b"1")})
    target = build({"old": {"x": File(b"1"), "y": File(b"2")}, "z": File(b"3")}, tmp_path / "target")
    for dry_run in (True, False):
        events: list[Event] = []
        options = RestoreOptions(delete=True, dry_run=dry_run)
        result = trio.run(restore, repository, snapshot, source, target, options, events.append)
        assert [event for event in events if isinstance(event, Deleted)] == [
            Deleted(target + b"/old", dry_run),
            Deleted(target + b"/z", dry_run),
        ]
        assert result.deleted == 4
        assert os.path.exists(target + b"/z") == dry_run


def test_delete_leaves_directories_alone_that_were_only_on_the_way(tmp_path: Path) -> None:
    """What is beside a source was never backed up: `restore latest:/ /` must not take it away."""
    source = build({"a": File(b"1")}, tmp_path / "above" / "s")
    snapshot = back_up(repository := new_repository(), source)
    other = {"etc": {"passwd": File(b"2")}, "above": {"beside": File(b"3"), "s": {"late": File(b"4")}}}
    target = build(other, tmp_path / "target")
    within = os.fsencode(tmp_path)
    result, events = run_restore(repository, snapshot, within, target, delete=True)
    assert sorted(os.listdir(target)) == [b"above", b"etc"]
    assert os.listdir(target + b"/above") == [b"beside", b"s"] or sorted(os.listdir(target + b"/above")) == [
        b"beside",
        b"s",
    ]
    assert os.listdir(target + b"/above/s") == [b"a"]
    assert (result.deleted, events) == (1, [])
    result, _ = run_restore(repository, snapshot, "/", target, delete=True)
    assert result.deleted == 0
    assert os.listdir(target + b"/etc") == [b"passwd"]


@as_root
def test_delete_leaves_alone_what_a_backup_left_out_or_could_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`backup / -x` and then `restore latest:/ / --delete` emptied every other file system of the machine."""
    source = build(
        {
            "disk": {},
            "full": {"a": File(b"1"), "big.o": File(noise(3000))},
            "large": {"a": File(b"1"), "big": File(noise(3000))},
            "marked": {"CACHE": File(b""), "x": File(b"1")},
            "secret": {"x": File(b"1")},
            "some": {"a": File(b"1"), "locked": File(b"2"), "d": {"b": File(b"3")}},
        },
        tmp_path / "source",
    )

    def refuse(opened: Callable[[bytes, int | None], int], name: bytes, dir_fd: int | None) -> int:
        if name in (b"locked", b"secret"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(name, dir_fd)

    repository = new_repository()
    rules = SelectionRules((parse_pattern(b"*.o"),), if_present=(b"CACHE",), larger_than=2000, one_file_system=True)
    if subprocess.run(["mount", "-t", "tmpfs", "none", source + b"/disk"], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (tmp_path / "source" / "disk" / "precious").write_bytes(b"!")
        before = snapshot_of(source).keys() - {b"full/big.o"}
        with monkeypatch.context() as patch:
            for name in ("open_file", "open_directory"):
                patch.setattr(reading, name, partial(refuse, getattr(reading, name)))
            snapshots = [back_up(repository, source, rules=rules) for _ in range(2)]
        assert snapshots[1].root == snapshots[0].root
        for snapshot in snapshots:
            for late in ("late", "full/big.o", "some/d/late"):
                (tmp_path / "source" / late).write_bytes(b"1")
            planned, _ = run_restore(repository, snapshot, source, source, delete=True, dry_run=True)
            result, events = run_restore(repository, snapshot, source, source, delete=True)
            assert (planned.deleted, result.deleted) == (3, 3)
            assert [os.fsencode(str(event)).count(source) for event in events] == [5]
            assert snapshot_of(source).keys() == before
            run_restore(repository, snapshot, source + b"/disk", source + b"/disk", delete=True)
            assert os.listdir(source + b"/disk") == [b"precious"]
    finally:
        subprocess.run(["umount", source + b"/disk"], check=True)


def test_delete_of_one_subdirectory_leaves_the_rest_of_the_target(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {"d": {"a": File(b"1")}})
    build({"x": File(b"1"), "d": {"x": File(b"1")}}, tmp_path / "target")
    run_restore(repository, snapshot, source + b"/d", tmp_path / "target" / "d", delete=True)
    assert set(snapshot_of(tmp_path / "target")) == {b"", b"x", b"d", b"d/a"}


def test_delete_never_removes_the_repository(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {"a": File(b"1")})
    target = build({"srv": {"repo": {"config": File(b"!")}, "x": File(b"1")}}, tmp_path / "target")
    run_restore(repository, snapshot, source, target, delete=True, own_folders=(target + b"/srv/repo",))
    assert set(snapshot_of(target)) == {b"", b"a", b"srv", b"srv/repo", b"srv/repo/config"}


@as_root
def test_delete_stops_at_another_file_system(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {"a": File(b"1")})
    target = build({"gone": {"disk": {}, "x": File(b"1")}}, tmp_path / "target")
    if subprocess.run(["mount", "-t", "tmpfs", "none", target + b"/gone/disk"], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (tmp_path / "target" / "gone" / "disk" / "precious").touch()
        planned, skipped = run_restore(repository, snapshot, source, target, delete=True, dry_run=True)
        result, events = run_restore(repository, snapshot, source, target, delete=True)
        assert (tmp_path / "target" / "gone" / "disk" / "precious").exists()
        assert [type(event) for event in events] == [FileSkipped]
        assert (planned.deleted, skipped, os.listdir(target + b"/gone")) == (result.deleted, events, [b"disk"])
    finally:
        subprocess.run(["umount", target + b"/gone/disk"], check=True)


def test_exclude_and_include(tmp_path: Path) -> None:
    repository, snapshot, source = saved(
        tmp_path,
        {
            "a.c": File(b"1"),
            "d": {"b.c": File(b"2"), "b.o": File(b"3"), "e": {"f": {"c.o": File(b"4")}}},
            "n": {"x": {}},
        },
    )
    run_restore(repository, snapshot, source, tmp_path / "no-o", exclude=(parse_pattern(b"*.o"), parse_pattern(b"/n")))
    assert set(below(snapshot_of(tmp_path / "no-o"))) == {b"a.c", b"d", b"d/b.c", b"d/e", b"d/e/f"}
    result, _ = run_restore(repository, snapshot, source, tmp_path / "o", include=(parse_pattern(b"*.o"),), verify=True)
    # No directory is made for nothing.
    assert set(below(snapshot_of(tmp_path / "o"))) == {b"d", b"d/b.o", b"d/e", b"d/e/f", b"d/e/f/c.o"}
    assert (result.files, result.verified) == (2, 5)
    assert os.stat(tmp_path / "o" / "d" / "e" / "f").st_mtime_ns == OLD_NS
    run_restore(repository, snapshot, source, tmp_path / "e", include=(parse_pattern(b"/d/e"),))
    assert set(below(snapshot_of(tmp_path / "e"))) == {b"d", b"d/e", b"d/e/f", b"d/e/f/c.o"}


@pytest.mark.parametrize("include", [b"/d/e", b"*.c", b"/d"])
def test_verify_knows_what_was_not_entered(include: bytes, tmp_path: Path) -> None:
    tree: Tree = {
        "d": {"a.c": File(b"1"), "e": {"b.c": File(b"2")}, "f": {"c.c": File(b"3")}},
        "z": {"z.c": File(b"4")},
    }
    repository, snapshot, source = saved(tmp_path, tree)
    target = build({"d": File(b"in the way")}, tmp_path / "target")
    patterns = (parse_pattern(include), parse_pattern(b"/z"))
    result, events = run_restore(repository, snapshot, source, target, include=patterns, overwrite="never", verify=True)
    assert [event.path for event in events] == [target + b"/d"]
    assert (result.files, result.verified, result.errors) == (1, 2, 1)


def test_delete_touches_only_what_is_included(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {"d": {"a.c": File(b"1"), "b": File(b"1")}})
    target = build({"d": {"old.c": File(b"x"), "mine": File(b"x"), "e": {"z.c": File(b"x")}}}, tmp_path / "target")
    run_restore(repository, snapshot, source, target, delete=True, include=(parse_pattern(b"*.c"),))
    assert set(below(snapshot_of(target))) == {b"d", b"d/a.c", b"d/mine", b"d/e", b"d/e/z.c"}


def holds(pattern: bytes, path: bytes, is_directory: bool) -> bool:
    """Tell whether a path, or a directory that it is in, fits one of the patterns of the test below."""
    parts = path.split(b"/")
    for end in range(1, len(parts) + 1):
        above, name, inner = b"/".join(parts[:end]), parts[end - 1], end < len(parts) or is_directory
        if (
            pattern in (b"*", b"/" + above, name)
            or (pattern[:1] == b"*" and name.endswith(pattern[1:]))
            or (pattern[-1:] == b"/" and inner and name == pattern[:-1])
        ):
            return True
    return False


@pytest.mark.parametrize("overwrite", ["always", "if-changed", "if-newer", "never"])
def test_delete_with_include_deletes_what_fits_and_is_not_in_the_snapshot_and_nothing_else(
    overwrite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What was seen of a directory on an earlier page counts, too.
    monkeypatch.setattr(tree_module, "LEAST_PAGE", 1 << 10)
    monkeypatch.setattr(tree_module, "MOST_PAGE", 4 << 10)
    many: dict[str, Entry] = {f"{number:04}.txt": File(noise(number % 700, number)) for number in range(120)}
    tree: dict[str, Entry] = {
        "a.txt": File(b"1"),
        "only bin": {"b.bin": File(b"2"), "deep": {"c.bin": File(b"3")}},
        "sub": {
            "a.txt": File(b"4"), "b.bin": File(b"5"), "many": dict(many), "z": {"a.txt": File(BIG), "x": {}},
            "z.bin": {"of a directory": File(b"1")},
        },
    }  # fmt: skip
    repository, snapshot, source = saved(tmp_path, tree)
    many_node = find_path(snapshot, source + b"/sub/many", repository.trees.load)
    assert len(list(leaf_pages(tree_of(many_node), repository.trees.load))) > 1
    wanted = snapshot_of(source)
    for pattern in (
        b"*", b"*.txt", b"*.bin", b"/sub/a.txt", b"a.txt", b"many", b"/sub/many", b"many/", b"0119.txt", b"z", b"z.bin",
        b"x", b"deep", b"/only bin/deep", b"old.txt", b"nothing", b"gone.txt",
    ):  # fmt: skip
        target = tmp_path / "target"
        run_restore(repository, snapshot, source, target)
        for folder in ("", "sub", "sub/many", "sub/z/x", "only bin", "only bin/deep", "sub/z.bin"):
            build({"old.txt": File(b"x"), "old.bin": File(b"x")}, target / folder / "mine")
            for name in ("old.txt", "0119a.txt", "z.old.bin"):
                (target / folder / name).write_bytes(b"x")
            build({"a": File(b"x")}, target / folder / "gone.txt")
        (target / "sub" / "a.txt").write_bytes(b"mine")
        before = snapshot_of(target)

        def goes(path: bytes, before: dict[bytes, object] = before, pattern: bytes = pattern) -> bool:
            parts = path.split(b"/")
            # Something strange goes with all that is in it, or stays so.
            strange = next(
                (b"/".join(parts[:end]) for end in range(1, len(parts) + 1) if b"/".join(parts[:end]) not in wanted),
                b"",
            )
            return bool(strange) and holds(pattern, strange, before[strange].kind == "directory")  # type: ignore[attr-defined]

        expected = {path for path in before if not goes(path)}
        options = {"include": (parse_pattern(pattern),), "delete": True, "overwrite": overwrite}
        planned, _ = run_restore(repository, snapshot, source, target, **options, dry_run=True)
        result, events = run_restore(repository, snapshot, source, target, **options)
        after = snapshot_of(target)
        assert (pattern, set(after) ^ expected, events) == (pattern, set(), [])
        assert (planned.deleted, result.deleted) == (len(before) - len(expected),) * 2
        for path, entry in after.items():
            if entry.kind != "directory" and not (
                overwrite == "always" and path in wanted and holds(pattern, path, False)
            ):
                assert entry == before[path] or (path == b"sub/a.txt" and holds(pattern, path, False))
        subprocess.run(["rm", "-rf", target], check=True)


def test_a_dry_run_counts_and_touches_nothing(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, TOGETHER)
    real, _ = run_restore(repository, snapshot, source, tmp_path / "real")
    result, events = run_restore(repository, snapshot, source, tmp_path / "target", dry_run=True, verify=True)
    assert not (tmp_path / "target").exists()
    assert (result.files, result.directories, events) == (real.files, real.directories, [])
    before = snapshot_of(tmp_path / "real")
    result, _ = run_restore(
        repository, snapshot, source, tmp_path / "real", dry_run=True, delete=True, exclude=(parse_pattern(b"nothing"),)
    )
    assert snapshot_of(tmp_path / "real") == before
    assert (result.files, result.directories, result.deleted) == (real.files, 0, 0)


# Owners.


@as_root
def test_owners_go_by_name_where_this_machine_has_the_name(tmp_path: Path) -> None:
    source = build({"a": File(b"1", owner=(65534, 65534)), "b": File(b"1", owner=(4242, 4242))}, tmp_path / "source")
    repository = new_repository()
    with pytest.MonkeyPatch.context() as patch:
        # As if the other machine numbered its users differently.
        from backupfs.localfs import reading

        names = {4242: b"daemon", 65534: b"nobody elsewhere"}
        patch.setattr(reading, "owner_name", lambda uid: names.get(uid, b""))
        patch.setattr(reading, "group_name", lambda gid: names.get(gid, b""))
        snapshot = back_up(repository, source)
    run_restore(repository, snapshot, source, tmp_path / "named", verify=True)
    run_restore(repository, snapshot, source, tmp_path / "numbered", owner="number", verify=True)
    assert [os.stat(tmp_path / "named" / name).st_uid for name in "ab"] == [65534, 1]
    assert [os.stat(tmp_path / "numbered" / name).st_uid for name in "ab"] == [65534, 4242]


AS_USER = """
import os, sys
sys.path.insert(0, {checkout!r})
import trio
from pathlib import Path
from backupfs.stores.opening import open_store
from backupfs.usecases.restore import RestoreOptions, restore
from backupfs.usecases.events import Progress
from backupfs.snapshots.listing import load_snapshots
from tests.builders import reopened, NOWHERE
repository = reopened(open_store({store!r}), NOWHERE)
snapshot = load_snapshots(repository).find("latest")
os.setgroups([54322]); os.setgid(54321); os.setuid(54321)
result = trio.run(restore, repository, snapshot, {source!r}, {target!r}, RestoreOptions(**{options!r}),
    lambda event: None if isinstance(event, Progress) else print(repr(event)))
print(result.files, result.errors, result.verified, result.deleted)
"""


class OfUser:
    """A backup in a folder that an ordinary user may read, and a target that is the user's."""

    def __init__(self, folder: Path, tree: Tree) -> None:
        self.source = build(tree, folder / "source")
        self._store = folder / "store"
        store = DirectoryStore(self._store)
        store.create()
        back_up(new_repository(store), self.source)
        subprocess.run(["chmod", "-R", "a+rwX", self._store], check=True)
        (folder / "target").mkdir()
        self.target = os.fsencode(folder / "target")
        os.chown(self.target, 54321, 54321)

    def own(self) -> None:
        """Give everything in the target to the user."""
        subprocess.run(["chown", "-hR", "54321:54321", self.target], check=True)

    def restore(self, **options: object) -> list[str]:
        """Restore as the user; return the events, and the counts as the last line."""
        script = AS_USER.format(
            checkout=str(Path(__file__).parents[2]), store=str(self._store), source=self.source, target=self.target,
            options=options,
        )  # fmt: skip
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    # pytest keeps its own folders to the user who runs it.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@as_root
def test_a_user_gets_what_a_user_may_have(open_folder: Path) -> None:
    tree = {
        "a": File(b"1", owner=(1, 1), mode=0o6755),
        "b": File(BIG, mode=0o400, xattrs={"user.a": b"1"}),
        "c": Special(stat.S_IFCHR, device=(1, 3)),
        "d": Directory({"x": File(BIG)}, mode=0o555),
        "e": Directory({"x": File(b"1"), "y": Hardlink("e/x")}, mode=0o000),
        "p": Special(),
        "s": File(b"1", xattrs={"trusted.x": b"1", "user.y": b"2"}),
    }
    of_user = OfUser(open_folder, tree)
    target = of_user.target
    lines = of_user.restore(verify=True)
    assert lines[-1].split()[:2] == ["7", "2"]
    assert repr(FileSkipped(target + b"/c", "only root can make a device file")) in lines
    assert (
        repr(FileSkipped(target + b"/s", "its attribute trusted.x could not be set: Operation not permitted")) in lines
    )
    assert [line for line in lines if "Remark(" in line] == [
        "Remark(text='3 entries were not verified: their modes keep this user from reading them')",
        "Remark(text='only root can give files to their owners: they belong to the user who restored them')",
    ]
    seen = snapshot_of(target)
    # A program must not run as a user it was not meant for.
    assert (seen[b"a"].mode, seen[b"a"].owner) == (0o755, (54321, 54321))
    assert seen[b"b"].xattrs == ((b"user.a", b"1"),)
    assert seen[b"e/x"].links == (b"e/x", b"e/y")
    assert [seen[name].mode for name in (b"b", b"d", b"e")] == [0o400, 0o555, 0]


@as_root
@pytest.mark.parametrize("overwrite", ["always", "if-changed"])
def test_a_user_gives_files_to_the_groups_that_he_is_in(overwrite: str, open_folder: Path) -> None:
    his = {
        "a": File(b"1", owner=(54321, 54322), mode=0o2640),
        "b": File(BIG, owner=(54321, 54322), mode=0o400),
        "c": File(noise(2000), owner=(54321, 54322)),
        "d": File(b"2", owner=(54321, 54321)),
    }
    of_user = OfUser(open_folder, his)
    os.chown(of_user.target, 54321, 54322)
    os.chmod(of_user.target, 0o2775)
    for again in (False, True):
        lines = of_user.restore(overwrite=overwrite, verify=True)
        assert lines == ["0 0 4 0" if again and overwrite == "if-changed" else "4 0 4 0"]
        assert below(snapshot_of(of_user.target)) == below(snapshot_of(of_user.source))
        for name in (b"/a", b"/b"):
            os.chown(of_user.target + name, 54321, 54321)


@as_root
def test_a_user_keeps_the_group_where_he_is_not_in_that_of_the_snapshot(open_folder: Path) -> None:
    of_user = OfUser(open_folder, {"a": File(b"1", owner=(54321, 7), mode=0o2640)})
    lines = of_user.restore()
    assert [line.split("(")[0] for line in lines] == ["Remark", "1 0 0 0"]
    assert snapshot_of(of_user.target)[b"a"].owner == (54321, 54321)
    assert snapshot_of(of_user.target)[b"a"].mode == 0o640


@as_root
@pytest.mark.parametrize("overwrite", ["always", "if-changed", "never"])
def test_a_user_restores_over_folders_of_his_own_that_keep_him_out(overwrite: str, open_folder: Path) -> None:
    files: dict[str, Entry] = {"new": File(BIG), "same": File(b"1"), "other": File(b"2" * 600)}
    tree: Tree = {
        "ro": Directory({**files, "deep": Directory(dict(files), mode=0o500)}, mode=0o555),
        "none": Directory(dict(files), mode=0o000),
        "open": Directory(dict(files), mode=0o755),
    }
    there: dict[str, Entry] = {"same": File(b"1"), "other": File(b"x")}
    of_user = OfUser(open_folder, tree)
    strange = Directory({"x": File(b"1")}, mode=0o111)
    deep = Directory({**there, "strange": strange}, mode=0o000)
    build(
        {
            "ro": Directory({**there, "deep": deep}, mode=0o555),
            "none": Directory(dict(there), mode=0o000),
            "open": Directory(dict(there), mode=0o411),
        },
        of_user.target,
    )
    of_user.own()
    os.chmod(of_user.target, 0o555)
    before = snapshot_of(of_user.target)
    planned = of_user.restore(overwrite=overwrite, delete=True, dry_run=True)
    assert snapshot_of(of_user.target) == before
    lines = of_user.restore(overwrite=overwrite, delete=True)
    assert planned[-1].split()[1] == lines[-1].split()[1] == "0"
    seen, wanted = snapshot_of(of_user.target), snapshot_of(of_user.source)
    assert stat.S_IMODE(os.stat(of_user.target).st_mode) == 0o555
    assert below(seen).keys() == below(wanted).keys()
    for path in below(seen):
        kept = before if overwrite == "never" and path in before else wanted
        assert (path, seen[path].mode) == (path, kept[path].mode)
        assert seen[path].content == kept[path].content


@as_root
def test_a_user_is_told_of_folders_that_are_not_his_in_a_dry_run_too(open_folder: Path) -> None:
    tree: Tree = {
        "d": {"a": File(b"1"), "b": {"c": File(BIG)}, "l": Symlink(b"x")},
        "n": Special(stat.S_IFCHR, device=(1, 3)),
    }
    of_user = OfUser(open_folder, tree)
    build({"d": {"mine": File(b"1"), "strange": {"x": File(b"1")}}}, of_user.target)
    for delete in (False, True):
        planned = of_user.restore(delete=delete, dry_run=True)
        real = of_user.restore(delete=delete)
        assert sorted(planned[:-1]) == sorted(line for line in real[:-1] if "Remark" not in line)
        assert planned[-1] == real[-1]
        assert planned[-1].split()[1] == ("7" if delete else "5")


@as_root
def test_a_new_target_that_keeps_its_owner_out_has_no_lock_left(open_folder: Path) -> None:
    of_user = OfUser(open_folder, {"a": File(b"1")})
    os.chmod(of_user.source, 0o555)
    store = DirectoryStore(open_folder / "store")
    back_up(reopened(store), of_user.source)
    subprocess.run(["chmod", "-R", "a+rwX", open_folder / "store"], check=True)
    of_user.target += b"/new"
    of_user.restore()
    assert os.listdir(of_user.target) == [b"a"]
    assert stat.S_IMODE(os.stat(of_user.target).st_mode) == 0o555


@as_root
def test_a_user_gets_the_modes_of_unchanged_files_that_cannot_be_read_there(open_folder: Path) -> None:
    tree: Tree = {
        "a": File(b"1", mode=0o644),
        "b": File(BIG, mode=0o400, xattrs={"user.a": b"1"}),
        "c": File(b"2", mode=0o000, xattrs={"user.a": b"1"}),
        "d": File(b"2", mode=0o444),
    }
    of_user = OfUser(open_folder, tree)
    build(
        {
            "a": File(b"1", mode=0o000, xattrs={"user.mine": b"1"}),
            "b": File(BIG, mode=0o000, xattrs={"user.a": b"2"}),
            "c": File(b"2", mode=0o000, xattrs={"user.mine": b"2"}),
            "d": File(b"2", mode=0o444, xattrs={"user.mine": b"2"}),
        },
        of_user.target,
    )
    of_user.own()
    of_user.restore(overwrite="if-changed", verify=True)
    seen, wanted = snapshot_of(of_user.target), snapshot_of(of_user.source)
    assert [(seen[name].mode, seen[name].xattrs) for name in (b"a", b"b", b"c", b"d")] == [
        (wanted[name].mode, wanted[name].xattrs) for name in (b"a", b"b", b"c", b"d")
    ]


# Hostile things.


def test_no_symlink_in_the_target_leads_outside(tmp_path: Path) -> None:
    tree: Tree = {"d": {"e": {"f": File(b"1"), "g": File(BIG)}}, "x": File(b"2"), "y": Symlink(b"z"), "p": Special()}
    repository, snapshot, source = saved(tmp_path, tree)
    outside = build({"e": {"f": File(b"precious"), "other": File(b"1")}, "x": File(b"precious")}, tmp_path / "outside")
    before = snapshot_of(outside)
    for there in (
        {"d": Symlink(outside)},
        {"d": {"e": Symlink(outside + b"/e")}},
        {"d": {"e": {"f": Symlink(outside + b"/e/f"), "g": Symlink(outside + b"/new")}}},
        {"x": Symlink(outside + b"/x"), "y": Symlink(outside), "p": Symlink(outside + b"/x")},
    ):
        for overwrite in ("never", "if-newer", "if-changed", "always"):
            target = build(there, tmp_path / "target")
            run_restore(repository, snapshot, source, target, overwrite=overwrite, delete=True, verify=True)
            assert snapshot_of(outside) == before
            assert overwrite != "always" or below(snapshot_of(target)) == below(snapshot_of(source))
            subprocess.run(["rm", "-rf", target], check=True)


@pytest.mark.parametrize("name", [b"../outside", b"..", b".", b"a/b", b"/etc/x"])
def test_no_name_of_a_hostile_snapshot_leads_outside(name: bytes, tmp_path: Path) -> None:
    repository = new_repository()
    (tmp_path / "top").mkdir()
    for mode, content in (
        (stat.S_IFREG | 0o644, b"\x03evil"),
        (stat.S_IFDIR | 0o755, None),
        (stat.S_IFLNK | 0o777, b"/etc"),
    ):
        snapshot = forged(repository, [(name, mode, content)])
        result, events = run_restore(repository, snapshot, "/", tmp_path / "top" / "target")
        assert (result.errors, [type(event) for event in events]) == (1, [FileSkipped])
        assert os.listdir(tmp_path / "top" / "target") == []
        assert os.listdir(tmp_path / "top") == ["target"]


def test_a_name_given_twice_in_a_hostile_snapshot_leads_nowhere(tmp_path: Path) -> None:
    repository = new_repository()
    outside = build({}, tmp_path / "outside")
    inner = forged(repository, [(b"evil", stat.S_IFREG | 0o644, b"\x03evil")]).root
    snapshot = forged(repository, [(b"d", stat.S_IFLNK | 0o777, outside), (b"d", stat.S_IFDIR | 0o755, inner)])
    result, _events = run_restore(repository, snapshot, "/", tmp_path / "target")
    assert (result.errors, os.listdir(outside)) == (1, [])


async def filed(repository: Repository, kind: Kind, chunk_id: ChunkId, data: bytes) -> ChunkId:
    """Store bytes under an id, whether it is theirs or not."""
    index = repository.data_index if kind == Kind.DATA_PACK else repository.tree_index
    writer = PackWriter(repository.store, repository.keyring, index, kind, b"h" * 16, DEFAULT_LEVEL)
    if not index.has(chunk_id):
        await writer.add(Block((chunk_id,), (len(data),), (data,)))
    await writer.flush()
    return chunk_id


def forged(repository: Repository, entries: list[tuple[bytes, int, bytes | None]], size: int | None = None) -> Snapshot:
    """Return a snapshot that no backup would make."""

    def page(names: list[bytes], rows: bytes, contents: list[bytes]) -> ChunkId:
        data = encode_record([0, b"\0".join(names), rows, contents, b"", [], [], [], []])
        return trio.run(filed, repository, Kind.TREE_PACK, repository.trees.chunk_id(data), data)

    empty = page([], b"", [])
    sizes = [len(content) - 1 if content and content[:1] == b"\3" else size or 0 for _, _, content in entries]
    rows = [
        STAT_ROW.pack(mode, 0, 0, 1, 9, length, 1, 0, 1, 0) for (_, mode, _), length in zip(entries, sizes, strict=True)
    ]
    contents = [empty if content is None else content for _, _, content in entries]
    root = page([name for name, _, _ in entries], b"".join(rows), contents)
    return Snapshot(0, b"h" * 16, "host", 1, b"", 1, 1, (b"/",), (), b"", root, Statistics())


@pytest.mark.expected_log
@pytest.mark.parametrize("size", [1000, 100_000])
def test_bytes_filed_under_a_wrong_id_are_never_written(size: int, tmp_path: Path) -> None:
    repository = new_repository()
    wrong = ChunkId(noise(32))
    trio.run(filed, repository, Kind.DATA_PACK, wrong, noise(size))
    snapshot = forged(repository, [(b"a", stat.S_IFREG | 0o644, b"\x01" + wrong)], size)
    result, events = run_restore(repository, snapshot, "/", tmp_path / "target")
    assert os.listdir(tmp_path / "target") == []
    assert (result.damaged, result.errors, len(events)) == (1, 1, 1)


@pytest.mark.parametrize("claimed", [999, 1001, 100_000])
def test_a_size_that_is_not_that_of_the_bytes_is_damage(claimed: int, tmp_path: Path) -> None:
    repository = new_repository()
    data = noise(1000)
    chunk_id = trio.run(filed, repository, Kind.DATA_PACK, repository.data.chunk_id(data), data)
    snapshot = forged(repository, [(b"a", stat.S_IFREG | 0o644, b"\x01" + chunk_id)], claimed)
    result, _ = run_restore(repository, snapshot, "/", tmp_path / "target")
    assert os.listdir(tmp_path / "target") == []
    assert result.errors == 1


# Damage.


def data_packs(repository: Repository) -> list[str]:
    return [info.key for info in repository.store.list("packs/data/")]


@pytest.mark.expected_log
def test_damage_costs_the_files_it_hits_and_no_other(tmp_path: Path) -> None:
    tree = {f"f{number:03}": File(noise(3000 + 100 * number, number)) for number in range(60)}
    tree["links"] = {"f": Hardlink("f010")}
    repository, snapshot, source = saved(tmp_path, tree)
    packs = data_packs(repository)
    assert len(packs) > 3
    victim = max(packs, key=repository.store.size)
    for change in ("flip", "cut", "delete"):
        data = bytearray(repository.store.get(victim))
        if change == "flip":
            for at in range(100, len(data) - 3000, 2000):
                data[at] ^= 1
            repository.store.put(victim, data)
        elif change == "cut":
            repository.store.put(victim, data[: len(data) // 2])
        else:
            repository.store.delete(victim)
        target = tmp_path / change
        result, events = run_restore(reopened(repository), snapshot, source, target, verify=True)
        there, wanted = below(snapshot_of(target)), below(snapshot_of(source))
        lost = {event.path for event in events}
        assert all(victim in event.reason for event in events)
        assert result.damaged == result.errors == len(lost) == len(events) > 0
        assert {os.fsencode(target) + b"/" + path for path in wanted.keys() - there.keys()} == lost
        assert result.verified == len(there)
        for path, entry in there.items():
            assert entry == wanted[path] or wanted[path].links
        assert temporaries(target) == []


@pytest.mark.expected_log
def test_another_copy_of_a_damaged_chunk_is_used(tmp_path: Path) -> None:
    source = build({"a": File(noise(100_000)), "b": File(noise(3000, 1))}, tmp_path / "source")
    repository = new_repository()
    back_up(repository, source)
    first = {info.key for info in repository.store.list("")}
    hidden = {key: repository.store.get(key) for key in first if key.startswith(("index/data", "packs/data"))}
    for key in hidden:
        repository.store.delete(key)
    snapshot = back_up(reopened(repository), source, force=True)
    for key, data in hidden.items():
        if key.startswith("packs/data"):
            mangled = bytearray(data)
            mangled[len(mangled) // 3] ^= 1
            data = bytes(mangled)
        repository.store.put(key, data)
    result, events = run_restore(reopened(repository), snapshot, source, tmp_path / "one", verify=True)
    assert (events, result.damaged) == ([], 0)
    # And the other way round: the newer copies are bad.
    for key in data_packs(repository):
        if key in hidden:
            repository.store.put(key, hidden[key])
        else:
            mangled = bytearray(repository.store.get(key))
            mangled[len(mangled) // 3] ^= 1
            repository.store.put(key, mangled)
    result, events = run_restore(reopened(repository), snapshot, source, tmp_path / "two", verify=True)
    assert (events, result.damaged) == ([], 0)
    assert snapshot_of(tmp_path / "one") == snapshot_of(tmp_path / "two") == snapshot_of(source)


@pytest.mark.expected_log
def test_a_lost_index_is_made_again(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {"a": File(BIG), "b": File(b"x" * 1000)})
    for info in list(repository.store.list("index/data/")):
        repository.store.delete(info.key)
    result, events = run_restore(reopened(repository), snapshot, source, tmp_path / "target")
    assert (events, result.errors) == ([], 0)
    assert snapshot_of(tmp_path / "target") == snapshot_of(source)


@pytest.mark.slow
@pytest.mark.expected_log
def test_a_garbled_cache_file_costs_no_file_wherever_it_is_garbled(tmp_path: Path) -> None:
    source = build({"a": File(noise(3000)), "b": File(noise(2000, 1))}, tmp_path / "source")
    store, folders = new_repository().store, folders_in(tmp_path)
    snapshot = back_up(reopened(store, folders), source)
    (file,) = (tmp_path / "cache").rglob("index-data/*.run")
    data, wanted = file.read_bytes(), snapshot_of(source)
    for at in range(0, len(data), 5):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        target = tmp_path / "targets" / str(at)
        result, events = run_restore(reopened(store, folders), snapshot, source, target)
        assert (events, result.errors) == ([], 0), at
        assert snapshot_of(target) == wanted


@pytest.mark.expected_log
def test_a_damaged_directory_is_named_and_nothing_in_it_deleted(tmp_path: Path) -> None:
    source = build({"d": {"a": File(b"1")}, "e": {"b": File(b"2")}}, tmp_path / "source")
    repository = new_repository()
    snapshot = back_up(repository, source)
    target = build({"d": {"mine": File(b"x")}, "e": {"old": File(b"x")}}, tmp_path / "target")
    tree = find_path(snapshot, source + b"/d", repository.trees.load).content
    fresh = reopened(repository)
    load = fresh.trees.load

    def failing(chunk_id: ChunkId) -> bytes | memoryview:
        if chunk_id == tree:
            from backupfs.errors import DamagedObject

            raise DamagedObject("the object packs/tree/… is damaged")
        return load(chunk_id)

    fresh.trees.load = failing  # type: ignore[method-assign]
    result, events = run_restore(fresh, snapshot, source, target, delete=True)
    assert events == [FileSkipped(target + b"/d", "the object packs/tree/… is damaged")]
    assert set(below(snapshot_of(target))) == {b"d", b"d/mine", b"e", b"e/b"}
    assert (result.errors, result.damaged) == (1, 1)


def test_verify_finds_what_the_target_did_not_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree: Tree = {
        "a": File(BIG), "b": File(b"1" * 600), "c": File(b"1"), "d": Directory({}, xattrs={"user.a": b"1"}),
        "h": Sparse(1 << 20, {0: b"1"}), "l": Symlink(b"x"), "m": File(b"2"), "t": File(b"2"), "g": File(b"2"),
    }  # fmt: skip
    repository, snapshot, source = saved(tmp_path, tree)
    target = tmp_path / "target"

    def break_all(_verifier: object) -> None:
        with open(target / "a", "r+b") as file:
            file.seek(150_000)
            file.write(b"\xff" if BIG[150_000] != 255 else b"\0")
        for name, content in ((("b", b"2" * 600)), ("c", b"2")):
            (target / name).write_bytes(content)
        with open(target / "h", "r+b") as file:
            file.seek(600_000)
            file.write(b"1")
        for name in "abch":
            os.utime(target / name, ns=(OLD_NS, OLD_NS))
        os.removexattr(target / "d", "user.a")
        os.unlink(target / "l")
        os.symlink("y", target / "l")
        os.utime(target / "l", ns=(OLD_NS, OLD_NS), follow_symlinks=False)
        os.chmod(target / "m", 0o600)
        os.utime(target / "t", ns=(1, 1))
        os.unlink(target / "g")

    monkeypatch.setattr(restore_verify.Verifier, "sync", break_all)
    result, events = run_restore(repository, snapshot, source, target, verify=True)
    assert sorted(event.path[-1:] for event in events) == [b"a", b"b", b"c", b"d", b"g", b"h", b"l", b"m", b"t"]
    assert (result.verified, result.errors, result.damaged) == (0, 9, 0)


@as_root
def test_verify_waits_for_the_file_systems_of_the_target_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, snapshot, source = saved(tmp_path, {"a": File(b"1"), "disk": {"b": File(BIG)}})
    target = build({"disk": {}}, tmp_path / "target")
    if subprocess.run(["mount", "-t", "tmpfs", "none", target + b"/disk"], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    written_out: list[int] = []
    monkeypatch.setattr(restore_verify, "write_out", lambda fd: written_out.append(os.fstat(fd).st_dev), raising=False)
    monkeypatch.delattr(os, "sync")
    try:
        result, events = run_restore(repository, snapshot, source, target, verify=True)
        assert (result.verified, events) == (3, [])
        assert written_out == [os.stat(target).st_dev, os.stat(target + b"/disk").st_dev]
    finally:
        subprocess.run(["umount", target + b"/disk"], check=True)


# The end of a run before its end.


@pytest.mark.parametrize("kind", ["file", "dangling link", "below a file"])
def test_a_target_that_is_no_directory_is_refused(kind: str, tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {"a": File(b"1")})
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    path = {"file": "file", "dangling link": "link", "below a file": "file/x"}[kind]
    with pytest.raises(SourceError, match="target"):
        run_restore(repository, snapshot, source, tmp_path / path)
    with pytest.raises(SourceError, match="target"):
        run_restore(repository, snapshot, source, tmp_path / path, dry_run=True)


@as_root
@pytest.mark.parametrize("place", ["/proc/x", "/sys/x/y", "read-only/x", "read-only"])
def test_a_target_that_nothing_can_be_made_in_is_refused_in_a_dry_run_too(place: str, tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {"a": File(b"1")})
    folder = tmp_path / "read-only"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", folder], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        said = []
        for dry_run in (True, False):
            with pytest.raises(SourceError, match="the target") as raised:
                run_restore(repository, snapshot, source, tmp_path / place, dry_run=dry_run)
            said.append(str(raised.value))
        assert said[0] == said[1]
    finally:
        subprocess.run(["umount", folder], check=True)


def test_an_unknown_path_is_named(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {"a": File(b"1")})
    with pytest.raises(PathNotFound, match="has no b"):
        run_restore(repository, snapshot, source + b"/b", tmp_path / "target")
    assert not (tmp_path / "target").exists()


@as_root
def test_a_full_disk_stops_the_run_with_one_message(tmp_path: Path) -> None:
    tree: dict[str, Entry] = {
        "a": File(BIG),
        "big": File(noise(3 << 20)),
        "b": {f"{n}": File(noise(3000, n)) for n in range(300)},
    }
    repository, snapshot, source = saved(tmp_path, tree)
    target = tmp_path / "target"
    target.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", target], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(SourceError, match="is full: make room"):
            run_restore(repository, snapshot, source, target)
        assert temporaries(target) == []
        subprocess.run(["mount", "-o", "remount,ro", target], check=True)
        with pytest.raises(SourceError, match="read-only"):
            run_restore(repository, snapshot, source, target)
    finally:
        subprocess.run(["umount", "--lazy", target], check=True)


def test_a_file_that_cannot_be_written_is_told_and_the_rest_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, snapshot, source = saved(
        tmp_path, {"a": File(b"1" * 600), "b": File(BIG), "c": File(b"2"), "d": File(BIG)}
    )
    real = writing.rename_to_free

    def failing(old: bytes, new: bytes, dir_fd: int) -> None:
        if new in (b"a", b"b"):
            raise OSError(errno.EIO, "Input/output error")
        real(old, new, dir_fd)

    monkeypatch.setattr(writing, "rename_to_free", failing)
    result, events = run_restore(repository, snapshot, source, tmp_path / "target")
    assert sorted(events, key=repr) == [
        FileSkipped(os.fsencode(tmp_path) + b"/target/" + name, "Input/output error") for name in (b"a", b"b")
    ]
    assert sorted(os.listdir(tmp_path / "target")) == ["c", "d"]
    assert (result.errors, result.damaged) == (2, 0)


@as_root
@pytest.mark.parametrize("large", [False, True])
def test_of_names_that_are_one_to_the_target_each_is_restored_or_told(large: bool, tmp_path: Path) -> None:
    """On FAT, exFAT and NTFS one of `a` and `A` replaced the other without a word, exit code 0."""
    one, other = (BIG, noise(300_001)) if large else (b"1", b"22")
    repository, snapshot, source = saved(
        tmp_path, {"a": File(one), "A": File(other), "b": File(b"3"), "l": Symlink(b"a"), "L": Symlink(b"bb")}
    )
    disk, target = tmp_path / "disk", tmp_path / "target"
    target.mkdir()
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    made = subprocess.run(["mkntfs", "-F", "-q", "-f", disk], capture_output=True, check=False) if NTFS else None
    if made is None or made.returncode or subprocess.run([NTFS, "-o", "ignore_case", disk, target]).returncode:
        pytest.skip("there is no file system here that takes two names for one")
    try:
        result, events = run_restore(repository, snapshot, source, target)
        there = {name.lower(): (target / name).read_bytes() for name in os.listdir(target) if name.lower() != "l"}
    finally:
        subprocess.run(["umount", target], check=True)
    told = sorted(os.path.basename(event.path) for event in events if isinstance(event, FileSkipped))
    assert told in ([b"A", b"L"], [b"A", b"l"], [b"L", b"a"], [b"a", b"l"])
    assert (result.files, result.errors) == (3, 2)
    assert there == {"a": one if b"A" in told else other, "b": b"3"}


def test_where_links_cannot_be_made_copies_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, snapshot, source = saved(
        tmp_path,
        {
            "a": File(BIG),
            "b": {"c": Hardlink("a")},
            "d": File(b"1"),
            "e": Hardlink("d"),
            "f": File(b"2" * 600),
            "g": Hardlink("f"),
        },
    )

    def failing(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", failing)
    result, events = run_restore(repository, snapshot, source, tmp_path / "target")
    wanted = {path: replace(entry, links=()) for path, entry in snapshot_of(source).items()}
    assert snapshot_of(tmp_path / "target") == wanted
    assert (events, result.files) == ([], 6)


@pytest.mark.parametrize("closed", [b"a", b"ab", b"b", b"abc"])
def test_a_name_that_cannot_be_made_does_not_take_the_other_names_of_its_file_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: bytes
) -> None:
    files = {
        "inline": File(b"1"),
        "single": File(noise(20_000, 1)),
        "large": File(BIG),
        "fifo": Special(),
        "link": Symlink(b"nowhere"),
    }
    names = {above: {name: Hardlink(f"a/{name}") for name in files} for above in ("b", "c")}
    repository, snapshot, source = saved(tmp_path, {"a": files, **names})

    def failing(makes: Callable[..., object]) -> Callable[..., object]:
        def wrapped(target: writing.Target, into: writing.Directory, *arguments: object) -> object:
            if into.name and into.name in closed:
                raise OSError(errno.EPERM, "Operation not permitted")
            return makes(target, into, *arguments)

        return wrapped

    for name in ("create", "write_file", "make_special"):
        monkeypatch.setattr(writing.Target, name, failing(getattr(writing.Target, name)))
    link = writing.Target.link

    def linked(
        target: writing.Target, first: writing.Directory, old: bytes, into: writing.Directory, *arguments: Any
    ) -> None:
        if into.name in closed:
            raise OSError(errno.EPERM, "Operation not permitted")
        link(target, first, old, into, *arguments)

    monkeypatch.setattr(writing.Target, "link", linked)
    result, events = run_restore(repository, snapshot, source, tmp_path / "target")
    told = [tmp_path / "target" / chr(above) / name for above in closed for name in files]
    assert sorted(events, key=str) == [FileSkipped(bytes(path), "Operation not permitted") for path in sorted(told)]
    assert (result.errors, result.damaged, result.files) == (len(told), 0, 15 - len(told))
    seen, wanted = snapshot_of(tmp_path / "target"), snapshot_of(source)
    for path, entry in wanted.items():
        if path[:1] in closed and path[1:2] == b"/":
            assert path not in seen
        else:
            links = tuple(name for name in entry.links if name[:1] not in closed)
            assert replace(seen[path], links=()) == replace(entry, links=())
            assert seen[path].links == (links if len(links) > 1 else ())


def test_a_store_that_fails_ends_the_run_with_its_own_error(tmp_path: Path) -> None:
    repository, snapshot, source = saved(tmp_path, {f"{n}": File(noise(20_000, n)) for n in range(20)})
    for at in (1, 3, 5):
        store = FaultyStore(repository.store, Fault("get", at, prefix="packs/data/"))
        with pytest.raises(StoreUnavailable, match="failed by rule"):
            run_restore(reopened(store), snapshot, source, tmp_path / "target")
        assert temporaries(tmp_path / "target") == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(25))
def test_an_interrupted_run_leaves_whole_files_and_no_temporaries(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    tree: dict[str, Entry] = {
        f"d{n}": {f"f{m}": File(noise(chance.choice([10, 700, 3000, 90_000, 400_000]), n * m)) for m in range(12)}
        for n in range(6)
    }
    repository, snapshot, source = saved(tmp_path, tree)
    calls = chance.randrange(60)

    class Stopping(CountingStore):
        def around(self, verb: str, key: str, call: Callable[[], object]) -> object:  # type: ignore[override]
            if key.startswith("packs/data") and self.calls["get"] >= calls:
                trio.from_thread.run_sync(scope.cancel)
            return super().around(verb, key, call)

    scope = trio.CancelScope()

    async def cancelled() -> None:
        with scope:
            scope.deadline = trio.current_time() + chance.random() * 0.05 if seed % 2 else float("inf")
            await restore(
                fresh, snapshot, source, os.fsencode(tmp_path / "target"), RestoreOptions(), lambda event: None
            )

    fresh = reopened(repository)
    fresh.data._store = Stopping(repository.store)
    open_before = open_files()
    trio.run(cancelled)
    assert temporaries(tmp_path / "target") == []
    assert open_files() - open_before == set()
    wanted = snapshot_of(source)
    for path, entry in snapshot_of(tmp_path / "target").items() if (tmp_path / "target").exists() else ():
        assert entry.kind == "directory" or entry == wanted[path]
    _result, events = run_restore(repository, snapshot, source, tmp_path / "target", overwrite="if-changed")
    assert events == []
    assert below(snapshot_of(tmp_path / "target")) == below(wanted)


def test_a_long_walk_ends_when_the_run_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, snapshot, source = saved(tmp_path, {f"{number}": File(b"1") for number in range(3000)})
    monkeypatch.setattr(restore_files, "_SLICE_S", 1000)
    real, written = writing.Target.write_file, []

    def cancelling(*arguments: object) -> None:
        written.append(1)
        if len(written) == 10:
            trio.from_thread.run_sync(scope.cancel)
        if len(written) >= 10:
            time.sleep(0.001)  # so that the event loop gets to act on it
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writing.Target, "write_file", cancelling)
    scope = trio.CancelScope()

    async def cancelled() -> None:
        with scope:
            await restore(
                repository, snapshot, source, os.fsencode(tmp_path / "target"), RestoreOptions(), lambda event: None
            )

    trio.run(cancelled)
    assert 10 <= len(os.listdir(tmp_path / "target")) < 2000
    assert temporaries(tmp_path / "target") == []


# Costs.


def test_packs_are_read_in_order_in_few_requests(tmp_path: Path) -> None:
    tree = {f"d{n}": {f"f{m}": File(noise(2000, 100 * n + m)) for m in range(40)} for n in range(10)}
    repository, snapshot, source = saved(tmp_path, tree)
    packs = data_packs(repository)
    store = CountingStore(repository.store)
    fresh = reopened(repository)
    fresh.data._store = store
    run_restore(fresh, snapshot, source, tmp_path / "target")
    assert store.calls["get"] <= len(packs) + 2


def test_progress_has_totals_when_the_whole_snapshot_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore_module, "_PROGRESS_SECONDS", 0)
    repository, snapshot, source = saved(tmp_path, {f"{n}": File(noise(20_000, n)) for n in range(20)})
    events: list[Event] = []
    for path in (source, b"/"):
        trio.run(restore, repository, snapshot, path, os.fsencode(tmp_path / "target"), RestoreOptions(), events.append)
    progress = [event for event in events if isinstance(event, Progress)]
    assert {(event.verb, event.files_total, event.size_total) for event in progress} == {("restore", 20, 400_000)}
    assert all(event.files <= 20 and event.size <= 400_000 for event in progress)
