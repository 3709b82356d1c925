"""One object of a folder that the disk cannot read is as good as damaged, and everything goes on without it."""

import errno
import os
from pathlib import Path

import pytest
import trio

from backupfs.ids import short
from backupfs.repository.repository import Repository, open_repository
from backupfs.snapshots.listing import load_snapshots
from backupfs.stores.directory import DirectoryStore
from backupfs.usecases.events import ignore
from backupfs.usecases.forget import forget
from backupfs.usecases.restore import RestoreOptions, restore
from tests.builders import (
    CHEAP,
    NOWHERE,
    PASSWORD,
    File,
    back_up,
    build,
    folders_in,
    keys_of,
    new_repository,
    noise,
    reopened,
    run_check,
)

pytestmark = pytest.mark.expected_log(r"^(WARNING|ERROR) backupfs\.\S+: .*cannot be read")

TREE = {f"f{number}": File(noise(number, 9000)) for number in range(12)}


@pytest.fixture
def source(tmp_path: Path) -> bytes:
    return build(TREE, tmp_path / "source")


@pytest.fixture
def repository(tmp_path: Path, source: bytes) -> Repository:
    """Return one with four snapshots of the same, of which the first is forgotten."""
    store = DirectoryStore(tmp_path / "repository")
    store.create()
    repository = new_repository(store, folders_in(tmp_path / "a"))
    first = back_up(repository, source)
    for number in range(3):
        Path(os.fsdecode(source), "f0").write_bytes(noise(100 + number, 9000))
        back_up(repository, source)
    trio.run(forget, repository, [first.snapshot_id.hex()], False)
    return repository


def on_another_machine(repository: Repository, tmp_path: Path) -> Repository:
    return reopened(DirectoryStore(repository.store.url), folders_in(tmp_path / "b"))


def make_unreadable(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    real_pread = os.pread

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(key):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real_pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)


def test_a_snapshot(repository: Repository, source: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second, third, fourth = load_snapshots(repository).snapshots
    key = f"snapshots/{second.snapshot_id.hex()}"
    make_unreadable(monkeypatch, key)
    other = on_another_machine(repository, tmp_path)
    assert load_snapshots(other).snapshots == [third, fourth]
    assert restored(other, tmp_path) == len(TREE)
    assert back_up(other, source).sequence == 1
    result = run_check(other)
    assert [finding.key for finding in result.findings] == [key]
    assert "put the object back from a copy" in result.findings[0].what
    done = trio.run(forget, other, [short(second.snapshot_id)], False)
    assert done.broken == (second.snapshot_id,)
    assert not run_check(other).damaged


def test_a_note(repository: Repository, source: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [key] = keys_of(repository.store, "notes/")
    make_unreadable(monkeypatch, key)
    other = on_another_machine(repository, tmp_path)
    shown = load_snapshots(other).snapshots
    assert len(shown) == 4  # what the note said is not known
    assert restored(other, tmp_path) == len(TREE)
    back_up(other, source)
    assert [finding.key for finding in run_check(other).findings] == [key]
    trio.run(forget, other, [shown[0].snapshot_id.hex()], False)
    assert load_snapshots(other).snapshots[:3] == shown[1:]


@pytest.mark.parametrize("prefix", ["index/data/", "index/tree/"])
def test_an_index_segment(
    repository: Repository, source: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    key = keys_of(repository.store, prefix)[0]
    make_unreadable(monkeypatch, key)
    other = on_another_machine(repository, tmp_path)
    assert len(load_snapshots(other).snapshots) == 3
    assert restored(other, tmp_path) == len(TREE)
    made = back_up(other, source)
    result = run_check(other)
    assert key in {finding.key for finding in result.findings}
    assert all("cannot be read" in finding.what or "no index" in finding.what for finding in result.findings)
    assert result.snapshots_hit == ()
    trio.run(forget, other, [made.snapshot_id.hex()], False)


@pytest.mark.parametrize("prefix", ["packs/data/", "packs/tree/"])
def test_a_pack(
    repository: Repository, source: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    keys = keys_of(repository.store, prefix)
    latest = load_snapshots(repository).snapshots[-1]
    key = max(keys, key=repository.store.size)
    make_unreadable(monkeypatch, key)
    other = on_another_machine(repository, tmp_path)
    if prefix == "packs/data/":
        # The files that do not lie in it are there.
        assert 0 < restored(other, tmp_path) < len(TREE)
    result = run_check(other, read_data=True)
    assert key in {finding.key for finding in result.findings}
    assert result.packs_read == result.packs
    # And the next backup stores anew what lay in it.
    made = back_up(other, source)
    assert restored(other, tmp_path) == len(TREE)
    trio.run(forget, other, [latest.snapshot_id.hex()], False)
    assert made in load_snapshots(other).snapshots


def test_a_key_slot(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    slot_id = repository.add_slot(b"other", "second", CHEAP)
    for own in (slot_id, repository.slot_id):
        with monkeypatch.context() as patched:
            make_unreadable(patched, f"keys/{own.hex()}")
            other = open_repository(repository.store, b"other" if own != slot_id else PASSWORD, NOWHERE)
            assert other.slot_id != own
            assert [slot.name for slot in other.slots()].count("(damaged)") == 1


def restored(repository: Repository, tmp_path: Path) -> int:
    """Return how many files a restore of the latest snapshot gives."""
    target = tmp_path / f"out-{len(os.listdir(tmp_path))}"
    snapshot = load_snapshots(repository).find("latest")
    folder = snapshot.paths[0]
    trio.run(restore, repository, snapshot, folder, os.fsencode(target), RestoreOptions(), ignore)
    return len(os.listdir(target))
