"""Images that are changed: children by put, rm and edit, parents as they were, and what an abandoned edit leaves."""

import fcntl
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.test_commands import Cli
from tests.disks.test_luks import PASSPHRASE, encrypted

MIB = 1 << 20


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    cli = Cli(tmp_path)
    cli("init")
    return cli


@pytest.fixture
def disk(cli: Cli, tmp_path: Path) -> Path:
    """A disk with an ext4 and a FAT partition, of which there is an image."""
    folder = tmp_path / "content"
    (folder / "etc" / "deep").mkdir(parents=True)
    (folder / "etc" / "hosts").write_bytes(b"127.0.0.1 localhost\n")
    (folder / "etc" / "deep" / "one").write_bytes(os.urandom(5000))
    (folder / "large").write_bytes(os.urandom(3 * MIB))
    path = tmp_path / "vda.raw"
    with open(path, "wb") as file:
        file.truncate(100 * MIB)
    subprocess.run(["sfdisk", "-q", path], input=b"label: gpt\nsize=40M\nsize=40M\n", check=True)
    subprocess.run(["mkfs.ext4", "-q", "-E", f"offset={MIB}", "-d", folder, path, "40M"], check=True)
    subprocess.run(
        ["mkfs.fat", "-F", "32", "--offset", str(41 * MIB // 512), path, str(40 << 10)], check=True, capture_output=True
    )
    cli("image", path, "--name", "web", "--tag", "nightly")
    return path


def stored(cli: Cli) -> int:
    return sum(path.stat().st_size for path in cli.repository.rglob("*") if path.is_file())


@pytest.mark.fuse
def test_a_file_is_put_and_removed_and_the_image_stays_as_it_was(cli: Cli, disk: Path, tmp_path: Path) -> None:
    plain = disk.read_bytes()
    [parent] = cli.json("snapshots")
    new = tmp_path / "new"
    new.write_bytes(b"10.0.0.1 web\n")
    new.chmod(0o640)
    before = stored(cli)
    *_, summary = cli.json("put", "web:latest:/files/vda1/etc/hosts", new, "--tag", "mended")
    # What changed: blocks of metadata, the file, and pages of the tree.
    assert stored(cli) - before < MIB
    child = cli.json("snapshots")[-1]
    assert (child["parent"], child["image"], child["host"]) == (parent["id"], "web", parent["host"])
    assert (child["tags"], child["paths"]) == (["mended", "nightly"], parent["paths"])
    assert summary["snapshot"]["id"] == child["id"]
    assert cli.run("dump", "web:latest:/files/vda1/etc/hosts").stdout == b"10.0.0.1 web\n"
    assert "-rw-r-----" in cli("ls", "-l", "web:latest:/files/vda1/etc/hosts")
    assert cli.run("dump", f"{parent['id']}:/disks/vda.raw").stdout == plain
    assert cli.run("dump", f"{parent['id']}:/files/vda1/etc/hosts").stdout == b"127.0.0.1 localhost\n"
    cli("put", "--parents", "web:latest:/files/vda1/a/b/c", new)
    cli("put", "web:latest:/files/vda2/Autoexec file.bat", new)
    cli("put", "web:latest:/files/vda1/etc/deep", tmp_path / "content" / "etc")
    cli("rm", "web:latest:/files/vda1/large", "/files/vda1/a/b/c")
    cli("rm", "-R", "web:latest:/files/vda1/a")
    names = cli("ls", "-R", "web:latest:/files").split()
    assert "/files/vda1/etc/deep/deep/one" in names
    assert "/files/vda1/a/" not in names
    assert "/files/vda1/large" not in names
    assert cli.run("dump", "web:latest:/files/vda2/Autoexec file.bat").stdout == b"10.0.0.1 web\n"
    *_, verified = cli.json("verify", "web:latest")
    assert [one["result"] for one in verified["outcomes"]] == ["passed"] * 4
    assert "no damage found" in cli("check", "--read-data")
    # Each stands alone.
    cli("forget", parent["id"])
    assert cli.run("dump", "web:latest:/files/vda1/etc/hosts").stdout == b"10.0.0.1 web\n"


@pytest.mark.fuse
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["put", "web:latest:/files/vda1/no/such", "new"], "--parents makes what is missing"),
        (["put", "web:latest:/files/vda9/x", "new"], "has no vda9"),
        (["put", "web:latest:/disks/vda.raw", "new"], "only what is below /files/VOLUME"),
        (["put", "web:latest:/files/vda1/etc", "new"], "folder"),
        (["put", "web:latest:/files/vda1/x", "nosuch"], "nosuch"),
        (["rm", "web:latest:/files/vda1/etc"], "-R removes it"),
        (["rm", "web:latest:/files/vda1/nosuch"], "has no nosuch"),
        (["rm", "web:latest:/files/vda1/large", "/files/vda2/x"], "several volumes"),
        (["edit", "web:latest"], "give one of: edit SNAP DIR"),
        (["edit", "--commit", "--discard", "x"], "give one of: edit SNAP DIR"),
        (["edit", "--commit", "content"], "no backupfs is mounted"),
        (["edit", "--discard", "content"], "no backupfs is mounted"),
        (["edit", "web:latest", "nosuch"], "there is no directory"),
        (["edit", "web:latest", "--run", "true"], "nothing was changed"),
        (["edit", "web:latest", "--run", "exit 5"], "the command ended with 5, so no child was made"),
    ],
)
def test_bad_words_get_one_line_and_make_no_child(
    words: list[str], says: str, cli: Cli, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").write_bytes(b"new")
    monkeypatch.chdir(tmp_path)
    said = cli(*words, code=1)
    assert says in said
    assert len(cli.json("snapshots")) == 1


@pytest.mark.fuse
def test_an_edit_is_committed_from_its_mount(cli: Cli, disk: Path, tmp_path: Path) -> None:
    place = tmp_path / "edit"
    place.mkdir()
    said = cli("edit", "web:latest", place)
    assert f"`backupfs edit --commit {place}`" in said
    (tmp_path / "new").write_bytes(b"new")
    commands = f"write {tmp_path / 'new'} written\n".encode()
    subprocess.run(
        ["debugfs", "-w", "-f", "-", place / "volumes/vda1.raw"], input=commands, check=True, capture_output=True
    )
    assert "no copy to edit" not in cli("edit", "--commit", place)
    assert not list(place.iterdir())
    assert cli.run("dump", "web:latest:/files/vda1/written").stdout == b"new"
    assert len(cli.json("snapshots")) == 2
    # A mount of snapshots is no edit.
    cli("mount", place)
    assert "is no copy to edit" in cli("edit", "--commit", place, code=1)
    cli("umount", place)


@pytest.mark.fuse
def test_what_is_written_anywhere_is_in_the_child(cli: Cli, disk: Path, tmp_path: Path) -> None:
    """Partition table, gaps and both partitions, through disks and volumes."""
    places = ((0, "disks/vda.raw", 7), (0, "disks/vda.raw", 85 * MIB), (41 * MIB, "volumes/vda2.raw", 30 * MIB))
    writes = [
        f"printf changed | dd of=$BACKUPFS_EDIT/{name} bs=1 seek={at} conv=notrunc status=none"
        for _, name, at in places
    ]
    cli("edit", "web:latest", "--run", " && ".join(writes))
    plain = bytearray(disk.read_bytes())
    for base, _, at in places:
        plain[base + at : base + at + 7] = b"changed"
    assert cli.run("dump", "web:latest:/disks/vda.raw").stdout == plain


@pytest.mark.fuse
def test_who_changes_an_earlier_image_is_told_of_later_ones(cli: Cli, disk: Path, tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    [first] = cli.json("snapshots")
    assert "a later image" not in cli("put", "web:latest:/files/vda1/one", tmp_path / "new")
    second = cli.json("snapshots")[-1]
    said = cli("put", f"{first['id']}:/files/vda1/two", tmp_path / "new")
    later = f"{second['short_id']} is a later image of web than {first['short_id']}"
    assert f"{later}: what was changed there is not in this child" in said
    assert f" compared with {first['short_id']}," in cli("snapshots", "--verbose")


@pytest.mark.fuse
@pytest.mark.parametrize(
    ("block", "says"), [(1024, "is not sound, so no child was made"), (4096, "is no file system any more")]
)
def test_a_file_system_that_is_broken_by_an_edit_makes_no_child(
    block: int, says: str, cli: Cli, disk: Path, tmp_path: Path
) -> None:
    # So small, it has copies of its superblock with small blocks only.
    options = ["-b", str(block), "-E", f"offset={MIB}", "-d", tmp_path / "content"]
    subprocess.run(["mkfs.ext4", "-q", "-F", *options, disk, "40M"], check=True)
    [first] = cli.json("snapshots")
    cli("image", disk, "--name", "web")
    cli("forget", first["id"])
    wipe = "dd if=/dev/zero of=$BACKUPFS_EDIT/volumes/vda1.raw bs=1k seek=1 count=1 conv=notrunc status=none"
    assert says in cli("edit", "web:latest", "--run", wipe, code=1)
    assert len(cli.json("snapshots")) == 1
    cli("edit", "web:latest", "--unchecked", "--run", wipe)
    assert len(cli.json("snapshots")) == 2


@pytest.mark.fuse
def test_an_abandoned_edit_leaves_nothing(cli: Cli, disk: Path, tmp_path: Path) -> None:
    place = tmp_path / "edit"
    place.mkdir()
    before = cli.objects()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    cli.environment["TMPDIR"] = str(temporary)
    for end in ("discard", "umount", "kill"):
        [started] = cli.json("edit", "web:latest", place)
        with open(place / "disks/vda.raw", "r+b") as file:
            file.write(b"written")
        if end == "discard":
            cli("edit", "--discard", place)
        elif end == "umount":
            cli("umount", place)
        else:
            os.kill(started["pid"], signal.SIGKILL)
            deadline = time.monotonic() + 20
            while subprocess.run(["umount", place], capture_output=True).returncode:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert cli.objects() == before
        assert not list(temporary.iterdir())
        assert not list(place.iterdir())
    assert cli.run("dump", "web:latest:/disks/vda.raw").stdout == disk.read_bytes()


@pytest.mark.fuse
def test_what_is_encrypted_is_changed_within_and_stays_encrypted(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "content" / "etc").mkdir(parents=True)
    (tmp_path / "content" / "etc" / "hosts").write_bytes(b"127.0.0.1 localhost\n")
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(24 * MIB))
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-d", tmp_path / "content", plain], check=True)
    disk = tmp_path / "vda.raw"
    disk.write_bytes(encrypted(tmp_path, plain.read_bytes()))
    (tmp_path / "key").write_bytes(PASSPHRASE)
    cli("image", disk, "--name", "web", "--luks-key-file", tmp_path / "key")
    new = tmp_path / "new"
    new.write_bytes(b"10.0.0.1 web\n")
    # The child needs no passphrase: its parent has the key.
    said = cli("put", "web:latest:/files/vda_crypt/etc/hosts", new)
    assert "passphrase" not in said
    assert cli.run("dump", "web:latest:/files/vda_crypt/etc/hosts").stdout == b"10.0.0.1 web\n"
    changed = tmp_path / "changed.raw"
    changed.write_bytes(cli.run("dump", "web:latest:/disks/vda.raw").stdout)
    assert b"10.0.0.1 web" not in changed.read_bytes()
    cli("image", changed, "--name", "other", "--luks-key-file", tmp_path / "key")
    assert cli.run("dump", "other:latest:/files/changed_crypt/etc/hosts").stdout == b"10.0.0.1 web\n"
    (tmp_path / "volume").write_bytes(cli.run("dump", "other:latest:/volumes/changed_crypt.raw").stdout)
    subprocess.run(["e2fsck", "-fn", tmp_path / "volume"], check=True, capture_output=True)


@pytest.mark.fuse
def test_a_copy_that_is_in_use_makes_no_child(cli: Cli, disk: Path, tmp_path: Path) -> None:
    """What is written meanwhile would be in it in parts; and a child was made before it was said that none could be."""
    place = tmp_path / "edit"
    place.mkdir()
    cli("edit", "web:latest", place)
    with subprocess.Popen(
        ["sh", "-c", f"exec 7>>'{place}/disks/vda.raw'; printf x >&7; echo; read end"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        user.stdout.readline()
        with open(place / "disks/vda.raw", "r+b") as file:
            file.write(b"written")
        assert f"is in use by process {user.pid} (sh)" in cli("edit", "--commit", place, code=1)
        user.stdin.close()
    assert len(cli.json("snapshots")) == 1
    with open(place / "changes/vda.map") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process makes the child" in cli("edit", "--commit", place, code=1)
    cli("edit", "--commit", place)
    assert len(cli.json("snapshots")) == 2


@pytest.mark.fuse
def test_an_edit_that_cannot_be_committed_says_what_remains(cli: Cli, disk: Path, tmp_path: Path) -> None:
    place = tmp_path / "edit"
    place.mkdir()
    [parent] = cli.json("snapshots")
    [started] = cli.json("edit", "web:latest", place)
    with open(place / "disks/vda.raw", "r+b") as file:
        file.write(b"written")
    cli("forget", parent["id"])
    assert f"`backupfs image {place}/disks/*.raw` keeps" in cli("edit", "--commit", place, code=1)
    cli("image", place / "disks/vda.raw", "--name", "web")
    assert cli.run("dump", "web:latest:/disks/vda.raw").stdout[:7] == b"written"
    os.kill(started["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while "what was written is lost" not in cli("edit", "--commit", place, code=1):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    cli("edit", "--discard", place)
    # Other mounts are not to be discarded by mistake.
    cli("mount", place)
    assert "is no copy to edit" in cli("edit", "--discard", place, code=1)
    cli("umount", place)


@pytest.mark.fuse
@pytest.mark.expected_log
def test_damage_of_the_repository_is_not_told_as_of_the_disk(cli: Cli, disk: Path, tmp_path: Path) -> None:
    """The disk may be on another machine, and long gone."""
    for pack in (cli.repository / "packs/data").rglob("*"):
        if pack.is_file():
            pack.unlink()
    place = tmp_path / "edit"
    place.mkdir()
    cli("edit", "web:latest", place)
    with open(place / "disks/vda.raw", "r+b") as file:
        file.write(bytes(8192))
    said = cli("edit", "--unchecked", "--commit", place, code=1)
    assert "the disk vda cannot be read from the repository" in said
    assert str(disk) not in said
    cli("edit", "--discard", place)
