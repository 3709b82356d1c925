"""Writing below a target: descriptors, sparse runs, and what is never followed."""

import errno
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.errors import SourceError
from backupfs.localfs import fatal, naming, writing
from backupfs.localfs.content import write_at, write_sparsely
from backupfs.localfs.directories import Directory
from backupfs.localfs.metadata import Metadata, change_mode
from backupfs.localfs.writing import Target
from tests.descriptors import open_files

PLAIN = Metadata(stat.S_IFREG | 0o640, os.geteuid(), os.getegid(), 123)


def opened(path: Path) -> tuple[Target, list[tuple[bytes, str]]]:
    problems: list[tuple[bytes, str]] = []
    return Target(os.fsencode(path), lambda path, reason: problems.append((path, reason))), problems


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, _ = opened(tmp_path)

    def failing(*_arguments: object, **_options: object) -> None:
        assert [name.startswith(".backupfs-") for name in os.listdir(tmp_path)] == [True]
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", failing)
        with pytest.raises(OSError, match="broken"):
            target.write_file(target.root, b"a", b"1", PLAIN)
    assert os.listdir(tmp_path) == []
    target.write_file(target.root, b"a", b"1", PLAIN)
    status = os.stat(tmp_path / "a")
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o640, 123)
    target.close()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o644, 0o777, 0o1755])
def test_modes_do_not_depend_on_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        target, _ = opened(tmp_path)
        target.write_file(target.root, b"a", b"1", PLAIN._replace(mode=stat.S_IFREG | mode))
        made = target.make_directory(target.root, b"d")
        made.metadata = PLAIN._replace(mode=stat.S_IFDIR | mode)
        target.finish_directory(made)
        target.close()
    finally:
        os.umask(before)
    assert [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in "ad"] == [mode, mode]


def test_more_directories_than_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_MOST_OPEN", 3)
    target, _ = opened(tmp_path)
    made: list[Directory] = []
    for name in (b"a", b"b", b"c", b"d", b"e"):
        made.append(target.make_directory(made[-1] if made else target.root, name))
        target.write_file(made[-1], b"file", name, PLAIN)
    for directory in (made[0], made[4], made[1], made[3]):
        target.write_file(directory, b"again", b"x", PLAIN)
    assert len(target._open) <= 3
    assert (tmp_path / "a/b/c/d/e/again").exists()
    target.close()


def test_a_directory_that_became_a_symlink_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_MOST_OPEN", 1)
    outside = tmp_path / "outside"
    outside.mkdir()
    target, _ = opened(tmp_path / "target")
    first = target.make_directory(target.root, b"d")
    target.fd(first)
    target.fd(target.make_directory(target.root, b"other"))
    assert first not in target._open
    os.rmdir(tmp_path / "target" / "d")
    os.symlink(outside, tmp_path / "target" / "d")
    with pytest.raises(OSError, match=r"Not a directory|symbolic"):
        target.write_file(first, b"a", b"1", PLAIN)
    os.unlink(tmp_path / "target" / "d")
    os.mkdir(tmp_path / "target" / "taken")
    os.mkdir(tmp_path / "target" / "d")
    with pytest.raises(OSError, match="replaced"):
        target.write_file(first, b"a", b"1", PLAIN)
    assert os.listdir(outside) == os.listdir(tmp_path / "target" / "d") == []
    target.close()


def test_another_process_has_descriptors_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_MOST_OPEN_APART", 1)
    before = open_files()
    target, _ = opened(tmp_path)
    other = target.for_another_process(1, lambda path, reason: None)
    first = target.make_directory(target.root, b"a")
    second = target.make_directory(first, b"b")
    mine = target.fd(first)
    for directory in (first, second, first):
        other.write_file(directory, b"x", b"1", PLAIN)
    target.finish_directory(second)
    other.write_file(second, b"y", b"2", PLAIN)
    other.close_directories()
    assert target.fd(first) == mine
    target.write_file(first, b"z", b"3", PLAIN)
    assert sorted(os.listdir(tmp_path / "a")) == ["b", "x", "z"]
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["x", "y"]
    target.close()
    assert open_files() - before == set()


@pytest.mark.parametrize("put", ["symlink", "directory"])
def test_another_process_follows_nothing_that_took_a_directorys_place(put: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    target, _ = opened(tmp_path / "target")
    other = target.for_another_process(1, lambda path, reason: None)
    first = target.make_directory(target.root, b"d")
    second = target.make_directory(first, b"e")
    target.fd(second)
    os.rename(tmp_path / "target" / "d", tmp_path / "moved")
    if put == "symlink":
        os.symlink(outside, tmp_path / "target" / "d")
    else:
        os.mkdir(tmp_path / "target" / "d")
    for directory in (first, second):
        with pytest.raises(OSError, match=r"Not a directory|symbolic|replaced"):
            other.write_file(directory, b"a", b"1", PLAIN)
    assert os.listdir(outside) == []
    assert os.listdir(tmp_path / "moved") == ["e"]
    assert (tmp_path / "target" / "d").is_symlink() or os.listdir(tmp_path / "target" / "d") == []
    other.close_directories()
    target.close()


def test_a_link_across_more_directories_than_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_MOST_OPEN", 1)
    target, _ = opened(tmp_path)
    ends: list[Directory] = []
    for top in (b"a", b"b"):
        directory = target.make_directory(target.root, top)
        for name in (b"1", b"2"):
            directory = target.make_directory(directory, name)
        ends.append(directory)
    target.write_file(ends[0], b"x", b"1", PLAIN)
    target.link(ends[0], b"x", ends[1], b"y")
    assert os.stat(tmp_path / "a/1/2/x").st_ino == os.stat(tmp_path / "b/1/2/y").st_ino
    target.close()


def test_a_mode_is_not_set_through_a_symlink(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.touch(mode=0o600)
    (tmp_path / "link").symlink_to(precious)
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(OSError, match="not supported"):
        change_mode(fd, b"link", 0o777)
    os.close(fd)
    assert stat.S_IMODE(precious.stat().st_mode) == 0o600


def test_what_takes_the_place_of_a_new_fifo_keeps_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "precious"
    precious.touch(mode=0o600)
    target, _ = opened(tmp_path / "target")

    def hostile(name: bytes, _mode: int, _device: int, *, dir_fd: int) -> None:
        os.symlink(precious, name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mknod", hostile)
    with pytest.raises(OSError, match="not supported"):
        target.make_special(target.root, b"p", PLAIN._replace(mode=stat.S_IFIFO | 0o666), b"", (0, 0))
    assert stat.S_IMODE(precious.stat().st_mode) == 0o600
    assert os.listdir(tmp_path / "target") == []
    target.close()


def test_linking_a_name_to_its_own_file_leaves_nothing_else(tmp_path: Path) -> None:
    target, _ = opened(tmp_path)
    target.write_file(target.root, b"a", b"1", PLAIN)
    for name in (b"b", b"b", b"a"):
        target.link(target.root, b"a", target.root, name)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    target.close()


def test_an_attribute_that_cannot_be_set_is_a_problem_and_no_failure(tmp_path: Path) -> None:
    target, problems = opened(tmp_path)
    target.write_file(target.root, b"a", b"1", PLAIN._replace(xattrs=((b"nonsense.x", b"1"), (b"user.y", b"2"))))
    assert problems == [
        (os.fsencode(tmp_path / "a"), "its attribute nonsense.x could not be set: Operation not supported")
    ]
    assert os.getxattr(tmp_path / "a", "user.y") == b"2"
    target.close()


def test_every_fatal_error_says_what_to_do(tmp_path: Path) -> None:
    target, _ = opened(tmp_path)
    for number in fatal._FATAL:
        error = OSError(number, os.strerror(number))
        assert fatal.is_fatal(error)
        assert isinstance(target.full(error), SourceError)
        assert str(tmp_path) in str(target.full(error))
    assert not fatal.is_fatal(OSError(errno.EACCES, "x"))
    target.close()


@given(
    runs=st.lists(st.tuples(st.booleans(), st.integers(0, 40_000)), max_size=8), least=st.sampled_from([1, 4096, 8192])
)
def test_sparse_writing_reads_back_the_same(
    runs: list[tuple[bool, int]], least: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = b"".join((b"\1" if is_data else b"\0") * length for is_data, length in runs)
    if least == 1 and len(data) > 5000:
        data = data[:5000]
    path = tmp_path_factory.mktemp("sparse") / "a"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, len(data) + 5)
    write_sparsely(fd, memoryview(data), 5, least)
    assert os.pread(fd, len(data) + 10, 0) == bytes(5) + data
    write_at(fd, data, 0)
    assert os.pread(fd, len(data), 0) == data
    os.close(fd)


def test_a_directory_that_an_owner_was_let_into_gets_its_mode_back_at_any_end(tmp_path: Path) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "e").chmod(0o111)
    (tmp_path / "d").chmod(0o555)
    target, _ = opened(tmp_path)
    # Root needs no letting in.
    target.access.is_root_user = False
    outer = target.open_existing(target.root, b"d")
    inner = target.open_existing(outer, b"e")
    target.write_file(inner, b"a", b"1", PLAIN)
    assert [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("d", "d/e")] == [0o755, 0o711]
    target.close()
    assert [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("d", "d/e")] == [0o555, 0o111]


@pytest.mark.parametrize("knows", [True, False])
def test_a_name_that_was_free_is_not_taken_from_another(
    knows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """knows: the C library can rename without replacing."""
    if not knows:
        monkeypatch.setattr(naming, "_renameat2", None)
    (tmp_path / "known").write_bytes(b"old")
    target, _ = opened(tmp_path)
    for name in (b"known", b"free"):
        target.write_file(target.root, name, b"1", PLAIN)
    with pytest.raises(FileExistsError):
        target.write_file(target.root, b"free", b"22", PLAIN)
    # The same again, as another restore into the same target may have put it there.
    target.write_file(target.root, b"free", b"1", PLAIN)
    target.write_file(target.root, b"known", b"22", PLAIN)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == {"known": b"22", "free": b"1"}
    target.close()
