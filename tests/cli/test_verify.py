"""Verifying and booting as users meet them: real file systems, real programs that check them, a real machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.boot_sector import boot_sector
from tests.cli.test_commands import Cli
from tests.processes import runs_below

MIB = 1 << 20
VOLUME = 40 * MIB


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    cli = Cli(tmp_path)
    cli("init")
    return cli


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk of one ext4 partition with files in it."""
    (tmp_path / "content").mkdir()
    (tmp_path / "content" / "large").write_bytes(os.urandom(3 * MIB))
    path = tmp_path / "vda.raw"
    with open(path, "wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["sfdisk", "-q", path], input=b"label: dos\nsize=40M\n", check=True)
    # Blocks of 1 KiB, so that there are copies of the superblock; Ubuntu's mkfs would take 4 KiB and make none.
    options = ["-b", "1024", "-E", f"offset={MIB}", "-d", tmp_path / "content"]
    subprocess.run(["mkfs.ext4", "-q", *options, path, "40M"], check=True)
    return path


def change(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def outcomes(summary: dict) -> list[tuple[int, str | None, str]]:
    return [(one["level"], one["subject"], one["result"]) for one in summary["outcomes"]]


@pytest.mark.fuse
def test_a_sound_image_passes_and_the_record_is_seen_everywhere(cli: Cli, disk: Path, tmp_path: Path) -> None:
    cli("image", disk, "--name", "web")
    [snapshot] = cli.json("snapshots")
    assert snapshot["verifications"] == []
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    cli("mount", mountpoint)
    try:
        place = mountpoint / "images/web/latest/.verify"
        assert os.listdir(place) == []
        *_, summary = cli.json("verify", "web:latest")
        assert (summary["result"], summary["level"], summary["snapshot"]) == ("passed", 2, snapshot["id"])
        assert outcomes(summary) == [(0, None, "passed"), (1, None, "passed"), (2, "vda1", "passed")]
        assert cli.json("snapshots")[0]["verifications"] == [
            {name: value for name, value in summary.items() if name != "event"}
        ]
        assert "2 passed  vda1: ext2/3/4: e2fsck finds nothing wrong" in cli("snapshots", "--verbose")
        # A mount that was there sees it, too.
        deadline = time.monotonic() + 20
        while not os.listdir(place):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        [record] = place.iterdir()
        assert record.name.endswith("-level2")
        assert sorted(path.name for path in record.iterdir()) == ["check-vda1.log", "report.txt"]
        assert "level 2  passed   vda1: ext2/3/4" in (record / "report.txt").read_text()
        assert b"e2fsck" in (record / "check-vda1.log").read_bytes()
        assert sorted(os.listdir(mountpoint / "images/web/latest")) == [".verify", "disks", "files", "volumes"]
    finally:
        cli("umount", mountpoint)
    cli("verify", "web:latest", "--level", "1", "--no-record")
    assert len(cli.json("snapshots")[0]["verifications"]) == 1
    assert "no damage found" in cli("check", "--read-data")


@pytest.mark.fuse
def test_a_broken_superblock_passes_what_reads_bytes_and_fails_what_reads_files(cli: Cli, disk: Path) -> None:
    # The count of blocks, which e2fsck compares with the size.
    change(disk, MIB + 1024 + 4, b"\xff\xff\xff\x7f")
    assert "its superblock has a wrong checksum, a copy is at byte" in cli("image", disk, "--name", "web", code=3)
    *_, summary = cli.json("verify", "web:latest", code=1)
    assert outcomes(summary) == [(0, None, "passed"), (1, None, "passed"), (2, "vda1", "failed")]
    # Wiped altogether, a copy further on still says what was there.
    change(disk, MIB, bytes(2048))
    assert "its superblock is damaged, a copy is at byte" in cli("image", disk, "--name", "web", code=3)
    *_, summary = cli.json("verify", "web:latest", code=1)
    assert outcomes(summary)[2] == (2, "vda1", "failed")
    assert "its superblock is damaged, a copy is at byte" in summary["outcomes"][2]["words"]
    assert "failed" in cli("snapshots", "--verbose")


@pytest.mark.fuse
def test_a_journal_is_replayed_on_the_scratch_copy_and_nowhere_else(cli: Cli, disk: Path, tmp_path: Path) -> None:
    # A transaction that waits in the journal: debugfs writes one, and the flag that it needs recovery.
    volume = tmp_path / "volume"
    volume.write_bytes(disk.read_bytes()[MIB : MIB + VOLUME])
    (tmp_path / "block").write_bytes(b"replayed" * 128)
    commands = f"jo\njw -b 30000 {tmp_path / 'block'}\njc\n".encode()
    subprocess.run(["debugfs", "-w", "-f", "-", volume], input=commands, check=True, capture_output=True)
    assert b"needs_recovery" in subprocess.run(["dumpe2fs", "-h", volume], capture_output=True, check=True).stdout
    change(disk, MIB, volume.read_bytes())
    cli("image", disk, "--name", "web")
    *_, summary = cli.json("verify", "web:latest")
    assert summary["outcomes"][2]["result"] == "passed"
    assert "after its journal was replayed" in summary["outcomes"][2]["words"]
    assert cli.run("dump", "web:latest:/disks/vda.raw").stdout == disk.read_bytes()


@pytest.mark.fuse
@pytest.mark.expected_log
def test_damage_of_the_repository_fails_from_the_level_that_sees_it(cli: Cli, disk: Path) -> None:
    cli("image", disk, "--name", "web")
    pack = max((cli.repository / "packs/data").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    plain = bytearray(pack.read_bytes())
    plain[len(plain) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(plain)
    *_, summary = cli.json("verify", "web:latest", code=1)
    assert outcomes(summary)[:2] == [(0, None, "passed"), (1, None, "failed")]
    pack.unlink()
    *_, summary = cli.json("verify", "web:latest", "--level", "0", code=1)
    assert outcomes(summary) == [(0, None, "failed")]
    assert "is missing" in summary["outcomes"][0]["words"]
    # Nor can it be booted: that is what came of the level, and no reason to say nothing of the others.
    *_, summary = cli.json("verify", "web:latest", "--level", "3", code=1)
    assert [one["result"] for one in summary["outcomes"]] == ["failed"] * 4
    assert "it cannot be read" in summary["outcomes"][3]["words"]
    assert len(cli.json("snapshots")[0]["verifications"]) == 3


@pytest.mark.fuse
def test_what_was_found_is_told_where_it_cannot_be_recorded(cli: Cli, disk: Path) -> None:
    """It may have taken hours."""
    cli("image", disk, "--name", "web")
    # Nothing more can be stored.
    (cli.repository / ".tmp").rmdir()
    (cli.repository / ".tmp").write_bytes(b"")
    said = cli("verify", "web:latest", code=1)
    assert "level 2  passed" in said
    assert "backupfs: failed: cannot" in said


@pytest.mark.fuse
def test_an_interrupt_from_the_terminal_is_no_fault_of_the_machine(cli: Cli, disk: Path) -> None:
    """It goes to all processes, qemu too: that it ended was told as if it could not be started."""
    cli("image", disk, "--name", "web")
    with subprocess.Popen(
        [sys.executable, "-m", "backupfs", "verify", "web:latest", "--level", "3", "--accelerator", "tcg"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=cli.environment, start_new_session=True,
    ) as command:  # fmt: skip
        deadline = time.monotonic() + 60
        while not runs_below(command.pid, "qemu") and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(command.pid, signal.SIGINT)
        _, said = command.communicate()
    assert command.returncode == 130, said
    assert b"qemu" not in said
    assert time.monotonic() < deadline


@pytest.mark.fuse
def test_levels_look_at_one_snapshot_only(cli: Cli, disk: Path, tmp_path: Path) -> None:
    """What is damaged in another snapshot's packs is not this one's."""
    cli("image", disk, "--name", "web")
    others = {path for path in (cli.repository / "packs/data").rglob("*") if path.is_file()}
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "one").write_bytes(os.urandom(100_000))
    (tmp_path / "files" / "two").write_bytes(b"two")
    cli("backup", tmp_path / "files")
    for pack in others:
        pack.unlink()
    *_, summary = cli.json("verify", "latest")
    assert outcomes(summary) == [(0, None, "passed"), (1, None, "passed"), (2, None, "passed")]
    assert "2 files, 100,003 bytes, read through the mount" in summary["outcomes"][2]["words"]
    assert cli.json("snapshots")[1]["verifications"][0]["result"] == "passed"


@pytest.mark.fuse
def test_files_that_cannot_be_read_are_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "one").write_bytes(os.urandom(100_000))
    cli("backup", tmp_path / "files")
    for pack in (cli.repository / "packs/data").rglob("*"):
        if pack.is_file():
            pack.unlink()
    *_, summary = cli.json("verify", "latest", code=1)
    assert [result for *_, result in outcomes(summary)] == ["failed", "failed", "failed"]
    assert f"{tmp_path}/files/one: Input/output error" in summary["outcomes"][2]["words"]


@pytest.mark.fuse
def test_a_machine_boots_from_the_image_and_what_it_shows_is_kept(cli: Cli, disk: Path, tmp_path: Path) -> None:
    change(disk, 0, boot_sector(b"\r\nweb1 login: "))
    cli("image", disk, "--name", "web")
    *_, summary = cli.json("verify", "web:latest", "--level", "3", "--memory", "64M", "--accelerator", "tcg")
    assert outcomes(summary)[3] == (3, "vda", "passed")
    assert "a login prompt on the console" in summary["outcomes"][3]["words"]
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    cli("mount", mountpoint)
    try:
        [record] = (mountpoint / "images/web/latest/.verify").iterdir()
        assert b"web1 login: " in (record / "console.log").read_bytes()
        assert "web1 login:" in (record / "screen.txt").read_text()
        assert (record / "screen.png").read_bytes().startswith(b"\x89PNG")
    finally:
        cli("umount", mountpoint)
    words = ("--level", "3", "--memory", "64M", "--accelerator", "tcg", "--no-record")
    *_, summary = cli.json("verify", "web:latest", "--marker", "web1 ", *words)
    assert "the marker on the console" in summary["outcomes"][3]["words"]
    *_, summary = cli.json("verify", "web:latest", "--marker", "web2 ", "--timeout", "4", *words, code=1)
    assert "no marker within 4 s" in summary["outcomes"][3]["words"]


@pytest.mark.fuse
def test_a_broken_boot_loader_fails_the_last_level_and_no_other(cli: Cli, disk: Path) -> None:
    change(disk, 510, bytes(2))
    cli("image", disk, "--name", "web")
    *_, summary = cli.json("verify", "web:latest", "--level", "3", "--memory", "64M", "--accelerator", "tcg", code=1)
    assert [one["result"] for one in summary["outcomes"] if one["level"] < 2] == ["passed", "passed"]
    assert outcomes(summary)[-1] == (3, "vda", "failed")
    assert "`No bootable device` on the screen" in summary["outcomes"][-1]["words"]


@pytest.mark.fuse
def test_boot_runs_a_machine_on_this_terminal_until_it_is_switched_off(cli: Cli, disk: Path) -> None:
    change(disk, 0, boot_sector(b"\r\nweb1 login: "))
    cli("image", disk, "--name", "web")
    process = subprocess.Popen(
        [sys.executable, "-m", "backupfs", "boot", "web:latest", "--memory", "64M", "--accelerator", "tcg"],
        env=cli.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = b""
        while b"web1 login: " not in said:
            part = os.read(process.stdout.fileno(), 4096)
            assert part, said
            said += part
        process.stdin.write(b"\x01x")
        process.stdin.flush()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
    cli("backup", disk.parent / "content")
    assert "it is one of files" in cli("boot", "latest", code=1)


@pytest.mark.fuse
def test_nothing_is_left_when_the_command_is_killed(cli: Cli, disk: Path, tmp_path: Path) -> None:
    change(disk, 0, boot_sector(b"nothing to see"))
    cli("image", disk, "--name", "web")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "backupfs", "verify", "web:latest", "--level", "3", "--accelerator", "tcg"],
        env={**cli.environment, "TMPDIR": str(temporary)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 50
        while not list(temporary.glob("backupfs-scratch-*/machine/serial")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    while list(temporary.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert str(temporary) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--level", "3"], "a snapshot of this kind has levels 0 to 2"),
        (["--level", "-1"], "has levels 0 to 2"),
        (["--memory", "3M"], "a machine takes 16M and more"),
        (["--memory", "much"], "is no size"),
    ],
)
def test_bad_words_get_one_line(cli: Cli, tmp_path: Path, words: list[str], says: str) -> None:
    (tmp_path / "files").mkdir()
    cli("backup", tmp_path / "files")
    assert says in cli("verify", "latest", *words, code=1)
