"""Scanning processes: they share the work, come to the same trees whatever their number, and never outlive a backup."""

import logging
import os
import signal
import time
from pathlib import Path

import pytest

from backupfs.errors import BackupfsError, DamagedObject
from backupfs.localfs import reading
from backupfs.usecases import archive_part, backup, scanners
from backupfs.usecases.archive_part import DirectoriesResult, DirectoriesTask
from backupfs.usecases.archiver import Archiver
from backupfs.usecases.events import FileSkipped
from backupfs.usecases.scanner import MOST_NESTED, Assigned, Scanner
from tests.builders import File, Hardlink, build, contents_of, keys_of, new_repository, noise, run_backup, run_check
from tests.processes import assert_that_children_end_with_their_parent
from tests.usecases.test_backup import told


def tree(width: int, depth: int, seed: int = 0) -> dict[str, object]:
    """Return a tree of directories in directories, with some files in each."""
    entries: dict[str, object] = {f"file-{number}": File(noise(seed * 31 + number, 600)) for number in range(4)}
    if depth:
        for number in range(width):
            entries[f"dir-{number}"] = tree(width, depth - 1, seed * width + number + 1)
    return entries


@pytest.fixture
def assigned(monkeypatch: pytest.MonkeyPatch) -> list[DirectoriesTask]:
    """Give away whatever can be given, asked for or not, and collect the tasks."""
    found: list[DirectoriesTask] = []
    real = scanners._send

    def send(member: object, answer: object) -> None:
        if isinstance(answer, Assigned):
            found.append(answer.task)
        real(member, answer)  # type: ignore[arg-type]

    monkeypatch.setattr(scanners, "_send", send)
    monkeypatch.setattr(archive_part, "_ENOUGH_TO_GIVE", 2)
    monkeypatch.setattr(Scanner, "is_wanted", lambda self: self.nested < MOST_NESTED)
    return found


def test_any_number_of_scanners_makes_the_same_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assigned: list[DirectoriesTask]
) -> None:
    source = build(tree(5, 3), tmp_path / "s")
    repository = new_repository()
    roots = set()
    for count in (1, 2, 5):
        monkeypatch.setattr(backup, "scanner_count", lambda count=count: count)
        result = run_backup(repository, source, force=True)
        assert result.snapshot is not None
        assert result.counts.directories == 1 + 5 + 25 + 125
        assert result.counts.files == 4 * 156
        roots.add(result.snapshot.root)
    assert len(roots) == 1
    assert len(assigned) > 3
    assert not run_check(repository, read_data=True).damaged


def test_an_unchanged_tree_is_shared_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assigned: list[DirectoriesTask]
) -> None:
    source = build(tree(4, 3), tmp_path / "s")
    monkeypatch.setattr(backup, "scanner_count", lambda: 3)
    repository = new_repository()
    first = run_backup(repository, source)
    time.sleep(0.05)
    run_backup(repository, source)
    assigned.clear()
    second = run_backup(repository, source)
    assert first.snapshot is not None
    assert second.snapshot is not None
    assert (second.snapshot.root, second.counts.files_unchanged) == (first.snapshot.root, second.counts.files)
    assert second.stored_added == 0
    assert any(not task.wants_xattrs for task in assigned)


def test_chunks_of_different_scanners_are_stored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assigned: list[DirectoriesTask]
) -> None:
    same = {f"file-{number}": File(noise(number, 2000)) for number in range(20)}
    source = build({f"dir-{number}": {"deep": dict(same)} for number in range(40)}, tmp_path / "s")
    monkeypatch.setattr(backup, "scanner_count", lambda: 4)
    result = run_backup(new_repository(), source)
    assert result.data.chunks == 20
    assert assigned


def test_a_task_whose_directory_is_another_one_now_is_done_by_its_giver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assigned: list[DirectoriesTask]
) -> None:
    source = build(tree(5, 2), tmp_path / "s")
    monkeypatch.setattr(backup, "scanner_count", lambda: 3)

    def refuse(self: Archiver, task: DirectoriesTask) -> DirectoriesResult:
        return None

    monkeypatch.setattr(Archiver, "archive_task", refuse)
    repository = new_repository()
    result, events = told(repository, source)
    assert assigned
    assert result.snapshot is not None
    assert result.counts.files == 4 * 31
    assert len(contents_of(repository, result.snapshot)) >= 4 * 31
    assert not [event for event in events if isinstance(event, FileSkipped)]


def test_a_directory_in_the_place_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    source = build({"d": {"x": {}}, "other": {"x": {}}}, tmp_path / "s")
    status = os.stat(source + b"/other")
    archiver = Archiver(None, None, None)  # type: ignore[arg-type]
    task = DirectoriesTask(source + b"/d", (status.st_dev, status.st_ino), (b"x",), (None,), True)
    assert archiver.archive_task(task) is None
    os.symlink(source + b"/other", source + b"/link")
    assert (
        archiver.archive_task(
            DirectoriesTask(source + b"/link", (status.st_dev, status.st_ino), (b"x",), (None,), True)
        )
        is None
    )


def test_names_of_one_file_keep_their_identity_whoever_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assigned: list[DirectoriesTask]
) -> None:
    entries: dict[str, object] = {"first": File(noise(1, 3000))}
    entries |= {f"dir-{number}": {"deep": {"link": Hardlink("first")}} for number in range(20)}
    source = build(entries, tmp_path / "s")
    monkeypatch.setattr(backup, "scanner_count", lambda: 3)
    repository = new_repository()
    result = run_backup(repository, source)
    assert result.snapshot is not None
    nodes = [kept.node for kept in contents_of(repository, result.snapshot).values() if kept and kept.node.is_file]
    assert len(nodes) == 21
    assert len({(node.filesystem, node.inode) for node in nodes}) == 1
    assert assigned


def test_a_scanner_that_is_killed_ends_the_backup_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build({"a": File(b"1"), "die": File(b"2")}, tmp_path / "s")
    real = reading.open_file

    def open_file(name: bytes, dir_fd: int) -> int:
        if name == b"die":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(name, dir_fd)

    monkeypatch.setattr(reading, "open_file", open_file)
    repository = new_repository()
    with pytest.RaisesGroup(pytest.RaisesExc(BackupfsError, match="scanning process ended"), flatten_subgroups=True):
        run_backup(repository, source)
    assert keys_of(repository.store, "snapshots/") == []


@pytest.mark.parametrize("error", [DamagedObject("it is damaged"), ZeroDivisionError("a fault")])
def test_what_a_scanner_raises_is_raised_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    source = build({"a": File(b"1")}, tmp_path / "s")

    def open_file(name: bytes, dir_fd: int) -> int:
        raise error

    monkeypatch.setattr(reading, "open_file", open_file)
    with pytest.RaisesGroup(pytest.RaisesExc(type(error), match=str(error)), flatten_subgroups=True):
        run_backup(new_repository(), source)


@pytest.mark.expected_log("WARNING backupfs.test: from a scanner")
def test_log_lines_of_scanners_come_out_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = build({"a": File(b"1")}, tmp_path / "s")
    real = reading.open_file

    def open_file(name: bytes, dir_fd: int) -> int:
        logging.getLogger("backupfs.test").warning("from a %s", "scanner")
        return real(name, dir_fd)

    monkeypatch.setattr(reading, "open_file", open_file)
    run_backup(new_repository(), source)
    assert [record.getMessage() for record in caplog.records] == ["from a scanner"]


def test_scanners_end_with_their_leader(tmp_path: Path) -> None:
    """Kill -9 leaves no process that reads on."""
    assert_that_children_end_with_their_parent(
        """
        import os, sys, time
        from backupfs.usecases.scanners import Scanners
        def scan(scanner, begins):
            time.sleep(60)
        scanners = Scanners({})
        scanners.start(2, scan)
        print(*(member.process.pid for member in scanners._members), flush=True)
        time.sleep(60)
        """,
        2,
    )
