"""Freezing file systems while their disks are read: they are thawed in the end, whatever the end is."""

import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupfs.disks.source import open_disk
from backupfs.errors import SourceError
from backupfs.repository.repository import Repository
from backupfs.stores.directory import DirectoryStore
from backupfs.usecases import image as image_module
from backupfs.usecases import image_freeze
from backupfs.usecases.events import Event, Remark
from backupfs.usecases.image_freeze import frozen
from tests.builders import folders_in, ignore, new_repository
from tests.usecases.test_image import bytes_of, run_image

MIB = 1 << 20

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount and freeze")


class Disk:
    """A loop device with ext4, mounted."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "file"
        self.mountpoint = folder / "mnt"
        self.mountpoint.mkdir()
        self.file.write_bytes(bytes(24 * MIB))
        run("mkfs.ext4", "-q", "-F", self.file)
        self.device = run("losetup", "-f", "--show", self.file).decode().strip()
        run("mount", self.device, self.mountpoint)

    def is_frozen(self) -> bool:
        fd = os.open(self.mountpoint, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, image_freeze._FREEZE, 0)
        except OSError as error:
            return error.errno == errno.EBUSY
        else:
            fcntl.ioctl(fd, image_freeze._THAW, 0)
            return False
        finally:
            os.close(fd)

    def close(self) -> None:
        subprocess.run(["fsfreeze", "-u", self.mountpoint], check=False, capture_output=True)
        deadline = time.monotonic() + 10
        # The process that thaws has it open for a moment longer.
        while subprocess.run(["umount", self.mountpoint], check=False, capture_output=True).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        run("losetup", "-d", self.device)


def run(*words: str | Path) -> bytes:
    return subprocess.run(words, check=True, capture_output=True).stdout


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    try:
        yield disk
    finally:
        disk.close()


def test_a_mounted_file_system_is_frozen_while_its_disk_is_read(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = image_module.read_layout

    def looking(*arguments: object) -> object:
        seen.append(disk.is_frozen())
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(image_module, "read_layout", looking)
    (disk.mountpoint / "file").write_bytes(b"not yet on the disk")
    repository, events = new_repository(), list[Event]()
    snapshot = run_image(repository, disk.device, freezes=True, skips_free=True, report=events.append).snapshot
    assert snapshot is not None
    assert seen == [True]
    assert not disk.is_frozen()
    remarks = [event.text for event in events if isinstance(event, Remark)]
    assert f"frozen while the disks are read: {disk.mountpoint}" in remarks
    # A frozen ext4 has an empty journal: nothing has to be replayed, and its free space can be told.
    assert not [text for text in remarks if "not unmounted" in text]
    assert [text for text in remarks if "free space are left out" in text]
    name = os.path.basename(disk.device)
    assert bytes_of(repository, snapshot, f"/files/{name}/file") == b"not yet on the disk"


def test_what_a_mounted_file_system_wrote_past_the_kernels_memory_of_a_device_is_read(disk: Disk) -> None:
    """A device that was read once stays in memory while it is mounted; files go to the disk by another way."""
    name = os.path.basename(disk.device)
    repository = new_repository()
    for number in range(2):
        (disk.mountpoint / "file").write_bytes(content := os.urandom(2 * MIB))
        os.sync()
        snapshot = run_image(repository, disk.device, freezes=number > 0).snapshot
        assert snapshot is not None
        assert bytes_of(repository, snapshot, f"/files/{name}/file") == content
        fd = os.open(disk.mountpoint / "file", os.O_WRONLY)
        # In the same place, so that nothing but the file's own bytes changes.
        os.pwrite(fd, content := os.urandom(2 * MIB), 0)
        os.fsync(fd)
        os.close(fd)
        snapshot = run_image(repository, disk.device, freezes=number > 0).snapshot
        assert snapshot is not None
        stored = hashlib.sha256(bytes_of(repository, snapshot, f"/files/{name}/file")).digest()
        assert stored == hashlib.sha256(content).digest()


def test_it_is_thawed_after_errors(disk: Disk) -> None:
    source = open_disk(os.fsencode(disk.device))
    seen: list[bool] = []

    def fails(error: type[BaseException]) -> None:
        with frozen([source], new_repository(), ignore):
            seen.append(disk.is_frozen())
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            fails(error)
        assert not disk.is_frozen()
    assert seen == [True, True]
    source.close()


SCRIPT = """
import os, sys, time
from backupfs.disks.source import open_disk
from backupfs.usecases.image_freeze import frozen
from tests.builders import ignore, new_repository
with frozen([open_disk(os.fsencode(sys.argv[1]))], new_repository(), ignore):
    if os.fork() == 0:
        time.sleep(0.2)  # a scanning process, which goes with its leader
        os._exit(0)
    print("frozen", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_it_is_thawed_when_the_run_is_killed(number: signal.Signals, disk: Disk) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, disk.device], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        cwd=Path(__file__).parent.parent.parent,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "frozen\n"
    assert disk.is_frozen()
    process.send_signal(number)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while disk.is_frozen():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_run_writes_to_is_not_frozen(disk: Disk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (disk.mountpoint / "r").mkdir()
    (tmp_path / "link").symlink_to(disk.mountpoint / "r")
    source = open_disk(os.fsencode(disk.device))

    def refused(repository: Repository) -> str:
        with (
            pytest.raises(SourceError, match=r"cannot be frozen: .*--before") as error,
            frozen([source], repository, ignore),
        ):
            raise AssertionError("it runs")
        assert not disk.is_frozen()
        return str(error.value)

    assert "the repository is on it" in refused(new_repository(DirectoryStore(str(tmp_path / "link"))))
    assert "the cache is on it" in refused(new_repository(folders=folders_in(disk.mountpoint)))
    monkeypatch.setattr(image_freeze.tempfile, "gettempdir", lambda: str(disk.mountpoint))
    assert "the folder for temporary files is on it" in refused(new_repository())
    monkeypatch.undo()
    # By way of another loop device, whose file is on it.
    inner_folder = tmp_path / "inner"
    inner_folder.mkdir()
    (disk.mountpoint / "file").write_bytes(bytes(8 * MIB))
    run("mkfs.ext4", "-q", "-F", disk.mountpoint / "file")
    run("mount", "-o", "loop", disk.mountpoint / "file", inner_folder)
    try:
        (inner_folder / "r").mkdir()
        assert "the repository is on it" in refused(new_repository(DirectoryStore(str(inner_folder / "r"))))
    finally:
        run("umount", inner_folder)
    source.close()


def test_what_somebody_else_froze_is_left_to_them(disk: Disk) -> None:
    run("fsfreeze", "-f", disk.mountpoint)
    source = open_disk(os.fsencode(disk.device))
    with pytest.raises(SourceError, match="it is frozen already"), frozen([source], new_repository(), ignore):
        raise AssertionError("it runs")
    source.close()
    assert disk.is_frozen()


def test_where_nothing_is_mounted_nothing_is_frozen_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(100_000))
    events: list[Event] = []
    run_image(new_repository(), path, freezes=True, report=events.append)
    told = [event.text for event in events if isinstance(event, Remark)]
    assert sum("nothing is frozen" in text for text in told) == 1
