"""put and rm as users meet them: words, reports, exit codes, and a live mount."""

import json
import os
import time
from pathlib import Path

import pytest

from tests.cli.test_commands import Cli
from tests.cli.test_images import disk

__all__ = ["disk"]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    made = Cli(tmp_path)
    made("init")
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "below").mkdir(parents=True)
    (folder / "one").write_bytes(b"one")
    (folder / "below" / "two").write_bytes(os.urandom(100_000))
    return folder


def test_a_file_is_put_and_removed_by_its_path(cli: Cli, source: Path, tmp_path: Path) -> None:
    cli("backup", source, "--tag", "daily")
    (tmp_path / "new").write_bytes(b"new")
    said = cli("put", f"latest:{source}/one", tmp_path / "new")
    assert "2 (97.7 KiB): 0 new, 1 changed, 1 unchanged, compared with" in said
    assert cli.run("dump", f"latest:{source}/one").stdout == b"new"
    *_, summary = cli.json("put", "-p", "--tag", "mended", f"latest:{source}/x/y", tmp_path / "new")
    first, second, third = cli.json("snapshots")
    assert {**summary["snapshot"], "verifications": []} == third
    assert (third["tags"], third["parent"], second["parent"]) == (["daily", "mended"], second["id"], first["id"])
    assert summary["files_new"] == 1
    cli("rm", "-R", f"latest:{source}/one", f"{source}/below", f"latest:{source}/x/y")
    assert cli("ls", f"latest:{source}") == "x/\n"
    assert cli.run("dump", f"{first['short_id']}:{source}/one").stdout == b"one"
    assert "no damage" in cli("check", "--read-data")
    before = cli.objects()
    assert "dry run" in cli("put", "-n", f"latest:{source}/one", tmp_path / "new")
    assert "dry run" in cli("rm", "-n", f"{first['short_id']}:{source}/one")
    assert cli.objects() == before


def test_what_ends_as_a_folder_must_be_one(cli: Cli, source: Path, tmp_path: Path) -> None:
    cli("backup", source)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/three").write_bytes(b"3")
    cli("put", f"latest:{source}/below/", tmp_path / "new")
    assert cli("ls", f"latest:{source}/below") == "three\n"
    said = cli("put", f"latest:{source}/below/", tmp_path / "new/three", code=1)
    assert "name the file in it" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["put", "latest:/nosuch/x", "/etc/hostname"], "has no nosuch in this snapshot: --parents makes"),
        (["put", "latest", "/etc/hostname"], "give SNAP:PATH"),
        (["put", "latest:x", "/etc/hostname"], "starts with /"),
        (["put", "latest:/x", "/nosuch"], "cannot be read: No such file"),
        (["rm", "latest:/nosuch"], "/ has no nosuch in this snapshot"),
        (["rm", "ffffffff:/nosuch"], "there is no snapshot ffffffff"),
        (["rm", "latest:/nosuch", "abcdef:/x"], "of another snapshot"),
    ],
)
def test_bad_words_get_one_line(cli: Cli, source: Path, words: list[str], says: str) -> None:
    cli("backup", source)
    said = cli(*words, code=1)
    assert says in said
    assert said.count("\n") == 1


def test_the_repository_and_the_cache_are_left_out_of_what_is_put(cli: Cli, source: Path, tmp_path: Path) -> None:
    cli("backup", source)
    [*_, summary] = cli.json("put", f"latest:{source}/all", tmp_path)
    assert summary["left_out"] >= 1
    assert summary["files_skipped"] == 0
    assert "no damage" in cli("check", "--read-data")


@pytest.mark.fuse
def test_a_live_mount_shows_the_child(cli: Cli, source: Path, tmp_path: Path) -> None:
    cli("backup", source)
    (tmp_path / "new").write_bytes(b"new")
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    cli("mount", mountpoint)
    try:
        [first] = os.listdir(mountpoint / "snapshots")
        assert (mountpoint / f"latest{source}/one").read_bytes() == b"one"
        cli("put", f"latest:{source}/one", tmp_path / "new")
        deadline = time.monotonic() + 20
        while len(os.listdir(mountpoint / "snapshots")) == 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (mountpoint / f"latest{source}/one").read_bytes() == b"new"
        assert (mountpoint / f"snapshots/{first}{source}/one").read_bytes() == b"one"
    finally:
        cli("umount", mountpoint)
    assert json.loads(cli.run("--json", "snapshots").stdout)[1]["statistics"]["files_changed"] == 1
