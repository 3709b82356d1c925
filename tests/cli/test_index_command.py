"""index as users meet it: an image that was taken without readers, and a mount that shows what was found."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.test_commands import Cli
from tests.cli.test_images import disk

__all__ = ["disk"]

# As on a machine without anything that reads file systems.
BLIND = """
import sys
from backupfs.disks import explorer, readers
explorer.is_installed = lambda: False
readers.open_filesystem = lambda read, size: None
from backupfs.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    made = Cli(tmp_path)
    made("init")
    return made


def image_blindly(cli: Cli, disk: Path) -> None:
    words = [sys.executable, "-c", BLIND, "image", disk, "--name", "web"]
    done = subprocess.run(words, env=cli.environment, capture_output=True, check=True, timeout=60)
    assert b"pip install '.[images]'" in done.stderr


def test_an_image_taken_without_readers_is_indexed(cli: Cli, disk: Path, tmp_path: Path) -> None:
    image_blindly(cli, disk)
    assert cli("ls", "web:latest:/files") == ".unread\n"
    assert "the library that reads it is missing" in cli("dump", "web:latest:/files/.unread")
    said = cli("index", "web:latest")
    assert "indexed" in said
    assert "added    web1p1\n" in said
    assert "files    2 in it\n" in said
    assert cli("ls", "web:latest:/files") == "web1p1/\n"
    assert cli.run("dump", "web:latest:/files/web1p1/hosts").stdout == b"127.0.0.1 localhost\n"
    cli("restore", "--verify", "web:latest:/files/web1p1", tmp_path / "out")
    assert (tmp_path / "out/large").read_bytes() == (tmp_path / "content/large").read_bytes()
    cli("restore", "--image", "web:latest", tmp_path / "disk")
    assert (tmp_path / "disk").read_bytes() == disk.read_bytes()
    [snapshot] = cli.json("snapshots")
    assert snapshot["statistics"]["files"] == 2
    before = cli.objects()
    assert "shown already; --force looks into them again" in cli("index", "web:latest")
    *_, summary = cli.json("index", "--force", snapshot["short_id"])
    assert (summary["looked"], summary["added"], summary["renewed"]) == (True, [], [])
    assert {**summary["snapshot"], "verifications": []} == snapshot
    assert cli.objects() == before
    assert "no damage" in cli("check", "--read-data")
    # The next image takes the files from what was found.
    assert "files_skipped" in cli.json("image", disk, "--name", "web")[-1]
    assert cli.run("dump", "web:latest:/files/web1p1/hosts").stdout == b"127.0.0.1 localhost\n"


def test_what_is_no_image_gets_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a").write_bytes(b"a")
    cli("backup", tmp_path / "source")
    said = cli("index", "latest", code=1)
    assert "is a snapshot of files, which are shown already: there is nothing to index" in said
    assert said.count("\n") == 1


@pytest.mark.fuse
def test_a_live_mount_shows_what_was_found(cli: Cli, disk: Path, tmp_path: Path) -> None:
    image_blindly(cli, disk)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    cli("mount", mountpoint)
    try:
        files = mountpoint / "images/web/latest/files"
        assert os.listdir(files) == [".unread"]
        with open(mountpoint / "images/web/latest/disks/web1.raw", "rb") as opened:
            cli("index", "web:latest")
            deadline = time.monotonic() + 20
            while not (files / "web1p1").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            assert (files / "web1p1/hosts").read_bytes() == b"127.0.0.1 localhost\n"
            # Who has the disk open goes on reading it.
            assert opened.read() == disk.read_bytes()
        assert (mountpoint / "images/web/latest/disks/web1.raw").read_bytes() == disk.read_bytes()
    finally:
        cli("umount", mountpoint)
