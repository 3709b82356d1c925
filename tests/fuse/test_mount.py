"""Real mounts, served by a child process; every client is another process with a time limit."""

import errno
import mmap
import os
import pickle
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import pytest

from backupfs.errors import MountError
from backupfs.fuse import mounted
from backupfs.repository.repository import Repository
from backupfs.snapshots import notes
from backupfs.snapshots.snapshot import Snapshot
from backupfs.stores.opening import open_store
from backupfs.usecases.umount import umount
from tests.builders import (
    PASSWORD,
    Directory,
    File,
    Hardlink,
    Seen,
    Sparse,
    Special,
    Symlink,
    Tree,
    back_up,
    build,
    folders_in,
    new_repository,
    noise,
    snapshot_of,
)

pytestmark = pytest.mark.fuse

Result = TypeVar("Result")

LIMIT_S = 60

SERVER = """
import logging, sys, trio
from functools import partial
from pathlib import Path
from backupfs.repository.local import LocalFolders
from backupfs.repository.repository import open_repository
from backupfs.stores.opening import open_store
from backupfs.usecases.events import ignore
from backupfs.usecases.mount import MountFilter, MountOptions, mount_in_background, serve_mount

url, mountpoint, log_file, password, hosts, snapshots, background = sys.argv[1:]
ids = frozenset(bytes.fromhex(one) for one in snapshots.split(",") if one)
options = MountOptions(MountFilter(ids, tuple(hosts.split(",")) if hosts else ()), refresh_s=0.2)

def serve(on_ready):
    repository = open_repository(open_store(url), password.encode(), LocalFolders(None, None))
    trio.run(serve_mount, repository, Path(mountpoint), options, on_ready, ignore)

if background:
    print(mount_in_background(serve, Path(mountpoint), options, Path(log_file)), flush=True)
else:
    logging.basicConfig(filename=log_file, level=logging.INFO)
    serve(partial(print, "ready", flush=True))
"""


def run(*command: str | bytes | Path, fails: bool = False) -> str:
    """Run a program on the mount and return what it says."""
    done = subprocess.run(command, capture_output=True, timeout=LIMIT_S, env={**os.environ, "LC_ALL": "C"}, check=False)
    assert (done.returncode != 0) == fails, (command, done.returncode, done.stdout, done.stderr)
    return (done.stderr if fails else done.stdout).decode("utf-8", "surrogateescape")


def apart(look: Callable[[], Result]) -> Result:
    """Run a look into the mount in a process of its own, so that a server that hangs cannot hang the tests."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            told = pickle.dumps((True, look()))
        except BaseException as error:
            told = pickle.dumps((False, error))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(told)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        if not select.select([pipe], [], [], LIMIT_S)[0]:
            os.kill(pid, signal.SIGKILL)
        told = pipe.read()
    os.waitpid(pid, 0)
    assert told, "the mount does not answer"
    worked, result = pickle.loads(told)
    if not worked:
        raise result
    return result  # type: ignore[no-any-return]


@dataclass
class Mounted:
    """A repository in a folder, its mount, and the process that serves it."""

    folder: Path
    repository: Repository
    point: Path
    server: "subprocess.Popen[str] | None" = None
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder / "mount.log"

    def start(self, hosts: str = "", snapshots: str = "", background: str = "") -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", SERVER, self.repository.store.url.removeprefix("file://"), str(self.point),
             str(self.log), PASSWORD.decode(), hosts, snapshots, background],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def mount(self, **options: str) -> Path:
        self.server = self.start(**options)
        assert self.server.stdout is not None
        assert self.server.stderr is not None
        said = self.server.stdout.readline()
        assert said == "ready\n", self.server.stderr.read()
        return self.point

    def backed_up(self, tree: Tree, **options: object) -> tuple[Path, Snapshot]:
        """Build a tree, back it up, and return it with its snapshot."""
        source = self.folder / "source"
        build(tree, source)
        return source, back_up(self.repository, source, **options)

    def end(self) -> None:
        if self.server is not None and self.server.poll() is None:
            self.server.send_signal(signal.SIGTERM)
            try:
                self.server.wait(10)
            except subprocess.TimeoutExpired:
                subprocess.run(["umount", "--lazy", self.point], timeout=10, check=False)
                self.server.kill()
                self.server.wait(10)
        if self.server is not None:
            for pipe in (self.server.stdout, self.server.stderr):
                assert pipe is not None
                pipe.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Mounted]:
    assert os.path.exists("/dev/fuse"), "these tests make real mounts and need /dev/fuse"
    store = open_store(str(tmp_path / "repository"))
    store.create()
    point = tmp_path / "mnt"
    point.mkdir()
    made = Mounted(tmp_path, new_repository(store, folders_in(tmp_path)), point)
    yield made
    made.end()


TREE: Tree = {
    b"empty": File(),
    b"small": File(b"hello", mode=0o640, xattrs={"user.colour": b"red\0blue", "user.none": b""}),
    b"medium": File(noise(1, 30_000), mode=0o4755),
    b"large": File(noise(2, 900_000), mtime_ns=-1_234_567_891),
    b"sparse": Sparse(3_000_000, {1_000_000: b"x" * 5000, 2_999_000: b"end"}),
    b"all hole": Sparse(1_000_000),
    b"future": File(b"f", mtime_ns=5_000_000_000_999_999_999),
    b"odd \xff\n name": File(b"o"),
    b"link": Symlink(b"../some\xfe/\\where\n"),
    b"fifo": Special(stat.S_IFIFO),
    b"socket": Special(stat.S_IFSOCK),
    b"d": Directory({b"inner": File(b"inner" * 3000), b"same": Hardlink("small"), b"empty": Directory({})}, mode=0o711),
    b"other": {b"name": Hardlink("small"), b"fifo": Hardlink("fifo")},
    b"many": {b"%05d" % number: File(b"%d" % number) for number in range(1500)},
}


def without_holes(tree: dict[bytes, Seen]) -> dict[bytes, Seen]:
    return {path: replace(seen, data=()) for path, seen in tree.items()}


def test_everything_in_a_snapshot_is_seen_as_it_was(world: Mounted) -> None:
    source, _ = world.backed_up(TREE)
    top = world.mount() / "latest" / str(source)[1:]
    assert without_holes(apart(lambda: snapshot_of(top))) == without_holes(snapshot_of(source))


def test_programs_copy_a_snapshot_out_of_the_mount(world: Mounted) -> None:
    source, _ = world.backed_up(TREE)
    top = world.mount() / "latest" / str(source)[1:]
    wanted = without_holes(snapshot_of(source))
    wanted_on_disk = {path: os.lstat(os.fsencode(source) + b"/" + path).st_blocks for path in (b"sparse", b"all hole")}

    def check(copy: Path) -> None:
        assert without_holes(snapshot_of(copy)) == wanted
        for path, blocks in wanted_on_disk.items():
            assert os.lstat(os.fsencode(copy) + b"/" + path).st_blocks <= blocks + 16

    # Newer versions of cp ask the file system for holes, and FUSE as Python has it tells of none.
    run("cp", "-a", "--sparse=always", top, world.folder / "copied")
    check(world.folder / "copied")
    run("rsync", "-aHAXS", f"{top}/", world.folder / "synced")
    check(world.folder / "synced")
    assert run("rsync", "-aHAXSn", "--checksum", "--delete", "-i", f"{top}/", f"{source}/") == ""
    archive = world.folder / "archive.tar"
    # Sockets have no place in an archive.
    run("tar", "-C", top, "--xattrs", "--sparse", "--exclude=./socket", "-cf", archive, ".")
    (world.folder / "unpacked").mkdir()
    run("tar", "-C", world.folder / "unpacked", "--xattrs", "-xpf", archive)
    unpacked = without_holes(snapshot_of(world.folder / "unpacked"))
    assert unpacked.keys() == wanted.keys() - {b"socket"}
    assert {path: seen.content for path, seen in unpacked.items()} == {
        path: seen.content for path, seen in wanted.items() if path != b"socket"
    }


def test_find_and_stat_agree_with_the_source(world: Mounted) -> None:
    source, _ = world.backed_up(TREE)
    top = world.mount() / "latest" / str(source)[1:]
    form = r"%P %y %m %n %U %G %T@ %l\0"
    # Sizes and blocks of directories are a matter of the file system.
    files = r"%P %s\0"
    for options in (["-printf", form], ["-not", "-type", "d", "-printf", files]):
        assert sorted(run("find", top, *options).split("\0")) == sorted(run("find", source, *options).split("\0"))


def test_names_of_one_file_have_one_inode_and_true_blocks(world: Mounted) -> None:
    source, _ = world.backed_up(TREE)
    top = world.mount() / "latest" / str(source)[1:]

    def look() -> tuple[set[int], os.stat_result, os.stat_result, int]:
        names = ("small", "d/same", "other/name")
        inodes = {os.stat(top / name).st_ino for name in names}
        return inodes, os.stat(top / "sparse"), os.stat(top / "all hole"), os.stat(top / "small").st_nlink

    inodes, sparse, hole, links = apart(look)
    assert len(inodes) == 1
    assert links == 3
    assert hole.st_blocks == 0
    assert 0 < sparse.st_blocks * 512 < 100_000


def test_readers_of_every_kind_get_the_same_bytes(world: Mounted) -> None:
    content = noise(5, 700_001)
    source, _ = world.backed_up({"f": File(content)})
    path = world.mount() / "latest" / str(source)[1:] / "f"

    def mapped() -> bytes:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
            return memory[:]

    def scattered() -> bool:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            offsets = [number * 7919 % len(content) for number in range(500)]
            return all(os.pread(file.fileno(), 4096, at) == content[at : at + 4096] for at in offsets)

    assert apart(mapped) == content
    run("sh", "-c", "echo 1 > /proc/sys/vm/drop_caches") if os.geteuid() == 0 else None
    assert apart(scattered)
    assert run("cmp", path, source / "f") == ""


def test_nothing_can_be_written(world: Mounted) -> None:
    source, _ = world.backed_up({"f": File(b"x"), "d": {}})
    point = world.mount()
    top = point / "latest" / str(source)[1:]

    def tries() -> list[int | None]:
        calls: list[Callable[[], object]] = [
            lambda: os.open(top / "f", os.O_RDWR),
            lambda: os.open(top / "new", os.O_WRONLY | os.O_CREAT),
            lambda: os.unlink(top / "f"),
            lambda: os.rmdir(top / "d"),
            lambda: os.mkdir(point / "new"),
            lambda: os.rename(top / "f", top / "g"),
            lambda: os.chmod(top / "f", 0o600),
            lambda: os.utime(top / "f"),
            lambda: os.setxattr(top / "f", "user.a", b"b"),
            lambda: os.symlink("a", top / "b"),
            lambda: os.truncate(top / "f", 0),
        ]
        found: list[int | None] = []
        for call in calls:
            try:
                call()
                found.append(None)
            except OSError as error:
                found.append(error.errno)
        return found

    assert apart(tries) == [errno.EROFS] * 11
    [mount] = [one for one in mounted.mounts() if one.mountpoint == str(point)]
    assert mount.user_id == os.getuid()
    options = run("findmnt", "-n", "-o", "SOURCE,FSTYPE,OPTIONS", point)
    assert options.split()[:2] == ["backupfs", "fuse.backupfs"]
    assert {"ro", "nosuid", "nodev"} <= set(options.split()[2].split(","))


def test_the_directories_above_the_snapshots_lead_to_them(world: Mounted) -> None:
    source, first = world.backed_up({"f": File(b"1")}, host="ann/e", tags=("a tag",), time_ns=1_700_000_000 * 10**9)
    (source / "f").write_bytes(b"two")
    second = back_up(world.repository, source, host="bob", time_ns=1_700_000_000 * 10**9)
    point, name = world.mount(), "2023-11-14T22-13-20Z"

    def look() -> dict[str, list[str]]:
        return {
            path: sorted(os.listdir(point / path))
            for path in ("", "snapshots", "hosts", "hosts/ann%2Fe", "tags", "tags/a tag", "ids")
        }

    assert apart(look) == {
        "": ["hosts", "ids", "latest", "snapshots", "tags"],
        "snapshots": [name, f"{name}-2"],
        "hosts": ["ann%2Fe", "bob"],
        "hosts/ann%2Fe": [name, "latest"],
        "tags": ["a tag"],
        "tags/a tag": [name],
        "ids": sorted([first.snapshot_id.hex()[:8], second.snapshot_id.hex()[:8]]),
    }
    tail = str(source / "f")[1:]
    for path, content in (
        (f"snapshots/{name}", "1"),
        (f"snapshots/{name}-2", "two"),
        ("latest", "two"),
        ("hosts/ann%2Fe/latest", "1"),
        (f"hosts/bob/{name}-2", "two"),
        (f"tags/a tag/{name}", "1"),
        (f"ids/{second.snapshot_id.hex()[:8]}", "two"),
    ):
        assert run("cat", point / path / tail) == content
    assert apart(lambda: os.stat(point / "latest").st_mtime) == 1_700_000_000
    # A directory above the sources was not looked at itself: it has the snapshot's time.
    assert apart(lambda: os.stat(point / "latest" / tail.split("/")[0]).st_mtime) == 1_700_000_000
    assert run("df", "--output=size,avail", point).split()[-1] == "0"
    assert int(run("df", "-B1", "--output=size", point).split()[-1]) >= 1000


def test_a_filter_shows_its_snapshots_only_and_without_xattrs_none_are_asked_for(world: Mounted) -> None:
    source, first = world.backed_up({"f": File(b"1")}, host="ann")
    back_up(world.repository, source, host="bob")
    point = world.mount(snapshots=first.snapshot_id.hex())
    assert run("ls", point / "snapshots").split() == [first.time_name]
    assert run("ls", point / "hosts").split() == ["ann"]
    with pytest.raises(OSError, match="not supported"):
        apart(lambda: os.getxattr(point / "latest" / str(source)[1:] / "f", "user.a"))
    with pytest.raises(OSError, match="not supported"):
        apart(lambda: os.listxattr(point / "latest" / str(source)[1:] / "f"))


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)


def test_snapshots_come_and_go_in_a_live_mount(world: Mounted) -> None:
    source, first = world.backed_up({"f": File(b"1" * 5000)}, time_ns=1_700_000_000 * 10**9)
    point = world.mount()
    path = str(source / "f")[1:]
    assert run("ls", point / "snapshots").split() == [first.time_name]
    held = os.open(point / "snapshots" / first.time_name / path, os.O_RDONLY)
    try:
        (source / "f").write_bytes(b"2")
        second = back_up(world.repository, source, tags=("new",))
        until(lambda: run("ls", point / "snapshots").split() == [first.time_name, second.time_name])
        until(lambda: run("cat", point / "latest" / path) == "2")
        assert run("cat", point / "tags/new" / second.time_name / path) == "2"
        notes.put_note(world.repository, notes.new_note(first.snapshot_id, notes.FORGET))
        until(lambda: run("ls", point / "snapshots").split() == [second.time_name])
        until(lambda: not os.path.exists(point / "snapshots" / first.time_name))
        assert apart(lambda: os.pread(held, 10_000, 0)) == b"1" * 5000
    finally:
        os.close(held)


def test_a_flipped_byte_is_an_error_for_its_file_only(world: Mounted) -> None:
    files = {f"f{number:02}": File(noise(number, 40_000)) for number in range(20)}
    source, _ = world.backed_up(files)
    packs = sorted((world.folder / "repository" / "packs" / "data").rglob("*"), key=lambda path: path.stat().st_size)
    damaged = bytearray(packs[-1].read_bytes())
    damaged[2000] ^= 1
    packs[-1].chmod(0o600)
    packs[-1].write_bytes(damaged)
    top = world.mount() / "latest" / str(source)[1:]

    def look() -> dict[str, bytes | int | None]:
        found: dict[str, bytes | int | None] = {}
        for name in files:
            try:
                found[name] = (top / name).read_bytes()
            except OSError as error:
                found[name] = error.errno
        return found

    for _ in range(2):
        seen = apart(look)
        bad = [name for name, content in seen.items() if content != files[name].content]
        assert 1 <= len(bad) <= 3
        assert {seen[name] for name in bad} == {errno.EIO}
    logged = world.log.read_text()
    assert f"{source}/{bad[0]} cannot be read: the object packs/data/" in logged
    assert logged.count(f"{source}/{bad[0]} cannot be read") == 1


def test_sigterm_ends_the_mount_cleanly(world: Mounted) -> None:
    world.backed_up({"f": File(b"1")})
    world.mount()
    assert world.server is not None
    world.server.send_signal(signal.SIGTERM)
    assert world.server.wait(10) == 0
    assert mounted.find_mount(world.point) is None
    assert os.listdir(world.point) == []


def test_umount_returns_when_the_server_has_ended(world: Mounted) -> None:
    world.backed_up({"f": File(b"1")})
    point = world.mount()
    mount = mounted.find_mount(point)
    assert mount is not None
    server = mounted.server_of(mount)
    assert server is not None
    assert world.server is not None
    assert server.pid == world.server.pid
    held = os.open(point / "snapshots", os.O_RDONLY)
    with pytest.raises(MountError, match=r"is in use.*--lazy"):
        umount(point)
    os.close(held)
    umount(point)
    assert not server.is_alive()
    assert world.server.wait(10) == 0
    with pytest.raises(MountError, match="no backupfs is mounted"):
        umount(point)


def test_a_server_in_the_background_says_when_it_is_ready_and_why_it_is_not(world: Mounted) -> None:
    source, _ = world.backed_up({"f": File(b"1")})
    command = world.start(background="yes")
    said, complaint = command.communicate(timeout=LIMIT_S)
    assert command.returncode == 0, complaint
    assert run("cat", world.point / "latest" / str(source)[1:] / "f") == "1"
    mount = mounted.find_mount(world.point)
    assert mount is not None
    server = mounted.server_of(mount)
    assert server is not None
    assert server.pid == int(said)
    assert stat.S_IMODE(world.log.stat().st_mode) == 0o600
    again = world.start(background="yes")
    _, complaint = again.communicate(timeout=LIMIT_S)
    assert "is mounted at" in complaint
    umount(world.point)
    (world.folder / "repository" / "config").unlink()
    command = world.start(background="yes")
    _, complaint = command.communicate(timeout=LIMIT_S)
    assert "errors.NotARepository: " in complaint
    assert "rest of a repository" in complaint
    assert mounted.find_mount(world.point) is None


def test_a_mount_that_cannot_be_made_says_why(world: Mounted) -> None:
    world.backed_up({"f": File(b"1")})
    for make, words in (
        (lambda: world.point.rmdir(), "there is no directory"),
        (lambda: world.point.write_bytes(b""), "is no directory"),
        (lambda: (world.point.unlink(), world.point.mkdir(), (world.point / "f").touch()), "is not empty"),
    ):
        make()
        started = world.start()
        _, complaint = started.communicate(timeout=LIMIT_S)
        assert started.returncode == 1
        assert words in complaint.splitlines()[-1]


def test_a_mount_whose_server_was_killed_can_be_removed(world: Mounted) -> None:
    world.backed_up({"f": File(b"1")})
    point = world.mount()
    assert world.server is not None
    world.server.kill()
    world.server.communicate(timeout=10)
    again = world.start()
    _, complaint = again.communicate(timeout=LIMIT_S)
    assert "is mounted at" in complaint
    umount(point)
    assert mounted.find_mount(point) is None
    assert os.listdir(world.mount()) != []
