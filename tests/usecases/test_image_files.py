"""The files inside disks: as the file system has them, whatever it is made of, and whatever its reader does."""

import logging
import os
import random
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
import trio
import zstandard

from backupfs.disks import explorer, readers
from backupfs.disks.filesystem import READ, Entry, Extent, Read, Unreadable
from backupfs.errors import DamagedObject, StoreUnavailable
from backupfs.repository.repository import Repository
from backupfs.snapshots.node import STAT_ROW
from backupfs.snapshots.snapshot import Snapshot
from backupfs.snapshots.walk import find_path, walk
from backupfs.usecases import image_files, image_scan, image_unread, image_walk
from backupfs.usecases.events import Event, FileSkipped, Remark
from backupfs.usecases.image_unread import damage_before
from backupfs.usecases.restore import RestoreOptions, restore
from tests.builders import (
    Directory,
    File,
    Hardlink,
    Seen,
    Sparse,
    Special,
    Symlink,
    Tree,
    build,
    ignore,
    new_repository,
    reopened,
    run_check,
    snapshot_of,
)
from tests.usecases.test_image import bytes_of, run_image

MIB = 1 << 20

HARD: Tree = {
    b"empty": File(),
    b"tiny": File(b"x"),
    b"inline": File(b"y" * 100),
    b"large": File(random.Random(1).randbytes(3 * MIB + 17), mode=0o4711, owner=(1000, 70000)),
    b"not \xff utf-8 \n": File(b"name"),
    b"n" * 255: File(b"long name"),
    b"old": File(b"1965", mtime_ns=-150_000_000 * 10**9),
    b"xattrs": File(b"a", xattrs={"user.one": b"1", "user.large": b"v" * 900, "trusted.t": b"\0\1"}),
    b"sparse": Sparse(40 * MIB, {0: b"start", 17 * MIB + 4096: b"island" * 999, 40 * MIB - 4: b"end."}),
    b"dir": Directory(
        {b"one": File(b"1"), b"deep": {b"er": {b"still": {b"file": File(b"deep")}}}, b"link": Hardlink("large")},
        mode=0o1777,
    ),
    b"many": {b"f%04d" % number: File(b"%d" % number * (number % 50)) for number in range(1500)},
    b"empty dir": {},
    b"fast": Symlink(b"tiny"),
    b"slow": Symlink(b"../" * 60 + b"x" * 40),
    b"fifo": Special(),
    b"device": Special(stat.S_IFCHR, device=(5, 300)),
}


def as_of_mkfs(seen: Mapping[bytes, Seen]) -> dict[bytes, Seen]:
    """Return what mkfs keeps of a tree: times to the second, but for the top's, and its own idea of holes."""
    return {
        path: replace(one, mtime_ns=one.mtime_ns // 10**9 if path else 0, data=())
        for path, one in seen.items()
        if path != b"lost+found"
    }


def volume_of(tree: Path, path: Path, kind: str, *options: str, size: int = 96 * MIB) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
    subprocess.run([f"mkfs.{kind}", "-q", *options, "-d", tree, path], check=True, capture_output=True)
    return path


def restored(repository: Repository, snapshot: Snapshot, path: str, target: Path) -> dict[bytes, Seen]:
    options = RestoreOptions(verify=True)
    result = trio.run(partial(restore, repository, snapshot, os.fsencode(path), os.fsencode(target), options, ignore))
    assert (result.errors, result.damaged) == (0, 0)
    return snapshot_of(target)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ext4", []),
        ("ext4", ["-O", "inline_data", "-I", "256"]),
        ("ext4", ["-b", "1024"]),
        ("ext3", []),
        ("ext2", []),
    ],
)
def test_files_of_a_volume_are_what_was_put_into_it(kind: str, options: list[str], tmp_path: Path) -> None:
    source = Path(os.fsdecode(build(HARD, tmp_path / "source")))
    path = volume_of(source, tmp_path / "disk.raw", kind, *options)
    repository = new_repository()
    events: list[Event] = []
    snapshot = run_image(repository, path, report=events.append).snapshot
    assert snapshot is not None
    assert not [event for event in events if isinstance(event, FileSkipped | Remark)]
    repository = reopened(repository)
    found = restored(repository, snapshot, "/files/disk", tmp_path / "out")
    assert as_of_mkfs(found) == as_of_mkfs(snapshot_of(source))
    assert bytes_of(repository, snapshot, "/disks/disk.raw") == path.read_bytes()
    assert not run_check(repository, read_data=True).damaged


def test_contents_of_files_take_no_space_beside_the_disk(tmp_path: Path) -> None:
    source = Path(os.fsdecode(build({f"f{number}": File(os.urandom(MIB)) for number in range(9)}, tmp_path / "source")))
    path = volume_of(source, tmp_path / "disk.raw", "ext4")
    repository = new_repository()
    result = run_image(repository, path)
    assert 9 * MIB <= result.data.plain_bytes < 12 * MIB
    assert result.trees.plain_bytes < 100_000


def test_damaged_file_systems_cost_their_view_only(tmp_path: Path) -> None:
    source = Path(os.fsdecode(build({**HARD, b"many": {}}, tmp_path / "source")))
    whole = volume_of(source, tmp_path / "whole.raw", "ext4", "-b", "1024", size=16 * MIB).read_bytes()
    chooser = random.Random(7)
    repository = new_repository()
    path = tmp_path / "disk.raw"
    problems = 0
    for _ in range(25):
        damaged = bytearray(whole)
        for _ in range(chooser.choice((1, 200, 5000))):
            damaged[chooser.randrange(1024, MIB // 2)] = chooser.randrange(256)
        path.write_bytes(damaged)
        events: list[Event] = []
        snapshot = run_image(repository, path, report=events.append).snapshot
        assert snapshot is not None
        assert bytes_of(repository, snapshot, "/disks/disk.raw") == damaged
        problems += any(isinstance(event, FileSkipped) for event in events)
    assert problems >= 3
    assert not run_check(repository).damaged


# Readers that do what they like.


class Made:
    """A file system that is a mapping, and does as its parts say."""

    form = "made"
    remarks: tuple[str, ...] = ("it was made",)

    def __init__(self, entries: dict[int, list[Entry]], contents: Mapping[bytes, object] | None = None) -> None:
        self._entries = entries
        self._contents = contents or {}

    def top(self) -> Entry:
        return Entry(b"", stat.S_IFDIR | 0o755, inode=1)

    def entries(self, directory: Entry) -> Iterator[Entry]:
        for entry in self._entries.get(directory.inode, []):
            if entry.name == b"raise":
                raise Unreadable("the rest is garbled")
            if entry.name == b"hang":
                time.sleep(1000)
            if entry.name == b"die":
                os._exit(3)
            if entry.name == b"eat":
                bytearray(8 << 30)
            yield entry

    def identity(self, directory: Entry) -> object:
        return directory.inode

    def xattrs(self, entry: Entry) -> list[tuple[bytes, bytes]]:
        if entry.name == b"no xattrs":
            raise ValueError("odd")
        return [(b"user.a", b"1")] if entry.name == b"has xattrs" else []

    def extents(self, file: Entry) -> list[Extent] | None:
        found = self._contents.get(file.name)
        return found if isinstance(found, list) else None

    def data(self, file: Entry) -> Iterator[bytes]:
        found = self._contents[file.name]
        if isinstance(found, list):
            yield from (bytes([(at + 1) % 256]) * length for at, (length, place) in enumerate(found) if place == READ)
            return
        assert isinstance(found, bytes)
        yield found[: len(found) // 2]
        if file.name == b"cut":
            raise Unreadable("the second half is garbled")
        yield found[len(found) // 2 :]


def file(name: bytes, size: int = 0, inode: int = 9, **fields: int) -> Entry:
    return Entry(name, stat.S_IFREG | 0o644, size=size, inode=inode, **fields)


def folder(name: bytes, inode: int) -> Entry:
    return Entry(name, stat.S_IFDIR | 0o700, inode=inode)


Image = Callable[[Made], tuple[Repository, Snapshot, list[Event]]]


@pytest.fixture
def imaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image:
    """Return what makes an image of a disk with a given file system in it."""
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(3).randbytes(200_000))

    def make(filesystem: Made) -> tuple[Repository, Snapshot, list[Event]]:
        def opened(read: Read, size: int) -> Made:
            assert (read(0, 5), size) == (path.read_bytes()[:5], 200_000)
            return filesystem

        monkeypatch.setattr(readers, "open_filesystem", opened)
        repository, events = new_repository(), list[Event]()
        snapshot = run_image(repository, path, report=events.append).snapshot
        assert snapshot is not None
        assert bytes_of(repository, snapshot, "/disks/disk.raw") == path.read_bytes()
        assert not run_check(repository).damaged
        return repository, snapshot, events

    return make


def problems_of(events: list[Event]) -> dict[bytes, str]:
    return {event.path: event.reason for event in events if isinstance(event, FileSkipped)}


def test_what_has_no_place_in_the_volume_is_stored_as_a_file(imaged: Image, tmp_path: Path) -> None:
    large, small = os.urandom(100_000), os.urandom(400)
    plain = random.Random(3).randbytes(200_000)
    entries = {
        1: [
            file(b"large", 100_000), file(b"small", 400), file(b"cut", 2000), folder(b"d", 2),
            file(b"pieces", 5000), file(b"has xattrs"), file(b"no xattrs"),
        ],
        2: [file(b"inner", 3000)],
    }  # fmt: skip
    contents = {
        b"large": large, b"small": small, b"cut": bytes(2000), b"inner": large[:3000],
        b"pieces": [(1000, 150_001), (2000, None), (2000, 7)],
    }  # fmt: skip
    repository, snapshot, events = imaged(Made(entries, contents))
    assert problems_of(events) == {
        b"disk:/cut": "the second half is garbled", b"disk:/no xattrs": "its attributes cannot be read: odd",
    }  # fmt: skip
    assert [event.text for event in events if isinstance(event, Remark)] == ["disk (made): it was made"]
    found = restored(repository, snapshot, "/files/disk", tmp_path / "out")
    assert sorted(found) == [
        b"", b"d", b"d/inner", b"has xattrs", b"large", b"no xattrs", b"pieces", b"small",
    ]  # fmt: skip
    assert (tmp_path / "out/large").read_bytes() == large
    assert (tmp_path / "out/small").read_bytes() == small
    assert (tmp_path / "out/d/inner").read_bytes() == large[:3000]
    assert (tmp_path / "out/pieces").read_bytes() == plain[150_001:151_001] + bytes(2000) + plain[7:2007]
    assert found[b"has xattrs"].xattrs == ((b"user.a", b"1"),)


def test_what_has_a_place_in_the_volume_in_part_is_stored_in_part_and_holes_take_nothing(
    imaged: Image, tmp_path: Path
) -> None:
    plain = random.Random(3).randbytes(200_000)
    extents = {
        b"mixed": [(70_000, READ), (40 * MIB, None), (1000, 7), (5, READ), (300, None)],
        b"behind": [(40 * MIB, None), (2000, READ)],
        b"small": [(100, None), (200, READ)],
        b"pieces": [(1, None) if at % 2 else (1, READ) for at in range(9999)],
    }
    sizes = {name: sum(length for length, _ in found) for name, found in extents.items()}
    entries = [file(name, size) for name, size in sizes.items()]
    repository, snapshot, events = imaged(Made({1: entries}, extents))
    assert not problems_of(events)
    restored(repository, snapshot, "/files/disk", tmp_path / "out")
    wanted = b"\1" * 70_000, plain[7:1007] + b"\4" * 5 + bytes(300)
    with open(tmp_path / "out/mixed", "rb") as found:
        assert found.read(70_001) == wanted[0] + b"\0"
        found.seek(70_000 + 40 * MIB)
        assert found.read() == wanted[1]
    with open(tmp_path / "out/behind", "rb") as found:
        assert os.lseek(found.fileno(), 0, os.SEEK_DATA) >= 40 * MIB - 4096
        found.seek(40 * MIB)
        assert found.read() == b"\2" * 2000
    assert (tmp_path / "out/small").read_bytes() == bytes(100) + b"\2" * 200
    assert (tmp_path / "out/pieces").read_bytes() == bytes((at + 1) % 256 * (1 - at % 2) for at in range(9999))


def test_more_than_a_volume_can_hold_is_not_unpacked_and_costs_its_file_only(
    imaged: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_walk, "_LEAST_READ", 0)
    extents = {
        b"a": [(5_000_000, READ)], b"bomb": [(1 << 40, READ)], b"c": [(1 << 40, None), (1_000_000, READ)],
        b"d": [(500_000, READ)], b"e": [(1 << 40, None), (300_000, READ)],
    }  # fmt: skip
    entries = [file(name, sum(length for length, _ in found)) for name, found in extents.items()]
    repository, snapshot, events = imaged(Made({1: entries}, extents))
    # 32 times 200,000 bytes.
    says = "bytes of it would have to be unpacked, and 6,400,000 is the most in this volume"
    assert problems_of(events) == {b"disk:/bomb": f"{1 << 40:,} {says}", b"disk:/d": f"500,000 {says}"}
    top = find_path(snapshot, b"/files/disk", repository.trees.load)
    assert [name for name, _ in walk(top, b"", repository.trees.load)] == [b"/a", b"/c", b"/e"]


@pytest.mark.parametrize(("share", "kept"), [("_READING_SHARE", [b"/d", b"/d/deep", b"/lies"]), ("_WALKING_SHARE", [])])
def test_what_was_found_is_kept_when_a_reader_has_no_time_left(
    share: str, kept: list[bytes], imaged: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_walk, share, 0)
    entries = {1: [file(b"lies", 5), file(b"packed", 1000), folder(b"d", 2)], 2: [file(b"deep", 7)]}
    extents = {b"lies": [(5, 0)], b"packed": [(1000, READ)], b"deep": [(7, 0)]}
    repository, snapshot, events = imaged(Made(entries, extents))
    said = problems_of(events)
    assert said.keys() == {b"disk:/packed" if kept else b"disk:/"}
    assert "had no time left" in " ".join(said.values())
    top = find_path(snapshot, b"/files/disk", repository.trees.load)
    assert [name for name, _ in walk(top, b"", repository.trees.load)] == kept


def test_names_and_loops_that_cannot_be_are_told_and_passed_over(imaged: Image, tmp_path: Path) -> None:
    entries = {
        1: [
            file(b"a/b"), file(b".."), file(b""), file(b"twice", inode=5), file(b"twice", inode=6), folder(b"d", 2),
            file(b"huge", 1 << 63), folder(b"lost", 4), Entry(b"link", stat.S_IFLNK | 0o777),
        ],
        2: [folder(b"up", 1), folder(b"self", 2), file(b"good")],
        4: [file(b"here"), file(b"raise"), file(b"not reached")],
    }  # fmt: skip
    repository, snapshot, events = imaged(Made(entries))
    said = problems_of(events)
    assert said.keys() == {
        b"disk:/a/b", b"disk:/..", b"disk:/", b"disk:/twice", b"disk:/d/up", b"disk:/d/self", b"disk:/huge",
        b"disk:/lost", b"disk:/link",
    }  # fmt: skip
    assert "not all of the directory can be read: the rest is garbled" in said[b"disk:/lost"]
    found = restored(repository, snapshot, "/files/disk", tmp_path / "out")
    assert sorted(found) == [b"", b"d", b"d/good", b"d/self", b"d/up", b"lost", b"lost/here", b"twice"]


def test_an_extent_beyond_the_volume_is_damage_to_its_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that were made before this was compared may have some."""
    (tmp_path / "disk.raw").write_bytes(os.urandom(200_000))
    made = Made(
        {1: [file(b"beyond", 5000), file(b"good", 50)]}, {b"beyond": [(5000, 199_000)], b"good": [(50, 0)]}
    )  # fmt: skip
    monkeypatch.setattr(readers, "open_filesystem", lambda _read, _size: made)
    monkeypatch.setattr(image_scan, "Place", lambda *of: replace(image_files.Place(*of), size=MIB))
    repository = new_repository()
    snapshot = run_image(repository, tmp_path / "disk.raw").snapshot
    assert snapshot is not None
    options = RestoreOptions()
    result = trio.run(
        partial(restore, repository, snapshot, b"/files/disk", os.fsencode(tmp_path / "out"), options, ignore)
    )
    assert (result.damaged, result.files) == (1, 1)


def test_a_top_that_is_no_directory_is_told(imaged: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made({})
    monkeypatch.setattr(made, "top", lambda: file(b"", 50))
    repository, snapshot, events = imaged(made)
    assert problems_of(events) == {b"disk:/": "its file system cannot be read: its top is no directory"}
    assert sorted(restored(repository, snapshot, "/files", tmp_path / "out")) == [b"", b".unread"]


def test_an_image_of_before_whose_top_is_no_directory_keeps_no_other_from_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All images after such a one ended with a traceback."""
    top = image_walk.Closed(1, image_walk.Node(b"", STAT_ROW.pack(stat.S_IFREG | 0o644, 0, 0, 1, 9, 0, 0, 0, 0, 0), ()))
    repository, path = new_repository(), tmp_path / "disk.raw"
    path.write_bytes(bytes(200_000))
    with monkeypatch.context() as before:
        before.setattr(image_files, "walk_volume", lambda line, *_: line.send(top))
        before.setattr(image_files, "_require_kind", lambda *_, **__: None)
        run_image(repository, path)
    monkeypatch.setattr(readers, "open_filesystem", lambda _read, _size: Made({1: [file(b"a")]}))
    snapshot = run_image(repository, path).snapshot
    assert snapshot is not None
    assert sorted(restored(repository, snapshot, "/files/disk", tmp_path / "out")) == [b"", b"a"]


def test_a_tree_deeper_than_is_believed_is_cut(imaged: Image) -> None:
    entries = {number: [folder(b"d", number + 1)] for number in range(1, 3000)}
    _, _, events = imaged(Made(entries))
    assert "deeper than is believed" in " ".join(problems_of(events).values())


@pytest.mark.parametrize(
    ("what", "says"),
    [("hang", "has said nothing"), ("die", "ended before its work did"), ("eat", "more memory than a reader may have")],
)
def test_a_reader_that_hangs_dies_or_eats_is_ended(
    what: str, says: str, imaged: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "_PATIENCE_S", 2.0)
    _, _, events = imaged(Made({1: [file(b"a"), file(what.encode())]}))
    assert says in " ".join(problems_of(events).values())


def test_without_the_library_disks_are_complete_and_the_report_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explorer, "is_installed", lambda: False)
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(100_000))
    events: list[Event] = []
    repository = new_repository()
    snapshot = run_image(repository, path, report=events.append).snapshot
    assert snapshot is not None
    assert sum("pip install '.[images]'" in event.text for event in events if isinstance(event, Remark)) == 1
    assert bytes_of(repository, snapshot, "/disks/disk.raw") == path.read_bytes()


@pytest.mark.parametrize(("make", "form"), [(lambda *a: _squashfs(*a), "squashfs"), (lambda *a: _iso(*a), "ISO 9660")])
def test_without_the_library_what_it_would_read_is_named(
    make: Callable[[bytes, Path], list[list[str | bytes | Path]]],
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(explorer, "is_installed", lambda: False)
    path = tmp_path / "disk.raw"
    for command in make(build({"a": File(b"a")}, tmp_path / "source"), path):
        subprocess.run(command, check=True, capture_output=True)
    repository = new_repository()
    snapshot = run_image(repository, path).snapshot
    assert snapshot is not None
    kept = bytes_of(repository, snapshot, "/files/.unread").decode()
    assert kept == f"disk: it holds {form}, and the library that reads it is missing\n"
    # The list is none of the files in the disk.
    assert snapshot.statistics.files == 0


def test_files_of_a_volume_that_did_not_change_are_not_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(os.fsdecode(build(HARD, tmp_path / "source")))
    path = volume_of(source, tmp_path / "disk.raw", "ext4")
    repository = new_repository()
    first = run_image(repository, path).snapshot

    def opened(read: Read, size: int) -> object:
        raise AssertionError("nobody should look")

    monkeypatch.setattr(readers, "open_filesystem", opened)
    events: list[Event] = []
    second = run_image(repository, path, report=events.append).snapshot
    assert not problems_of(events)
    assert first is not None
    assert second is not None
    wanted = restored(repository, first, "/files/disk", tmp_path / "first")
    assert restored(repository, second, "/files/disk", tmp_path / "second") == wanted
    counted = [(one.statistics.files, one.statistics.directories) for one in (first, second)]
    assert counted[0] == counted[1]
    assert counted[0] > (1, 1)


@pytest.mark.parametrize("count", [1, 500])
def test_what_could_not_be_read_is_listed_as_long_as_the_volume_stays_the_same(
    count: int, imaged: Image, tmp_path: Path
) -> None:
    entries = [file(b"huge %04d \n" % number, 1 << 63) for number in range(count)]
    repository, snapshot, events = imaged(Made({1: [file(b"good", 50), *entries]}, {b"good": [(50, 0)]}))
    reason = f"it says that it has {1 << 63} bytes"
    lines = b"disk: it was made\n"
    lines += b"".join(b"disk:/huge %04d \\x0a: %s\n" % (number, reason.encode()) for number in range(count))
    assert len(problems_of(events)) == count
    assert snapshot.statistics.files_skipped == count
    # Beside the volume's folder, as a file that is there for readers of every kind.
    assert bytes_of(repository, snapshot, "/files/.unread") == lines
    assert sorted(restored(repository, snapshot, "/files", tmp_path / "out")) == [
        b"", b".unread", b"disk", b"disk/good",
    ]  # fmt: skip
    assert (tmp_path / "out/.unread").read_bytes() == lines

    # The second image does not look through it again, and the third takes it from the second.
    for _ in range(2):
        events = []
        second = run_image(repository, tmp_path / "disk.raw", report=events.append).snapshot
        assert second is not None
        assert problems_of(events) == {}
        whole, remark = [event.text for event in events if isinstance(event, Remark)]
        assert whole == "disk: it was made"
        assert f"disk is as it was, and {count:,} of it could not be read then" in remark
        assert bytes_of(repository, second, "/files/.unread") == lines
        assert second.statistics.files_skipped == count
        assert second.statistics.files == snapshot.statistics.files


@pytest.mark.parametrize("error", [DamagedObject, StoreUnavailable])
def test_a_volume_is_looked_through_again_where_the_list_of_what_it_lacks_cannot_be_read(
    error: type[Exception], imaged: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, snapshot, _ = imaged(Made({1: [file(b"good", 50), file(b"huge", 1 << 63)]}, {b"good": [(50, 0)]}))

    def failing(*_arguments: object) -> NoReturn:
        raise error("the list")

    monkeypatch.setattr(image_unread, "pieces", failing)
    events: list[Event] = []
    second = run_image(repository, tmp_path / "disk.raw", report=events.append).snapshot
    assert second is not None
    assert len(problems_of(events)) == second.statistics.files_skipped == 1
    assert second.statistics.files == snapshot.statistics.files
    listed = bytes_of(repository, second, "/files/.unread")
    assert listed == bytes_of(repository, snapshot, "/files/.unread")
    with pytest.raises(error):
        damage_before(snapshot, "disk", repository.trees.load)


@pytest.mark.expected_log("a look at")
@pytest.mark.parametrize("how", ["changed", "forced"])
def test_files_of_a_volume_that_changed_are(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(os.fsdecode(build({"a": File(b"first" * 500)}, tmp_path / "source")))
    path = volume_of(source, tmp_path / "disk.raw", "ext4", size=8 * MIB)
    repository = new_repository()
    run_image(repository, path)
    if how == "changed":
        (source / "b").write_bytes(b"second" * 500)
        volume_of(source, path, "ext4", size=8 * MIB)
    real = readers.open_filesystem
    looks: list[str] = []

    class Looks(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            looks.append(record.getMessage())

    def opened(read: Read, size: int) -> object:
        logging.getLogger("test").warning("a look at %d bytes", size)
        return real(read, size)

    monkeypatch.setattr(readers, "open_filesystem", opened)
    logging.getLogger("test").addHandler(handler := Looks())
    snapshot = run_image(repository, path, force=how == "forced").snapshot
    logging.getLogger("test").removeHandler(handler)
    assert looks == [f"a look at {8 * MIB} bytes"]
    assert snapshot is not None
    found = restored(repository, snapshot, "/files/disk", tmp_path / "out")
    assert (b"b" in found) == (how == "changed")


PLAIN: Tree = {
    "a": File(b"a" * 5000),
    "large": File(random.Random(2).randbytes(700_000) + bytes(100_000) + b"text " * 50_000),
    "d": {"e": {"deep": File(b"deep")}, **{f"file{number}": File(b"%d" % number) for number in range(60)}},
    "many": {f"d{number}": {"e": {"file": File(b"%d" % number)}} for number in range(30)},
}


def _squashfs(source: bytes, path: Path) -> list[list[str | bytes | Path]]:
    return [["mksquashfs", source, path, "-quiet", "-no-progress"]]


def _iso(source: bytes, path: Path) -> list[list[str | bytes | Path]]:
    return [["genisoimage", "-quiet", "-R", "-o", path, source]]


def _btrfs(source: bytes, path: Path) -> list[list[str | bytes | Path]]:
    return [["truncate", "-s", "160M", path], ["mkfs.btrfs", "-q", "--rootdir", source, path]]


def _fat(source: bytes, path: Path) -> list[list[str | bytes | Path]]:
    names = [source + b"/a", source + b"/large", source + b"/d", source + b"/many"]
    return [["truncate", "-s", "40M", path], ["mkfs.vfat", path], ["mcopy", "-s", "-i", path, *names, "::"]]


def _ntfs(source: bytes, path: Path) -> list[list[str | bytes | Path]]:
    return [
        ["truncate", "-s", "40M", path], ["mkntfs", "-q", "-F", path],
        ["ntfscp", "-q", path, source + b"/large", "large"], ["ntfscp", "-q", path, source + b"/a", "a"],
    ]  # fmt: skip


@pytest.mark.parametrize("make", [_squashfs, _iso, _btrfs, _fat, _ntfs])
def test_other_file_systems_are_read(
    make: Callable[[bytes, Path], list[list[str | bytes | Path]]], tmp_path: Path
) -> None:
    source = build(PLAIN, tmp_path / "source")
    path = tmp_path / "disk.raw"
    for command in make(source, path):
        subprocess.run(command, check=True, capture_output=True)
    repository = new_repository()
    events: list[Event] = []
    result = run_image(repository, path, report=events.append)
    snapshot = result.snapshot
    assert snapshot is not None
    assert not problems_of(events)
    found = restored(repository, snapshot, "/files/disk", tmp_path / "out")
    wanted = snapshot_of(source)
    contents = {name: one.content for name, one in found.items() if one.kind == "file"}
    expected = {name: one.content for name, one in wanted.items() if one.kind == "file"}
    if make is _ntfs:
        expected = {name: expected[name] for name in (b"a", b"large")}
        contents = {name: contents.get(name, "") for name in expected}
    assert contents == expected
    if make in (_iso, _btrfs, _fat):
        # The bytes of files are stored as parts of the disk, and nowhere else.
        assert not [entry for entry in events if isinstance(entry, Remark)]
        assert result.data.plain_bytes <= snapshot.volumes[0].data_size
    if make in (_squashfs, _btrfs, _iso):
        # ISO 9660 keeps no owner who may write.
        keep = 0o777 if make is not _iso else 0o444
        assert {name: one.mode & keep for name, one in found.items() if one.kind == "file"} == {
            name: one.mode & keep for name, one in wanted.items() if one.kind == "file"
        }
    assert bytes_of(repository, snapshot, "/disks/disk.raw") == path.read_bytes()


# (mode, owner, group, links, inode) as the kernel shows them (Linux 6.18).
SUBVOLUMES = {
    "a-snap": (0o755, 0, 0, 1, 256), "a-snap/d": (0o755, 1000, 1001, 1, 258),
    "a-snap/d/deep": (0o755, 1000, 1001, 1, 2), "a-snap/file": (0o644, 0, 0, 1, 257),
    "a-snap/gone": (0o755, 0, 0, 1, 2), "a-snap/inner": (0o755, 0, 0, 1, 2), "x": (0o755, 0, 0, 1, 257),
    "z-vol": (0o755, 0, 0, 1, 256), "z-vol/d": (0o755, 1000, 1001, 1, 258), "z-vol/d/deep": (0o755, 0, 0, 1, 256),
    "z-vol/d/deep/g": (0o644, 0, 0, 1, 257), "z-vol/file": (0o644, 0, 0, 1, 257),
    "z-vol/moved": (0o755, 0, 0, 1, 256), "z-vol/moved/again": (0o755, 0, 0, 1, 256),
    "z-vol/moved/again/d": (0o755, 1000, 1001, 1, 258), "z-vol/moved/again/d/deep": (0o755, 1000, 1001, 1, 2),
    "z-vol/moved/again/file": (0o644, 0, 0, 1, 257), "z-vol/moved/again/gone": (0o755, 0, 0, 1, 2),
    "z-vol/moved/again/inner": (0o755, 0, 0, 1, 2), "z-vol/moved/f": (0o644, 0, 0, 1, 257),
}  # fmt: skip


def test_subvolumes_of_btrfs_are_where_the_kernel_shows_them(tmp_path: Path) -> None:
    """subvolumes.btrfs.zst is the blocks of a volume of 120 MiB that are no zeros, each behind its place; made by:

    subvolume create z-vol, z-vol/inner, z-vol/d/deep, z-vol/gone, with a file in all but the last; chown z-vol/d;
    subvolume snapshot z-vol a-snap; subvolume snapshot -r z-vol z-vol/inner/again; subvolume delete z-vol/gone;
    mv z-vol/inner z-vol/moved; mkdir x.
    """
    packed = (Path(__file__).parents[1] / "disks/subvolumes.btrfs.zst").read_bytes()
    path = tmp_path / "disk.raw"
    with open(path, "wb") as disk:
        disk.truncate(120 * MIB)
        for place, block in struct.iter_unpack("<Q4096s", zstandard.decompress(packed, 1 << 24)):
            disk.seek(place)
            disk.write(block)
    repository, events = new_repository(), list[Event]()
    snapshot = run_image(repository, path, report=events.append).snapshot
    assert snapshot is not None
    assert not problems_of(events)
    top = find_path(snapshot, b"/files/disk", repository.trees.load)
    found = {
        os.fsdecode(name).lstrip("/"): (node.mode & 0o7777, node.uid, node.gid, node.nlink, node.inode)
        for name, node in walk(top, b"", repository.trees.load)
    }
    assert found == SUBVOLUMES
    for name, plain in (("z-vol/moved/f", b"inner\n"), ("z-vol/d/deep/g", b"deep\n"), ("a-snap/file", b"hi\n")):
        assert bytes_of(repository, snapshot, f"/files/disk/{name}") == plain


@pytest.mark.parametrize("codec", ["gzip", "xz", "zstd", "lz4", "lzo"])
def test_squashfs_is_read_whatever_packed_it(codec: str, tmp_path: Path) -> None:
    source = build(PLAIN, tmp_path / "source")
    path = tmp_path / "disk.raw"
    subprocess.run(["mksquashfs", source, path, "-quiet", "-no-progress", "-comp", codec], check=True)
    repository = new_repository()
    events: list[Event] = []
    snapshot = run_image(repository, path, report=events.append).snapshot
    assert snapshot is not None
    assert not problems_of(events)
    assert bytes_of(repository, snapshot, "/files/disk/large") == Path(os.fsdecode(source), "large").read_bytes()


def test_files_behind_the_end_of_a_disk_that_was_cut_are_named(tmp_path: Path) -> None:
    tree = {f"f{number}": File(os.urandom(2 * MIB)) for number in range(8)}
    path = volume_of(Path(os.fsdecode(build(tree, tmp_path / "source"))), tmp_path / "disk.raw", "ext4", size=64 * MIB)
    os.truncate(path, 12 * MIB)
    repository = new_repository()
    events: list[Event] = []
    snapshot = run_image(repository, path, report=events.append).snapshot
    assert snapshot is not None
    assert ["larger than the disk" in event.text for event in events if isinstance(event, Remark)] == [True]
    named = problems_of(events)
    whole = 0
    for name, entry in tree.items():
        key = b"disk:/" + name.encode()
        if key in named:
            assert "behind the end of the disk" in named[key]
        else:
            assert bytes_of(repository, snapshot, f"/files/disk/{name}") == entry.content
            whole += 1
    assert 0 < whole < len(tree)


def test_what_a_reader_says_to_lie_outside_of_the_volume_costs_its_file_only(imaged: Image) -> None:
    extents = {b"a": [(10, 7), (2, 199_999)], b"b": [(10, 199_990)], b"c": [(2000, READ), (9, -7)]}
    sizes = {name: sum(length for length, _ in found) for name, found in extents.items()}
    repository, snapshot, events = imaged(Made({1: [file(name, size) for name, size in sizes.items()]}, extents))
    behind = "it lies behind the end of the disk, which is cut short"
    assert problems_of(events) == {b"disk:/a": behind, b"disk:/c": behind}
    plain = random.Random(3).randbytes(200_000)
    assert bytes_of(repository, snapshot, "/files/disk/b") == plain[199_990:]


def test_files_of_xfs_behind_the_end_of_a_disk_that_was_cut_are_named(tmp_path: Path) -> None:
    tree = {f"f{number}": os.urandom(6 * MIB) for number in range(6)}
    lines = ["/stand/diag", "4872 110", "d--755 0 0"]
    for name, content in tree.items():
        (tmp_path / name).write_bytes(content)
        lines.append(f"{name} ---640 0 0 {tmp_path / name}")
    (tmp_path / "proto").write_text("\n".join([*lines, "$", ""]))
    path = tmp_path / "disk.raw"
    with open(path, "wb") as disk:
        disk.truncate(320 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-p", tmp_path / "proto", path], check=True, capture_output=True)
    os.truncate(path, 20 * MIB)
    repository, events = new_repository(), list[Event]()
    snapshot = run_image(repository, path, report=events.append).snapshot
    assert snapshot is not None
    assert ["larger than the disk" in event.text for event in events if isinstance(event, Remark)] == [True]
    named = problems_of(events)
    assert 0 < len(named) < len(tree)
    for name, content in tree.items():
        if (key := b"disk:/" + name.encode()) in named:
            assert named[key] == "it lies behind the end of the disk, which is cut short"
        else:
            assert bytes_of(repository, snapshot, f"/files/disk/{name}") == content


def test_one_garbled_entry_hides_no_other(tmp_path: Path) -> None:
    tree = {f"f{number:03}": File(b"%d" % number) for number in range(200)}
    path = volume_of(Path(os.fsdecode(build(tree, tmp_path / "source"))), tmp_path / "disk.raw", "ext4", size=16 * MIB)
    for field in ("f003 mode 0170644", "f100 extra_isize 9999", "f150 size 5000000"):
        subprocess.run(["debugfs", "-w", "-R", f"set_inode_field {field}", path], check=True, capture_output=True)
    repository = new_repository()
    events: list[Event] = []
    snapshot = run_image(repository, path, report=events.append).snapshot
    assert snapshot is not None
    found = restored(repository, snapshot, "/files/disk", tmp_path / "out")
    assert b"disk:/f003" in problems_of(events)
    assert len(found.keys() & {name.encode() for name in tree}) >= 197


class Takeover:
    """What a reader would send that hostile bytes have taken over."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("what", ["code", "numbers", "type", "extents", "outside", "before", "parts", "top", "kind"])
def test_a_reader_that_was_taken_over_can_do_nothing_here(
    what: str, imaged: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = bytes(56)
    folder_row = STAT_ROW.pack(stat.S_IFDIR | 0o755, 0, 0, 1, 9, 0, 0, 0, 0, 0)
    sent = {
        "top": image_walk.Closed(1, image_walk.Node(b"", row, ())),
        "kind": image_walk.Listed((image_walk.Node(b"a", folder_row, (), b"content"),)),
        "code": Takeover(tmp_path / "made"),
        "numbers": image_walk.Listed((image_walk.Node(b"a", row, (), directory=77),)),
        "extents": image_walk.Listed((image_walk.Node(b"a", row, (), extents=((None, None),)),)),  # type: ignore[arg-type]
        "outside": image_walk.Listed((image_walk.Node(b"a", row, (), extents=((2, 199_999),)),)),
        "before": image_walk.Gap(((2, -5),)),
        "parts": image_walk.Gap(((-5, None),)),
        "type": image_walk.Listed((image_walk.Node(b"a", b"short", ()),)),
    }[what]
    monkeypatch.setattr(image_files, "walk_volume", lambda line, *_: line.send(sent))
    _, _, events = imaged(Made({}))
    assert "said what makes no sense" in " ".join(problems_of(events).values())
    assert not (tmp_path / "made").exists()
