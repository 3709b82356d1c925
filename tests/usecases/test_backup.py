"""What a backup reads, reuses, leaves out and stores: real files, a repository in memory."""

import errno
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupfs.errors import SourceError
from backupfs.localfs import reading
from backupfs.localfs.exclude import parse_pattern
from backupfs.localfs.selection import SelectionRules
from backupfs.repository import local
from backupfs.repository.local import LocalFolders
from backupfs.repository.repository import Repository
from backupfs.snapshots.node import CHANGED_WHILE_READ, RACY
from backupfs.snapshots.tree import leaf_pages
from backupfs.snapshots.walk import find_path, tree_of, walk
from backupfs.stores.passing import PassingStore
from backupfs.stores.store import ObjectInfo
from backupfs.usecases import archive_files, storing
from backupfs.usecases import backup as backup_module
from backupfs.usecases.backup import BackupResult, backup, backup_stream
from backupfs.usecases.events import Event, FileChanged, FileSkipped, FileVanished, LeftOut, Remark
from tests.builders import (
    Directory,
    File,
    Hardlink,
    Sparse,
    Symlink,
    back_up,
    build,
    content_of,
    contents_of,
    folders_in,
    keys_of,
    new_repository,
    noise,
    reopened,
    run_backup,
    run_check,
    small_options,
)


def settled(path: bytes) -> bytes:
    """Wait until no file below is as young as a tick of the clock, so that none is racy."""
    newest = max(os.lstat(os.path.join(above, name)).st_ctime_ns for above, _, names in os.walk(path) for name in names)
    while time.time_ns() < newest + 30_000_000:
        time.sleep(0.002)
    return path


def told(repository: object, *paths: bytes, **options: object) -> tuple[BackupResult, list[Event]]:
    """Back up and return the result and the events."""
    events: list[Event] = []
    result = backup(repository, list(paths), small_options(**options), events.append)  # type: ignore[arg-type]
    return result, events


class Opened:
    """The names of the files that were opened to be read, by whatever process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.clear()

    def add(self, name: bytes) -> None:
        with open(self._path, "ab") as file:
            file.write(name + b"\n")

    def names(self) -> list[bytes]:
        return sorted(self._path.read_bytes().splitlines())

    def clear(self) -> None:
        self._path.write_bytes(b"")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Opened:
    found = Opened(tmp_path / "opened")
    real = reading.open_file

    def open_file(name: bytes, dir_fd: int) -> int:
        found.add(name)
        return real(name, dir_fd)

    monkeypatch.setattr(reading, "open_file", open_file)
    return found


def test_an_unchanged_file_is_not_opened(tmp_path: Path, opened: Opened) -> None:
    source = settled(build({"a": File(b"a"), "d": {"b": File(noise(1, 5000))}}, tmp_path / "s"))
    repository = new_repository()
    back_up(repository, source)
    assert opened.names() == [b"a", b"b"]
    opened.clear()
    result = run_backup(reopened(repository), source)
    assert opened.names() == []
    assert (result.counts.files_unchanged, result.stored_added) == (2, 0)


def test_only_what_changed_is_opened(tmp_path: Path, opened: Opened) -> None:
    source = build({"a": File(b"a"), "d": {"b": File(b"b"), "c": File(b"c")}}, tmp_path / "s")
    settled(source)
    repository = new_repository()
    back_up(repository, source)
    opened.clear()
    Path(os.fsdecode(source), "d", "c").write_bytes(b"C")
    Path(os.fsdecode(source), "d", "new").write_bytes(b"new")
    snapshot = back_up(reopened(repository), source)
    assert opened.names() == [b"c", b"new"]
    contents = contents_of(repository, snapshot)
    assert {path: kept.content for path, kept in contents.items() if kept and kept.node.is_file} == {
        source + b"/a": b"a",
        source + b"/d/b": b"b",
        source + b"/d/c": b"C",
        source + b"/d/new": b"new",
    }


def test_a_change_that_restores_size_and_times_is_seen(tmp_path: Path) -> None:
    source = settled(build({"a": File(b"one")}, tmp_path / "s"))
    repository = new_repository()
    back_up(repository, source)
    path = os.fsdecode(source) + "/a"
    before = os.stat(path)
    with open(path, "r+b") as file:
        file.write(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    snapshot = back_up(reopened(repository), source)
    node = find_path(snapshot, source + b"/a", repository.trees.load)
    assert content_of(repository, node) == b"two"


def test_a_file_as_young_as_the_look_at_it_is_racy_and_read_again(tmp_path: Path, opened: Opened) -> None:
    source = build({"a": File(b"a")}, tmp_path / "s")
    future = time.time_ns() + 3600 * 10**9
    os.utime(source + b"/a", ns=(future, future))
    repository = new_repository()
    snapshot = back_up(repository, source)
    assert find_path(snapshot, source + b"/a", repository.trees.load).flags & RACY
    opened.clear()
    back_up(reopened(repository), source)
    assert opened.names() == [b"a"]


def test_force_reads_everything_and_stores_nothing_twice(tmp_path: Path, opened: Opened) -> None:
    source = settled(build({"a": File(noise(1, 30_000)), "b": File(noise(2, 30_000))}, tmp_path / "s"))
    repository = new_repository()
    first = back_up(repository, source)
    opened.clear()
    result = run_backup(reopened(repository), source, force=True)
    assert opened.names() == [b"a", b"b"]
    assert result.data.chunks == 0
    assert result.snapshot is not None
    assert result.snapshot.root == first.root


def test_a_directory_of_many_pages_that_did_not_change_is_the_same_tree(tmp_path: Path, opened: Opened) -> None:
    source = settled(build({f"file-{number:05}": File(b"%d" % number) for number in range(3000)}, tmp_path / "s"))
    repository = new_repository()
    first = back_up(repository, source)
    tree = tree_of(find_path(first, source, repository.trees.load))
    assert len(list(leaf_pages(tree, repository.trees.load))) > 3
    opened.clear()
    result = run_backup(reopened(repository), source)
    assert result.snapshot is not None
    assert (opened.names(), result.snapshot.root, result.trees.chunks) == ([], first.root, 0)


@pytest.mark.parametrize("change", ["first", "middle", "last", "removed", "added-first", "added-last", "all-removed"])
def test_one_change_in_a_directory_of_many_pages_changes_few_of_them(tmp_path: Path, change: str) -> None:
    source = settled(build({f"file-{number:05}": File(b"%d" % number) for number in range(3000)}, tmp_path / "s"))
    folder = Path(os.fsdecode(source))
    repository = new_repository()
    first = back_up(repository, source)
    pages = len(list(leaf_pages(tree_of(find_path(first, source, repository.trees.load)), repository.trees.load)))
    match change:
        case "first" | "middle" | "last":
            (folder / {"first": "file-00000", "middle": "file-01500", "last": "file-02999"}[change]).write_bytes(b"!")
        case "removed":
            (folder / "file-01000").unlink()
        case "added-first":
            (folder / "a").write_bytes(b"!")
        case "added-last":
            (folder / "z").write_bytes(b"!")
        case "all-removed":
            shutil.rmtree(folder)
            folder.mkdir()
    result = run_backup(reopened(repository), source)
    assert result.snapshot is not None
    seen = {
        path: kept.content
        for path, kept in contents_of(repository, result.snapshot).items()
        if kept and kept.node.is_file
    }
    assert seen == {os.fsencode(path): path.read_bytes() for path in folder.iterdir()}
    # The changed page, the inner page above it, the directories on the way.
    assert result.trees.chunks <= pages // 2 + len(folder.parts) + 3


@pytest.mark.expected_log("damaged")
def test_a_damaged_parent_costs_only_its_comparison(tmp_path: Path) -> None:
    source = settled(build({f"f{number:04}": File(b"%d" % number) for number in range(1500)}, tmp_path / "s"))
    repository = new_repository()
    back_up(repository, source)
    before = contents_of(repository, back_up(repository, source))
    for key in keys_of(repository.store, "packs/tree/"):
        data = bytearray(repository.store.get(key))
        data[len(data) // 2] ^= 1
        repository.store.put(key, data)
    result, events = told(reopened(repository), source)
    assert any(isinstance(event, Remark) and "damaged" in event.text for event in events)
    assert result.snapshot is not None
    assert result.snapshot.statistics.files == 1500
    assert {path for path, kept in before.items() if kept and kept.node.is_file} == {
        source + b"/f%04d" % number for number in range(1500)
    }


def test_links_of_one_file_are_read_once_and_keep_their_identity(tmp_path: Path, opened: Opened) -> None:
    source = settled(build({"a": File(noise(3, 9000)), "b": Hardlink("a"), "c": Hardlink("a")}, tmp_path / "s"))
    repository = new_repository()
    snapshot = back_up(repository, source)
    found = [find_path(snapshot, source + b"/" + name, repository.trees.load) for name in (b"a", b"b", b"c")]
    assert len({(node.filesystem, node.inode, node.nlink) for node in found}) == 1
    assert {content_of(repository, node) for node in found} == {noise(3, 9000)}


def test_holes_cost_nothing(tmp_path: Path) -> None:
    source = build({"sparse": Sparse(8 << 30, {5 << 30: b"island"})}, tmp_path / "s")
    repository = new_repository()
    result = run_backup(repository, source)
    assert result.counts.size == 8 << 30
    assert result.plain_added < 100_000
    assert result.snapshot is not None
    node = find_path(result.snapshot, source + b"/sparse", repository.trees.load)
    assert node.size == 8 << 30


def test_a_single_edit_in_a_large_file_stores_a_chunk_and_its_way(tmp_path: Path) -> None:
    source = build({"large": File(noise(4, 4_000_000))}, tmp_path / "s")
    repository = new_repository()
    first = run_backup(repository, source)
    with open(source + b"/large", "r+b") as file:
        file.seek(2_000_000)
        file.write(b"edit")
    second = run_backup(reopened(repository), source)
    assert first.data.chunks > 500
    assert second.data.chunks <= 3
    # The page of the content list that the edit is in, and what stands above it; not the list. How large a page is
    # depends on the keys: two thirds of the list at most in sixty repositories.
    assert second.trees.plain_bytes < first.trees.plain_bytes * 9 / 10


def test_a_file_that_changes_once_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build({"a": File(b"before")}, tmp_path / "s")
    changes = iter([b"after!"])
    change_while_reading(monkeypatch, source + b"/a", changes)
    result, events = told(repository := new_repository(), source)
    assert result.snapshot is not None
    node = find_path(result.snapshot, source + b"/a", repository.trees.load)
    assert (content_of(repository, node), node.flags & CHANGED_WHILE_READ) == (b"after!", 0)
    assert not any(isinstance(event, FileChanged) for event in events)


def test_a_file_that_goes_on_changing_is_kept_flagged_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build({"a": File(b"0")}, tmp_path / "s")
    changes = iter([b"x" * length for length in range(2, 100)])
    change_while_reading(monkeypatch, source + b"/a", changes)
    result, events = told(repository := new_repository(), source)
    assert FileChanged(source + b"/a") in events
    assert result.snapshot is not None
    node = find_path(result.snapshot, source + b"/a", repository.trees.load)
    content = content_of(repository, node)
    assert node.flags & CHANGED_WHILE_READ
    assert content is not None
    assert (len(content), set(content)) == (node.size, {ord("x")})


def change_while_reading(monkeypatch: pytest.MonkeyPatch, path: bytes, contents: Iterator[bytes]) -> None:
    """Write to a file each time somebody has read from it."""
    real_pread, real_preadv = os.pread, os.preadv

    def change(count: int) -> None:
        content = next(contents, None)
        if content is not None and count:
            with open(path, "wb") as file:
                file.write(content)

    def pread(fd: int, size: int, offset: int) -> bytes:
        data = real_pread(fd, size, offset)
        change(len(data))
        return data

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = real_preadv(fd, buffers, offset)
        change(count)
        return count

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(os, "preadv", preadv)


def test_patterns_sizes_and_markers_leave_out_with_the_reason(tmp_path: Path) -> None:
    tag = b"Signature: 8a477f597d28d172789f06886806bc55"
    source = build(
        {
            "keep.txt": File(b"1"),
            "drop.o": File(b"2"),
            "big": File(b"3" * 2000),
            "cache": {"CACHEDIR.TAG": File(tag), "x": File(b"4")},
            "marked": {".nobackup": File(b""), "y": File(b"5")},
            "build": {"z.o": File(b"6"), "keep.o": File(b"7")},
        },
        tmp_path / "s",
    )
    rules = SelectionRules(
        patterns=(parse_pattern(b"*.o"), parse_pattern(b"!keep.o")),
        caches=True,
        if_present=(b".nobackup",),
        larger_than=1000,
    )
    result, events = told(repository := new_repository(), source, rules=rules)
    assert result.snapshot is not None
    root = find_path(result.snapshot, source, repository.trees.load)
    assert {path for path, _ in walk(root, b"", repository.trees.load)} == {
        b"/keep.txt",
        b"/cache",
        b"/marked",
        b"/build",
        b"/build/keep.o",
    }
    reasons = {event.path.removeprefix(source): event.reason for event in events if isinstance(event, LeftOut)}
    assert set(reasons) == {b"/drop.o", b"/big", b"/cache", b"/marked", b"/build/z.o"}
    assert "1000" in reasons[b"/big"]


def test_a_mounted_pseudo_file_system_is_not_entered(tmp_path: Path) -> None:
    root = Path("/")
    _, events = told(new_repository(), os.fsencode(root / "dev"))
    left_out = {event.path for event in events if isinstance(event, LeftOut)}
    assert all(path.startswith(b"/dev/") for path in left_out)
    assert not os.path.ismount("/dev/shm") or b"/dev/shm" in left_out


def test_a_file_of_the_kernel_that_says_no_size_is_read_to_its_end() -> None:
    source = os.path.realpath(b"/proc/self") + b"/mounts"
    assert os.stat(source).st_size == 0
    repository = new_repository()
    result, events = told(repository, source)
    assert result.snapshot is not None
    node = find_path(result.snapshot, source, repository.trees.load)
    content = content_of(repository, node)
    assert (content, node.size) == (Path(os.fsdecode(source)).read_bytes(), len(content))
    assert result.counts.size == len(content) > 0
    assert not [event for event in events if isinstance(event, FileSkipped | FileChanged)]


@pytest.mark.skipif(os.geteuid() != 0, reason="the kernel shows it to root alone")
def test_a_file_of_the_kernel_without_an_end_is_told(tmp_path: Path) -> None:
    source = os.path.realpath(b"/proc/self") + b"/pagemap"
    other = build({"f": File(b"1")}, tmp_path / "s")
    result, events = told(new_repository(), source, other)
    [skipped] = [event for event in events if isinstance(event, FileSkipped)]
    assert skipped == FileSkipped(source, "it says a size of 0 and gives more than 64 MiB")
    assert result.counts.files_skipped == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="the kernel shows it to root alone")
def test_a_file_of_the_kernel_that_gives_whole_records_alone_is_read() -> None:
    """By chance of where it was cut it was asked for parts of records, and refused as an invalid argument."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        read, buffer = archive_files._unsized_reader(fd), memoryview(bytearray(13))
        assert [read(buffer) for _ in range(3)] == [13, 13, 13]
    finally:
        os.close(fd)


def test_what_vanishes_before_it_is_read_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"a": File(b"1"), "gone": File(b"2"), "d": {"x": File(b"3")}, "denied": File(b"4"), "named": File(b"5")}
    source = build(tree, tmp_path / "s")
    named = source + b"/named"
    real = reading.open_file, reading.open_directory

    def open_file(name: bytes, dir_fd: int) -> int:
        if name in (b"gone", b"named"):
            os.unlink(name, dir_fd=dir_fd)
        # Its own file system says so, and still it is there.
        if name == b"denied":
            raise FileNotFoundError(2, "No such file or directory")
        return real[0](name, dir_fd)

    def open_directory(name: bytes, dir_fd: int | None) -> int:
        if name == b"d":
            shutil.rmtree(os.fsdecode(source + b"/d"))
        return real[1](name, dir_fd)

    monkeypatch.setattr(reading, "open_file", open_file)
    monkeypatch.setattr(reading, "open_directory", open_directory)
    result, events = told(new_repository(), source + b"/gone", named, source + b"/a")
    assert {event.path for event in events if isinstance(event, FileSkipped)} == {source + b"/gone", named}
    build({"gone": File(b"2")}, tmp_path / "t")
    os.rename(tmp_path / "t" / "gone", tmp_path / "s" / "gone")
    result, events = told(repository := new_repository(), source)
    assert [event for event in events if isinstance(event, FileSkipped)] == [
        FileSkipped(source + b"/denied", "No such file or directory")
    ]
    assert {event for event in events if isinstance(event, FileVanished)} == {
        FileVanished(source + b"/gone"), FileVanished(source + b"/d"),
    }  # fmt: skip
    assert (result.counts.files_skipped, result.counts.files, result.counts.size) == (1, 1, 1)
    assert result.snapshot is not None
    root = find_path(result.snapshot, source, repository.trees.load)
    assert {path for path, _ in walk(root, b"", repository.trees.load)} == {b"/a", b"/d"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_a_user_named_is_found_in_a_folder_that_he_cannot_list() -> None:
    """A home in a /home of mode 0711 could not be backed up by its owner, nor anything that was named beside it."""
    with tempfile.TemporaryDirectory() as open_folder:
        os.chmod(open_folder, 0o755)
        source = build({"home": {"ann": {"f": File(b"1")}}, "shut": {"x": File(b"3")}}, Path(open_folder) / "s")
        subprocess.run(["chown", "-R", "54321", source + b"/home/ann"], check=True)
        os.chmod(source + b"/home", 0o711)
        os.chmod(source + b"/shut", 0o700)
        repository = new_repository()
        os.seteuid(54321)
        try:
            result, events = told(repository, source + b"/home/ann", source + b"/shut/x", source + b"/no")
        finally:
            os.seteuid(0)
    assert [event for event in events if isinstance(event, FileSkipped)] == [
        FileSkipped(source + b"/shut/x", "Permission denied"),
        FileSkipped(source + b"/no", "it does not exist"),
    ]
    assert result.snapshot is not None
    root = find_path(result.snapshot, source, repository.trees.load)
    assert {path for path, _ in walk(root, b"", repository.trees.load)} == {b"/home", b"/home/ann", b"/home/ann/f"}


def test_an_unreadable_directory_is_told_and_stored_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Directory({"x": File(b"2")}, xattrs={"user.a": b"1"})
    source = build({"good": File(b"1"), "bad": bad}, tmp_path / "s")
    real = reading.open_directory

    def open_directory(name: bytes, dir_fd: int | None) -> int:
        if name == b"bad":
            raise PermissionError(13, "Permission denied")
        return real(name, dir_fd)

    monkeypatch.setattr(reading, "open_directory", open_directory)
    result, events = told(repository := new_repository(), source)
    assert FileSkipped(source + b"/bad", "Permission denied") in events
    assert result.snapshot is not None
    root = find_path(result.snapshot, source, repository.trees.load)
    found = dict(walk(root, b"", repository.trees.load))
    assert found.keys() == {b"/good", b"/bad"}
    # Where they are an ACL, the mode without it would give its rights to the group.
    assert found[b"/bad"].xattrs == ((b"user.a", b"1"),)


def test_statistics_count_what_the_snapshot_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that could not be read were counted as files of the snapshot, and their directories were not."""
    source = build({"a": File(b"12"), "bad": {"x": File(b"2")}, "b": File(b"345"), "l": Symlink("a")}, tmp_path / "s")
    real = {name: getattr(reading, name) for name in ("open_file", "open_directory")}

    def refuse(name: bytes, dir_fd: int | None, kind: str) -> int:
        if name in (b"b", b"bad"):
            raise PermissionError(13, "Permission denied")
        opened: int = real[kind](name, dir_fd)
        return opened

    for kind in real:
        monkeypatch.setattr(reading, kind, lambda name, dir_fd, kind=kind: refuse(name, dir_fd, kind))
    change_while_reading(monkeypatch, source + b"/a", iter([b"longer"]))
    result, events = told(repository := new_repository(), source)
    assert result.snapshot is not None
    root = find_path(result.snapshot, source, repository.trees.load)
    below = [node for _, node in walk(root, b"", repository.trees.load)]
    statistics = result.snapshot.statistics
    files = [node for node in below if not node.is_directory]
    assert [len(files), len(below) - len(files) + 1] == [statistics.files, statistics.directories] == [2, 2]
    assert statistics.size == sum(node.size for node in files if node.is_file) == len(b"longer")
    assert statistics.files == result.counts.files_new
    assert statistics.files_skipped == len([event for event in events if isinstance(event, FileSkipped)]) == 2


def test_missing_sources_are_told_and_none_at_all_is_refused(tmp_path: Path) -> None:
    source = build({"a": File(b"1")}, tmp_path / "s")
    _, events = told(new_repository(), source, source + b"-missing")
    assert [event.path for event in events if isinstance(event, FileSkipped)] == [source + b"-missing"]
    with pytest.raises(SourceError, match="missing"):
        told(new_repository(), source + b"-missing")


def test_several_sources_stand_under_their_own_paths(tmp_path: Path) -> None:
    one = build({"a": File(b"1")}, tmp_path / "x" / "one")
    two = build({"b": File(b"2"), "link": Symlink(b"b")}, tmp_path / "x" / "two")
    repository = new_repository()
    snapshot = back_up(repository, one, two, two + b"/b")
    paths = {path for path, kept in contents_of(repository, snapshot).items() if kept and not kept.node.is_directory}
    assert paths == {one + b"/a", two + b"/b", two + b"/link"}


def test_what_happens_beside_a_source_changes_nothing(tmp_path: Path) -> None:
    source = settled(build({"a": File(b"1")}, tmp_path / "s"))
    repository = new_repository()
    first = back_up(repository, source)
    (tmp_path / "beside").write_bytes(b"x")
    assert back_up(reopened(repository), source).root == first.root


def test_a_source_may_be_a_single_file_or_a_symlink(tmp_path: Path) -> None:
    source = build({"a": File(b"1"), "link": Symlink(b"a")}, tmp_path / "s")
    repository = new_repository()
    snapshot = back_up(repository, source + b"/link", source + b"/a")
    assert find_path(snapshot, source + b"/link", repository.trees.load).content == b"a"
    assert content_of(repository, find_path(snapshot, source + b"/a", repository.trees.load)) == b"1"


def test_depth_is_bounded_by_nothing(tmp_path: Path) -> None:
    top = tmp_path / "s"
    top.mkdir()
    depth, name = 1200, b"n" * 20
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open(b"deep", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)
    repository = new_repository()
    soft_before = len(os.listdir("/proc/self/fd"))
    result = run_backup(repository, top)
    assert len(os.listdir("/proc/self/fd")) <= soft_before + 2
    assert result.counts.directories >= depth
    assert result.snapshot is not None
    assert find_path(result.snapshot, os.fsencode(top) + (b"/" + name) * depth + b"/deep", repository.trees.load)
    again = run_backup(reopened(repository), top)
    assert again.counts.files_unchanged + again.counts.files_changed == 1
    remove_deep(top, name)


def remove_deep(top: Path, name: bytes) -> None:
    """Flatten a chain of directories from its top, as no path reaches its end."""
    while True:
        inner = os.fsencode(top) + b"/" + name
        if not os.path.isdir(inner):
            break
        moved = os.fsencode(top) + b"-moved"
        os.rename(inner, moved)
        os.rmdir(top)
        os.rename(moved, top)
    shutil.rmtree(top)


def test_a_stream_becomes_one_file(tmp_path: Path) -> None:
    data = noise(7, 200_000)
    position = 0

    def read_into(buffer: memoryview) -> int:
        nonlocal position
        count = min(len(buffer), 777, len(data) - position)
        buffer[:count] = data[position : position + count]
        position += count
        return count

    repository = new_repository()
    result = backup_stream(repository, b"/a/dump.sql", read_into, small_options(), lambda _event: None)
    assert result.snapshot is not None
    node = find_path(result.snapshot, b"/a/dump.sql", repository.trees.load)
    assert content_of(repository, node) == data
    assert stat.S_ISREG(node.mode)


def test_a_dry_run_reads_and_stores_nothing(tmp_path: Path) -> None:
    source = build({"a": File(noise(1, 50_000))}, tmp_path / "s")
    repository = new_repository()
    before = keys_of(repository.store)
    result = run_backup(repository, source, dry_run=True)
    assert (result.snapshot, keys_of(repository.store)) == (None, before)
    assert result.plain_added > 50_000


def test_snapshots_of_a_host_are_numbered_and_chained(tmp_path: Path) -> None:
    source = build({"a": File(b"1")}, tmp_path / "s")
    repository = new_repository(folders=folders_in(tmp_path / "local"))
    first, second = back_up(repository, source), back_up(repository, source)
    assert (first.sequence, second.sequence) == (1, 2)
    assert (first.previous, second.previous) == (b"", first.snapshot_id)
    assert not run_check(repository).damaged


@pytest.mark.expected_log("is not in memory|cut short")
def test_what_lay_in_lost_packs_is_stored_again(tmp_path: Path) -> None:
    """The index may name packs that are gone; what is believed to be stored must be there."""
    source = settled(build({"a": File(noise(1, 50_000)), "d": {"b": File(noise(2, 3000))}}, tmp_path / "s"))
    for prefix in ("packs/data/", "packs/tree/", "packs/"):
        for cut_short in (False, True):
            repository = new_repository(folders=folders_in(tmp_path / f"local-{cut_short}-{prefix.replace('/', '-')}"))
            first = back_up(repository, source)
            for key in keys_of(repository.store, prefix):
                data = repository.store.get(key)
                repository.store.delete(key)
                if cut_short:
                    repository.store.put(key, data[:-1])
            result, events = told(reopened(repository), source)
            assert any(isinstance(event, Remark) and "missing or cut short" in event.text for event in events)
            assert result.snapshot is not None
            for snapshot in (first, result.snapshot):
                contents = contents_of(reopened(repository), snapshot)
                assert contents[source + b"/a"].content == noise(1, 50_000)  # type: ignore[union-attr]
                assert contents[source + b"/d/b"].content == noise(2, 3000)  # type: ignore[union-attr]


def test_packs_that_a_stale_listing_does_not_show_are_not_stored_again(tmp_path: Path) -> None:
    source = settled(build({"a": File(noise(1, 50_000)), "d": {"b": File(noise(2, 3000))}}, tmp_path / "s"))
    repository = new_repository(folders=folders_in(tmp_path / "local"))
    back_up(repository, source)

    class Stale(PassingStore):
        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            return (info for info in super().list(prefix) if not info.key.startswith("packs/"))

    result, events = told(reopened(Stale(repository.store), repository.local), source)
    assert not [event for event in events if isinstance(event, Remark)]
    assert (result.counts.files_unchanged, result.data.chunks) == (2, 0)


def test_packs_that_no_index_names_are_taken_over_by_their_host(tmp_path: Path) -> None:
    source = settled(build({"a": File(noise(1, 50_000)), "b": File(noise(2, 3000))}, tmp_path / "s"))
    repository = new_repository(folders=folders_in(tmp_path / "local"))
    back_up(repository, source)
    for key in [*keys_of(repository.store, "index/"), *keys_of(repository.store, "snapshots/")]:
        repository.store.delete(key)
    shutil.rmtree(tmp_path / "local" / "cache")
    for path in (tmp_path / "local" / "state").glob("last-*"):
        path.unlink()
    packs = keys_of(repository.store, "packs/")
    result = run_backup(reopened(repository), source)
    assert (result.data.chunks, keys_of(repository.store, "packs/data/")) == (
        0,
        [key for key in packs if "data" in key],
    )
    assert not run_check(reopened(repository), read_data=True).damaged


@pytest.mark.parametrize("is_old", [False, True])
def test_packs_of_another_host_are_taken_over_when_they_are_old(
    tmp_path: Path, is_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_old:
        monkeypatch.setattr(storing, "_ORPHAN_AGE_NS", -(10**9))
    source = settled(build({"a": File(noise(1, 50_000))}, tmp_path / "s"))
    repository = new_repository(folders=folders_in(tmp_path / "one"))
    back_up(repository, source)
    for key in [*keys_of(repository.store, "index/"), *keys_of(repository.store, "snapshots/")]:
        repository.store.delete(key)
    other = reopened(repository, folders=folders_in(tmp_path / "other"))
    assert (run_backup(other, source).data.chunks == 0) == is_old


@pytest.mark.expected_log("is damaged")
@pytest.mark.parametrize("scanners", [1, 3])
def test_what_lay_in_a_damaged_tree_pack_is_stored_again(
    scanners: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the right size, so that no listing shows it: the parent's trees do, and every later snapshot can be read."""
    monkeypatch.setattr(backup_module, "scanner_count", lambda: scanners)
    tree = {f"d{n}": {f"e{m}": {f"f{k}": File(b"%d" % k) for k in range(5)} for m in range(4)} for n in range(5)}
    source = build(tree, tmp_path / "source")
    repository = new_repository()
    back_up(repository, source)
    for key in keys_of(repository.store, "packs/tree/"):
        data = bytearray(repository.store.get(key))
        data[60] ^= 1
        repository.store.put(key, data)
    result, events = told(reopened(repository), source)
    assert any(isinstance(event, Remark) and "compared with is damaged" in event.text for event in events)
    assert result.snapshot is not None
    fresh = reopened(repository)
    fresh.load_indexes()
    node = find_path(result.snapshot, os.fsencode(source), fresh.trees.load)
    assert len(list(walk(node, b"", fresh.trees.load))) == 5 + 20 + 100


def test_a_folder_of_this_machine_that_cannot_be_written_is_told_with_what_it_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build({"a": File(b"x")}, tmp_path / "source")
    repository = new_repository(folders=folders_in(tmp_path))

    def remarks(repository: Repository) -> list[str]:
        events: list[Event] = []
        backup(repository, [source], small_options(), events.append)
        return [event.text for event in events if isinstance(event, Remark)]

    assert remarks(reopened(repository)) == []
    (tmp_path / "file").write_bytes(b"")
    nowhere = LocalFolders(tmp_path / "cache", tmp_path / "file" / "state")
    unnoticed = "a snapshot that is lost may go unnoticed"
    means = f"each backup counts as one of another host, and {unnoticed}"
    assert remarks(reopened(repository, nowhere)) == [f"the folder {nowhere.state} cannot be written: {means}"]

    # The host is known, and nothing more is kept.
    def fail(path: Path, data: bytes) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(local, "write_privately", fail)
    assert remarks(reopened(repository)) == [f"the folder {tmp_path}/state cannot be written: {unnoticed}"]
