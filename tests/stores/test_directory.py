"""What a store in a folder promises beyond the contract: durability, privacy, and clear words when the disk fails."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backupfs.errors import (
    AccessDenied,
    DamagedObject,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from backupfs.stores import directory
from backupfs.stores.directory import DirectoryStore
from backupfs.stores.store import Store
from tests.descriptors import open_files

MIB = 1 << 20
DAY_S = 24 * 3600

VERBS: list[Callable[[Store], object]] = [
    lambda store: store.put("packs/data/ab", b"x"),
    lambda store: store.put("config", b"x", if_absent=True),
    lambda store: store.get("config"),
    lambda store: store.size("config"),
    lambda store: list(store.list("")),
    lambda store: list(store.list("packs/data/")),
    lambda store: store.now(),
    lambda store: store.delete("config"),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def store(root: Path) -> DirectoryStore:
    store = DirectoryStore(root)
    store.create()
    return store


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; mounting it takes root."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "none", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())


def keys(store: Store, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def run_child(root: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a child process, with `store` at a root."""
    head = f"from backupfs.stores.directory import DirectoryStore\nstore = DirectoryStore({str(root)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(body)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# Making and reading


def test_opening_and_reading_a_store_makes_nothing(tmp_path: Path, root: Path) -> None:
    DirectoryStore(root)
    assert list(tmp_path.iterdir()) == []
    root.mkdir()
    store = DirectoryStore(root)
    assert keys(store) == []
    store.delete("config")
    with pytest.raises(ObjectMissing):
        store.get("config")
    assert list(root.iterdir()) == []


def test_create_makes_the_folders_above_too_and_all_are_private(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "a" / "b" / "c")
    store.create()
    store.put("config", b"x")
    for path in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_create_leaves_an_existing_folder_as_it_is(root: Path) -> None:
    root.mkdir()
    root.chmod(0o755)
    (root / "lost+found").mkdir()
    DirectoryStore(root).create()
    assert stat.S_IMODE(root.stat().st_mode) == 0o755
    assert [path.name for path in root.iterdir()] == ["lost+found"]


def test_files_and_folders_are_private_to_their_owner(store: DirectoryStore, root: Path) -> None:
    old_mask = os.umask(0)
    try:
        store.put("packs/data/ab", b"x")
        store.put("config", b"x", if_absent=True)
    finally:
        os.umask(old_mask)
    for name in ("packs/data/ab", "config"):
        assert stat.S_IMODE((root / name).stat().st_mode) == 0o600
    for name in (".", ".tmp", "packs", "packs/data"):
        assert stat.S_IMODE((root / name).stat().st_mode) == 0o700


def test_a_relative_root_stays_where_it_was_when_the_process_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = DirectoryStore("root")
    store.create()
    monkeypatch.chdir("/")
    store.put("a", b"x")
    assert (tmp_path / "root" / "a").read_bytes() == b"x"


def test_what_is_no_object_is_not_listed_or_read(store: DirectoryStore, root: Path) -> None:
    store.put("packs/data/ab", b"x")
    (root / ".tmp" / "leftover").write_bytes(b"part")
    (root / ".hidden").write_bytes(b"")
    (root / "packs" / "a b").write_bytes(b"")
    (root / "lost+found").mkdir()
    (root / "lost+found" / "a").write_bytes(b"")
    os.mkfifo(root / "packs" / "fifo")
    (root / "packs" / "dangling").symlink_to("nowhere")
    assert keys(store) == ["packs/data/ab"]
    assert keys(store, "packs/") == ["packs/data/ab"]
    assert keys(store, "lost+found/") == []
    assert keys(store, ".tmp/") == []
    for key in ("packs/fifo", "packs/dangling", "packs/data"):
        with pytest.raises(ObjectMissing):
            store.get(key)
        with pytest.raises(ObjectMissing):
            store.size(key)


def test_a_file_is_not_open_in_a_child_process(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    real_open = os.open

    def record(path: str, flags: int, mode: int = 0o777) -> int:
        opened.append(flags)
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", record)
    store.put("packs/ab", b"x")
    store.get("packs/ab")
    store.now()
    assert len(opened) >= 4
    assert all(flags & os.O_CLOEXEC for flags in opened)


def test_no_call_leaves_a_file_open(store: DirectoryStore) -> None:
    store.put("packs/ab", b"x")
    before = open_files()
    store.put("packs/cd", b"x")
    store.put("packs/ef", b"x", if_absent=True)
    with pytest.raises(ObjectExists):
        store.put("packs/ef", b"x", if_absent=True)
    store.get("packs/ab")
    with pytest.raises(ObjectMissing):
        store.get("packs")
    store.now()
    store.delete("packs/ab")
    next(store.list(""))
    assert open_files() - before == set()


# Writing whole objects, durably


class Recorder:
    """The calls that make a put durable, in order, with paths below the root."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self._root = root
        real = {name: getattr(os, name) for name in ("fsync", "replace", "link", "mkdir", "unlink")}

        def fsync(descriptor: int) -> None:
            self._note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            real["fsync"](descriptor)

        def replace(source: str, target: str) -> None:
            real["replace"](source, target)
            self._note("name", target)

        def link(source: str, target: str) -> None:
            real["link"](source, target)
            self._note("name", target)

        def mkdir(path: str, mode: int) -> None:
            real["mkdir"](path, mode)
            self._note("mkdir", path)

        def unlink(path: str) -> None:
            real["unlink"](path)
            self._note("unlink", path)

        for name, function in (
            ("fsync", fsync),
            ("replace", replace),
            ("link", link),
            ("mkdir", mkdir),
            ("unlink", unlink),
        ):
            monkeypatch.setattr(os, name, function)

    def _note(self, what: str, path: str) -> None:
        below = os.path.relpath(path, self._root)
        if below.startswith(".tmp/"):
            below = ".tmp/*"
        self.calls.append(f"{what} {below}")


@pytest.mark.parametrize("if_absent", [False, True])
def test_a_put_syncs_the_data_before_its_name_and_every_new_name_after(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch, if_absent: bool
) -> None:
    store.now()
    recorder = Recorder(root, monkeypatch)
    store.put("packs/data/ab", b"x", if_absent=if_absent)
    assert recorder.calls == [
        "fsync .tmp/*",
        "mkdir packs",
        "fsync .",
        "mkdir packs/data",
        "fsync packs",
        "name packs/data/ab",
        "fsync packs/data",
    ] + (["unlink .tmp/*"] if if_absent else [])


def test_later_puts_sync_only_the_object_and_its_folder(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("packs/data/ab", b"x")
    recorder = Recorder(root, monkeypatch)
    store.put("packs/data/cd", b"x")
    store.put("config", b"x")
    assert recorder.calls == [
        "fsync .tmp/*",
        "name packs/data/cd",
        "fsync packs/data",
        "fsync .tmp/*",
        "name config",
        "fsync .",
    ]


def test_a_folder_made_by_another_process_is_synced_before_it_is_relied_on(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.now()
    (root / "packs").mkdir()
    recorder = Recorder(root, monkeypatch)
    store.put("packs/ab", b"x")
    assert recorder.calls == ["fsync .tmp/*", "fsync .", "name packs/ab", "fsync packs"]


def test_create_syncs_the_name_of_every_folder_it_makes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(root.parent, monkeypatch)
    DirectoryStore(root / "deep").create()
    assert recorder.calls == ["mkdir root", "fsync .", "mkdir root/deep", "fsync root"]


def test_a_delete_is_synced(store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("packs/ab", b"x")
    recorder = Recorder(root, monkeypatch)
    store.delete("packs/ab")
    store.delete("packs/cd")
    assert recorder.calls == ["unlink packs/ab", "fsync packs"]


def test_a_folder_that_cannot_be_synced_by_its_kind_is_accepted(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store.put("packs/ab", b"x")
    assert store.get("packs/ab") == b"x"


def test_a_put_whose_data_cannot_be_synced_leaves_no_object(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreUnavailable, match="packs/ab"):
        store.put("packs/ab", b"x")
    assert files(root) == []


def test_a_put_of_16_mib_copies_nothing(store: DirectoryStore) -> None:
    data = bytearray(16 * MIB)
    store.put("warm", b"x")
    tracemalloc.start()
    try:
        store.put("packs/data/ab", data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MIB


def test_short_writes_are_carried_on(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:7]))
    data = os.urandom(100)
    store.put("a", data)
    store.put("b", bytearray(data))
    assert store.get("a") == store.get("b") == data


def test_short_reads_are_carried_on(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(100)
    store.put("a", data)
    real_pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, length, offset: real_pread(descriptor, min(7, length), offset))
    assert store.get("a") == data
    assert store.get("a", start=11, length=50) == data[11:61]


def test_a_put_that_meets_the_limit_of_file_sizes_leaves_the_old_object_and_no_part_of_the_new(
    store: DirectoryStore, root: Path
) -> None:
    store.put("packs/old", b"old")
    done = run_child(
        root,
        """
        import resource
        from backupfs.errors import StoreUnavailable
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        for key in ("packs/old", "packs/new"):
            try:
                store.put(key, bytes(300_000))
            except StoreUnavailable as error:
                print(error)
        """,
    )
    assert done.returncode == 0, done.stderr
    assert "packs/old" in done.stdout
    assert "packs/new" in done.stdout
    assert files(root) == ["packs/old"]
    assert store.get("packs/old") == b"old"


@pytest.mark.parametrize("moment", ["write", "fsync"])
def test_a_put_killed_in_the_middle_leaves_no_object(store: DirectoryStore, root: Path, moment: str) -> None:
    store.put("packs/old", b"old")
    done = run_child(
        root,
        f"""
        import os, signal
        write, fsync = os.write, os.fsync
        def write_half_and_die(descriptor, data):
            write(descriptor, data[:len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        def die(descriptor):
            os.kill(os.getpid(), signal.SIGKILL)
        os.write, os.fsync = (write_half_and_die, fsync) if {moment!r} == "write" else (write, die)
        store.put("packs/old", bytes(300_000))
        """,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert keys(store) == ["packs/old"]
    assert store.get("packs/old") == b"old"
    (leftover,) = (root / ".tmp").iterdir()
    assert leftover.stat().st_size == (150_000 if moment == "write" else 300_000)


def test_a_full_disk_is_said_so_and_keeps_no_part(small_disk: Path) -> None:
    store = DirectoryStore(small_disk)
    store.put("packs/old", bytes(300_000))
    data = bytearray(2 * MIB)
    with pytest.raises(StoreFull, match=r"packs/new.*free some room") as caught:
        store.put("packs/new", data)
    data.clear()
    assert str(small_disk) in str(caught.value)
    assert files(small_disk) == ["packs/old"]
    store.put("packs/small", bytes(300_000))
    assert keys(store) == ["packs/old", "packs/small"]


def test_leftovers_of_dead_runs_make_room_on_a_full_disk(small_disk: Path) -> None:
    (small_disk / ".tmp").mkdir()
    leftover = small_disk / ".tmp" / "leftover"
    leftover.write_bytes(bytes(900_000))
    os.utime(leftover, (time.time() - 2 * DAY_S,) * 2)
    DirectoryStore(small_disk).put("packs/new", bytes(500_000))
    assert files(small_disk) == ["packs/new"]


def test_one_of_many_threads_wins_a_put_if_absent(store: DirectoryStore, root: Path) -> None:
    start = threading.Barrier(16)

    def put(number: int) -> bool:
        start.wait()
        try:
            store.put("keys/first", str(number).encode(), if_absent=True)
        except ObjectExists:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(put, range(16)))
    assert won.count(True) == 1
    assert store.get("keys/first") == str(won.index(True)).encode()
    assert files(root) == ["keys/first"]


def test_a_put_if_absent_works_on_a_disk_without_hard_links(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    store.put("keys/first", b"1", if_absent=True)
    with pytest.raises(ObjectExists):
        store.put("keys/first", b"2", if_absent=True)
    assert store.get("keys/first") == b"1"
    assert files(root) == ["keys/first"]


def test_a_put_survives_somebody_tidying_away_empty_folders(store: DirectoryStore, root: Path) -> None:
    for if_absent in (False, True):
        store.put("leases/x/1", b"1")
        store.delete("leases/x/1")
        (root / "leases" / "x").rmdir()
        (root / "leases").rmdir()
        (root / ".tmp").rmdir()
        store.put("leases/x/2", b"2", if_absent=if_absent)
        assert store.get("leases/x/2") == b"2"
        store.delete("leases/x/2")


# Temporary files of runs that died


def test_the_first_put_removes_stale_temporary_files_and_no_fresh_ones(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = store.now() / 1e9
    for name, age_s in (("stale", DAY_S + 60), ("fresh", DAY_S - 60), ("new", 0), ("ahead", -DAY_S * 3)):
        path = root / ".tmp" / name
        path.write_bytes(b"part")
        os.utime(path, (now_s - age_s,) * 2)
    # A machine whose own clock is a year ahead must not take the work of others for stale.
    monkeypatch.setattr(time, "time", lambda: now_s + 365 * DAY_S)
    monkeypatch.setattr(time, "time_ns", lambda: int((now_s + 365 * DAY_S) * 1e9))
    assert keys(store) == []
    assert files(root) == [".tmp/ahead", ".tmp/fresh", ".tmp/new", ".tmp/stale"]
    store.put("a", b"x")
    assert files(root) == [".tmp/ahead", ".tmp/fresh", ".tmp/new", "a"]


def test_stale_temporary_files_are_looked_for_once(store: DirectoryStore, root: Path) -> None:
    store.put("a", b"x")
    stale = root / ".tmp" / "stale"
    stale.write_bytes(b"part")
    os.utime(stale, (time.time() - 2 * DAY_S,) * 2)
    store.put("b", b"x")
    assert stale.exists()
    DirectoryStore(root).put("c", b"x")
    assert not stale.exists()


def test_a_temporary_file_that_cannot_be_removed_does_not_stop_a_put(store: DirectoryStore, root: Path) -> None:
    (root / ".tmp" / "folder").mkdir(parents=True)
    os.utime(root / ".tmp" / "folder", (0, 0))
    store.put("a", b"x")
    assert store.get("a") == b"x"


# Disks that fail


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EACCES, AccessDenied),
        (errno.EPERM, AccessDenied),
        (errno.EROFS, AccessDenied),
        (errno.EIO, StoreUnavailable),
        (errno.ESTALE, StoreUnavailable),
        (errno.EFBIG, StoreUnavailable),
    ],
)
def test_an_error_of_the_system_becomes_one_of_ours_that_names_object_and_folder(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StoreError]
) -> None:
    store.put("packs/ab", b"x")

    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", fail)
        patched.setattr(os, "pread", fail)
        reading = DamagedObject if number == errno.EIO else kind
        for raised, call in ((kind, lambda: store.put("packs/ab", b"y")), (reading, lambda: store.get("packs/ab"))):
            with pytest.raises(raised) as caught:
                call()
            assert type(caught.value) is raised
            assert "packs/ab" in str(caught.value)
            assert str(root) in str(caught.value)
            assert os.strerror(number) in str(caught.value)
    assert files(root) == ["packs/ab"]
    assert store.get("packs/ab") == b"x"


@pytest.mark.parametrize("number", [errno.EIO, errno.EUCLEAN, errno.EBADMSG])
@pytest.mark.parametrize("call", ["open", "pread"])
def test_an_object_that_the_disk_cannot_read_is_damaged(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    store.put("packs/ab", b"x")

    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(DamagedObject, match=f"packs/ab in {root} cannot be read.*{os.strerror(number)}"):
            store.get("packs/ab")
        # Where all of it is gone, as a disk that was pulled out, no object is to blame.
        root.rename(root.with_name("gone"))
        if call == "open":
            with pytest.raises(StoreUnavailable):
                store.get("packs/ab")
        root.with_name("gone").rename(root)

    def refuse(*arguments: object) -> int:
        raise OSError(errno.EACCES, "no")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(AccessDenied):
        store.get("packs/ab")


def test_a_buffer_is_free_again_after_the_disk_failed(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(descriptor: int, octets: memoryview) -> int:
        del octets  # the real one has no frame that a traceback could keep
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", write)
    data = bytearray(100)
    with pytest.raises(StoreUnavailable) as caught:
        store.put("a", data)
    data.clear()
    assert caught.value.__traceback__ is not None


def test_a_missing_root_is_unavailable_and_neither_empty_nor_made(root: Path) -> None:
    store = DirectoryStore(root)
    for verb in VERBS:
        with pytest.raises(StoreUnavailable, match="disk is mounted") as caught:
            verb(store)
        assert str(root) in str(caught.value)
    assert not root.exists()


def test_a_root_that_vanishes_is_unavailable_and_not_made_again(store: DirectoryStore, root: Path) -> None:
    store.put("config", b"x")
    store.put("packs/data/ab", b"x")
    root.rename(root.parent / "elsewhere")
    for verb in VERBS:
        with pytest.raises(StoreUnavailable, match="disk is mounted"):
            verb(store)
    assert not root.exists()
    (root.parent / "elsewhere").rename(root)
    assert keys(store) == ["config", "packs/data/ab"]


def test_a_root_that_vanishes_during_a_listing_ends_it_with_an_error(store: DirectoryStore, root: Path) -> None:
    for key in ("config", "keys/a", "packs/a", "packs/b"):
        store.put(key, b"x")
    for seen in range(1, 4):
        listing = store.list("")
        for _ in range(seen):
            next(listing)
        root.rename(root.parent / "elsewhere")
        with pytest.raises(StoreUnavailable):
            list(listing)
        (root.parent / "elsewhere").rename(root)


def test_a_root_that_is_a_file_is_said_so(root: Path) -> None:
    root.write_bytes(b"no folder")
    store = DirectoryStore(root)
    for verb in (*VERBS, lambda store: store.create()):
        with pytest.raises(StoreError, match="is not a folder") as caught:
            verb(store)
        assert not isinstance(caught.value, (StoreUnavailable, ObjectMissing))
    assert root.read_bytes() == b"no folder"


def test_a_root_below_a_file_cannot_be_made(root: Path) -> None:
    root.write_bytes(b"no folder")
    with pytest.raises(StoreError, match="check the path"):
        DirectoryStore(root / "deep" / "er").create()


def test_a_hostile_folder_name_cannot_drive_the_terminal(tmp_path: Path) -> None:
    store = DirectoryStore(f"{tmp_path}/\x1b[31m\n\udcff")
    with pytest.raises(StoreUnavailable) as caught:
        store.get("a")
    assert str(caught.value).isprintable()
    store.create()
    with pytest.raises(ObjectMissing) as missing:
        store.get("a")
    assert str(missing.value).isprintable()
    store.put("a", b"x")
    assert store.get("a") == b"x"


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A store's folder with two objects that cannot be written to: on a read-only disk as root, by mode otherwise."""
    root = tmp_path / "frozen"
    root.mkdir()
    as_root = os.geteuid() == 0
    if as_root:
        subprocess.run(["mount", "-t", "tmpfs", "none", root], check=True)
    try:
        store = DirectoryStore(root)
        store.put("config", b"configuration")
        store.put("packs/data/ab", b"pack")
        if as_root:
            subprocess.run(["mount", "-o", "remount,ro", root], check=True)
        else:
            for path in (root, *root.rglob("*")):
                path.chmod(0o500)
        yield root
    finally:
        if as_root:
            subprocess.run(["umount", root], check=True)
        else:
            for path in (root, *root.rglob("*")):
                path.chmod(0o700)


def test_a_read_only_folder_is_read_and_refuses_the_rest(read_only: Path) -> None:
    store = DirectoryStore(read_only)
    store.create()
    assert keys(store) == ["config", "packs/data/ab"]
    assert store.get("packs/data/ab", start=1, length=2) == b"ac"
    assert store.size("config") == 13
    for call in (
        lambda: store.put("packs/data/cd", b"x"),
        lambda: store.put("config", b"x", if_absent=True),
        lambda: store.delete("config"),
        store.now,
        DirectoryStore(read_only / "deep").create,
    ):
        with pytest.raises(AccessDenied, match="read-only") as caught:
            call()
        assert str(read_only) in str(caught.value)
    assert keys(store) == ["config", "packs/data/ab"]


@pytest.mark.parametrize("refusal", ["none", "at once", "when writing"])
@pytest.mark.parametrize("extra", [0, 1, 4095, 4097])
def test_large_objects_are_whole_whether_or_not_the_file_system_writes_past_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: int, refusal: str
) -> None:
    data = bytearray(os.urandom(2 * directory._DIRECT_STEP + extra))
    flags: list[int] = []
    real_fcntl, real_write = fcntl.fcntl, os.write

    def refusing_fcntl(descriptor: int, command: int, value: int = 0) -> int:
        if refusal == "at once" and value & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        flags.append(value)
        return real_fcntl(descriptor, command, value)

    def refusing_write(descriptor: int, part: memoryview) -> int:
        direct = real_fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
        if refusal == "when writing" and direct and len(flags) > 0 and len(part) == directory._DIRECT_STEP:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, part)

    monkeypatch.setattr(fcntl, "fcntl", refusing_fcntl)
    monkeypatch.setattr(os, "write", refusing_write)
    store = DirectoryStore(tmp_path)
    store.put("packs/large", data)
    assert store.get("packs/large") == data
    assert flags == ([] if refusal == "at once" else [os.O_DIRECT, 0])
