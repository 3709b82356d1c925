"""Children of snapshots: what is put or removed is, all else stays, and the next backup is not misled."""

import os
import random
import stat
from functools import partial
from pathlib import Path

import independent_reader
import pytest
import trio

from backupfs.errors import PathNotFound, SourceError, StoreUnavailable, UsageError
from backupfs.localfs import reading
from backupfs.repository.repository import Repository
from backupfs.snapshots import tree
from backupfs.snapshots.listing import load_all
from backupfs.snapshots.snapshot import HAS_XATTRS, Snapshot
from backupfs.stores.directory import DirectoryStore
from backupfs.stores.memory import MemoryStore
from backupfs.usecases import archive_context
from backupfs.usecases.amend import AmendOptions, put, remove
from backupfs.usecases.events import Event, FileSkipped, Remark
from backupfs.usecases.restore import RestoreOptions, restore
from backupfs.usecases.storing import BackupResult
from tests.builders import (
    PASSWORD,
    SMALL,
    Directory,
    File,
    Hardlink,
    Sparse,
    Special,
    Symlink,
    back_up,
    build,
    contents_of,
    copy_of,
    ignore,
    keys_of,
    new_repository,
    noise,
    reopened,
    run_backup,
    run_check,
    snapshot_of,
)
from tests.faults import Fault, FaultyStore
from tests.usecases.test_backup import settled
from tests.view.test_filesystem import Client

Model = dict[bytes, bytes | None]  # path → content; None: a directory


def run_put(
    repository: Repository, snapshot: Snapshot, path: str | bytes | Path, local: str | bytes | Path, **options: object
) -> BackupResult:
    repository = reopened(repository)
    report = options.pop("report", ignore)
    given = AmendOptions(sizes=SMALL, **options)  # type: ignore[arg-type]
    return put(repository, load_all(repository), snapshot, os.fsencode(path), os.fsencode(local), given, report)  # type: ignore[arg-type]


def run_remove(
    repository: Repository, snapshot: Snapshot, *paths: str | bytes | Path, **options: object
) -> BackupResult:
    repository = reopened(repository)
    report = options.pop("report", ignore)
    given = AmendOptions(sizes=SMALL, **options)  # type: ignore[arg-type]
    return remove(repository, load_all(repository), snapshot, list(map(os.fsencode, paths)), given, report)  # type: ignore[arg-type]


def child_of(result: BackupResult) -> Snapshot:
    assert result.snapshot is not None
    return result.snapshot


def model_of(repository: Repository, snapshot: Snapshot) -> Model:
    found: Model = {}
    for path, kept in contents_of(reopened(repository), snapshot).items():
        assert kept is not None
        found[path] = None if kept.node.is_directory else kept.content
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.mark.parametrize("seed", range(4))
def test_any_changes_one_after_the_other_give_what_a_model_says(
    seed: int, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Directories of several pages.
    monkeypatch.setattr(tree, "LEAST_PAGE", 400)
    monkeypatch.setattr(tree, "MOST_PAGE", 1200)
    chooser = random.Random(seed)
    build({f"d{d}": {f"f{n:02}": File(noise(n, 5 * n)) for n in range(30)} for d in range(3)}, source)
    store = DirectoryStore(tmp_path / "store")
    store.create()
    repository = new_repository(store)
    top = os.fsencode(source)
    snapshot = back_up(repository, source)
    model = model_of(repository, snapshot)
    made = [(snapshot, dict(model))]
    for step in range(20):
        if chooser.random() < 0.2:
            snapshot, model = made[chooser.randrange(len(made))]
            model = dict(model)
        below = sorted(path for path in model if path.startswith(top + b"/"))
        old = chooser.choice(below)
        if chooser.random() < 0.4:
            others = [path for path in below if chooser.random() < 0.03]
            result = run_remove(repository, snapshot, old, *others, recursive=True)
            for path in (old, *others):
                model = {at: kept for at, kept in model.items() if at != path and not at.startswith(path + b"/")}
        else:
            path = old if chooser.random() < 0.5 else os.path.dirname(old) + b"/new%d/below" % chooser.randrange(4)
            local = tmp_path / f"local{step}"
            content = noise(step, chooser.randrange(9000))
            is_directory = model[path] is None if path in model else chooser.random() < 0.5
            if is_directory:
                build({f"{n}": File(content[: n * 9]) for n in range(chooser.randrange(9))}, local)
                put_there: Model = {path + b"/" + name: (local / os.fsdecode(name)).read_bytes()
                                    for name in map(os.fsencode, os.listdir(local))}  # fmt: skip
                put_there[path] = None
            else:
                local.write_bytes(content)
                put_there = {path: content}
            result = run_put(repository, snapshot, path, local, makes_parents=True)
            model = {at: kept for at, kept in model.items() if at != path and not at.startswith(path + b"/")}
            model |= put_there
            while (path := os.path.dirname(path)) != b"/":
                model[path] = None
        assert result.parent == snapshot.snapshot_id
        snapshot = child_of(result)
        made.append((snapshot, dict(model)))
        assert model_of(repository, snapshot) == model
        files = [kept for kept in model.values() if kept is not None]
        statistics = snapshot.statistics
        assert (statistics.files, statistics.size) == (len(files), sum(map(len, files)))
        # Directories that `makes_parents` made, and those above the source, are on the way only.
        nodes = [kept.node for kept in contents_of(reopened(repository), snapshot).values() if kept is not None]
        assert statistics.directories == sum(node.is_directory and bool(node.inode) for node in nodes)
    checked = run_check(reopened(repository), read_data=True)
    assert (checked.damaged, checked.snapshots) == (False, len(made))
    second = independent_reader.Repository(tmp_path / "store", PASSWORD)
    trees = {one.snapshot_id: one.tree for one in second.snapshots()}
    for one, kept in made:
        found = second.walk(trees[one.snapshot_id.hex()])
        assert {at: None if stat.S_ISDIR(node.mode) else second.read(node) for at, node in found} == kept
    trio.run(compare_with_view, reopened(repository), snapshot, model)


async def compare_with_view(repository: Repository, snapshot: Snapshot, model: Model) -> None:
    client = Client(repository)
    digits = snapshot.snapshot_id.hex()[:8].encode()
    link = await client.ask(client.view.lookup, (await client.walk(b"ids")).inode, digits)
    assert link is not None
    target = (await client.ask(client.view.target, link.inode)).removeprefix(b"../")
    for path, content in model.items():
        found = await client.walk(target + path)
        assert stat.S_ISDIR(found.mode) == (content is None)
        if content is None:
            names = {name for name, _ in await client.entries(found.inode)}
            assert names == {os.path.basename(at) for at in model if os.path.dirname(at) == path}
        else:
            assert await client.read(found.inode) == content


def test_what_is_put_has_all_that_it_has_here(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_context, "_MOST_XATTRS", 500)
    build({"a": File(b"old"), "z": File(b"z")}, source)
    local = {
        "file": File(noise(1, 70_000), mode=0o640, xattrs={"user.a": b"1", "user.large": b"v" * 900}),
        "holes": Sparse(1 << 20, {4096: b"island"}),
        "link": Symlink(b"file"),
        "fifo": Special(),
        "d": Directory({"x": File(b"x"), "y": Hardlink("d/x")}, mode=0o1777),
    }
    build(local, tmp_path / "local")
    (tmp_path / "z").write_bytes(b"z")
    repository = new_repository()
    snapshot = back_up(repository, source)
    assert not snapshot.traits & HAS_XATTRS
    for name in local:
        snapshot = child_of(run_put(repository, snapshot, source / name, tmp_path / "local" / name))
    assert snapshot.traits & HAS_XATTRS
    snapshot = child_of(run_put(repository, snapshot, source / "a", tmp_path / "local/file"))
    snapshot = child_of(run_put(repository, snapshot, "/elsewhere/z", tmp_path / "z", makes_parents=True))
    assert snapshot.traits & HAS_XATTRS
    repository = reopened(repository)
    top = partial(restore, repository, snapshot, os.fsencode(source))
    result = trio.run(partial(top, os.fsencode(tmp_path / "out"), RestoreOptions(verify=True), ignore))
    assert (result.errors, result.damaged) == (0, 0)
    seen, here = snapshot_of(tmp_path / "out"), snapshot_of(tmp_path / "local")
    assert {path: seen[path] for path in here if path} == {path: one for path, one in here.items() if path}
    assert seen[b"a"] == here[b"file"]
    assert seen[b"z"].size == 1


def test_only_the_pages_on_the_way_and_the_new_content_are_stored(source: Path, tmp_path: Path) -> None:
    build({f"d{n}": {f"f{m}": File(noise(m, 900)) for m in range(20)} for n in range(20)}, source)
    (tmp_path / "new").write_bytes(noise(7, 900))
    repository = new_repository()
    snapshot = back_up(repository, source)
    result = run_put(repository, snapshot, source / "d3/f4", tmp_path / "new")
    assert (result.data.chunks, result.trees.chunks) == (0, os.fsencode(source).count(b"/") + 2)
    assert result.counts.files_unchanged == 399
    (tmp_path / "new").write_bytes(noise(99, 900))
    assert run_put(repository, snapshot, source / "d3/f4", tmp_path / "new").data.chunks == 1
    result = run_remove(repository, snapshot, source / "d3/f4", source / "d3/f5")
    assert (result.data.chunks, result.trees.chunks) == (0, os.fsencode(source).count(b"/") + 2)


def test_a_folder_that_stands_at_its_own_path_is_compared_not_read(source: Path) -> None:
    settled(build({"d": {f"f{n}": File(noise(n, 900)) for n in range(20)}, "e": File(b"e")}, source))
    repository = new_repository()
    snapshot = back_up(repository, source)
    (source / "d/f3").write_bytes(b"changed")
    (source / "e").write_bytes(b"changed, but not put")
    result = run_put(repository, snapshot, source / "d", source / "d")
    counts = result.counts
    assert (counts.files_new, counts.files_changed, counts.files_unchanged, counts.files) == (0, 1, 20, 21)
    assert model_of(repository, child_of(result))[os.fsencode(source / "e")] == b"e"


def test_the_next_backup_reads_what_was_put_again_and_nothing_else(source: Path, tmp_path: Path) -> None:
    settled(build({"d": {f"f{n}": File(noise(n, 900)) for n in range(20)}, "gone": File(b"gone")}, source))
    (tmp_path / "new").write_bytes(noise(77, 900))
    repository = new_repository()
    first = back_up(repository, source)
    result = run_put(repository, first, source / "d/f3", tmp_path / "new")
    assert (result.counts.files_new, result.counts.files_changed, result.counts.files_unchanged) == (0, 1, 20)
    snapshot = child_of(result)
    snapshot = child_of(run_remove(repository, snapshot, source / "gone"))
    result = run_backup(reopened(repository), source)
    assert result.parent == snapshot.snapshot_id
    counts = result.counts
    assert (counts.files_new, counts.files_changed, counts.files_unchanged) == (1, 1, 19)
    assert child_of(result).root == first.root


def test_a_child_is_of_the_same_host_has_its_tags_and_leaves_its_parent_alone(source: Path, tmp_path: Path) -> None:
    build({"a": File(b"old")}, source)
    (tmp_path / "new").write_bytes(b"new")
    repository = new_repository()
    snapshot = back_up(repository, source, tags=("nightly",), host="elsewhere")
    before = {key: repository.store.get(key) for key in keys_of(repository.store)}
    child = child_of(run_put(repository, snapshot, source / "a", tmp_path / "new", tags=("mended",)))
    assert (child.host, child.tags, child.paths) == ("elsewhere", ("mended", "nightly"), snapshot.paths)
    assert child.parent == snapshot.snapshot_id
    assert (child.root_row, child.root_owner) == (snapshot.root_row, snapshot.root_owner)
    assert load_all(reopened(repository)).find("elsewhere:latest").snapshot_id == child.snapshot_id
    assert all(repository.store.get(key) == data for key, data in before.items())
    assert model_of(repository, snapshot)[os.fsencode(source / "a")] == b"old"


def test_names_of_one_file_stay_so_and_those_of_another_file_system_are_none(source: Path, tmp_path: Path) -> None:
    build({"d": {"a": File(b"linked"), "b": Hardlink("d/a"), "c": Hardlink("d/a")}}, source)
    (tmp_path / "new").write_bytes(b"another")
    repository = new_repository()
    snapshot = back_up(repository, source)
    # Under another path these inodes are those of other files, as on a file system that counts the same.
    snapshot = child_of(run_put(repository, snapshot, source / "e", source / "d"))
    snapshot = child_of(run_put(repository, snapshot, source / "f", source / "d"))
    snapshot = child_of(run_put(repository, snapshot, source / "d/b", tmp_path / "new"))
    snapshot = child_of(run_remove(repository, snapshot, source / "e/a"))
    repository = reopened(repository)
    top = partial(restore, repository, snapshot, os.fsencode(source))
    trio.run(partial(top, os.fsencode(tmp_path / "out"), RestoreOptions(), ignore))
    seen = snapshot_of(tmp_path / "out")
    names = {path: one.links for path, one in seen.items() if one.kind == "file"}
    assert names == {
        b"d/a": (b"d/a", b"d/c"), b"d/c": (b"d/a", b"d/c"), b"d/b": (),
        b"e/b": (b"e/b", b"e/c"), b"e/c": (b"e/b", b"e/c"),
        **dict.fromkeys((b"f/a", b"f/b", b"f/c"), (b"f/a", b"f/b", b"f/c")),
    }  # fmt: skip


def test_what_cannot_be_is_said_and_nothing_is_stored(source: Path, tmp_path: Path) -> None:
    build({"d": {"f": File(b"f")}, "a": File(b"a"), "l": Symlink(b"d")}, source)
    build({"folder": {}, "file": File()}, tmp_path / "local")
    local = tmp_path / "local"
    repository = new_repository()
    snapshot = back_up(repository, source)
    before = keys_of(repository.store)
    put_here, remove_here = partial(run_put, repository, snapshot), partial(run_remove, repository, snapshot)
    with pytest.raises(PathNotFound, match="has no x in this snapshot: --parents"):
        put_here(source / "x/y", local / "file")
    for above in ("a", "l"):
        with pytest.raises(PathNotFound, match="is not a directory and can have no f"):
            put_here(source / above / "f", local / "file", makes_parents=True)
    with pytest.raises(UsageError, match=r"is a folder in the snapshot and .* is none"):
        put_here(source / "d", local / "file")
    with pytest.raises(UsageError, match=r"is no folder in the snapshot and .* is one"):
        put_here(source / "a", local / "folder")
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        put_here(source / "a", local / "nosuch")
    for path, place in (("/", local / "folder"), (source / "a", "/")):
        with pytest.raises(UsageError, match="below /"):
            put_here(path, place)
    with pytest.raises(PathNotFound, match="d has no x in this snapshot"):
        remove_here(source / "a", source / "d/x")
    with pytest.raises(UsageError, match="is a folder: -R removes it"):
        remove_here(source / "d")
    with pytest.raises(UsageError, match="`backupfs forget`"):
        remove_here("/", recursive=True)
    own = pytest.RaisesExc(SourceError, match="no child")
    with pytest.RaisesGroup(own, flatten_subgroups=True, allow_unwrapped=True):
        put_here(source / "d", local / "folder", own_folders=(os.fsencode(local / "folder"),))
    assert keys_of(repository.store) == before


def test_what_cannot_be_read_below_a_folder_is_named_and_the_rest_is_put(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build({"a": File(b"a")}, source)
    build({"one": File(b"1"), "two": File(b"2")}, tmp_path / "local")
    repository = new_repository()
    snapshot = back_up(repository, source)
    events: list[Event] = []
    own = (os.fsencode(tmp_path / "local/own"),)
    (tmp_path / "local/own").mkdir()
    real = reading.open_file

    def open_file(name: bytes, dir_fd: int) -> int:
        if name == b"two":
            raise PermissionError(13, "Permission denied")
        return real(name, dir_fd)

    monkeypatch.setattr(reading, "open_file", open_file)
    result = run_put(repository, snapshot, source / "new", tmp_path / "local", report=events.append, own_folders=own)
    assert [event.path for event in events if isinstance(event, FileSkipped)] == [os.fsencode(tmp_path / "local/two")]
    assert result.counts.files_skipped == child_of(result).statistics.files_skipped == 1
    kept = {os.path.basename(path) for path in model_of(repository, child_of(result))}
    assert {b"new", b"one"} <= kept
    assert not {b"two", b"own"} & kept


def test_a_dry_run_counts_and_stores_nothing(source: Path, tmp_path: Path) -> None:
    build({"a": File(b"old"), "b": File(b"b")}, source)
    (tmp_path / "new").write_bytes(b"new one")
    repository = new_repository()
    snapshot = back_up(repository, source)
    before = keys_of(repository.store)
    result = run_put(repository, snapshot, source / "a", tmp_path / "new", dry_run=True)
    assert (result.snapshot, result.counts.files, result.counts.size) == (None, 2, 8)
    result = run_remove(repository, snapshot, source / "a", dry_run=True)
    assert (result.snapshot, result.counts.files, result.counts.size) == (None, 1, 1)
    assert keys_of(repository.store) == before


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_store_that_fails_leaves_the_snapshots_as_they_were(number: int, source: Path, tmp_path: Path) -> None:
    build({"a": File(b"old")}, source)
    (tmp_path / "new").write_bytes(noise(5, 5000))
    repository = new_repository()
    snapshot = back_up(repository, source)
    store = FaultyStore(copy_of(repository.store), Fault("put", number))
    failed = pytest.RaisesExc(StoreUnavailable)
    with pytest.RaisesGroup(failed, flatten_subgroups=True, allow_unwrapped=True):
        run_put(reopened(store), snapshot, source / "a", tmp_path / "new")
    assert len(keys_of(store, "snapshots/")) == 1
    assert not run_check(reopened(store.inner), read_data=True).damaged


@pytest.mark.expected_log
def test_a_damaged_folder_can_be_removed(source: Path) -> None:
    settled(build({"d": {f"f{n}": File(noise(n, 900)) for n in range(9)}}, source))
    store = MemoryStore()
    repository = new_repository(store)
    back_up(repository, source / "d")
    damaged = keys_of(store, "packs/tree/")
    build({"a": File(b"a")}, source)
    snapshot = back_up(reopened(repository), source)
    for key in damaged:
        store.delete(key)
    assert run_check(reopened(store)).damaged
    events: list[Event] = []
    child = child_of(run_remove(reopened(store), snapshot, source / "d", recursive=True, report=events.append))
    assert any("totals" in event.text for event in events if isinstance(event, Remark))
    kept = contents_of(reopened(store), child)
    assert [path for path in kept if path.startswith(os.fsencode(source) + b"/")] == [os.fsencode(source / "a")]
