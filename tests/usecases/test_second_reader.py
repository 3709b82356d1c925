"""A second reader agrees: The Sleuth Kit, written by others, finds in disks the very files that our images show.

What the disk here leaves out is what TSK 4.15 itself is wrong on: times before 1970 and after 2106, inline data, ext3's
parts of seconds, FAT names of more than 195 bytes, and directories of ext4 so large that they are hashed: in those it
finds an entry `Q` that is none.
"""

import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import pytsk3
import trio

from backupfs.snapshots.snapshot import Snapshot
from backupfs.usecases.events import Event, FileSkipped, Remark
from backupfs.usecases.restore import RestoreOptions, restore
from tests.builders import (
    File,
    Hardlink,
    Sparse,
    Symlink,
    Tree,
    build,
    ignore,
    new_repository,
    noise,
    reopened,
    snapshot_of,
)
from tests.usecases.test_image import run_image

MIB = 1 << 20
# What TSK shows beside what is on the disk.
VIRTUAL = (pytsk3.TSK_FS_META_TYPE_VIRT, pytsk3.TSK_FS_META_TYPE_VIRT_DIR)
# What NTFS itself is made of is files, too, for TSK; nobody else shows them.
OWN_OF_NTFS = {
    b"$AttrDef", b"$BadClus", b"$Bitmap", b"$Boot", b"$Extend/$ObjId", b"$Extend/$Quota", b"$Extend/$Reparse",
    b"$LogFile", b"$MFT", b"$MFTMirr", b"$Secure", b"$UpCase", b"$Volume",
}  # fmt: skip

EVERYWHERE: Tree = {
    "empty": File(),
    "Upper Case.TXT": File(b"upper"),
    "lower.txt": File(b"lower"),
    "ünï cödé 日本": File(b"names"),
    "n" * 190: File(b"long name"),
    "large": File(noise(1, 3 * MIB + 17)),
    "exact": File(noise(2, 65_536)),
    "d": {"one": File(b"1"), "deep": {"er": {"still": {"file": File(b"deep")}}}},
    **{f"many {tens}": {f"f{one}": File(b"%d" % tens * one * 500) for one in range(10)} for tens in range(30)},
}
EXT4: Tree = {
    **EVERYWHERE,
    b"not \xff utf-8 \n": File(b"name"),
    b"n" * 255: File(b"long name"),
    b"later": File(b"2090", mtime_ns=3_800_000_000 * 10**9),
    b"first": File(b"1970", mtime_ns=0),
    b"sparse": Sparse(40 * MIB, {0: b"start", 17 * MIB + 4096: b"island" * 999, 40 * MIB - 4: b"end."}),
    b"hole": Sparse(5 * MIB),
    b"second name": Hardlink("large"),
    b"links": {b"third name": Hardlink("large"), b"link": Symlink(b"../large")},
    b"slow link": Symlink(b"../" * 60 + b"x" * 40),
}

# Without directories: ntfscp makes none.
NTFS: Tree = {
    **{name: entry for name, entry in EVERYWHERE.items() if isinstance(entry, File)},
    **{f"{number:03}" + "m" * 100: File(b"%d" % number * number * 50) for number in range(40)},
}


@dataclass(frozen=True)
class Found:
    """A regular file, as a reader has it."""

    size: int
    content: str
    mtime_ns: int


def run(*words: str | bytes | Path, stdin: bytes = b"") -> bytes:
    return subprocess.run(words, input=stdin, check=True, capture_output=True).stdout


def make_ext4(path: Path) -> None:
    source = build(EXT4, path.parent / "ext4 source")
    run("mkfs.ext4", "-q", "-b", "4096", "-O", "^inline_data", "-d", source, path)
    # A file in many pieces: every second block is taken while it is written.
    large = path.parent / "pieces"
    large.write_bytes(noise(3, 4 * MIB))
    free = [
        block
        for line in run("dumpe2fs", path).splitlines()
        if line.startswith(b"  Free blocks: ")
        for part in line.split(b":")[1].split(b",")
        if part.strip()
        for block in range(int(part.split(b"-")[0]), int(part.split(b"-")[-1]) + 1)
    ]
    taken = free[::2]
    commands = [
        *(f"setb {block}" for block in taken), f"write {large} pieces", *(f"freeb {block}" for block in taken),
    ]  # fmt: skip
    # mkfs keeps 32 bits of a time.
    commands += ["set_inode_field later mtime @3800000000", "set_inode_field later mtime_extra 1"]
    run("debugfs", "-w", "-f", "-", path, stdin="\n".join(commands).encode())
    run("e2fsck", "-fn", path)
    assert len(run("debugfs", "-R", "dump_extents -l pieces", path).splitlines()) > 1000


def make_fat(path: Path) -> None:
    source = build(EVERYWHERE, path.parent / "fat source")
    names = [os.path.join(source, name) for name in sorted(os.listdir(source))]
    run("mkfs.fat", "-F", "32", "-s", "1", path)
    run("mcopy", "-s", "-m", "-i", path, *names, "::")


def make_ntfs(path: Path) -> None:
    source = build(NTFS, path.parent / "ntfs source")
    run("mkntfs", "-q", "-F", path)
    for name in sorted(os.listdir(source)):
        run("ntfscp", "-q", "-t", path, os.path.join(source, name), name)


def disk_in(folder: Path) -> Path:
    """Make a disk with a GPT and three partitions."""
    path = folder / "vda.raw"
    with open(path, "wb") as disk:
        disk.truncate(250 * MIB)
    run("sfdisk", "-q", path, stdin=b"label: gpt\nsize=96M\nsize=64M\nsize=64M\n")
    begin = 1
    for make, size in ((make_ext4, 96), (make_fat, 64), (make_ntfs, 64)):
        volume = folder / "volume"
        with open(volume, "wb") as file:
            file.truncate(size * MIB)
        make(volume)
        run("dd", f"if={volume}", f"of={path}", "bs=1M", f"seek={begin}", "conv=notrunc,sparse")
        volume.unlink()
        begin += size
    return path


def found_by_tsk(path: Path) -> list[dict[bytes, Found]]:
    """Return the regular files of each partition."""
    disk = pytsk3.Img_Info(str(path))
    return [
        dict(_files(pytsk3.FS_Info(disk, offset=part.start * 512).open_dir("/"), b""))
        for part in pytsk3.Volume_Info(disk)
        if part.flags == pytsk3.TSK_VS_PART_FLAG_ALLOC
    ]


def _files(directory: pytsk3.Directory, above: bytes) -> Iterator[tuple[bytes, Found]]:
    for file in directory:
        name, meta = file.info.name, file.info.meta
        if name.name in (b".", b"..") or name.flags != pytsk3.TSK_FS_NAME_FLAG_ALLOC or meta.type in VIRTUAL:
            continue
        path = above + name.name
        if meta.type == pytsk3.TSK_FS_META_TYPE_DIR:
            yield from _files(file.as_directory(), path + b"/")
        elif meta.type == pytsk3.TSK_FS_META_TYPE_REG:
            content = file.read_random(0, meta.size) if meta.size else b""
            mtime_ns = meta.mtime * 10**9 + meta.mtime_nano
            yield path, Found(meta.size, hashlib.sha256(content).hexdigest(), mtime_ns)


def found_by_us(path: Path, folder: Path) -> list[dict[bytes, Found]]:
    repository = new_repository()
    events: list[Event] = []
    snapshot = run_image(repository, path, report=events.append).snapshot
    assert isinstance(snapshot, Snapshot)
    assert not [event for event in events if isinstance(event, FileSkipped | Remark)]
    repository = reopened(repository)
    parts = []
    for number in (1, 2, 3):
        place, target = b"/files/vda%d" % number, folder / f"restored {number}"
        options = RestoreOptions(verify=True)
        result = trio.run(partial(restore, repository, snapshot, place, os.fsencode(target), options, ignore))
        assert (result.errors, result.damaged) == (0, 0)
        seen = snapshot_of(target, holes=False)
        parts.append({
            name: Found(one.size, one.content, one.mtime_ns) for name, one in seen.items() if one.kind == "file"
        })  # fmt: skip
    return parts


@pytest.fixture
def _in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FAT says no zone; TSK takes that of this process."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("_in_utc")
def test_a_second_reader_finds_the_same_files(tmp_path: Path) -> None:
    path = disk_in(tmp_path)
    theirs, ours = found_by_tsk(path), found_by_us(path, tmp_path)
    assert [len(part) for part in ours] == [318, 309, 47]
    assert theirs[2].keys() - ours[2].keys() == OWN_OF_NTFS
    theirs[2] = {name: found for name, found in theirs[2].items() if name not in OWN_OF_NTFS}
    assert ours == theirs
    # Both have the odd ones.
    assert {b"not \xff utf-8 \n", b"n" * 255, b"links/third name"} < ours[0].keys()
    assert ours[0][b"later"].mtime_ns == 3_800_000_000 * 10**9
    assert ours[0][b"large"] == ours[1][b"large"] == ours[2][b"large"]
