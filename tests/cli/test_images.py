"""Images as users meet them: the command line, and the mount with tools that know disks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backupfs.disks.source import open_disk
from tests.cli.test_commands import Cli
from tests.disks.test_luks import PASSPHRASE, encrypted
from tests.disks.test_source import damage

MIB = 1 << 20


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    cli = Cli(tmp_path)
    cli("init")
    return cli


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk of one ext4 partition with a file in it."""
    (tmp_path / "content").mkdir()
    (tmp_path / "content" / "hosts").write_bytes(b"127.0.0.1 localhost\n")
    (tmp_path / "content" / "large").write_bytes(os.urandom(3 * MIB))
    path = tmp_path / "web1.raw"
    with open(path, "wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["sfdisk", "-q", path], input=b"label: gpt\nsize=40M\n", check=True)
    subprocess.run(["mkfs.ext4", "-q", "-E", f"offset={MIB}", "-d", tmp_path / "content", path, "40M"], check=True)
    return path


@pytest.mark.fuse
def test_the_mount_shows_disks_and_volumes_that_tools_take(cli: Cli, disk: Path, tmp_path: Path) -> None:
    said = cli("image", disk, "--name", "web")
    assert "image web, snapshot" in said
    assert f"disk     web1 (64.0 MiB, raw) from {disk}" in said
    cli("image", f"sda={disk}", "--name", "web")
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    cli("mount", mountpoint)
    try:
        assert sorted(os.listdir(mountpoint)) == ["hosts", "ids", "images", "snapshots", "tags"]
        latest = mountpoint / "images/web/latest"
        assert len(os.listdir(mountpoint / "images/web")) == 3
        assert sorted(os.listdir(latest)) == [".verify", "disks", "files", "volumes"]
        assert os.listdir(latest / "disks") == ["sda.raw"]
        assert (latest / "disks/sda.raw").read_bytes() == disk.read_bytes()
        status = os.stat(latest / "disks/sda.raw")
        assert (status.st_size, 3 * MIB <= status.st_blocks * 512 < 8 * MIB) == (64 * MIB, True)
        status = os.stat(latest / "volumes/sda1.raw")
        assert (status.st_size, 3 * MIB <= status.st_blocks * 512 < 8 * MIB) == (40 * MIB, True)
        subprocess.run(["e2fsck", "-fn", latest / "volumes/sda1.raw"], check=True, capture_output=True)
        found = subprocess.run(
            ["debugfs", "-R", "cat hosts", latest / "volumes/sda1.raw"], capture_output=True, check=True
        )
        assert found.stdout == b"127.0.0.1 localhost\n"
        for snapshot, name in zip(cli.json("snapshots"), ("web1", "sda"), strict=True):
            assert os.listdir(mountpoint / "ids" / snapshot["short_id"] / "disks") == [f"{name}.raw"]
    finally:
        cli("umount", mountpoint)


def test_images_are_listed_and_read_by_name(cli: Cli, disk: Path) -> None:
    cli("image", disk, "--name", "web", "--tag", "monthly")
    [snapshot] = cli.json("snapshots")
    assert (snapshot["kind"], snapshot["image"]) == ("image", "web")
    assert snapshot["disks"] == [{"name": "web1", "size": 64 * MIB, "format": "raw"}]
    assert f"image web: {disk}" in cli("snapshots")
    assert "/volumes/web1p1.raw" in cli("ls", "-R", "web:latest")
    assert cli.run("dump", "web:latest:/disks/web1.raw").stdout == disk.read_bytes()
    assert "no file snapshot" in cli("ls", "latest", code=1)
    summary = cli.json("image", disk, "--name", "web")[-1]
    assert (summary["disks"], summary["size"], summary["chunks_new"]) == (1, 64 * MIB, 0)
    assert summary["parent"] == snapshot["id"]
    assert "dry run" in cli("image", "--dry-run", disk)
    assert len(cli.json("snapshots")) == 2
    cli("forget", snapshot["short_id"])
    assert cli.run("dump", "web:latest:/disks/web1.raw").stdout == disk.read_bytes()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give a DISK"),
        (["/nosuch"], "cannot be opened: No such file"),
        (["/"], "is no disk"),
        (["a b=/etc/passwd"], "cannot be the name of a disk"),
        (["/etc/passwd", "--format", "qcow"], "the format is one of raw, qcow2, "),
        (["/etc/passwd", "--format", "vda=qcow2"], "there is no disk vda among those given"),
    ],
)
def test_bad_words_get_one_line(cli: Cli, words: list[str], says: str) -> None:
    assert says in cli("image", *words, code=1)


def test_a_file_is_read_in_the_format_that_is_said_and_names_what_is_allowed(cli: Cli, tmp_path: Path) -> None:
    folder, bases = tmp_path / "disks", tmp_path / "bases"
    folder.mkdir()
    bases.mkdir()
    (bases / "base.raw").write_bytes(b"base" * MIB)
    top = folder / "guest.raw"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", bases / "base.raw", "-F", "raw", top], check=True)
    said = cli("image", top, "--name", "raw")
    assert "begins like qcow2 and is stored as a raw disk" in said
    assert "--format guest=qcow2" in said
    cli("export", "raw:latest:guest", tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == top.read_bytes()
    for option in ("qcow2", "guest=qcow2"):
        assert f"--backing-folder {bases} allows that" in cli("image", top, "--format", option, code=1)
    other = f"other={bases / 'base.raw'}"
    said = cli("image", top, other, "--name", "q", "--format", "guest=qcow2", "--backing-folder", bases)
    assert f"is made of {top}, {bases / 'base.raw'}" in said
    cli("export", "q:latest:guest", tmp_path / "read")
    assert (tmp_path / "read").read_bytes() == (bases / "base.raw").read_bytes()
    said = cli("image", top, other, "--format", "raw", "--format", "other=raw")
    assert "begins like" not in said


def test_a_disk_goes_back_to_where_it_came_from(cli: Cli, disk: Path, tmp_path: Path) -> None:
    cli("image", disk, "--name", "web")
    plain = disk.read_bytes()
    with open(disk, "r+b") as file:
        file.seek(5 * MIB)
        file.write(b"an accident")
    assert "differs in" in cli("restore", "--image", "--dry-run", "web:latest", disk)
    assert "verified all of it" in cli("restore", "--image", "web:latest:web1", disk)
    assert disk.read_bytes() == plain
    [snapshot] = cli.json("snapshots")
    *_, summary = cli.json("restore", "--image", f"{snapshot['short_id']}:/disks/web1.raw", tmp_path / "out")
    assert (summary["size"], summary["verified"]) == (len(plain), len(plain))
    assert (tmp_path / "out").read_bytes() == plain
    assert "no disk vda" in cli("restore", "--image", "web:latest:vda", tmp_path / "out", code=1)


def test_nothing_is_written_into_the_repository_or_the_cache(cli: Cli, disk: Path, tmp_path: Path) -> None:
    cli("image", disk, "--name", "web")
    repository, cache, state = cli.repository, tmp_path / "cache", tmp_path / "state" / "backupfs"
    assert cache.is_dir()
    assert state.is_dir()
    (tmp_path / "link").symlink_to(repository)
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    for target in (
        repository / "config", repository / "new", tmp_path / "link" / "config", repository / "packs" / "new" / "x",
        repository, cache / "new", state / "new",
    ):  # fmt: skip
        for words in (
            ("restore", "--image", "web:latest", target), ("restore", "web:latest:/disks", target),
            ("export", "web:latest", target), ("export", "web:latest", target, "--format", "qcow2"),
        ):  # fmt: skip
            assert "backupfs's own" in cli(*words, code=1)
    # Beside it is fine.
    cli("export", "web:latest", repository.parent / "beside.raw")
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before


def test_commands_run_before_disks_are_opened_and_after_they_were_read(cli: Cli, disk: Path, tmp_path: Path) -> None:
    # The first one makes the disk, as a snapshot of a volume would be made.
    snapshot, log = tmp_path / "snapshot.raw", tmp_path / "log"
    cli(
        "image", snapshot, "--before", f"cp {disk} {snapshot}; echo before >>{log}",
        "--after", f"echo after >>{log}; rm {snapshot}",
    )  # fmt: skip
    assert log.read_text() == "before\nafter\n"
    assert not snapshot.exists()
    said = cli("image", disk, "--before", "exit 7", "--after", f"echo undone >>{log}", code=1)
    assert "the command before the image ended with 7, so no disk was read" in said
    assert "the command after the image ended with 3" in cli("image", disk, "--after", "exit 3", code=3)
    assert "/nosuch cannot be opened" in cli("image", "/nosuch", "--after", f"echo failed >>{log}", code=1)
    assert log.read_text() == "before\nafter\nundone\nfailed\n"
    done = cli.run("--json", "image", disk, "--before", "echo words")
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()][-1] == "summary"
    assert len(cli.json("snapshots")) == 3


def test_the_command_after_is_run_where_the_one_before_was_interrupted(cli: Cli, disk: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = "--before", f"echo frozen >>{log}; exec sleep 100", "--after", f"echo thawed >>{log}"
    running = subprocess.Popen(
        [sys.executable, "-m", "backupfs", "image", disk, *words], env=cli.environment, stderr=subprocess.PIPE
    )
    while not log.exists() or not log.read_text():
        assert running.poll() is None
        time.sleep(0.01)
    running.terminate()
    _, said = running.communicate(timeout=30)
    assert running.returncode == 130, said
    assert log.read_text() == "frozen\nthawed\n"


@pytest.mark.parametrize("form", ["raw", "qcow2", "vmdk", "vhd", "vhdx", "vdi"])
def test_a_disk_is_exported_in_formats_of_virtual_machines(form: str, cli: Cli, disk: Path, tmp_path: Path) -> None:
    cli("image", disk, "--name", "web")
    target = tmp_path / "out"
    said = cli("export", "web:latest", target, "--format", form)
    assert said.startswith("exported: wrote ")
    assert "verified all of it" in said
    source = open_disk(os.fsencode(target))
    assert source.read(0, source.size) == disk.read_bytes()
    assert source.form == {"vhd": "vpc"}.get(form, form)
    source.close()
    assert sorted(path.name for path in tmp_path.iterdir() if "backupfs" in path.name) == []
    assert "is there already" in cli("export", "web:latest:web1", target, code=1)
    assert "choose one of raw" in cli("export", "web:latest", tmp_path / "other", "--format", "zip", code=1)


def test_a_map_of_what_changed_saves_reading_the_rest(cli: Cli, disk: Path, tmp_path: Path) -> None:
    cli("image", disk, "--name", "web")
    [snapshot] = cli.json("snapshots")
    changes = tmp_path / "changes"
    # As a command before the image writes it.
    text = f"since {snapshot['short_id']}\n0 {disk.stat().st_size} same\n"
    said = cli("image", disk, "--name", "web", "--hints", changes, "--before", f"printf '{text}' >{changes}")
    assert "need not be read; 64 chunks of them, chosen by chance, were" in said
    changes.write_text(f"0 {disk.stat().st_size} same\n")
    events = cli.json("image", f"web1={disk}", "--hints", f"web1={changes}", "--hints-since", snapshot["short_id"])
    assert (events[-1]["parent"], events[-1]["chunks_new"]) == (snapshot["id"], 0)
    assert "not as in which image" in cli("image", disk, "--hints", changes, code=1)
    assert "8 digits or more" in cli("image", disk, "--hints", changes, "--hints-since", "latest", code=1)
    assert "says what --hints counts from" in cli("image", disk, "--hints-since", "01234567", code=1)
    changes.write_text("0 all same\n")
    assert "line 1: 0 all same is not START LENGTH" in cli("image", disk, "--hints", changes, code=1)
    assert len(cli.json("snapshots")) == 3
    disk_map = subprocess.run(["qemu-img", "map", "--output=json", disk], capture_output=True, check=True).stdout
    changes.write_bytes(disk_map)
    assert "by the map" in cli("image", disk, "--hints", changes)
    assert cli.run("dump", "web:latest:/disks/web1.raw").stdout == disk.read_bytes()


def test_what_is_encrypted_is_shown_to_those_who_give_the_passphrase(cli: Cli, tmp_path: Path) -> None:
    plain = os.urandom(MIB)
    disk, file, key = tmp_path / "web1.raw", tmp_path / "first line", tmp_path / "key"
    disk.write_bytes(encrypted(tmp_path, plain))
    key.write_bytes(PASSPHRASE)
    file.write_bytes(PASSPHRASE + b"\nanother line\n")
    assert "no passphrase was given" in cli("image", disk, "--name", "web")
    assert "none of the passphrases" in cli("image", disk, "--name", "web", code=3, BACKUPFS_LUKS_PASSPHRASE="another")
    assert "web1_crypt" in cli("dump", "web:latest:/volumes/web1_crypt.raw", code=1)
    for words, environment in (
        (["--luks-passphrase-file", file], {}),
        (["--luks-key-file", key], {}),
        ([], {"BACKUPFS_LUKS_PASSPHRASE": PASSPHRASE.decode()}),
    ):
        said = cli("image", disk, "--name", f"web{len(environment)}", *words, **environment)
        assert "passphrase" not in said
        shown = cli.run("dump", f"web{len(environment)}:latest:/volumes/web1_crypt.raw").stdout
        assert shown[:MIB] == plain
    assert "--luks-ask needs a terminal" in cli("image", disk, "--luks-ask", code=1)
    assert "cannot be read" in cli("image", disk, "--luks-key-file", tmp_path / "none", code=1)
    assert "is empty" in cli("image", disk, "--luks-key-file", "/dev/null", code=1)


@pytest.mark.fuse
def test_free_space_is_left_out_when_that_is_wanted(cli: Cli, disk: Path) -> None:
    with open(disk, "r+b") as file:
        # Where mkfs left a hole that it keeps free: the end of the partition.
        file.seek(40 * MIB)
        file.write(os.urandom(MIB - 4096))
    cli("image", disk, "--name", "web")
    said = cli("image", disk, "--name", "web", "--skip-free")
    assert "of web11, " in said or "of web1p1, " in said
    whole, left = cli.json("snapshots")
    assert (whole["free_left_out"], left["free_left_out"]) == (False, True)
    dumped = cli.run("dump", "web:latest:/disks/web1.raw").stdout
    assert dumped[40 * MIB : 41 * MIB - 4096] == bytes(MIB - 4096)
    assert dumped[:MIB] == disk.read_bytes()[:MIB]
    assert dumped[41 * MIB :] == disk.read_bytes()[41 * MIB :]


def test_an_image_of_a_damaged_file_with_a_disk_ends_with_3_and_promises_nothing(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "web.vdi"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vdi", path, "40M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 7 0 8M", path], check=True, capture_output=True)
    damage(path, "vdi")
    said = cli("image", path, "--name", "web", code=3)
    assert "skipped web: it is damaged by the word of `qemu-img check`: ERROR" in said
    assert "complete" not in said
    assert "web: it is damaged by" in cli("dump", "web:latest:/files/.unread")
    os.truncate(path, path.stat().st_size - MIB)
    said = cli("image", path, "--name", "web", code=1)
    assert f"the disk {path} cannot be read: it is cut short: 1,048,576 bytes of it are missing" in said
