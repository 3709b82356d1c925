"""Changing files of file systems that nobody mounts: what is put is there with all that belongs to it, or an error."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from backupfs.disks.checkers import check_volume
from backupfs.disks.editors import Editor, open_editor
from backupfs.errors import SourceError, UsageError

MIB = 1 << 20
SIZE = 40 * MIB


def volume_of(tmp_path: Path, *command: str) -> Path:
    path = tmp_path / "volume"
    with open(path, "wb") as file:
        file.truncate(SIZE)
    subprocess.run([*command, path], check=True, capture_output=True)
    return path


def ext_of(tmp_path: Path) -> tuple[Path, Editor]:
    path = volume_of(tmp_path, "mkfs.ext4", "-q")
    return path, open_editor(path, SIZE)


def asked(volume: Path, command: str) -> bytes:
    return subprocess.run(["debugfs", "-R", command, volume], capture_output=True, check=True).stdout


@pytest.mark.parametrize("name", ["plain", 'with "quotes" and spaces', "-R", "\udcff\udcfe", "ä", "a\\b", "<2>"])
def test_a_file_is_put_with_its_name_and_all_that_belongs_to_it(name: str, tmp_path: Path) -> None:
    volume, editor = ext_of(tmp_path)
    local = tmp_path / "local"
    local.write_bytes(os.urandom(300_000))
    os.setxattr(local, "user.kind", b"a\0value")
    if os.geteuid() == 0:
        os.chown(local, 70_000, 100_001)
    os.chmod(local, 0o4751)
    os.utime(local, ns=(1, 3 * 10**18 + 123_456_789))
    (tmp_path / "folder").mkdir()
    editor.put(b"/d", os.fsencode(tmp_path / "folder"))
    editor.put(b"/d/" + os.fsencode(name), os.fsencode(local))
    assert check_volume(volume, SIZE).sound
    out = tmp_path / "out"
    out.mkdir()
    asked(volume, f"rdump /d {out}")
    found = out / "d" / os.fsdecode(os.fsencode(name))
    assert found.read_bytes() == local.read_bytes()
    quoted = '"/d/' + os.fsdecode(os.fsencode(name)).replace('"', '""') + '"'
    said = subprocess.run(
        [b"debugfs", b"-R", os.fsencode(f"stat {quoted}"), volume], capture_output=True, check=True
    ).stdout
    assert b"Mode:  04751" in said
    assert f"User: {os.stat(local).st_uid:>5}   Group: {os.stat(local).st_gid:>5}".encode() in said
    assert b"kind" in said
    # 2065: beyond what 31 bits hold. Nanoseconds stand above two bits of the seconds.
    extra = (123_456_789 << 2) | (((3 * 10**9 + (1 << 31)) >> 32) & 3)
    assert f"mtime: 0x{3 * 10**9 & 0xFFFFFFFF:08x}:{extra:08x}".encode() in said


def test_links_folders_and_empty_files_are_put_and_removed(tmp_path: Path) -> None:
    volume, editor = ext_of(tmp_path)
    before = asked(volume, "ls -p /")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("a target")
    (tmp_path / "long").symlink_to("t" * 200)
    for name in ("folder", "folder/empty", "folder/link", "folder/long"):
        editor.put(b"/" + name.encode(), os.fsencode(tmp_path / name.rpartition("/")[2]))
    assert b'Fast link dest: "a target"' in asked(volume, "stat /folder/link")
    assert asked(volume, "cat /folder/long").rstrip(b"\0") == b"t" * 200
    with pytest.raises(SourceError, match="not empty"):
        editor.remove(b"/folder", stat.S_IFDIR)
    for name in (b"empty", b"link", b"long"):
        editor.remove(b"/folder/" + name, stat.S_IFREG)
    editor.remove(b"/folder", stat.S_IFDIR)
    assert asked(volume, "ls -p /") == before
    assert check_volume(volume, SIZE).sound


def test_what_cannot_be_done_is_an_error(tmp_path: Path) -> None:
    volume, editor = ext_of(tmp_path)
    local = tmp_path / "local"
    local.write_bytes(b"x")
    editor.put(b"/there", os.fsencode(local))
    with pytest.raises(SourceError, match="exists"):
        editor.put(b"/there", os.fsencode(local))
    with pytest.raises(SourceError, match="not found"):
        editor.put(b"/nosuch/file", os.fsencode(local))
    with pytest.raises(SourceError, match="not found"):
        editor.remove(b"/nosuch", stat.S_IFREG)
    with pytest.raises(SourceError, match="line break"):
        editor.put(b"/a\nb", os.fsencode(local))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SourceError, match="neither a file"):
        editor.put(b"/fifo", os.fsencode(tmp_path / "fifo"))
    local.write_bytes(os.urandom(SIZE))
    with pytest.raises(SourceError, match="Could not allocate"):
        editor.put(b"/large", os.fsencode(local))
    assert asked(volume, "cat /there") == b"x"


@pytest.mark.parametrize("name", ["a:b", "q?", "s*", "end.", "end ", "\udcff", "\n", "a\\b", "😀", "com1", "x" * 256])
def test_a_name_that_fat_does_not_have_is_refused_in_words(name: str, tmp_path: Path) -> None:
    """Some were stored as other names, for others an error said nothing."""
    editor = open_editor(volume_of(tmp_path, "mkfs.fat", "-F", "32"), SIZE)
    local = tmp_path / "local"
    local.write_bytes(b"x")
    with pytest.raises(SourceError, match=r"no name that FAT can have|names like con and com1"):
        editor.put(b"/" + os.fsencode(name), os.fsencode(local))


def test_a_name_is_no_pattern_to_fat(tmp_path: Path) -> None:
    """To remove `[q]` removed `q`."""
    volume = volume_of(tmp_path, "mkfs.fat", "-F", "32")
    editor = open_editor(volume, SIZE)
    local, folder = tmp_path / "local", tmp_path / "folder"
    local.write_bytes(b"x")
    folder.mkdir()

    def names() -> list[bytes]:
        command = ["mdir", "-b", "-/", "-i", volume, "::/"]
        return sorted(subprocess.run(command, capture_output=True, check=False).stdout.split())

    editor.put(b"/[q]", os.fsencode(local))
    editor.put(b"/q", os.fsencode(local))
    editor.put(b"/[d]", os.fsencode(folder))
    editor.put(b"/[d]/[x", os.fsencode(local))
    assert names() == [b"::/[d]/", b"::/[d]/[x", b"::/[q]", b"::/q"]
    editor.remove(b"/[q]", stat.S_IFREG)
    assert names() == [b"::/[d]/", b"::/[d]/[x", b"::/q"]
    with pytest.raises(SourceError, match="is there with other capitals"):
        editor.put(b"/Q", os.fsencode(local))
    editor.put(b"/r", os.fsencode(folder))
    with pytest.raises(SourceError, match="could not"):
        editor.put(b"/[r]", os.fsencode(local))
    editor.remove(b"/[d]/[x", stat.S_IFREG)
    editor.remove(b"/[d]", stat.S_IFDIR)
    assert b"::/[d]/" not in names()


def test_fat_is_changed_too(tmp_path: Path) -> None:
    volume = volume_of(tmp_path, "mkfs.fat", "-F", "32")
    editor = open_editor(volume, SIZE)
    local = tmp_path / "Local File.txt"
    local.write_bytes(os.urandom(100_000))
    (tmp_path / "Folder").mkdir()
    editor.put(b"/Folder", os.fsencode(tmp_path / "Folder"))
    editor.put(b"/Folder/Long name.text", os.fsencode(local))
    assert check_volume(volume, SIZE).sound
    found = subprocess.run(["mtype", "-i", volume, "::/Folder/Long name.text"], capture_output=True, check=True)
    assert found.stdout == local.read_bytes()
    (tmp_path / "link").symlink_to("x")
    with pytest.raises(SourceError, match="FAT has nothing else"):
        editor.put(b"/link", os.fsencode(tmp_path / "link"))
    with pytest.raises(SourceError, match="mdel could not"):
        editor.remove(b"/nosuch", stat.S_IFREG)
    local.write_bytes(os.urandom(SIZE))
    with pytest.raises(SourceError, match="could not"):
        editor.put(b"/large", os.fsencode(local))
    editor.remove(b"/Folder/Long name.text", stat.S_IFREG)
    editor.remove(b"/Folder", stat.S_IFDIR)


@pytest.mark.parametrize(("program", "name"), [("mkfs.btrfs", "btrfs"), ("true", "this volume")])
def test_file_systems_without_an_editor_are_named(program: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "volume"
    with open(path, "wb") as file:
        file.truncate(150 * MIB)
    subprocess.run([program, path], check=True, capture_output=True)
    with pytest.raises(UsageError, match=f"files in {name} cannot be changed one by one: `backupfs edit`"):
        open_editor(path, 150 * MIB)


def test_a_file_system_that_is_not_sound_is_not_changed(tmp_path: Path) -> None:
    volume = volume_of(tmp_path, "mkfs.ext4", "-q", "-b", "1024")
    # The root directory's block is wiped.
    block = int(asked(volume, "blocks /").split()[0])
    with open(volume, "r+b") as file:
        file.seek(block * 1024)
        file.write(b"\xff" * 1024)
    subprocess.run(["debugfs", "-w", "-R", "ssv state 2", volume], check=True, capture_output=True)
    with pytest.raises(SourceError, match="not sound"):
        open_editor(volume, SIZE)
