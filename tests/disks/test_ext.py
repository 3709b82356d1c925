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
from backupfs.disks.ext_sums import _is_spanned
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
    "a seed of its own": ("ext4", ["-b", "1024", "-O", "metadata_csum_seed,^64bit"]),
    "sums of groups": ("ext4", ["-O", "^metadata_csum,uninit_bg"]),
    "maps": ("ext3", ["-b", "1024", "-I", "128"]),
    "no types": ("ext2", ["-O", "^filetype,^ext_attr", "-b", "2048"]),
    # Of revision 0, which a new mkfs no longer makes.
    "old": ("ext2", ["-O", "none", "-I", "128"]),
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
        if has_large_ones:
            os.setxattr(place / "link59", "trusted.of a link", chooser.randbytes(30_000), follow_symlinks=False)
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
    if form == "old":
        with open(path, "r+b") as file:
            os.pwrite(file.fileno(), bytes(4), 1024 + 76)
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


@pytest.mark.parametrize("form", ["meta groups", "values in inodes", "sums of groups", "maps"])
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
    path = volume_of(
        source, tmp_path / "volume", "ext4", "-b", "1024", "-O", "^dir_index,^metadata_csum", size=16 * MIB
    )
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


LONG = b"a name of some length, so that few of them fill a block %04d"


def summed(tmp_path: Path, *options: str, groups: str = "8192") -> Path:
    """Return a volume with blocks of all kinds that have sums: `/many` has an index of two levels."""
    tree = {
        "many": {LONG % number: File() for number in range(2000)},
        "few": {b"%d" % number: File(b"few") for number in range(9)},
        "attributes": File(b"a", xattrs={"user.a": b"v" * 700}),
        "scattered": Sparse(3 * MIB, {at * 100_000: b"island" for at in range(30)}),
    }
    source = Path(os.fsdecode(build(tree, tmp_path / "source")))
    options = ("-b", "1024", "-I", "256", "-N", "4096", "-g", groups, *options)
    path = volume_of(source, tmp_path / "volume", "ext4", *options, size=32 * MIB)
    require_sound(path, "-fyD")
    return path


def require_sound(path: Path, *before: str) -> None:
    if before:
        assert subprocess.run(["e2fsck", *before, path], check=False, capture_output=True).returncode in (0, 1)
    subprocess.run(["e2fsck", "-fn", path], check=True, capture_output=True)


def looked_through(read: Read, size: int) -> tuple[set[bytes], dict[bytes, str]]:
    """Return all paths of which nothing is wrong, and what is wrong with the others."""
    filesystem = open_ext(read, size)
    assert filesystem is not None
    found: set[bytes] = set()
    problems: dict[bytes, str] = {}
    stack = [(b"", filesystem.top())]
    while stack:
        path, directory = stack.pop()
        try:
            for entry in filesystem.entries(directory):
                below = path + b"/" + entry.name
                if entry.problem:
                    problems[below] = entry.problem
                    continue
                try:
                    filesystem.xattrs(entry)
                    if entry.is_file:
                        filesystem.extents(entry)
                except Unreadable as error:
                    problems[below] = str(error)
                    continue
                found.add(below)
                stack += [(below, entry)] if entry.is_directory else []
        except Unreadable as error:
            problems[path] = str(error)
    return found, problems


def flipped(whole: bytes, *places: int) -> tuple[set[bytes], dict[bytes, str]]:
    """Return what is found where a bit of each of these bytes is another."""
    damaged = bytearray(whole)
    for place in places:
        damaged[place] ^= 1 << place % 8
    return looked_through(lambda at, length: bytes(damaged[at : at + length]), len(damaged))


def blocks_of(path: Path, name: bytes) -> list[int]:
    """Return where the blocks of a file or directory are."""
    filesystem = opened(path)
    runs = filesystem._runs(dict(walked(filesystem))[name].handle)
    return [at * filesystem._block_size for _, block, length in runs for at in range(block, block + length)]


@pytest.mark.parametrize(
    "options",
    [
        ("-O", "metadata_csum"),
        ("-O", "metadata_csum,metadata_csum_seed"),
        ("-O", "metadata_csum,^64bit,^dir_index"),
        ("-O", "metadata_csum,inline_data"),
        ("-O", "metadata_csum,large_dir"),
        ("-O", "^metadata_csum,uninit_bg"),
        ("-O", "^metadata_csum,uninit_bg,^64bit"),
        ("-b", "2048", "-g", "16384"),
        ("-b", "4096", "-g", "32768"),
        ("-b", "65536", "-g", "65528", "-F"),
    ],
)
def test_sums_of_what_the_tools_make_are_right(options: tuple[str, ...], tmp_path: Path) -> None:
    path = summed(tmp_path, *options)
    read, size = reader_of(path), path.stat().st_size
    found, problems = looked_through(read, size)
    assert problems == {}
    assert {name for name in found if name.startswith(b"/many/")} == {b"/many/" + LONG % at for at in range(2000)}
    # With blocks of 1 KiB tune2fs 1.47.0 itself leaves wrong sums in an index of two levels, which the kernel refuses.
    if "-b" in options or "metadata_csum_seed" in options[1]:
        subprocess.run(["tune2fs", "-U", "random", path], check=True, capture_output=True, input=b"y\n")
        require_sound(path)
        assert looked_through(reader_of(path), size) == (found, {})


@pytest.mark.fuse
@pytest.mark.parametrize("block_size", [1024, 4096])
def test_sums_of_what_the_kernel_makes_are_right(block_size: int, tmp_path: Path) -> None:
    """An index begins where names were, and the kernel leaves their tail behind it: it is no sum of names any more."""
    path, place = tmp_path / "volume", tmp_path / "kernel"
    with open(path, "wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-b", f"{block_size}", "-N", "9000", path], check=True, capture_output=True)
    with mounted(path, place, "-o", "loop"):
        many = place / "many"
        many.mkdir()
        for number in range(4000):
            (many / os.fsdecode(LONG % number)).touch()
        for number in range(0, 4000, 3):
            (many / os.fsdecode(LONG % number)).unlink()
        for number in range(1, 4000, 30):
            (many / os.fsdecode(LONG % number)).rename(many / f"{number}")
        wanted = {b"/many/" + os.fsencode(name) for name in os.listdir(many)}
    first = reader_of(path)(blocks_of(path, b"many")[0], block_size)
    assert first[-8:-4] == b"\x0c\0\0\xde"
    for command in ([], ["e2fsck", "-fyD"], ["tune2fs", "-f", "-O", "metadata_csum_seed"], ["resize2fs"]):
        if command == ["resize2fs"]:
            os.truncate(path, 96 * MIB)
            require_sound(path, "-fy")
        if command:
            done = subprocess.run([*command, path], check=False, capture_output=True)
            assert done.returncode in (0, 1), done
        require_sound(path)
        found, problems = looked_through(reader_of(path), path.stat().st_size)
        assert problems == {}
        assert found == {*wanted, b"/many", b"/lost+found"}


@pytest.mark.fuse
def test_emptied_blocks_without_sums_are_taken_as_the_kernel_takes_them(tmp_path: Path) -> None:
    path, place = tmp_path / "volume", tmp_path / "kernel"
    with open(path, "wb") as file:
        file.truncate(64 * MIB)
    command = ["mkfs.ext4", "-q", "-b", "1024", "-N", "9000", "-O", "^metadata_csum,uninit_bg", path]
    subprocess.run(command, check=True, capture_output=True)
    with mounted(path, place, "-o", "loop"):
        (place / "many").mkdir()
        for number in range(1000):
            (place / "many" / os.fsdecode(LONG % number)).touch()
        for number in range(1, 1000):
            (place / "many" / os.fsdecode(LONG % number)).unlink()
    subprocess.run(["tune2fs", "-O", "metadata_csum", path], check=True, capture_output=True, input=b"y\n")
    found, problems = looked_through(reader_of(path), path.stat().st_size)
    assert problems == {}
    assert found == {b"/many", b"/many/" + LONG % 0, b"/lost+found"}


def test_names_in_a_damaged_block_of_a_directory_are_left_out(tmp_path: Path) -> None:
    path = summed(tmp_path)
    whole, chooser = path.read_bytes(), random.Random(3)
    found, problems = looked_through(reader_of(path), len(whole))
    assert problems == {}
    leaves = [at for at in blocks_of(path, b"many") if whole[at + 1012 : at + 1020] == b"\0\0\0\0\x0c\0\0\xde"]
    assert len(leaves) > 100
    for at in [*range(1012, 1020), *(chooser.randrange(1024) for _ in range(20))]:
        block = chooser.choice(leaves)
        rest, problems = flipped(whole, block + at)
        says = "has no checksum, which `e2fsck -D` mends" if 1012 <= at < 1020 else "has a wrong checksum"
        assert problems == {b"/many": f"a block of it {says}"}
        assert rest < found
        lost = found - rest
        assert 3 < len(lost) < 20
        assert all(name[6:] in whole[block : block + 1024] for name in lost)
    # One that is damaged says so once, and so do several.
    rest, problems = flipped(whole, leaves[0], leaves[5] + 9)
    assert problems == {b"/many": "a block of it has a wrong checksum"}
    assert 6 < len(found - rest) < 40


def test_a_damaged_index_is_told_and_hides_no_names(tmp_path: Path) -> None:
    path = summed(tmp_path)
    whole = path.read_bytes()
    found, _ = looked_through(reader_of(path), len(whole))
    root, *others = blocks_of(path, b"many")
    nodes = [at for at in others if whole[at : at + 8] == b"\0\0\0\0\0\4\0\0"]
    assert nodes
    told = {b"/many": "a block of its index has a wrong checksum"}
    # A count, an entry, the hash's kind; the sum itself; how much room there is, which says where that is.
    for at in (root + 34, root + 45, root + 28, root + 1020, *(nodes[0] + at for at in (10, 17, 1016, 1021))):
        assert flipped(whole, at) == (found, told), at
    for at in (root + 33, nodes[0] + 8, nodes[-1] + 9):
        assert flipped(whole, at) == (found, {b"/many": "a block of its index has no checksum"}), at
    # What looks like a block with names that is empty.
    assert flipped(whole, nodes[0] + 6) == (found, told)
    # What is not in use, nobody sums.
    used = int.from_bytes(whole[root + 34 : root + 36], "little")
    assert flipped(whole, root + 32 + 8 * used) == (found, {})


@pytest.mark.parametrize("features", ["metadata_csum", "^metadata_csum,uninit_bg"])
def test_inodes_of_a_group_with_a_wrong_checksum_are_told_and_none_else(features: str, tmp_path: Path) -> None:
    path = summed(tmp_path, "-O", features, groups="1024")
    whole = path.read_bytes()
    filesystem = opened(path)
    found, problems = looked_through(reader_of(path), len(whole))
    assert problems == {}
    numbers = {b"/" + name: entry.inode for name, entry in walked(filesystem)}
    inside = {name for name, number in numbers.items() if (number - 1) // filesystem._per_group == 5}
    assert 100 < len(inside) < len(found) / 2
    # Where its inodes begin, how much is free, the sum, and what only large descriptors have.
    for at in (8, 13, 30, 31, 40):
        rest, problems = flipped(whole, 2048 + 5 * filesystem._row + at)
        assert rest == found - inside
        assert problems == dict.fromkeys(inside, "the descriptor of its group 5 has a wrong checksum")


def test_a_superblock_with_a_wrong_checksum_is_not_believed(tmp_path: Path) -> None:
    path = summed(tmp_path)
    whole = path.read_bytes()
    for at in (0x00, 0x28, 0x62, 0x68, 0x1F0, 0x3FB, 0x3FC):
        with pytest.raises(Unreadable, match=r"^its superblock has a wrong checksum, a copy is at byte 8,389,632$"):
            flipped(whole, 1024 + at)
    with pytest.raises(Unreadable, match=r"^its superblock has a wrong checksum$"):
        flipped(whole, 1024, 8389632 + 0x38)
    # Without the feature there is none, whatever stands there.
    subprocess.run(["tune2fs", "-O", "^metadata_csum", path], check=True, capture_output=True)
    assert flipped(path.read_bytes(), 1024 + 0x3FC)[1] == {}


def test_a_wrong_checksum_is_told_and_never_read_over(tmp_path: Path) -> None:
    path = summed(tmp_path)
    whole = path.read_bytes()
    found, problems = looked_through(reader_of(path), len(whole))
    assert problems == {}
    entries = dict(walked(opened(path)))
    scattered, attributes = entries[b"scattered"].handle, entries[b"attributes"].handle
    # The block that the only extent, or branch, of the inode leads to; in it, the start of the second extent.
    at = whole.index(scattered.raw) + 40 + 12
    below = int.from_bytes(whole[at + 4 : at + 8], "little") * 1024
    for place, name, says in (
        (at + 4, b"/scattered", f"its inode {scattered.number} has a wrong checksum"),
        (below + 12 + 12 + 8, b"/scattered", "a block of its tree of extents has a wrong checksum"),
        (attributes.attributes_at * 1024 + 900, b"/attributes", "the block of its attributes has a wrong checksum"),
    ):
        assert flipped(whole, place) == (found - {name}, {name: says})


def test_an_entry_that_takes_all_of_a_large_block_says_so_in_two_ways() -> None:
    """A length of 65,536 has no room in its field."""
    for length, size, is_all in ((0, 65536, True), (65535, 65536, True), (65524, 65536, False), (0, 4096, False)):
        assert _is_spanned(struct.pack("<IH", 0, length).ljust(size, b"\0")) is is_all
    assert not _is_spanned(struct.pack("<IH", 7, 4096).ljust(4096, b"\0"))


def test_sums_are_those_of_others_with_the_library_and_without() -> None:
    assert plain_crc32c(SEED, b"123456789") ^ SEED == 0xE3069283
    for length in range(40):
        data = random.Random(length).randbytes(length)
        assert plain_crc32c(length, data) == crc32c(length, data)
