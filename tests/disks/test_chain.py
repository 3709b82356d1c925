"""Files that name other files: what whoever wrote a disk can have this host read."""

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupfs.disks.chain import Chain
from backupfs.disks.source import DiskSource, ServedDisk, open_disk
from backupfs.errors import SourceError, UsageError
from tests.descriptors import open_files
from tests.processes import children_of_this_process, runs

KIB, MIB = 1 << 10, 1 << 20
SECRET = b"root:$y$secret\n".ljust(512, b"#")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the disks; the secret lies beside it."""
    (tmp_path / "secret").write_bytes(SECRET * 100)
    (tmp_path / "disks").mkdir()
    return tmp_path / "disks"


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """No descriptor and no process is left of a disk, opened or refused."""
    before = open_files()
    yield
    assert open_files() == before
    assert not [pid for pid in children_of_this_process() if runs(pid)]


def create(path: Path, *words: str, size: str = "4M") -> Path:
    subprocess.run(["qemu-img", "create", "-q", *words, path, size], check=True, cwd=path.parent)
    return path


def over(path: Path, backing: str, form: str, *words: str) -> Path:
    """Make a qcow2 over what may not be there."""
    return create(path, "-f", "qcow2", "-u", "-b", backing, "-F", form, *words)


def raw(path: Path, fill: bytes) -> Path:
    path.write_bytes(fill * (4 * MIB // len(fill)))
    return path


def refusal(path: Path, *folders: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_disk(os.fsencode(path), folders=[os.fsencode(one) for one in folders])
    words = str(caught.value)
    assert "\n" not in words
    return words


def contents(path: Path, form: str = "", *folders: Path) -> tuple[bytes, tuple[str, ...]]:
    source = open_disk(os.fsencode(path), form=form, folders=[os.fsencode(one) for one in folders])
    try:
        plain = source.read(0, source.size)
        told = bytearray(len(plain))
        for start, end in source.data_ranges(0, source.size):
            told[start:end] = plain[start:end]
        assert told == plain
        return plain, source.remarks
    finally:
        source.close()


# What a file may name.


def test_a_chain_in_one_folder_is_read_and_named(folder: Path) -> None:
    raw(folder / "base.raw", b"base")
    over(folder / "l1.qcow2", "base.raw", "raw")
    (folder / "new").mkdir()
    over(folder / "l2.qcow2", str(folder / "l1.qcow2"), "qcow2")
    subprocess.run(["qemu-io", "-c", "write -P 7 1M 64k", folder / "l2.qcow2"], check=True, capture_output=True)
    wanted = bytearray((folder / "base.raw").read_bytes())
    wanted[MIB : MIB + 64 * KIB] = b"\7" * 64 * KIB
    found, remarks = contents(folder / "l2.qcow2")
    assert found == wanted
    top, middle, base = folder / "l2.qcow2", folder / "l1.qcow2", folder / "base.raw"
    assert remarks == (f"the disk {top} is made of {top}, {middle}, {base}",)
    assert contents(create(folder / "alone.qcow2", "-f", "qcow2")) == (bytes(4 * MIB), ())


def test_a_chain_below_the_folder_is_read_and_one_above_it_is_not(folder: Path) -> None:
    (folder / "bases").mkdir()
    raw(folder / "bases/base.raw", b"base")
    over(folder / "top.qcow2", "bases/base.raw", "raw")
    assert contents(folder / "top.qcow2")[0] == (folder / "bases/base.raw").read_bytes()
    raw(folder / "base.raw", b"base")
    over(folder / "bases/top.qcow2", "../base.raw", "raw")
    assert "is not beside it: --backing-folder" in refusal(folder / "bases/top.qcow2")
    assert contents(folder / "bases/top.qcow2", "", folder)[0] == (folder / "base.raw").read_bytes()


@pytest.mark.parametrize("way", ["absolute", "relative", "symlink", "second", "symlinked folder"])
def test_a_backing_file_elsewhere_is_refused_until_its_folder_is_allowed(way: str, folder: Path) -> None:
    secret = folder.parent / "secret"
    (folder / "link").symlink_to(secret)
    (folder / "up").symlink_to(folder.parent)
    name = {"absolute": str(secret), "second": str(secret), "relative": "../secret", "symlink": "link"}
    top = over(folder / "a.qcow2", name.get(way, "up/secret"), "raw")
    if way == "second":
        top = over(folder / "b.qcow2", "a.qcow2", "qcow2")
    words = refusal(top)
    assert words == (
        f"the disk {top} names the file {secret}, which is not beside it: --backing-folder {folder.parent} allows "
        "that, if you know who made the disk"
    )
    assert refusal(top, folder / "nosuch", Path("/usr")) == words
    assert contents(top, "", Path("/usr"), folder.parent)[0].startswith(SECRET)


def test_the_start_of_a_folder_s_name_is_not_the_folder(folder: Path) -> None:
    (folder.parent / "disks2").mkdir()
    raw(folder.parent / "disks2/base.raw", b"base")
    assert "not beside it" in refusal(over(folder / "top.qcow2", "../disks2/base.raw", "raw"))


@pytest.mark.parametrize(
    "name", ["nbd://127.0.0.1:PORT/x", "nbd:127.0.0.1:PORT", "http://127.0.0.1:PORT/x", "fat:/etc"]
)
def test_what_is_no_plain_file_is_refused_and_nothing_is_connected_to(name: str, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        name = name.replace("PORT", str(server.getsockname()[1]))
        words = refusal(over(folder / "top.qcow2", name, "raw"), Path("/"))
        assert f"is {name}, which is no plain file: copy the disk with `qemu-img convert`" in words
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.accept()


def test_options_of_qemu_in_the_place_of_a_name_are_refused(folder: Path) -> None:
    name = f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{folder.parent / "secret"}"}}}}'
    assert "which is no plain file" in refusal(over(folder / "top.qcow2", name, "raw"), Path("/"))


def test_devices_and_pipes_are_refused_without_being_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert "no plain file" in refusal(over(folder / "a.qcow2", "pipe", "raw"))
    assert "no plain file" in refusal(over(folder / "b.qcow2", "/dev/zero", "raw"), Path("/dev"))
    # A driver of qemu that is no format.
    raw(folder / "base.raw", b"base")
    assert "none of raw, qcow2" in refusal(over(folder / "c.qcow2", "base.raw", "blkdebug"))


@pytest.mark.parametrize("others", [0, 1, 3])
def test_a_chain_that_names_itself_has_no_end_and_that_is_said(others: int, folder: Path) -> None:
    paths = [folder / f"{number}.qcow2" for number in range(others + 1)]
    for path, below in zip(paths, [*paths[1:], paths[0]], strict=True):
        over(folder / "new", below.name, "qcow2").rename(path)
    assert "names itself as its backing file" in refusal(paths[0])


def test_a_chain_of_more_files_than_can_be_is_refused(folder: Path) -> None:
    for number in range(65):
        over(folder / f"{number}.qcow2", f"{number + 1}.qcow2", "qcow2")
    assert "more than 64 files" in refusal(folder / "0.qcow2")


def test_a_data_file_is_read_where_a_backing_file_would_be(folder: Path) -> None:
    create(folder / "top.qcow2", "-f", "qcow2", "-o", "data_file=data.raw,data_file_raw=on")
    raw(folder / "data.raw", b"data")
    plain, [remark] = contents(folder / "top.qcow2")
    assert plain == (folder / "data.raw").read_bytes()
    assert remark.endswith(f"made of {folder / 'top.qcow2'}, {folder / 'data.raw'}")
    outside = create(folder / "out.qcow2", "-f", "qcow2", "-o", f"data_file={folder.parent / 'd'},data_file_raw=on")
    assert "not beside it" in refusal(outside)
    # The same, changed by hand, as there is no other way to have it made.
    garbled = (folder / "top.qcow2").read_bytes().replace(b"data.raw", b"nbd:a:10")
    (folder / "bad.qcow2").write_bytes(garbled)
    assert "the data file of" in refusal(folder / "bad.qcow2", Path("/"))


@pytest.mark.parametrize("kind", ["monolithicFlat", "twoGbMaxExtentFlat", "twoGbMaxExtentSparse"])
def test_extents_of_a_vmdk_are_read_in_its_folder_only(kind: str, folder: Path) -> None:
    path = create(folder / "disk.vmdk", "-f", "vmdk", "-o", f"subformat={kind}")
    subprocess.run(["qemu-io", "-c", "write -P 7 1M 64k", path], check=True, capture_output=True)
    plain, [remark] = contents(path)
    assert plain == bytes(MIB) + b"\7" * 64 * KIB + bytes(3 * MIB - 64 * KIB)
    [extent] = [one for one in folder.iterdir() if one != path]
    assert remark.endswith(f"made of {path}, {extent}")
    text = path.read_bytes()
    for name, says in (
        (str(folder.parent / "secret"), "not beside it"), ("../secret", "not beside it"),
        ("nbd:127.0.0.1:1", "no plain file"), ("/dev/zero", "not beside it"),
    ):  # fmt: skip
        (folder / "bad.vmdk").write_bytes(text.replace(extent.name.encode(), name.encode()))
        assert says in refusal(folder / "bad.vmdk")
    # What we do not take for an extent is not for qemu to take for one, or to leave out.
    line = next(line for line in text.splitlines() if line.startswith(b"RW "))
    for words, says in (
        (b'\x0bRW 8192 FLAT "../secret" 0', "its extent"), (b"RW 8192 ZERO", "its extent"), (b"", "without data"),
        (b'\x01RW 8192 FLAT "../secret" 0', "without data"),
    ):  # fmt: skip
        (folder / "bad.vmdk").write_bytes(text.replace(line, words))
        assert says in refusal(folder / "bad.vmdk")


def test_a_vmdk_over_another_is_read_in_its_folder_only(folder: Path) -> None:
    base = create(folder / "base.vmdk", "-f", "vmdk")
    subprocess.run(["qemu-io", "-c", "write -P 7 1M 64k", base], check=True, capture_output=True)
    top = create(folder / "top.vmdk", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk")
    assert contents(top)[0][MIB : MIB + 64 * KIB] == b"\7" * 64 * KIB
    # What the header says of the text's length is nothing that qemu goes by.
    data = bytearray(top.read_bytes())
    data[36:44] = bytes(8)
    (folder / "short.vmdk").write_bytes(data)
    assert contents(folder / "short.vmdk")[0] == contents(top)[0]
    base.rename(folder.parent / "base.vmdk")
    base.symlink_to("../base.vmdk")
    assert "not beside it" in refusal(top)


@pytest.mark.parametrize("form", ["qcow2", "vmdk"])
def test_qemu_is_told_where_a_chain_ends(form: str, folder: Path) -> None:
    path = create(folder / "top", "-f", form)
    chain = Chain(os.fsencode(path), form)
    assert json.loads(chain.name.removeprefix("json:"))["backing"] is None
    chain.close()


def test_the_text_of_a_vmdk_inside_another_is_not_followed(folder: Path) -> None:
    """A sparse VMDK without capacity: qemu takes the text inside for its description, with any extents."""
    path = create(folder / "disk.vmdk", "-f", "vmdk")
    data = bytearray(path.read_bytes())
    text = b'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
    data[12:20] = bytes(8)
    data[512:1536] = (text + b'RW 100 FLAT "%s" 0\n' % os.fsencode(folder.parent / "secret")).ljust(1024, b"\n")
    path.write_bytes(data)
    assert "data is in other files" in refusal(path)


def test_qemu_reads_what_was_checked_whatever_becomes_of_the_names(folder: Path) -> None:
    raw(folder / "base.raw", b"base")
    source = open_disk(os.fsencode(over(folder / "top.qcow2", "base.raw", "raw")))
    assert isinstance(source, ServedDisk)
    try:
        opened = {
            os.readlink(f"/proc/{source._server._process.pid}/fd/{name}")
            for name in os.listdir(f"/proc/{source._server._process.pid}/fd")
        }
        files = {name for name in opened if name.startswith(str(folder.parent))}
        assert files == {str(folder / "top.qcow2"), str(folder / "base.raw")}
        # qemu was told no name at all.
        words = Path(f"/proc/{source._server._process.pid}/cmdline").read_bytes()
        assert os.fsencode(folder) not in words
        limits = Path(f"/proc/{source._server._process.pid}/limits").read_text()
        [space] = [line.split()[3] for line in limits.splitlines() if line.startswith("Max address space")]
        assert int(space) <= 3 << 30
    finally:
        source.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's namespaces are not allowed everywhere")
def test_qemu_has_no_network(folder: Path) -> None:
    source = open_disk(os.fsencode(create(folder / "top.qcow2", "-f", "qcow2")))
    assert isinstance(source, ServedDisk)
    try:
        if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode == 0:
            own = os.readlink("/proc/self/ns/net")
            assert os.readlink(f"/proc/{source._server._process.pid}/ns/net") != own
    finally:
        source.close()


def test_names_of_any_bytes_are_read(folder: Path) -> None:
    place = os.fsencode(folder) + b"/\xff\xfe"
    os.mkdir(place)
    path = create(folder / "disk.vmdk", "-f", "vmdk", "-o", "subformat=monolithicFlat")
    for name in ("disk.vmdk", "disk-flat.vmdk"):
        os.rename(folder / name, os.path.join(place, os.fsencode(name)))
    assert contents(Path(os.fsdecode(place)) / path.name)[0] == bytes(4 * MIB)


# Which format a file is in.


@pytest.mark.parametrize("name", ["guest.raw", "guest.IMG", "guest.dd", "cd.iso"])
def test_a_raw_disk_by_name_is_raw_whatever_its_guest_wrote(name: str, folder: Path) -> None:
    over(folder / "evil", str(folder.parent / "secret"), "raw").rename(folder / name)
    plain, [remark] = contents(folder / name)
    assert plain == (folder / name).read_bytes()
    stem = name.partition(".")[0]
    assert remark == (
        f"{folder / name} begins like qcow2 and is stored as a raw disk, as its name says: --format {stem}=qcow2 reads "
        "it so"
    )
    assert "not beside it" in _refused_as(folder / name, "qcow2")
    create(folder / name, "-f", "qcow2")
    assert contents(folder / name, "qcow2") == (bytes(4 * MIB), ())


def test_a_link_without_a_telling_name_is_what_it_leads_to(folder: Path) -> None:
    over(folder / "evil", str(folder.parent / "secret"), "raw").rename(folder / "guest.raw")
    (folder / "current").symlink_to("guest.raw")
    plain, [remark] = contents(folder / "current")
    assert plain == (folder / "guest.raw").read_bytes()
    assert f"{folder / 'guest.raw'} begins like qcow2" in remark
    create(folder / "some.qcow2", "-f", "qcow2")
    (folder / "other").symlink_to("some.qcow2")
    assert contents(folder / "other") == (bytes(4 * MIB), ())
    # A name that says something is the user's word.
    create(folder / "cloud.img", "-f", "qcow2")
    (folder / "web.qcow2").symlink_to("cloud.img")
    assert contents(folder / "web.qcow2") == (bytes(4 * MIB), ())


def _refused_as(path: Path, form: str) -> str:
    with pytest.raises(SourceError) as caught:
        open_disk(os.fsencode(path), form=form)
    return str(caught.value)


def test_a_format_that_no_name_says_is_told_and_can_be_said(folder: Path) -> None:
    create(folder / "guest", "-f", "qcow2")
    plain, [remark] = contents(folder / "guest")
    assert plain == bytes(4 * MIB)
    assert "is read as qcow2 because it begins like one" in remark
    assert remark.endswith("--format guest=raw")
    assert contents(folder / "guest", "raw") == ((folder / "guest").read_bytes(), ())
    assert contents(folder / "guest", "qcow2") == (bytes(4 * MIB), ())


def test_a_device_is_in_no_format() -> None:
    devices: list[DiskSource] = []
    with pytest.raises((UsageError, SourceError), match="device"):
        devices.append(open_disk(b"/dev/null", form="qcow2"))


def test_a_backing_file_without_a_format_that_may_be_two_things_is_refused(folder: Path) -> None:
    top = over(folder / "top.qcow2", "base.raw", "raw")
    data = top.read_bytes()
    at = data.index(b"\xe2\x79\x2a\xca")
    # An extension that nobody knows, in the place of the one that says the format.
    top.write_bytes(data[:at] + b"\x12\x34\x56\x78" + data[at + 4 :])
    raw(folder / "base.raw", b"base")
    assert contents(top)[0] == (folder / "base.raw").read_bytes()
    over(folder / "evil", str(folder.parent / "secret"), "raw").rename(folder / "base.raw")
    assert "qemu-img rebase -u -F FORMAT" in refusal(top)


def test_a_backing_file_without_a_format_is_told_where_its_beginning_decides(folder: Path) -> None:
    top = over(folder / "top.qcow2", "base", "raw")
    data = top.read_bytes()
    at = data.index(b"\xe2\x79\x2a\xca")
    top.write_bytes(data[:at] + b"\x12\x34\x56\x78" + data[at + 4 :])
    raw(folder / "base", b"base")
    plain, [_] = contents(top)
    assert plain == (folder / "base").read_bytes()
    create(folder / "base", "-f", "qcow2")
    plain, [_, remark] = contents(top)
    assert plain == bytes(4 * MIB)
    assert remark.startswith(f"{folder / 'base'}, which the disk {top} is made of, is read as qcow2 because it begins")


def test_a_vmdk_that_does_not_name_its_parent_is_refused(folder: Path) -> None:
    create(folder / "base.vmdk", "-f", "vmdk")
    for kind in ("monolithicSparse", "monolithicFlat"):
        path = create(folder / f"{kind}.vmdk", "-f", "vmdk", "-o", f"subformat={kind}")
        contents(path)
        path.write_bytes(path.read_bytes().replace(b"parentCID=ffffffff", b"parentCID=0badcafe"))
        assert "only what changed since its parent, which it does not name" in refusal(path)


def test_snapshots_in_a_qcow2_are_said_to_be_left_out(folder: Path) -> None:
    top = create(folder / "top.qcow2", "-f", "qcow2")
    for name in ("a", "b"):
        subprocess.run(["qemu-img", "snapshot", "-c", name, top], check=True)
    assert contents(top)[1] == (
        f"the disk {top} has 2 snapshots in its file, which are left out: what is stored is the disk as it is now",
    )
