"""Kill a backup, or the making of a repository, at every write: what was there stays, what was stored is used again."""

import itertools
import os
from pathlib import Path

import pytest

from backupfs.errors import StoreUnavailable
from backupfs.repository.repository import Repository
from backupfs.stores.memory import MemoryStore
from backupfs.usecases.check import CheckResult
from tests.builders import (
    File,
    all_contents,
    back_up,
    build,
    contents_of,
    copy_of,
    folders_in,
    keys_of,
    new_repository,
    noise,
    reopened,
    run_backup,
    run_check,
)
from tests.faults import Crash, Fault, FaultyStore

FIRST = {"old": File(noise(1, 30_000)), "d": {"x": File(noise(2, 900))}}
ADDED = {f"new-{number}": File(noise(10 + number, 20_000)) for number in range(12)}


class Before:
    """A repository with one snapshot, and a source that has grown since."""

    def __init__(self, base: Path) -> None:
        self.folders = folders_in(base)
        self.source = build(FIRST, base / "source")
        self.store = MemoryStore()
        repository = new_repository(self.store, self.folders)
        self.snapshot = back_up(repository, self.source)
        self.contents = contents_of(repository, self.snapshot)
        build(ADDED, base / "added")
        os.rename(base / "added", base / "source" / "added")


@pytest.fixture
def before(tmp_path: Path) -> Before:
    return Before(tmp_path)


def raised_in(error: BaseException) -> set[type]:
    """Return the types of what a run ended with, out of the groups that concurrency puts them in."""
    if isinstance(error, BaseExceptionGroup):
        return set().union(*(raised_in(inner) for inner in error.exceptions))
    return {type(error)}


def assert_valid(repository: Repository, before: Before) -> CheckResult:
    result = run_check(repository, read_data=True)
    assert not result.damaged, result.findings
    assert contents_of(repository, before.snapshot) == before.contents
    return result


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_backup_killed_at_any_put_leaves_a_valid_repository(before: Before, after: bool) -> None:
    whole = run_backup(reopened(copy_of(before.store)), before.source)
    most_reused = 0
    for at in itertools.count(1):
        store = copy_of(before.store)
        faulty = FaultyStore(store, Fault("put", at, after=after, kills=True))
        try:
            run_backup(reopened(faulty), before.source)
        except BaseException as error:
            if Crash not in raised_in(error):
                raise
        else:
            break  # it has fewer puts; how blocks fall into packs differs from run to run
        is_committed = len(keys_of(store, "snapshots/")) == 2
        assert after or not is_committed

        repository = reopened(store)
        assert_valid(repository, before)
        stored_before = keys_of(store, "index/data/")
        again = run_backup(repository, before.source)
        if len(stored_before) > len(keys_of(before.store, "index/data/")):
            reused = whole.data.plain_bytes - again.data.plain_bytes
            assert reused > 0, "what a checkpoint named is not stored again"
            most_reused = max(most_reused, reused)
        final = reopened(store)
        result = assert_valid(final, before)
        assert result.snapshots == 2 + is_committed
        assert again.snapshot is not None
        kept = contents_of(final, again.snapshot)
        for number in range(12):
            entry = kept[before.source + b"/added/new-%d" % number]
            assert entry is not None
            assert entry.content == noise(10 + number, 20_000)
    assert at > 10
    assert most_reused >= whole.data.plain_bytes / 2


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_the_put_of_the_snapshot_commits_and_is_the_last(before: Before, after: bool) -> None:
    store = copy_of(before.store)
    with pytest.raises(Crash):
        run_backup(
            reopened(FaultyStore(store, Fault("put", 1, prefix="snapshots/", after=after, kills=True))), before.source
        )
    assert assert_valid(reopened(store), before).snapshots == 1 + after
    again = run_backup(reopened(store), before.source)
    assert again.data.chunks == 0


def test_a_backup_whose_put_fails_says_so_and_leaves_a_valid_repository(before: Before) -> None:
    for at in range(1, 11, 3):
        store = copy_of(before.store)
        with pytest.raises(BaseException) as caught:  # noqa: PT011
            run_backup(reopened(FaultyStore(store, Fault("put", at))), before.source)
        assert StoreUnavailable in raised_in(caught.value)
        assert len(keys_of(store, "snapshots/")) == 1
        assert_valid(reopened(store), before)


def test_a_lost_response_to_a_put_is_harmless_to_a_later_run(before: Before) -> None:
    store = copy_of(before.store)
    for prefix in ("packs/data/", "packs/tree/", "index/", "snapshots/"):
        with pytest.raises(BaseException) as caught:  # noqa: PT011
            run_backup(reopened(FaultyStore(store, Fault("put", 1, prefix=prefix, after=True))), before.source)
        assert StoreUnavailable in raised_in(caught.value)
    run_backup(reopened(store), before.source)
    assert_valid(reopened(store), before)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", [1, 2])
def test_an_init_killed_at_any_put_can_be_done_again(tmp_path: Path, at: int, after: bool) -> None:
    store = MemoryStore()
    with pytest.raises(Crash):
        new_repository(FaultyStore(store, Fault("put", at, after=after, kills=True)))
    if not (after and at == 2):
        new_repository(store)
    repository = reopened(store)
    source = build(FIRST, tmp_path / "source")
    back_up(repository, source)
    assert not run_check(reopened(store), read_data=True).damaged
    assert len(all_contents(reopened(store))) == 1


def test_a_killed_merge_of_the_local_index_costs_nothing(before: Before, tmp_path: Path) -> None:
    """A file that was being written when the process died has a temporary name, and nobody takes it for a run."""
    reopened(before.store, before.folders)
    leftover = next((tmp_path / "cache").rglob("*.run")).with_name(".abc.run.123.tmp")
    leftover.write_bytes(b"half a run")
    assert_valid(reopened(before.store, before.folders), before)
