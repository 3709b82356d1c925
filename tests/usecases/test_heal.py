"""Packs with wrong bytes of the right size: what a check finds, the next backup of the machine stores again."""

import os
from pathlib import Path

import pytest

from backupfs.repository.local import LocalFolders
from backupfs.repository.repository import Repository
from backupfs.stores.memory import MemoryStore
from backupfs.usecases.backup import backup
from backupfs.usecases.events import Remark
from tests.builders import (
    File,
    Kept,
    all_contents,
    back_up,
    build,
    folders_in,
    keys_of,
    new_repository,
    noise,
    reopened,
    run_backup,
    run_check,
    small_options,
)
from tests.faults import Fault, FaultyStore

pytestmark = pytest.mark.expected_log(r"(damage|failed by rule)")

TREE = {f"d{part}": {f"f{n}": File(noise(100 * part + n, 5000)) for n in range(10)} for part in range(3)}


class Host:
    """A machine with sources, and a repository of its own."""

    def __init__(self, folder: Path) -> None:
        self.folders = folders_in(folder)
        self.source = build(TREE, folder / "source")
        self.first = new_repository(folders=self.folders)
        back_up(self.first, self.source)

    @property
    def store(self) -> MemoryStore:
        store = self.first.store
        assert isinstance(store, MemoryStore)
        return store

    @property
    def repository(self) -> Repository:
        return reopened(self.first)

    def garble(self, prefix: str) -> str:
        """Flip a bit in the middle of the first pack of a kind; return its key."""
        key = keys_of(self.store, prefix)[0]
        data = bytearray(self.store.get(key))
        data[len(data) // 3] ^= 1
        self.store.put(key, data)
        return key

    def remarks_of_backup(self) -> list[str]:
        said: list[str] = []

        def report(event: object) -> None:
            if isinstance(event, Remark):
                said.append(event.text)

        backup(self.repository, [self.source], small_options(), report)
        return said

    def damaged(self) -> list[tuple[bytes, Kept | None]]:
        return [
            (path, kept)
            for contents in all_contents(self.repository).values()
            for path, kept in contents.items()
            if kept is None or kept.content is None
        ]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize("kind", ["packs/data/", "packs/tree/"])
def test_what_a_damaged_pack_held_is_stored_again_after_a_check(kind: str, host: Host) -> None:
    key = host.garble(kind)
    found = run_check(host.repository, read_data=True)
    assert (found.damaged, found.noted_packs) == (True, 1)
    assert any(finding.key == key and finding.snapshots for finding in found.findings)

    (said,) = host.remarks_of_backup()
    assert "a check found damaged packs" in said
    assert host.damaged() == []
    after = run_check(host.repository, read_data=True)
    # The pack is still what it is, and hits nothing any more.
    assert [(finding.key, finding.snapshots) for finding in after.findings] == [(key, ())]
    # From now on backups are as quick as before.
    assert host.remarks_of_backup() == []
    again = run_backup(host.repository, host.source)
    assert (again.plain_added, again.counts.files_unchanged) == (0, 30)


def test_every_path_that_is_backed_up_is_read_again_once(host: Host) -> None:
    parts = [os.path.join(host.source, b"d%d" % number) for number in range(3)]
    for part in parts:
        back_up(host.repository, part)
    host.garble("packs/data/")
    assert run_check(host.repository, read_data=True).noted_packs == 1
    for part in parts:
        assert run_backup(host.repository, part).parent == b""
    assert host.damaged() == []
    for part in parts:
        assert run_backup(host.repository, part).parent != b""


def test_new_files_with_the_content_of_a_damaged_pack_are_stored(host: Host) -> None:
    """Long after: the note stays as long as the pack is damaged."""
    host.garble("packs/data/")
    lost = Path("/", os.fsdecode(host.damaged()[0][0]))
    content = lost.read_bytes()
    lost.unlink()
    run_check(host.repository, read_data=True)
    back_up(host.repository, host.source)
    back_up(host.repository, host.source)
    Path(os.fsdecode(host.source), "again").write_bytes(content)
    assert run_backup(host.repository, host.source).data.plain_bytes > 0
    assert host.damaged() == []


def test_a_pack_that_was_put_back_from_a_copy_counts_again(host: Host) -> None:
    (key, *_) = keys_of(host.store, "packs/data/")
    copy = host.store.get(key)
    assert host.garble("packs/data/") == key
    assert run_check(host.repository, read_data=True).noted_packs == 1
    # A check that does not read it knows nothing new.
    assert run_check(host.repository).noted_packs == 1
    host.store.put(key, copy)
    assert run_check(host.repository, read_data=True).noted_packs == 0
    assert host.remarks_of_backup() == []
    assert run_backup(host.repository, host.source).plain_added == 0


def test_a_store_that_does_not_answer_damages_nothing(host: Host) -> None:
    faulty = FaultyStore(host.store, Fault("get", 1, "packs/data/", times=2))
    result = run_check(reopened(faulty, host.folders), read_data=True)
    assert (result.damaged, result.unread, result.noted_packs) == (False, 2, 0)
    assert host.remarks_of_backup() == []


def test_without_a_place_for_notes_nothing_is_promised(host: Host) -> None:
    host.garble("packs/data/")
    result = run_check(reopened(host.store, LocalFolders(host.folders.cache, None)), read_data=True)
    assert (result.damaged, result.noted_packs) == (True, 0)
