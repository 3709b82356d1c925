"""Images that were taken without a look into them: what a later look finds, and what it leaves as it is."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

import backupfs.usecases.index as index_module
from backupfs.disks import explorer, layout, readers
from backupfs.disks.filesystem import Read
from backupfs.errors import PathNotFound, UsageError, WrongPassword
from backupfs.ids import ChunkId
from backupfs.repository.repository import Repository
from backupfs.snapshots import notes
from backupfs.snapshots.indexing import encode_index
from backupfs.snapshots.listing import load_all, put_snapshot
from backupfs.snapshots.node import Node
from backupfs.snapshots.snapshot import HAS_XATTRS, Snapshot
from backupfs.snapshots.walk import find_path
from backupfs.stores.directory import DirectoryStore
from backupfs.usecases import image_walk
from backupfs.usecases.events import Event, FileSkipped
from backupfs.usecases.index import IndexOptions, IndexResult, index
from tests import independent_reader
from tests.builders import (
    PASSWORD,
    SMALL,
    File,
    back_up,
    build,
    folders_in,
    ignore,
    keys_of,
    new_repository,
    reopened,
    run_check,
)
from tests.disks.test_logical import POOL_BLOCKS, Group, file_system
from tests.disks.test_luks import PASSPHRASE, encrypted
from tests.disks.test_source import converted, damage
from tests.usecases.test_image import bytes_of, disk_in, make_image
from tests.usecases.test_image_files import HARD, MIB, volume_of
from tests.view.test_filesystem import Client


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """One in a folder, with a cache: what reads in confined processes has neither at hand."""
    store = DirectoryStore(tmp_path / "store")
    store.create()
    return new_repository(store, folders_in(tmp_path))


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    return volume_of(Path(os.fsdecode(build(HARD, tmp_path / "source"))), tmp_path / "disk.raw", "ext4")


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As without anything that reads file systems, until it is undone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explorer, "is_installed", lambda: False)
        patch.setattr(readers, "open_filesystem", lambda _read, _size: None)
        yield patch


def run_index(repository: Repository, force: bool = False, report=ignore) -> IndexResult:
    repository = reopened(repository)
    listed = load_all(repository)
    return index(repository, listed, listed.snapshots[-1], IndexOptions(sizes=SMALL, force=force), report)


def shown(repository: Repository) -> Snapshot:
    return load_all(reopened(repository)).snapshots[-1]


def node_at(repository: Repository, snapshot: Snapshot, path: str) -> Node:
    return find_path(snapshot, path.encode(), reopened(repository).trees.load)


def test_an_index_finds_what_the_image_would_have_found(
    repository: Repository, volume: Path, blind: pytest.MonkeyPatch
) -> None:
    snapshot = make_image(repository, volume, name="web")
    with pytest.raises(PathNotFound):
        node_at(repository, snapshot, "/files/disk")
    blind.undo()
    before = {key: repository.store.get(key) for key in keys_of(repository.store)}
    events: list[Event] = []
    result = run_index(repository, report=events.append)
    assert (result.added, result.renewed, result.volumes, result.without, result.files_skipped) == (
        ("disk",), (), (), (), 0,
    )  # fmt: skip
    assert not [event for event in events if isinstance(event, FileSkipped)]
    assert {key: repository.store.get(key) for key in before} == before
    found = shown(repository)
    assert result.snapshot == found
    assert found.snapshot_id == snapshot.snapshot_id
    assert (found.volumes, found.disks, found.time_ns) == (snapshot.volumes, snapshot.disks, snapshot.time_ns)
    assert found.traits & HAS_XATTRS
    whole = make_image(reopened(repository), volume, name="another")
    files = "/files", "/files/disk", "/volumes", "/disks/disk.raw"
    assert [node_at(repository, found, path).content for path in files] == [
        node_at(repository, whole, path).content for path in files
    ]
    assert (found.statistics.files, found.statistics.directories) == (
        whole.statistics.files, whole.statistics.directories,
    )  # fmt: skip
    assert bytes_of(reopened(repository), found, "/files/disk/dir/one") == b"1"
    assert bytes_of(reopened(repository), found, "/disks/disk.raw") == volume.read_bytes()
    assert not run_check(reopened(repository), read_data=True).damaged


def test_volumes_over_two_disks_are_read_from_the_repository_too(
    repository: Repository, tmp_path: Path, blind: pytest.MonkeyPatch
) -> None:
    group = Group(tmp_path)
    plain = file_system(tmp_path, "ext4", 16 * MIB, 40)
    group.store_in_thin(1, plain, group.chooser.sample(range(POOL_BLOCKS), POOL_BLOCKS))
    paths = group.save()
    snapshot = make_image(repository, *paths)
    blind.undo()
    result = run_index(repository)
    assert result.added == ("mixed-thin",)
    found = shown(repository)
    assert found.volumes == snapshot.volumes
    whole = make_image(reopened(repository), *paths, name="another")
    for path in ("/files/mixed-thin", "/files/.unread"):
        assert node_at(repository, found, path).content == node_at(repository, whole, path).content
    hosts = bytes_of(reopened(repository), found, "/files/mixed-thin/etc/hosts")
    assert hosts == b"127.0.0.1 localhost\n" * 500


def test_the_note_is_what_the_format_says(
    repository: Repository, volume: Path, blind: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snapshot = make_image(repository, volume)
    blind.undo()
    found = run_index(repository).snapshot
    [key] = keys_of(repository.store, "notes/")
    other = independent_reader.Repository(tmp_path / "store", PASSWORD)
    version, about, kind, _, host, arguments = independent_reader.SealedObject(other.load(key), 7, other.keys).record()
    assert (version, about, kind, host) == (1, snapshot.snapshot_id, "index", os.uname().nodename)
    root, traits, volumes, statistics = arguments
    assert (root[0], len(root[1]), root[4], traits) == (found.root, 56, [], 1)
    assert volumes == [["disk", 0, 96 * MIB, snapshot.volumes[0].data_size, snapshot.volumes[0].content]]
    files = [node for _, node in other.walk(root[0], b"") if node.type != independent_reader.TREE]
    # Those in the disk, and the disk itself.
    assert statistics == [len(files) - 1, found.statistics.directories, 0]


def test_an_image_that_shows_all_is_left_alone_unless_forced(repository: Repository, volume: Path) -> None:
    make_image(repository, volume)
    before = keys_of(repository.store)
    result = run_index(repository)
    assert (result.looked, result.is_new) == (False, False)
    result = run_index(repository, force=True)
    assert (result.looked, result.is_new) == (True, False)
    assert keys_of(repository.store) == before


def test_volumes_whose_files_are_shown_keep_them_and_the_others_are_looked_into(
    repository: Repository, tmp_path: Path, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = disk_in(tmp_path / "two.raw", size=300 * MIB, table=b"label: gpt\nsize=100M\nsize=104M\nsize=20M\n")
    with open(path, "r+b") as file:
        for at in (MIB, 101 * MIB):
            file.seek(at)
            file.write(volume.read_bytes())
        file.seek(205 * MIB)
        file.write(bytes(20 * MIB))
    real = readers.open_filesystem

    def only_the_first(read: Read, size: int) -> object:
        return None if broken and size > 100 * MIB else real(read, size)

    monkeypatch.setattr(readers, "open_filesystem", only_the_first)
    broken = True
    before = make_image(repository, path)
    broken = False
    result = run_index(repository)
    assert (result.added, result.renewed, result.without) == (("two2",), (), ("two3",))
    snapshot = shown(repository)
    assert snapshot.volumes == before.volumes
    first, second = (node_at(repository, snapshot, f"/files/{name}") for name in ("two1", "two2"))
    assert first.xattrs == second.xattrs
    assert bytes_of(reopened(repository), snapshot, "/files/two2/dir/one") == b"1"
    # What holds nothing is looked into each time, and nothing is stored for it.
    keys = keys_of(repository.store)
    result = run_index(repository)
    assert (result.is_new, result.without) == (False, ("two3",))
    assert keys_of(repository.store) == keys


def test_a_better_reader_renews_and_one_that_fails_takes_nothing_away(
    repository: Repository, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(image_walk, "_MOST_ENTRIES", 20)
        snapshot = make_image(repository, volume)
    assert snapshot.statistics.files_skipped > 0
    assert not run_index(repository).looked
    result = run_index(repository, force=True)
    assert (result.renewed, result.added, result.files_skipped) == (("disk",), (), 0)
    found = shown(repository)
    assert found.statistics.files > snapshot.statistics.files
    assert found.statistics.files_skipped == 0

    def fail(*_arguments: object) -> object:
        raise ValueError("a fault")

    monkeypatch.setattr(readers, "open_filesystem", fail)
    events: list[Event] = []
    result = run_index(repository, force=True, report=events.append)
    assert any(isinstance(event, FileSkipped) for event in events)
    assert (result.is_new, shown(repository)) == (False, found)


def test_what_finds_fewer_volumes_takes_nothing_out_of_sight(
    repository: Repository, tmp_path: Path, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a version of the program that knows less of partitions would."""
    path = disk_in(tmp_path / "two.raw", size=300 * MIB, table=b"label: gpt\nsize=100M\nsize=100M\n")
    with open(path, "r+b") as file:
        file.seek(101 * MIB)
        file.write(volume.read_bytes())
    make_image(repository, path)
    before = keys_of(repository.store)
    real = layout.read_table
    monkeypatch.setattr(
        layout, "read_table", lambda *of: (table := real(*of))._replace(partitions=table.partitions[:1])
    )
    for force in (False, True):
        with pytest.raises(UsageError, match="two2: files are shown in a volume that this backupfs does not find"):
            run_index(repository, force=force)
    assert keys_of(repository.store) == before


def test_trees_of_files_that_are_gone_are_made_anew(
    repository: Repository, volume: Path, blind: pytest.MonkeyPatch, expected_log: list[str]
) -> None:
    make_image(repository, volume)
    blind.undo()
    packs = set(keys_of(repository.store, "packs/tree/"))
    run_index(repository)
    for key in set(keys_of(repository.store, "packs/tree/")) - packs:
        repository.store.delete(key)
    expected_log.append(".*")
    assert any(finding.snapshots for finding in run_check(reopened(repository)).findings)
    assert run_index(repository).added == ("disk",)
    assert bytes_of(reopened(repository), shown(repository), "/files/disk/dir/one") == b"1"
    # The packs are still gone, but nothing needs them.
    assert not any(finding.snapshots for finding in run_check(reopened(repository), read_data=True).findings)


@pytest.mark.expected_log
def test_check_looks_at_the_image_behind_its_index_too(repository: Repository, volume: Path) -> None:
    whole = make_image(repository, volume)
    snapshot = put_snapshot(repository, replace(whole, root=ChunkId(b"nowhere." * 4), sequence=2))
    note = replace(notes.new_note(snapshot.snapshot_id, notes.INDEX), arguments=encode_index(whole))
    notes.put_note(repository, note)
    assert bytes_of(reopened(repository), shown(repository), "/files/disk/dir/one") == b"1"
    assert run_check(reopened(repository)).damaged


def test_what_is_no_image_has_nothing_to_index(repository: Repository, tmp_path: Path) -> None:
    build({"a": {}}, tmp_path / "source")
    back_up(repository, tmp_path / "source")
    with pytest.raises(UsageError, match="nothing to index"):
        run_index(repository)


def test_without_the_right_nothing_is_begun(
    repository: Repository, volume: Path, blind: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image(repository, volume)
    blind.undo()

    def refuse(_repository: Repository, kind: str) -> None:
        raise WrongPassword(kind)

    monkeypatch.setattr(notes, "require_right", refuse)
    monkeypatch.setattr(index_module, "read_layout", None)
    with pytest.raises(WrongPassword, match="index"):
        run_index(repository)


def test_a_live_view_shows_what_was_found(repository: Repository, volume: Path, blind: pytest.MonkeyPatch) -> None:
    snapshot = make_image(repository, volume, name="web")
    blind.undo()
    client = Client(reopened(repository))
    path = b"images/web/" + snapshot.time_name.encode() + b"/files"

    async def before() -> int:
        folder = await client.walk(path)
        assert [entry[0] for entry in await client.entries(folder.inode)] == [b".unread"]
        return folder.inode

    async def after(old: int) -> None:
        found = await client.walk(path + b"/disk/dir/one")
        assert await client.read(found.inode) == b"1"
        # Who has the old one open goes on with it.
        assert [entry[0] for entry in await client.entries(old)] == [b".unread"]

    inode = trio.run(before)
    run_index(repository)
    assert client.listed.refresh()
    client.listed.repository.load_indexes()
    client.view.rearrange()
    trio.run(after, inode)


def test_an_index_opens_what_is_encrypted_and_later_ones_keep_it(repository: Repository, tmp_path: Path) -> None:
    tree = {"etc": {"hosts": File(b"127.0.0.1 localhost\n")}}
    plain = volume_of(Path(os.fsdecode(build(tree, tmp_path / "source"))), tmp_path / "fs", "ext4", size=24 * MIB)
    disk = tmp_path / "disk.raw"
    disk.write_bytes(encrypted(tmp_path, plain.read_bytes(), "luks2"))
    make_image(repository, disk)
    options = IndexOptions(sizes=SMALL, luks_passphrases=(PASSPHRASE,))
    for given in (options, replace(options, luks_passphrases=(), force=True)):
        again = reopened(repository)
        listed = load_all(again)
        found = index(again, listed, listed.snapshots[-1], given, ignore).snapshot
        assert [volume.name for volume in found.volumes] == ["disk", "disk_crypt"]
        assert bytes_of(reopened(repository), found, "/files/disk_crypt/etc/hosts") == b"127.0.0.1 localhost\n"
        assert shown(repository) == found
    assert not run_check(reopened(repository), read_data=True).damaged


def test_an_index_keeps_what_was_said_of_a_damaged_file(
    repository: Repository, volume: Path, tmp_path: Path, blind: pytest.MonkeyPatch
) -> None:
    path = converted(volume, tmp_path / "disk.qcow2", "qcow2", [])
    damage(path, "qcow2")
    snapshot = make_image(repository, path)
    said = bytes_of(repository, snapshot, "/files/.unread").splitlines()[0]
    assert said.startswith(b"disk: it is damaged by the word of `qemu-img check`")
    blind.undo()
    events: list[Event] = []
    found = run_index(repository, report=events.append)
    assert found.added == ("disk",)
    assert b"disk" in [event.path for event in events if isinstance(event, FileSkipped)]
    assert said in bytes_of(reopened(repository), found.snapshot, "/files/.unread").splitlines()
