"""Asking for many things at once: the answers in order, and no thread is left."""

import os
import threading
from functools import partial
from pathlib import Path

import pytest
import trio

from backupfs.errors import ObjectMissing
from backupfs.stores.memory import MemoryStore
from backupfs.stores.together import each
from backupfs.usecases import restore_files
from backupfs.usecases.restore import RestoreOptions, restore
from tests.builders import File, back_up, build, ignore, new_repository, noise, reopened, snapshot_of
from tests.faults import AroundStore, CountingStore


class Far(AroundStore):
    is_far = True  # type: ignore[assignment]


def test_answers_come_in_order_and_several_are_asked_for_at_once() -> None:
    together = threading.Barrier(8)

    def ask(number: int) -> int:
        together.wait(10)
        return number * number

    before = threading.active_count()
    assert list(each(Far(MemoryStore()), ask, range(40))) == [number * number for number in range(40)]
    assert threading.active_count() == before


def test_a_store_at_hand_is_asked_in_this_thread() -> None:
    here = threading.get_ident()
    assert set(each(MemoryStore(), lambda _: threading.get_ident(), range(5))) == {here}


def test_what_an_answer_raises_is_raised() -> None:
    inner = MemoryStore()
    inner.put("a", b"1")
    with pytest.raises(ObjectMissing):
        list(each(Far(inner), inner.get, ["a", "b", "a"]))


def test_a_repository_that_is_far_opens_as_one_at_hand(tmp_path: Path) -> None:
    repository = new_repository()
    for number in range(20):
        back_up(repository, build({"a": File(b"%d" % number)}, tmp_path / f"s{number}"))
    counting = CountingStore(repository.store)
    from backupfs.snapshots.listing import load_snapshots

    near, far = load_snapshots(reopened(repository.store)), load_snapshots(reopened(Far(counting)))
    assert near.snapshots == far.snapshots
    assert len(far.snapshots) == 20


def test_a_restore_fetches_what_files_share_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of few files, each of which wants a part of every block."""
    monkeypatch.setattr(restore_files, "_MOST_WANTED", 5)
    shared = {f"s{number}": File(noise(number, 2500)) for number in range(10)}
    tree = {f"d{n:02}": {**shared, **{f"own{k}": File(noise(100 * n + k, 2500)) for k in range(5)}} for n in range(12)}
    source = build(tree, tmp_path / "source")
    repository = new_repository()
    snapshot = back_up(repository, source)
    counting = CountingStore(repository.store)
    far = reopened(Far(counting))
    counting.bytes_got = 0
    target = os.fsencode(tmp_path / "out")
    result = trio.run(partial(restore, far, snapshot, source, target, RestoreOptions(verify=False), ignore))
    assert (result.errors, result.files) == (0, 12 * 15)
    assert snapshot_of(tmp_path / "out") == snapshot_of(source)
    stored = sum(info.size for info in repository.store.list("packs/"))
    assert counting.bytes_got < 1.2 * stored
