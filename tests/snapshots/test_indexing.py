"""Indexes of images: a note shows an image otherwise, and can neither hide it nor change its disks."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from backupfs.codec.records import Encodable, Field, encode_record
from backupfs.codec.sealing import Kind, hash_object, seal_record
from backupfs.errors import DamagedObject, WrongPassword
from backupfs.ids import ChunkId
from backupfs.repository import layout
from backupfs.repository.repository import Repository
from backupfs.snapshots import notes
from backupfs.snapshots.indexing import encode_index, indexed
from backupfs.snapshots.listing import load_snapshots, put_snapshot
from backupfs.snapshots.node import STAT_ROW
from backupfs.snapshots.snapshot import FILES, IMAGE, Disk, Snapshot, Statistics
from backupfs.snapshots.volumes import DISK, RANGES, Volume
from tests.builders import new_repository

ROOT, OTHER = ChunkId(b"r" * 32), ChunkId(b"o" * 32)
ROW = STAT_ROW.pack(0o40755, 0, 0, 1, 0, 0, 0, 0, 0, 0)
IMAGED = Snapshot(
    IMAGE, b"h" * 16, "earth", 1, b"", 5, 5, (b"/dev/vda",), (), b"", ROOT, Statistics(size=9, files_skipped=2),
    root_row=ROW, image="web", disks=(Disk("vda", 0, b"/dev/vda", "raw"),),
    volumes=(Volume("vda", DISK, 9, 9, [[9, 3, b"123456789"]]),),
)  # fmt: skip
SHOWN = replace(
    IMAGED,
    root=OTHER,
    root_owner=b"root",
    root_xattrs=((b"user.a", b"1"),),
    traits=1,
    volumes=(*IMAGED.volumes, Volume("vda1", RANGES, 4, 4, b"", ((4, 0, 2),))),
    statistics=Statistics(files=7, directories=3, size=9, files_skipped=1),
)


@pytest.fixture
def repository() -> Repository:
    return new_repository()


def put_note(repository: Repository, snapshot: Snapshot, arguments: tuple[Field, ...], time_ns: int) -> None:
    note = replace(notes.new_note(snapshot.snapshot_id, notes.INDEX), time_ns=time_ns, arguments=arguments)
    notes.put_note(repository, note)


def test_what_an_index_says_is_shown_and_all_else_stays(repository: Repository) -> None:
    snapshot = put_snapshot(repository, IMAGED)
    shown = replace(SHOWN, snapshot_id=snapshot.snapshot_id)
    assert indexed(snapshot, encode_index(shown), "it") == shown
    listed = load_snapshots(repository)
    assert listed.snapshots == [snapshot]
    put_note(repository, snapshot, encode_index(shown), 1)
    assert listed.refresh()
    assert listed.snapshots == [shown] == [listed.find("web:latest")]
    assert listed.as_stored(shown) == snapshot
    assert not listed.refresh()
    assert not listed.damaged


def test_the_newest_index_counts_and_the_next_one_is_newer_whatever_the_clocks(repository: Repository) -> None:
    snapshot = put_snapshot(repository, IMAGED)
    for number in (3, 1 << 62, 2):
        arguments = encode_index(replace(SHOWN, root=ChunkId(number.to_bytes(32, "big"))))
        put_note(repository, snapshot, arguments, number)
    listed = load_snapshots(repository)
    assert int.from_bytes(listed.snapshots[0].root, "big") == 1 << 62
    put_note(repository, snapshot, encode_index(SHOWN), listed.next_index_ns(snapshot))
    assert load_snapshots(repository).snapshots[0].root == OTHER


Change = Callable[[list[Field]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda arguments: arguments.clear(),
        lambda arguments: arguments.insert(0, None),
        lambda arguments: arguments[0].__setitem__(0, b"short"),
        lambda arguments: arguments[0].__setitem__(1, b"row"),
        lambda arguments: arguments[0].__setitem__(1, STAT_ROW.pack(0o100644, *[0] * 9)),
        lambda arguments: arguments[0].__setitem__(4, 7),
        lambda arguments: arguments.__setitem__(2, []),
        lambda arguments: arguments[2][0].__setitem__(4, [[9, 3, b"987654321"]]),
        lambda arguments: arguments[2][0].__setitem__(0, "vdb"),
        lambda arguments: arguments[2][1][4][0].__setitem__(1, 1),
        lambda arguments: arguments[3].clear(),
    ],
)
@pytest.mark.expected_log("it is ignored")
def test_one_that_cannot_be_or_speaks_of_other_disks_is_passed_over_and_told(
    change: Change, repository: Repository
) -> None:
    snapshot = put_snapshot(repository, IMAGED)
    good = replace(SHOWN, snapshot_id=snapshot.snapshot_id)
    copied = [[[[*part] if isinstance(part, list) else part for part in item] if isinstance(item, list) else item
               for item in field] if isinstance(field, list) else field for field in encode_index(SHOWN)]  # fmt: skip
    change(copied)  # type: ignore[arg-type]
    with pytest.raises(DamagedObject):
        indexed(snapshot, copied, "it")  # type: ignore[arg-type]
    put_note(repository, snapshot, tuple(copied), 9)  # type: ignore[arg-type]
    listed = load_snapshots(repository)
    assert listed.snapshots == [snapshot]
    assert [key.startswith("notes/") for key in listed.damaged] == [True]
    put_note(repository, snapshot, encode_index(SHOWN), 8)
    assert load_snapshots(repository).snapshots == [good]


@pytest.mark.expected_log("it is ignored")
def test_one_of_a_snapshot_of_files_and_one_without_its_snapshot_change_nothing(repository: Repository) -> None:
    files = put_snapshot(repository, replace(IMAGED, kind=FILES, disks=(), volumes=(), image=""))
    put_note(repository, files, encode_index(SHOWN), 1)
    put_note(repository, replace(IMAGED, snapshot_id=b"x" * 32), encode_index(SHOWN), 1)  # type: ignore[arg-type]
    assert load_snapshots(repository).snapshots == [files]


@pytest.mark.expected_log("needs the maintain key")
def test_who_may_only_add_backups_cannot_change_what_is_shown(repository: Repository) -> None:
    snapshot = put_snapshot(repository, IMAGED)
    arguments: list[Encodable] = [*encode_index(SHOWN)]
    record = encode_record([1, snapshot.snapshot_id, "index", 1, "earth", arguments])
    data = seal_record(Kind.NOTE, repository.keyring, record)
    repository.store.put(layout.note_prefix(snapshot.snapshot_id) + hash_object(data).hex(), data)
    assert load_snapshots(repository).snapshots == [snapshot]
    keyring = repository.keyring
    repository.keyring = replace(keyring, keys=tuple(key for key in keyring.keys if key[0] != "maintain"))
    with pytest.raises(WrongPassword, match="maintain"):
        notes.require_right(repository, notes.INDEX)
