"""Restores that are killed: what they leave goes with the next one, and nothing of one that still runs does."""

import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from backupfs.localfs.abandoned import RunLock
from backupfs.localfs.writing import Target
from tests.builders import File, build, snapshot_of

SOON_S = 60


class Place:
    """A repository with a large file in it, and restores of it by the command line."""

    def __init__(self, folder: Path) -> None:
        self.source = Path(
            os.fsdecode(build({"d": {"large": File(os.urandom(150 << 20)), "small": File(b"x" * 5000)}}, folder / "s"))
        )
        self.target = folder / "target"
        self.environment = {
            **os.environ,
            "BACKUPFS_PASSWORD": "a password",
            "BACKUPFS_REPOSITORY": str(folder / "repository"),
        }
        self.run("init")
        self.run("backup", str(self.source))

    def started(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "backupfs", *arguments], env=self.environment, stderr=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str) -> str:
        with self.started(*arguments) as process:
            _, said = process.communicate(timeout=SOON_S)
        assert process.returncode == 0, said
        return said

    def restore(self) -> str:
        return self.run("restore", f"latest:{self.source}", str(self.target), "--overwrite", "if-changed")

    def restoring(self) -> "subprocess.Popen[str]":
        """Start a restore, and return when it writes."""
        process = self.started("restore", f"latest:{self.source}", str(self.target))
        wait_for(lambda: process.poll() is not None or bool(self.temporaries()))
        assert process.poll() is None, process.communicate()
        return process

    def temporaries(self) -> list[str]:
        return [path.name for path in (self.target / "d").glob(".backupfs-*")]

    def assert_restored(self) -> None:
        found, wanted = snapshot_of(self.target), snapshot_of(self.source)
        # A target that was there is left as it is.
        del found[b""], wanted[b""]
        assert found == wanted


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def children_of(process: "subprocess.Popen[str]") -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_the_next_restore_removes_what_a_killed_one_left(place: Place) -> None:
    process = place.restoring()
    children = [os.pidfd_open(pid) for pid in children_of(process)]
    process.kill()
    process.communicate()
    for child in children:
        # They end when their leader is gone; until then they may write.
        wait_for(lambda child=child: is_over(child))  # type: ignore[misc]
        os.close(child)
    left = place.temporaries()
    assert left
    said = place.restore()
    assert f"removed {len(left)} temporary files of a restore that was killed" in said
    place.assert_restored()
    assert "removed" not in place.restore()
    place.assert_restored()


def is_over(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


def test_nothing_of_a_restore_that_runs_is_removed(place: Place) -> None:
    process = place.restoring()
    processes = [*children_of(process), process.pid]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    before = place.temporaries()
    try:
        assert before
        assert "removed" not in place.restore()
        assert set(place.temporaries()) == set(before)
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)
        process.communicate(timeout=SOON_S)
    assert process.returncode == 0
    assert "removed" not in place.restore()
    place.assert_restored()


def test_what_is_not_a_dead_restores_stays(place: Place) -> None:
    place.restore()
    token, dead = "0123456789ab", "ba9876543210"
    without_lock, mine = place.target / f".backupfs-{token}-1", place.target / "d" / ".backupfs-mine"
    left, folder = place.target / "d" / f".backupfs-{dead}-1-2", place.target / f".backupfs-{dead}-9"
    for path in (without_lock, mine, left, place.target / f".backupfs-{dead}-lock"):
        path.write_bytes(b"")
    folder.mkdir()
    before = os.stat(place.target).st_mtime_ns
    assert "removed 1 temporary files" in place.restore()
    assert without_lock.exists()
    assert mine.exists()
    assert folder.exists()
    assert not left.exists()
    assert not (place.target / f".backupfs-{dead}-lock").exists()
    assert os.stat(place.target).st_mtime_ns == before


def test_a_lock_that_is_held_keeps_files(place: Place) -> None:
    place.restore()
    token = "0123456789ab"
    left, lock = place.target / "d" / f".backupfs-{token}-1", place.target / f".backupfs-{token}-lock"
    left.write_bytes(b"")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        place.restore()
        assert left.exists()
        assert lock.exists()
    place.restore()
    assert not left.exists()


def test_a_target_without_locks_is_restored_into_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_fd: int, _operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for end in ("1", "lock"):
        (tmp_path / f".backupfs-0123456789ab-{end}").touch()
    target = Target(os.fsencode(tmp_path), lambda path, reason: None)
    lock = RunLock(target)
    assert lock.remove_abandoned() == 0
    target.close()
    lock.release()
    assert sorted(os.listdir(tmp_path)) == [".backupfs-0123456789ab-1", ".backupfs-0123456789ab-lock"]
