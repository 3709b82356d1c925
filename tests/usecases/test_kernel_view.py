"""One disk with five file systems, every file of which is compared with what the kernel, or who wrote it, sees.

Mounting takes root and loop devices; where they are missing this fails and says so, as the mount tests do.
"""

import contextlib
import os
import random
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders import Directory, File, Hardlink, Sparse, Special, Symlink, Tree, build
from tests.cli.test_commands import Cli
from tests.usecases.test_image_files import HARD

MIB = 1 << 20
SIZES = {"fat": 64, "ext4": 400, "xfs": 400, "btrfs": 300, "ntfs": 64}  # MiB
FILES = 20_000

pytestmark = pytest.mark.fuse


def hard_tree(count: int, seed: int) -> Tree:
    """Return a tree of so many entries with what file systems find hard."""
    chooser = random.Random(seed)
    tree: dict[bytes, object] = {}
    for number in range(count // 200):
        folder: dict[bytes, object] = {}
        for at in range(200):
            name = chooser.choice([b"f%d", b"\xff\xfe%d", "ünï %d".encode(), b"with space %d", b"n" * 200 + b"%d"]) % at
            kind = chooser.randrange(20)
            if kind == 0:
                folder[name] = Symlink(b"t" * chooser.choice([1, 59, 60, 200, 1000]))
            elif kind == 1:
                folder[name] = Sparse(9 * MIB, {chooser.randrange(8 * MIB): chooser.randbytes(5000)})
            elif kind == 2:
                folder[name] = File(b"x" * at, xattrs={"user.a": chooser.randbytes(chooser.choice([1, 60, 900]))})
            elif kind == 3:
                folder[name] = chooser.choice([Special(), Special(stat.S_IFBLK, device=(7, 300))])
            else:
                mode = chooser.choice([0o644, 0o4755, 0o2711, 0o000, 0o1777])
                when = chooser.choice([-(10**9), 0, 2**31 + 5, 2**33]) * 10**9 + chooser.randrange(10**9)
                data = chooser.randbytes(chooser.choice([0, 1, 59, 60, 61, 160, 511, 4096, 5000]))
                owner = (chooser.choice([0, 1000, 70_000]), chooser.choice([0, 100_000]))
                folder[name] = File(data, mode=mode, mtime_ns=when, owner=owner)
        tree[b"d%03d" % number] = Directory(folder, mode=0o750)  # type: ignore[arg-type]
    tree[b"again"] = {b"%d" % number: Hardlink("large") for number in range(30)}
    return {**HARD, **tree}  # type: ignore[dict-item]


@contextlib.contextmanager
def mounted(device: Path, place: Path, *options: str) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", *options, device, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def differences(one: Path, other: Path, *options: str) -> list[str]:
    command = ["rsync", "-n", "-aHAXS", "--checksum", "--delete", "--itemize-changes", *options, f"{one}/", f"{other}/"]
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout.splitlines()


def listing(place: Path) -> list[bytes]:
    command = [
        "find",
        place,
        "-path",
        f"{place}/lost+found",
        "-prune",
        "-o",
        "-printf",
        "%P\\0%m %U %G %n %s %T@ %l\\0",
    ]
    return sorted(subprocess.run(command, check=True, capture_output=True).stdout.split(b"\0"))


def test_every_file_of_every_file_system_is_as_the_kernel_shows_it(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.fail("comparing with the kernel takes root and loop devices")
    sources = {
        "ext4": Path(os.fsdecode(build(hard_tree(FILES, 1), tmp_path / "source"))),
        "small": Path(os.fsdecode(build(hard_tree(2000, 2), tmp_path / "small"))),
    }
    plain = tmp_path / "plain"
    (plain / "Folder" / "deeper").mkdir(parents=True)
    for number in range(100):
        (plain / "Folder" / f"Long name {number}.text").write_bytes(random.Random(number).randbytes(number * 300))
    (plain / "Folder" / "deeper" / "BIG.BIN").write_bytes(os.urandom(5 * MIB))
    disk, volume, place, view = (tmp_path / name for name in ("disk.raw", "volume", "kernel", "view"))
    view.mkdir()
    with open(disk, "wb") as file:
        file.truncate((sum(SIZES.values()) + 8) * MIB)
    table = "label: gpt\n" + "".join(f"size={size}M\n" for size in SIZES.values())
    subprocess.run(["sfdisk", "-q", disk], input=table.encode(), check=True)
    said = subprocess.run(["sfdisk", "-d", disk], capture_output=True, text=True, check=True).stdout
    starts = [int(found) * 512 for found in re.findall(r"start=\s*(\d+)", said)]
    volumes: dict[str, Path] = {}
    for (kind, size), start in zip(SIZES.items(), starts, strict=True):
        path = volumes[kind] = volume.with_suffix(f".{kind}")
        with open(path, "wb") as file:
            file.truncate(size * MIB)
        make = {
            "fat": ["mkfs.fat", "-F", "32"],
            "ext4": ["mkfs.ext4", "-q", "-d", sources["ext4"]],
            "xfs": ["mkfs.xfs", "-q", "-f"],
            "btrfs": ["mkfs.btrfs", "-q", "--mixed"],
            "ntfs": ["mkfs.ntfs", "-q", "-F"],
        }[kind]
        subprocess.run([*make, path], check=True, capture_output=True)
        if kind == "fat":
            subprocess.run(["mcopy", "-s", "-m", "-i", path, plain / "Folder", "::"], check=True)
        elif kind == "ntfs":
            with mounted(path, place, "-t", "ntfs-3g"):
                subprocess.run(["cp", "-a", plain / "Folder", place], check=True)
        elif kind != "ext4":
            options = ("-o", "loop,compress=zstd") if kind == "btrfs" else ("-o", "loop")
            with mounted(path, place, *options):
                subprocess.run(["rsync", "-aHAXS", f"{sources['small']}/", f"{place}/"], check=True)
        with open(disk, "r+b") as target:
            target.seek(start)
            target.write(path.read_bytes())
    cli = Cli(tmp_path)
    cli("init")
    said = cli("image", f"vda={disk}", "--name", "five")
    assert "problem" not in said
    cli("mount", view)
    try:
        files = view / "images/five/latest/files"
        assert sorted(os.listdir(files)) == ["vda1", "vda2", "vda3", "vda4", "vda5"]
        compared = {}
        for number, kind in enumerate(SIZES, 1):
            ours = files / f"vda{number}"
            if kind == "fat":
                # Times have steps of two seconds, and modes are of whoever mounts.
                assert differences(plain, ours, "--modify-window=2", "--no-perms", "--omit-dir-times") == []
                continue
            options = ("-t", "ntfs-3g", "-o", "ro") if kind == "ntfs" else ("-o", "loop,ro")
            with mounted(volumes[kind], place, *options):
                extra = ("--no-perms", "--exclude=System Volume Information", "--no-xattrs") if kind == "ntfs" else ()
                found = differences(place, ours, *extra)
                assert found == [], kind
                if kind != "ntfs":
                    compared[kind] = listing(place)
                    assert listing(ours) == compared[kind], kind
        assert len(compared["ext4"]) // 2 > FILES
        assert min(len(compared["xfs"]), len(compared["btrfs"])) // 2 > 3000
    finally:
        cli("umount", view)


def packed_files(place: Path) -> None:
    """Write what is packed, what is not, and holes."""
    for name, size in (("half", 20 * MIB), ("large", 1 << 40)):
        with open(place / name, "wb") as file:
            file.write(b"text " * 100_000 + random.Random(1).randbytes(300_000))
            file.seek(10 * MIB)
            file.write(b"more " * 50_000)
            file.truncate(size)


@pytest.mark.parametrize("kind", ["btrfs", "ntfs"])
def test_packed_files_have_the_holes_that_the_kernel_shows(kind: str, tmp_path: Path) -> None:
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.fail("comparing with the kernel takes root and loop devices")
    disk, place, view = (tmp_path / name for name in ("vda.raw", "kernel", "view"))
    view.mkdir()
    with open(disk, "wb") as file:
        file.truncate(200 * MIB)
    make = ["mkfs.btrfs", "-q", "--mixed"] if kind == "btrfs" else ["mkfs.ntfs", "-q", "-F"]
    subprocess.run([*make, disk], check=True, capture_output=True)
    options = ("-o", "loop,compress=zstd") if kind == "btrfs" else ("-t", "ntfs-3g", "-o", "compression")
    with mounted(disk, place, *options):
        (place / "packed").mkdir()
        if kind == "ntfs":
            os.setxattr(place / "packed", "system.ntfs_attrib", (0x800).to_bytes(4, "little"))  # compress what is new
        packed_files(place / "packed")
    cli = Cli(tmp_path)
    cli("init")
    assert "problem" not in cli("image", "--name", "one", disk)
    cli("mount", view)
    try:
        ours = view / "images/one/latest/files/vda/packed"
        with mounted(disk, place, *((*options[:-1], "loop,ro") if kind == "btrfs" else options)):
            theirs = place / "packed"
            sizes = {path.name: (path.stat().st_size, path.stat().st_blocks) for path in theirs.iterdir()}
            for name, (size, blocks) in sizes.items():
                status = (ours / name).stat()
                assert status.st_size == size
                # In units of compression of 64 KiB; ntfs-3g counts what they are packed to.
                assert blocks <= status.st_blocks <= max(blocks, (2 * MIB) // 512)
                with open(theirs / name, "rb") as one, open(ours / name, "rb") as other:
                    for at in (0, 9 * MIB):
                        one.seek(at)
                        other.seek(at)
                        assert one.read(10 * MIB) == other.read(10 * MIB)
                    if kind == "btrfs":
                        assert blocks == status.st_blocks
    finally:
        cli("umount", view)


def test_streams_and_descriptors_of_ntfs_are_attributes_that_anything_can_keep(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.fail("comparing with ntfs-3g takes root and FUSE")
    disk, place, view = (tmp_path / name for name in ("vda.raw", "kernel", "view"))
    view.mkdir()
    disk.write_bytes(bytes(64 * MIB))
    subprocess.run(["mkfs.ntfs", "-q", "-F", disk], check=True, capture_output=True)
    with mounted(disk, place, "-t", "ntfs-3g"):
        (place / "folder").mkdir()
        for name in ("file", "folder/inner"):
            (place / name).write_bytes(b"x")
        os.setxattr(place / "file", "user.Zone.Identifier", b"[ZoneTransfer]")
        os.setxattr(place / "file", "user.plain", b"p")
    cli = Cli(tmp_path)
    cli("init")
    assert "problem" not in cli("image", "--name", "one", disk)
    cli("mount", view)
    try:
        ours = view / "images/one/latest/files/vda"
        with mounted(disk, place, "-t", "ntfs-3g", "-o", "ro"):
            assert ours.stat().st_mtime_ns == place.stat().st_mtime_ns
            for name in ("file", "folder", "folder/inner"):
                theirs = place / name
                wanted = {key: os.getxattr(theirs, key) for key in os.listxattr(theirs) if key.startswith("user.")}
                wanted["user.ntfs_acl"] = os.getxattr(theirs, "system.ntfs_acl")
                assert {key: os.getxattr(ours / name, key) for key in os.listxattr(ours / name)} == wanted
    finally:
        cli("umount", view)
