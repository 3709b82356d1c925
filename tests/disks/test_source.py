"""Disks in formats of virtual machines, as qemu reads them."""

import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from backupfs.disks import chain as chain_module
from backupfs.disks.headers import VhdFooter
from backupfs.disks.source import DiskSource, ServedDisk, open_disk
from backupfs.errors import SourceError
from tests.builders import new_repository
from tests.descriptors import open_files
from tests.processes import children_of_this_process, runs
from tests.usecases.test_image import MIB, bytes_of, disk_in, make_image

FORMS = {
    "qcow2": ("qcow2", []),
    "compressed qcow2": ("qcow2", ["-c"]),
    "vmdk": ("vmdk", []),
    "stream-optimized vmdk": ("vmdk", ["-o", "subformat=streamOptimized"]),
    "vhd": ("vpc", ["-o", "force_size=on"]),
    "vhd of fixed size": ("vpc", ["-o", "subformat=fixed,force_size=on"]),
    "vhdx": ("vhdx", []),
    "vdi": ("vdi", []),
}


def converted(raw: Path, path: Path, form: str, options: list[str]) -> Path:
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", form, *options, raw, path], check=True)
    return path


def whole(source: DiskSource) -> bytes:
    return source.read(0, source.size)


@pytest.mark.parametrize("name", FORMS)
def test_a_disk_in_a_format_is_the_disk(name: str, tmp_path: Path) -> None:
    form, options = FORMS[name]
    raw = disk_in(tmp_path / "raw", size=40 * MIB, table=b"label: gpt\nsize=5M\n")
    path = converted(raw, tmp_path / f"disk.{form}", form, options)
    source = open_disk(os.fsencode(path))
    try:
        plain = raw.read_bytes()
        assert (source.form, source.name, source.size) == (form, "disk" if form != "vpc" else "disk.vpc", len(plain))
        assert whole(source) == plain
        told = bytearray(len(plain))
        for start, end in source.data_ranges(0, source.size):
            told[start:end] = plain[start:end]
        assert told == plain
        assert list(source.data_ranges(7 * MIB, 7 * MIB + 5)) in ([], [(7 * MIB, 7 * MIB + 5)])
    finally:
        source.close()


@pytest.mark.parametrize("scanners", [1, 3])
def test_an_image_of_a_chain_of_files_is_what_the_machine_saw(
    scanners: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backupfs.usecases import image as image_module

    monkeypatch.setattr(image_module, "scanner_count", lambda: scanners)
    base = converted(disk_in(tmp_path / "raw"), tmp_path / "base.qcow2", "qcow2", [])
    top = tmp_path / "web.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top], check=True)
    (tmp_path / "change").write_bytes(os.urandom(100_000))
    subprocess.run(["qemu-io", "-c", f"write -s {tmp_path / 'change'} 20M 98304", top], check=True, capture_output=True)
    wanted = bytearray((tmp_path / "raw").read_bytes())
    wanted[20 * MIB : 20 * MIB + 98304] = (tmp_path / "change").read_bytes()[:98304]
    repository = new_repository()
    snapshot = make_image(repository, top)
    assert [disk.form for disk in snapshot.disks] == ["qcow2"]
    assert bytes_of(repository, snapshot, "/disks/web.raw") == wanted
    assert snapshot.volumes[0].data_size < 30 * MIB


def test_what_qemu_cannot_read_is_said_in_its_words(tmp_path: Path) -> None:
    (tmp_path / "disk.qcow2").write_bytes(b"QFI\xfb" + b"\xff" * 5000)
    with pytest.raises(SourceError, match=r"disk\.qcow2 cannot be opened: .*[Uu]nsupported"):
        open_disk(os.fsencode(tmp_path / "disk.qcow2"))
    assert not [pid for pid in children_of_this_process() if runs(pid)]


def test_without_qemu_the_message_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk.qcow2").write_bytes(b"QFI\xfb" + bytes(5000))
    monkeypatch.setenv("PATH", "/nosuch")
    with pytest.raises(SourceError, match="install the package qemu-utils"):
        open_disk(os.fsencode(tmp_path / "disk.qcow2"))


def test_the_server_ends_with_whoever_started_it(tmp_path: Path) -> None:
    path = converted(
        disk_in(tmp_path / "raw", size=8 * MIB, table=b"label: dos\n"), tmp_path / "disk.qcow2", "qcow2", []
    )
    source = open_disk(os.fsencode(path))
    assert isinstance(source, ServedDisk)
    [pid] = [pid for pid in children_of_this_process() if runs(pid)]
    source.close()
    assert not runs(pid)
    script = (
        "import os, sys, time\nfrom backupfs.disks.source import open_disk\n"
        "source = open_disk(os.fsencode(sys.argv[1]))\nprint(source._server._process.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = process.stdout.readline().strip()
    assert runs(pid)
    process.kill()
    process.communicate()
    end = time.monotonic() + 10
    while runs(pid):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_server_needs_no_file_while_it_runs_wherever_temporary_files_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A name of more than 107 bytes is none that a socket can have.
    folder = tmp_path / ("n" * 150)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    path = converted(disk_in(tmp_path / "raw"), tmp_path / "disk.qcow2", "qcow2", [])
    source = open_disk(os.fsencode(path))
    assert list(folder.iterdir()) == []
    assert whole(source) == (tmp_path / "raw").read_bytes()
    before = open_files()
    source.close()
    assert len(before) - len(open_files()) >= 2


def test_a_raw_disk_that_looks_like_a_format_inside_is_raw(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096) + b"QFI\xfb" + bytes(100_000))
    source = open_disk(os.fsencode(path))
    assert (source.form, whole(source)) == ("raw", path.read_bytes())
    source.close()


CUT = {
    **FORMS,
    "vmdk of two files": ("vmdk", ["-o", "subformat=monolithicFlat"]),
    "sparse vmdk of two files": ("vmdk", ["-o", "subformat=twoGbMaxExtentSparse"]),
    "vdi of fixed size": ("vdi", ["-o", "static=on"]),
}


@pytest.mark.parametrize("missing", [600, None])
@pytest.mark.parametrize("name", CUT)
def test_a_file_that_was_cut_short_is_refused(name: str, missing: int | None, tmp_path: Path) -> None:
    form, options = CUT[name]
    raw = disk_in(tmp_path / "raw", size=40 * MIB, table=b"label: gpt\nsize=5M\n")
    with open(raw, "r+b") as file:
        file.seek(-MIB, os.SEEK_END)
        file.write(os.urandom(MIB))
    path = converted(raw, tmp_path / f"disk.{form}", form, options)
    [cut] = [one for one in tmp_path.iterdir() if one not in (raw, path)] or [path]
    size = cut.stat().st_size
    os.truncate(cut, size - missing if missing else size // 2)
    with pytest.raises(SourceError) as caught:  # noqa: PT012
        source = open_disk(os.fsencode(path), form=form)
        try:
            # qemu itself fails where it cannot unpack something.
            whole(source)
        finally:
            source.close()
    words = str(caught.value)
    assert "\n" not in words
    if form == "vdi" or (form in ("qcow2", "vmdk") and name != "stream-optimized vmdk"):
        which = "it" if cut == path else f"{cut}, which it is made of,"
        assert words.startswith(f"the disk {path} cannot be read: {which} is cut short: ")
        assert words.endswith(" bytes of it are missing, if its tables are right; copy it again")


def test_a_backing_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    base = converted(disk_in(tmp_path / "raw"), tmp_path / "base.qcow2", "qcow2", [])
    top = tmp_path / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top], check=True)
    os.truncate(base, base.stat().st_size - MIB // 2)
    with pytest.raises(SourceError, match=rf"top\.qcow2 cannot be read: {base}, which it is made of, is cut short"):
        open_disk(os.fsencode(top))


@pytest.mark.parametrize("form", ["qcow2", "vmdk"])
def test_a_file_whose_last_table_is_cut_off_is_refused(form: str, tmp_path: Path) -> None:
    """qemu reads zeros there, which say that there is no data."""
    path = tmp_path / f"disk.{form}"
    subprocess.run(["qemu-img", "create", "-q", "-f", form, path, "4G"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 7 3G 64k", path], check=True, capture_output=True)
    data = path.read_bytes()
    # Data first, tables behind it.
    if form == "qcow2":
        (first,) = struct.unpack_from(">Q", data, 40)
        entries = struct.unpack_from(">8Q", data, first)
        [place] = [entry & (1 << 56) - 512 for entry in entries if entry]
        length, entry = 65536, struct.pack(">Q", len(data) | 1 << 63)
        at = first + entries.index(next(filter(None, entries))) * 8
    else:
        first = struct.unpack_from("<Q", data, 56)[0] * 512
        place = struct.unpack_from("<I", data, first + 3 * 1024 // 32 * 4)[0] * 512
        length, entry, at = 2048, struct.pack("<I", len(data) // 512), first + 3 * 1024 // 32 * 4
    moved = data[:at] + entry + data[at + len(entry) :] + data[place : place + length]
    path.write_bytes(moved)
    source = open_disk(os.fsencode(path))
    assert source.read(3 << 30, 512) == b"\7" * 512
    source.close()
    os.truncate(path, len(data))
    with pytest.raises(SourceError, match=f"is cut short: {length:,} bytes of it"):
        open_disk(os.fsencode(path))


@pytest.mark.parametrize("form", ["qcow2", "vmdk", "vdi", "vpc"])
def test_a_file_that_ends_in_the_midst_of_a_cluster_is_whole(form: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    options = ["-o", "force_size=on"] if form == "vpc" else []
    subprocess.run(["qemu-img", "create", "-q", "-f", form, *options, path, "41000960"], check=True)
    for words in ("write -P 7 20M 4k", "write -P 7 40996864 4k"):
        subprocess.run(["qemu-io", "-f", form, "-c", words, path], check=True, capture_output=True)
    source = open_disk(os.fsencode(path), form=form)
    assert source.read(40996864, 4096) == b"\7" * 4096
    source.close()


def test_a_file_of_which_not_even_the_header_is_there_is_refused(tmp_path: Path) -> None:
    path = converted(disk_in(tmp_path / "raw"), tmp_path / "disk.qcow2", "qcow2", [])
    os.truncate(path, 100)
    with pytest.raises(SourceError, match=r"cannot be opened: .*header|is cut short"):
        open_disk(os.fsencode(path))


@pytest.mark.parametrize("ending", ["vhd", "qcow2", "vdi", "vhdx"])
def test_a_file_that_is_not_what_its_name_says_is_refused(ending: str, tmp_path: Path) -> None:
    raw = disk_in(tmp_path / "raw", size=8 * MIB, table=b"label: dos\n")
    path = tmp_path / f"disk.{ending}"
    if ending == "vhd":
        # Of fixed size: its end alone says what it is.
        converted(raw, path, "vpc", ["-o", "subformat=fixed,force_size=on"])
        os.truncate(path, 7 * MIB)
    else:
        path.write_bytes(raw.read_bytes())
    with pytest.raises(SourceError, match=r"though its name says so: .*copy it again; .*--format disk=raw"):
        open_disk(os.fsencode(path))
    source = open_disk(os.fsencode(path), form="raw")
    assert whole(source) == path.read_bytes()
    source.close()


def damage(path: Path, form: str) -> None:
    """Have two clusters lie in one place."""
    data = path.read_bytes()
    if form == "qcow2":
        (first,) = struct.unpack_from(">Q", data, 40)
        table = struct.unpack_from(">Q", data, first)[0] & (1 << 56) - 512
        at, entry = table + 8 * 100, data[table : table + 8]
    else:
        at, entry = 512 + 4 * 20, data[512:516]
    path.write_bytes(data[:at] + entry + data[at + len(entry) :])


@pytest.mark.parametrize("form", ["qcow2", "vdi"])
@pytest.mark.parametrize("is_base", [False, True])
def test_what_the_check_of_a_format_finds_is_a_problem(form: str, is_base: bool, tmp_path: Path) -> None:
    path = top = converted(disk_in(tmp_path / "raw"), tmp_path / f"disk.{form}", form, [])
    if is_base:
        top = tmp_path / "top.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", path, "-F", form, top], check=True)
    source = open_disk(os.fsencode(top))
    assert source.problems == ()
    source.close()
    damage(path, form)
    source = open_disk(os.fsencode(top))
    [problem] = source.problems
    which = f"{path}, which it is made of," if is_base else "it"
    assert problem.startswith(f"{which} is damaged by the word of `qemu-img check`: ERROR")
    source.close()


def test_space_that_is_lost_is_no_damage(tmp_path: Path) -> None:
    path = converted(disk_in(tmp_path / "raw"), tmp_path / "disk.qcow2", "qcow2", [])
    data = path.read_bytes()
    (first,) = struct.unpack_from(">Q", data, 40)
    table = struct.unpack_from(">Q", data, first)[0] & (1 << 56) - 512
    path.write_bytes(data[:table] + bytes(8) + data[table + 8 :])
    assert subprocess.run(["qemu-img", "check", path], capture_output=True, check=False).returncode == 3
    source = open_disk(os.fsencode(path))
    assert (source.problems, source.remarks) == ((), ())
    source.close()


def test_a_compressed_disk_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    raw = disk_in(tmp_path / "raw", size=8 * MIB, table=b"label: dos\n")
    raw.write_bytes(b"".join(b"%07d " % number for number in range(MIB)))
    path = converted(raw, tmp_path / "disk.qcow2", "qcow2", ["-c"])
    os.truncate(path, path.stat().st_size - 200_000)
    with pytest.raises(SourceError, match="it is cut short, by the word of `qemu-img check`; copy it again"):
        open_disk(os.fsencode(path))


def with_footers(path: Path, at: int, words: bytes) -> None:
    """Change something in the footer of a VHD and in its copy."""
    data = bytearray(path.read_bytes())
    for start in [0, len(data) - 512] if data.startswith(b"conectix") else [len(data) - 512]:
        footer = data[start : start + 512]
        footer[at : at + len(words)] = words
        footer[64:68] = bytes(4)
        footer[64:68] = struct.pack(">I", ~sum(footer) & 0xFFFFFFFF)
        data[start : start + 512] = footer
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["vhd", "vhd of fixed size"])
@pytest.mark.parametrize("maker", [b"vbox", b"vpc ", b"win ", b"????"])
def test_a_vhd_of_any_maker_is_as_large_as_it_says(name: str, maker: bytes, tmp_path: Path) -> None:
    raw = disk_in(tmp_path / "raw", size=40 * MIB, table=b"label: gpt\nsize=5M\n")
    path = converted(raw, tmp_path / "disk.vhd", *FORMS[name])
    # 1,204 cylinders, 4 heads and 17 sectors are a little less.
    with_footers(path, 56, struct.pack(">HBB", 1204, 4, 17))
    with_footers(path, 28, maker)
    source = open_disk(os.fsencode(path))
    assert whole(source) == raw.read_bytes()
    source.close()


def test_a_vhd_that_qemu_takes_for_another_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = disk_in(tmp_path / "raw", size=8 * MIB, table=b"label: dos\n")
    path = converted(raw, tmp_path / "disk.vhd", *FORMS["vhd"])
    monkeypatch.setattr(chain_module, "read_vhd", lambda _fd: VhdFooter(9 * MIB, needs_parent=False))
    with pytest.raises(SourceError, match="says that it has 9,437,184 bytes, and qemu reads 8,388,608"):
        open_disk(os.fsencode(path))


@pytest.mark.parametrize("is_base", [False, True])
def test_a_vhd_that_needs_its_parent_is_refused(is_base: bool, tmp_path: Path) -> None:
    raw = disk_in(tmp_path / "raw", size=8 * MIB, table=b"label: dos\n")
    path = top = converted(raw, tmp_path / "disk.vhd", *FORMS["vhd"])
    if is_base:
        top = tmp_path / "top.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", path, "-F", "vpc", top], check=True)
    with_footers(path, 60, struct.pack(">I", 4))
    with pytest.raises(SourceError, match=rf"{path} is a differencing VHD, which has only what changed since its"):
        open_disk(os.fsencode(top))
