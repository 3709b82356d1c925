"""ext2, ext3 and ext4 as mkfs makes them, as the kernel fills them, and damaged at random.

The whole of a hard tree is compared with the kernel's view in tests/usecases/test_kernel_view.py, and what mkfs makes
of one in tests/usecases/test_image_files.py.
"""

import os
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupfs.disks.crc32c import SEED, crc32c, plain_crc32c
from backupfs.disks.ext import Ext, _device, _Runs, open_ext
from backupfs.disks.filesystem import Entry, Read, Unreadable
from tests.builders import File, Sparse, Symlink, build
from tests.usecases.test_image_files import MIB, volume_of
from tests.usecases.test_kernel_view import mounted

FORMS = {
    "clusters": ("ext4", ["-O", "bigalloc", "-C", "65536"]),
    "clusters of small blocks": ("ext4", ["-O", "bigalloc", "-b", "1024", "-C", "16384"]),
    "clusters and meta groups": ("ext4", ["-O", "bigalloc,meta_bg,^resize_inode", "-b", "1024", "-C", "4096"]),
    "meta groups": ("ext4", ["-O", "meta_bg,^resize_inode", "-b", "1024", "-g", "1024"]),
    "two copies": ("ext4", ["-O", "meta_bg,^resize_inode,sparse_super2", "-b", "1024", "-g", "1024"]),
    "many groups": ("ext4", ["-O", "^flex_bg,^64bit", "-b", "1024", "-g", "512"]),
    "values in inodes": ("ext4", ["-O", "ea_inode,inline_data", "-I", "512"]),
    "large blocks": ("ext4", ["-b", "4096", "-I", "1024", "-O", "large_dir"]),
    "maps": ("ext3", ["-b", "1024", "-I", "128"]),
    "no types": ("ext2", ["-O", "^filetype,^ext_attr", "-b", "2048"]),
    "old": ("ext2", ["-r", "0"]),
}


def reader_of(path: Path) -> Read:
    data = path.read_bytes()
    return lambda at, length: data[at : at + length]


def opened(path: Path) -> Ext:
    found = open_ext(reader_of(path), path.stat().st_size)
    assert found is not None
    return found


def walked(filesystem: Ext, most: int = 10_000) -> Iterator[tuple[bytes, Entry]]:
    """Yield all entries with their paths; directories that come again are not entered."""
    stack, seen = [(b"", filesystem.top())], {2}
    while stack:
        path, directory = stack.pop()
        for entry in filesystem.entries(directory):
            if entry.problem:
                raise Unreadable(entry.problem)
            below = path + entry.name
            yield below, entry
            if entry.is_directory and entry.inode not in seen and len(seen) < most:
                seen.add(entry.inode)
                stack.append((below + b"/", entry))


def content_of(read: Read, filesystem: Ext, entry: Entry) -> bytes:
    extents = filesystem.extents(entry)
    if extents is None:
        return b"".join(filesystem.data(entry))
    assert sum(length for length, _ in extents) == entry.size
    found = b"".join(bytes(length) if at is None else read(at, length) for length, at in extents)
    assert b"".join(filesystem.data(entry)) == found
    return found


def fill(place: Path, has_attributes: bool, has_large_ones: bool) -> None:
    """Put into a file system what its form makes hard."""
    chooser = random.Random(4)
    for number in range(400):
        (place / f"a file of a long name, so that a directory has blocks {number:05}").write_bytes(b"%d" % number)
    (place / "some").mkdir()
    for number in range(3):
        (place / f"some/{number}").write_bytes(b"in the inode perhaps")
    # Many extents, and blocks of numbers in two levels.
    with open(place / "scattered", "wb") as file:
        for at in range(0, 600, 2):
            file.seek(at * 4096)
            file.write(chooser.randbytes(4096))
            file.flush()
            os.fsync(file.fileno())
    with open(place / "far", "wb") as file:
        for at in (0, 11 * 1024, 13 * 1024, 300 * 1024, 70 * MIB, 900 * MIB):
            file.seek(at)
            file.write(b"island" * 50)
    with open(place / "allocated", "wb") as file:
        file.write(b"written")
        subprocess.run(["fallocate", "-n", "-l", "3M", file.name], check=False, capture_output=True)
        subprocess.run(["fallocate", "-o", "100K", "-l", "500K", file.name], check=False, capture_output=True)
    for length in (1, 59, 60, 61, 500):
        os.symlink("t" * length, place / f"link{length}")
    os.mknod(place / "device", 0o020600, os.makedev(300, 70_000))
    os.mknod(place / "old device", 0o060600, os.makedev(7, 3))
    if has_attributes:
        for at, size in enumerate((1, 100, 400, 30_000) if has_large_ones else (1, 100, 400)):
            os.setxattr(place / f"some/{at % 3}", f"user.of {size}", chooser.randbytes(size))
        os.setxattr(place / "link60", "trusted.of a link", b"value", follow_symlinks=False)
        subprocess.run(["setfacl", "-m", "u:1000:rw,g:70000:r", place / "some/1"], check=True)
        subprocess.run(["setfacl", "-d", "-m", "u:1000:rwx", place / "some"], check=True)


@pytest.mark.fuse
@pytest.mark.parametrize("form", FORMS)
def test_what_the_kernel_puts_into_one_is_found(form: str, tmp_path: Path) -> None:
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.fail("comparing with the kernel takes root and loop devices")
    kind, options = FORMS[form]
    path, place = tmp_path / "volume", tmp_path / "kernel"
    with open(path, "wb") as file:
        file.truncate(64 * MIB)
    subprocess.run([f"mkfs.{kind}", "-q", *options, path], check=True, capture_output=True)
    with mounted(path, place, "-o", "loop"):
        fill(place, has_attributes=kind != "ext2", has_large_ones="ea_inode" in options[1])
    filesystem, read = opened(path), reader_of(path)
    assert filesystem.form == kind
    assert filesystem.remarks == ()
    with mounted(path, place, "-o", "loop,ro"):
        found = dict(walked(filesystem))
        wanted = {os.fsencode(one)[len(os.fsencode(place)) + 1 :]: one for one in place.rglob("*")}
        assert found.keys() == wanted.keys()
        for name, entry in found.items():
            one = os.fsencode(wanted[name])
            status = os.lstat(one)
            assert (entry.mode, entry.uid, entry.gid, entry.nlink, entry.inode, entry.mtime_ns, entry.ctime_ns) == (
                status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_ino, status.st_mtime_ns,
                status.st_ctime_ns,
            ), name  # fmt: skip
            names = sorted(os.listxattr(one, follow_symlinks=False))
            assert filesystem.xattrs(entry) == [
                (os.fsencode(key), os.getxattr(one, key, follow_symlinks=False)) for key in names
            ], name
            if entry.is_file:
                assert entry.size == status.st_size
                if entry.size < 100 * MIB:
                    with open(one, "rb") as file:
                        assert content_of(read, filesystem, entry) == file.read(), name
            elif entry.target:
                assert entry.target == os.readlink(one), name
            else:
                assert os.makedev(*entry.device) == status.st_rdev, name
        # Of a file of holes, the islands only.
        extents = filesystem.extents(found[b"far"])
        assert extents is not None
        at = 0
        with open(place / "far", "rb") as file:
            for length, offset in extents:
                if offset is not None:
                    file.seek(at)
                    assert file.read(length) == read(offset, length)
                at += length
        assert at == 900 * MIB + 300
        assert sum(length for length, offset in extents if offset is not None) < MIB


@pytest.mark.parametrize("form", ["meta groups", "values in inodes", "maps"])
def test_damage_ends_in_errors_of_its_own(form: str, tmp_path: Path) -> None:
    """Every block that a walk reads is hit some time; a walk ends, whatever it meets."""
    kind, options = FORMS[form]
    tree = {
        "many": {b"f%04d" % number: File(b"%d" % number) for number in range(500)},
        "large": File(random.Random(1).randbytes(3 * MIB + 5), xattrs={"user.a": b"v" * 300}),
        "sparse": Sparse(9 * MIB, {at * 100_000: b"island" for at in range(90)}),
        "link": Symlink(b"t" * 200),
    }
    source = Path(os.fsdecode(build(tree, tmp_path / "source")))
    path = volume_of(source, tmp_path / "volume", kind, *options, size=32 * MIB)
    chooser = random.Random(5)
    read = reader_of(path)
    places: set[int] = set()

    def noted(at: int, length: int) -> bytes:
        places.update(range(at // 256, (at + length + 255) // 256))
        return read(at, length)

    def walk(reader: Read) -> None:
        found = open_ext(reader, size)
        assert found is not None
        for _, entry in walked(found, 1000):
            found.xattrs(entry)
            if entry.is_file and (extents := found.extents(entry)) is not None:
                assert sum(length for length, _ in extents) == entry.size
                assert all(at is None or at + length <= size for length, at in extents)

    size = path.stat().st_size
    walk(noted)
    used = sorted(place for place in places if read(place * 256, 256).strip(b"\0"))
    errors = 0
    for _ in range(80):
        hits = {chooser.choice(used) * 256 + chooser.randrange(256): chooser.randrange(256) for _ in range(60)}
        hits.pop(1024 + 56, None)
        hits.pop(1024 + 57, None)

        def damaged(at: int, length: int, hits: dict[int, int] = hits) -> bytes:
            data = bytearray(read(at, length))
            for place, value in hits.items():
                if at <= place < at + len(data):
                    data[place - at] = value
            return bytes(data)

        try:
            walk(damaged)
        except (Unreadable, struct.error):
            errors += 1
    assert errors > 5


def made(tmp_path: Path, *commands: str, kind: str = "ext4", options: tuple[str, ...] = ()) -> Ext:
    """Return one with `/file` of 3 MiB, after commands of debugfs."""
    source = Path(os.fsdecode(build({"file": File(os.urandom(3 * MIB)), "d": {}}, tmp_path / "source")))
    path = volume_of(source, tmp_path / "volume", kind, *options, size=32 * MIB)
    for command in commands:
        subprocess.run(["debugfs", "-w", "-R", command, path], check=True, capture_output=True)
    return opened(path)


def file_in(filesystem: Ext) -> Entry:
    return next(entry for name, entry in walked(filesystem) if name == b"file")


def test_a_map_that_goes_in_circles_ends(tmp_path: Path) -> None:
    filesystem = made(tmp_path, kind="ext3", options=("-b", "1024"))
    whole = file_in(filesystem)
    numbers = struct.unpack("<15I", whole.handle.map)
    extents = filesystem.extents(whole)
    assert extents is not None
    assert sum(length for length, _ in extents) == 3 * MIB
    round_ = whole.handle._replace(map=struct.pack("<15I", *numbers[:14], numbers[13]), size=1 << 40)
    with pytest.raises(Unreadable, match="in circles"):
        filesystem.extents(Entry(b"file", whole.mode, size=1 << 40, handle=round_))


def test_more_blocks_than_there_are_is_not_believed() -> None:
    runs = _Runs(100, 1000)
    runs.add(0, (5,) * 60)
    with pytest.raises(Unreadable, match="more blocks than there are"):
        runs.add(60, (6, 7) * 30)
    with pytest.raises(Unreadable, match="nowhere"):
        _Runs(100, 1000).add(0, (0, 100))


def test_runs_go_on_over_blocks_of_numbers() -> None:
    runs = _Runs(1000, 1000)
    runs.add(0, (10, 11, 0, 0, 14))
    runs.add(5, (15, 16, 3))
    runs.add(12, (0, 0))
    runs.add(14, (20,))
    assert runs.found == [(0, 10, 2), (4, 14, 3), (7, 3, 1), (14, 20, 1)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda node: node[:6] + b"\7\0" + node[8:], "root of its tree"),
        (lambda node: b"\0\0" + node[2:], "root of its tree"),
        (lambda node: node[:2] + b"\5\0" + node[4:], "root of its tree"),
        (lambda node: node[:6] + b"\1\0" + node[8:16] + b"\1\0\0\0\0\0" + node[22:], "tree of extents is none"),
        (lambda node: node[:2] + b"\2\0" + node[4:24] + node[12:24] + node[36:], "in no order"),
        (lambda node: node[:20] + b"\xff\xff\xff\0" + node[24:], "nowhere"),
        (lambda node: node[:16] + b"\0\0" + node[18:], "in no order"),
    ],
)
def test_a_tree_of_extents_that_makes_no_sense_is_refused(change, says: str, tmp_path: Path) -> None:
    filesystem = made(tmp_path)
    whole = file_in(filesystem)
    wrong = whole.handle._replace(map=change(whole.handle.map))
    assert wrong.map != whole.handle.map
    assert len(wrong.map) == 60
    with pytest.raises(Unreadable, match=says):
        filesystem.extents(Entry(b"file", whole.mode, size=whole.size, handle=wrong))


def test_files_that_are_encrypted_or_deleted_are_named(tmp_path: Path) -> None:
    filesystem = made(tmp_path, "set_inode_field file flags 0x80800", "set_inode_field d flags 0x80800")
    with pytest.raises(Unreadable, match="it is encrypted"):
        filesystem.extents(file_in(filesystem))
    [folder] = [entry for entry in filesystem.entries(filesystem.top()) if entry.name == b"d"]
    with pytest.raises(Unreadable, match="names are encrypted"):
        list(filesystem.entries(folder))
    filesystem = made(tmp_path / "two", "set_inode_field file links_count 0")
    [problem] = [entry.problem for entry in filesystem.entries(filesystem.top()) if entry.problem]
    assert "not in use" in problem


def test_bytes_in_an_inode_are_no_more_than_have_room(tmp_path: Path) -> None:
    source = Path(os.fsdecode(build({"file": File(b"few bytes")}, tmp_path / "source")))
    path = volume_of(source, tmp_path / "volume", "ext4", "-O", "inline_data", "-I", "256", size=16 * MIB)
    filesystem = opened(path)
    file = file_in(filesystem)
    assert filesystem.extents(file) is None
    assert b"".join(filesystem.data(file)) == b"few bytes"
    # As one that was made longer and not written.
    longer = file.handle._replace(size=200)
    assert b"".join(filesystem.data(Entry(b"file", file.mode, size=200, handle=longer))) == b"few bytes" + bytes(191)
    wrong = file.handle._replace(size=1 << 40)
    with pytest.raises(Unreadable, match="in its inode"):
        list(filesystem.data(Entry(b"file", file.mode, size=1 << 40, handle=wrong)))


def test_one_garbled_block_of_a_directory_hides_no_other(tmp_path: Path) -> None:
    tree = {f"{number:0200}": File() for number in range(100)}
    source = Path(os.fsdecode(build(tree, tmp_path / "source")))
    path = volume_of(source, tmp_path / "volume", "ext4", "-b", "1024", "-O", "^dir_index", size=16 * MIB)
    filesystem = opened(path)
    blocks = [
        at for _, block, length in filesystem._runs(filesystem.top().handle) for at in range(block, block + length)
    ]
    with open(path, "r+b") as file:
        file.seek(blocks[3] * 1024 + 4)
        file.write(b"\3\0")
    filesystem = opened(path)
    found: list[bytes] = []
    with pytest.raises(Unreadable, match="makes no sense"):
        found.extend(entry.name for entry in filesystem.entries(filesystem.top()))
    # What a list is given one by one it keeps.
    assert 80 < len(set(found) - {b"lost+found"}) < 100


def test_journals_and_what_is_not_known_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with open(path, "wb") as file:
        file.truncate(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-O", "journal_dev", path], check=True, capture_output=True)
    with pytest.raises(Unreadable, match="journal of a file system on another"):
        opened(path)
    block = bytearray(2048)
    block[1024 + 56 : 1024 + 58] = b"\x53\xef"
    with pytest.raises(Unreadable, match="makes no sense"):
        open_ext(lambda at, length: bytes(block[at : at + length]), MIB)
    struct.pack_into("<I", block, 1024 + 0x4C, 1)
    struct.pack_into("<I", block, 1024 + 0x60, 1 << 30)
    with pytest.raises(Unreadable, match="not known"):
        open_ext(lambda at, length: bytes(block[at : at + length]), MIB)
    assert open_ext(lambda at, length: bytes(length), MIB) is None
    assert open_ext(lambda at, length: b"", 0) is None


def test_devices_are_taken_apart_as_the_kernel_puts_them_together() -> None:
    assert _device(struct.pack("<II", 0x0503, 0)) == (5, 3)
    assert _device(struct.pack("<II", 0, 0x11170 << 12 & 0xFFF00000 | 300 << 8 | 0x70)) == (300, 0x11170)


@pytest.mark.fuse
def test_one_that_was_not_unmounted_says_so(tmp_path: Path) -> None:
    path, copy, place = tmp_path / "volume", tmp_path / "copy", tmp_path / "kernel"
    with open(path, "wb") as file:
        file.truncate(32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", path], check=True, capture_output=True)
    with mounted(path, place, "-o", "loop"):
        (place / "file").write_bytes(b"content")
        os.sync()
        copy.write_bytes(path.read_bytes())
    assert "not unmounted" in opened(copy).remarks[0]
    assert opened(path).remarks == ()


def test_a_wrong_checksum_is_told_and_never_read_over(tmp_path: Path) -> None:
    tree = {"file": File(b"x" * 9000), "dir": {b"n%03d" % number: File(b"y" * 5000) for number in range(400)}}
    path = volume_of(Path(os.fsdecode(build(tree, tmp_path / "source"))), tmp_path / "v", "ext4", size=32 * MIB)
    whole = path.read_bytes()
    entries = dict(walked(opened(path)))
    inode = whole.index(entries[b"file"].handle.raw)

    def problems(at: int) -> set[str]:
        damaged = bytearray(whole)
        damaged[at] ^= 1
        found = open_ext(lambda at, length: bytes(damaged[at : at + length]), len(damaged))
        assert found is not None
        told: set[str] = set()
        stack = [found.top()]
        while stack:
            try:
                for entry in found.entries(stack.pop()):
                    told.add(entry.problem)
                    stack += [entry] if entry.is_directory else []
            except Unreadable as error:
                told.add(str(error))
        return told - {""}

    # The first block of the only extent, in the inode.
    assert problems(inode + 40 + 12 + 8) == {f"its inode {entries[b'file'].inode} has a wrong checksum"}


def test_sums_are_those_of_others_with_the_library_and_without() -> None:
    assert plain_crc32c(SEED, b"123456789") ^ SEED == 0xE3069283
    for length in range(40):
        data = random.Random(length).randbytes(length)
        assert plain_crc32c(length, data) == crc32c(length, data)
