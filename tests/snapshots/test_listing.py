"""Which snapshots there are, and which one a name means."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backupfs.codec.sealing import hash_object
from backupfs.errors import DamagedObject, UnknownSnapshot
from backupfs.ids import ChunkId, short
from backupfs.repository import local
from backupfs.repository.repository import Repository
from backupfs.snapshots import notes
from backupfs.snapshots.listing import load_snapshots, put_snapshot
from backupfs.snapshots.snapshot import FILES, IMAGE, Snapshot, Statistics, has_doubtful_time
from backupfs.stores.memory import MemoryStore
from backupfs.stores.passing import PassingStore
from backupfs.stores.store import ObjectInfo
from backupfs.view.folders import arrange, name_snapshots
from tests.builders import folders_in, keys_of, new_repository, reopened
from tests.faults import CountingStore

DAY_NS = 24 * 3600 * 10**9
MINUTE_NS = 60 * 10**9
ROOT = ChunkId(hash_object(b"root"))
EXAMPLE = Snapshot(FILES, bytes(16), "alpha", 1, b"", DAY_NS, DAY_NS, (b"/a",), ("t",), b"", ROOT, Statistics())


@pytest.fixture
def repository() -> Repository:
    return new_repository(CountingStore(MemoryStore()))


def test_snapshots_are_listed_by_time_and_found_by_name(repository: Repository) -> None:
    later = put_snapshot(repository, replace(EXAMPLE, time_ns=3 * DAY_NS, sequence=2))
    other = put_snapshot(repository, replace(EXAMPLE, time_ns=2 * DAY_NS, host="beta", host_id=bytes(15) + b"b"))
    first = put_snapshot(repository, EXAMPLE)
    image = put_snapshot(repository, replace(EXAMPLE, kind=IMAGE, time_ns=4 * DAY_NS, sequence=3))
    listed = load_snapshots(repository)
    assert listed.snapshots == [first, other, later, image]
    assert listed.find("latest") == later
    assert listed.find("beta:latest") == other
    for snapshot in listed.snapshots:
        assert listed.find(snapshot.snapshot_id.hex()) == snapshot
        assert listed.find(snapshot.snapshot_id.hex()[:16].upper()) == snapshot
    for name in ("", "x", "gamma:latest", "f" * 63, first.snapshot_id.hex() + "0"):
        with pytest.raises(UnknownSnapshot):
            listed.find(name)
    assert listed.last_of_host(bytes(16)) == image
    assert listed.last_of_host(bytes(15) + b"c") is None


def test_a_prefix_of_several_snapshots_is_refused(repository: Repository) -> None:
    stored = [put_snapshot(repository, replace(EXAMPLE, sequence=number)) for number in range(300)]
    listed = load_snapshots(repository)
    firsts = [snapshot.snapshot_id.hex()[:2] for snapshot in stored]
    twice = next(first for first in firsts if firsts.count(first) > 1)
    with pytest.raises(UnknownSnapshot, match="several"):
        listed.find(twice)


@pytest.mark.expected_log
@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_a_prefix_of_a_sound_snapshot_and_of_one_that_is_not_is_refused(repository: Repository, how: str) -> None:
    stored = in_a_row(repository, 300)
    firsts = [snapshot.snapshot_id.hex()[:2] for snapshot in stored]
    at = next(at for at, first in enumerate(firsts) if first in firsts[at + 1 : -1])
    bad, sound = stored[at], stored[firsts.index(firsts[at], at + 1)]
    key = f"snapshots/{bad.snapshot_id.hex()}"
    data = repository.store.get(key)
    repository.store.delete(key)
    if how == "damaged":
        repository.store.put(key, data[:-1])
    for other in stored:
        if other not in (bad, sound) and other.snapshot_id.hex().startswith(firsts[at]):
            notes.put_note(repository, notes.new_note(other.snapshot_id, notes.FORGET))
    listed = load_snapshots(repository)
    assert listed.find(firsts[at]) == sound
    with pytest.raises(UnknownSnapshot, match=r"several.*give more digits"):
        listed.find_any(firsts[at])
    for one in (bad, sound):
        assert listed.find_any(short(one.snapshot_id)) == one.snapshot_id


def test_an_empty_repository_says_so(repository: Repository) -> None:
    with pytest.raises(UnknownSnapshot, match="yet"):
        load_snapshots(repository).find("latest")


def test_a_forgotten_snapshot_is_gone_and_still_counts_for_its_host(repository: Repository) -> None:
    first = put_snapshot(repository, EXAMPLE)
    second = put_snapshot(repository, replace(EXAMPLE, sequence=2, time_ns=2 * DAY_NS))
    listed = load_snapshots(repository)
    notes.put_note(repository, notes.new_note(second.snapshot_id, notes.FORGET))
    assert listed.refresh()
    assert listed.snapshots == [first]
    assert not listed.refresh()
    assert listed.last_of_host(bytes(16)) == second
    forget_id = bytes.fromhex(keys_of(repository.store, "notes/")[0][-64:])
    undelete = notes.Note(second.snapshot_id, notes.UNDELETE, 1, "host", (forget_id,))
    notes.put_note(repository, undelete)
    assert listed.refresh()
    assert listed.snapshots == [first, second]
    notes.put_note(repository, notes.new_note(second.snapshot_id, notes.FORGET))
    listed.refresh()
    assert listed.snapshots == [first]


def test_a_refresh_reads_only_what_is_new(repository: Repository) -> None:
    for number in range(5):
        stored = put_snapshot(repository, replace(EXAMPLE, sequence=number))
        notes.put_note(repository, notes.new_note(stored.snapshot_id, "remark"))
    listed = load_snapshots(repository)
    store = repository.store
    assert isinstance(store, CountingStore)
    before = store.calls["get"]
    listed.refresh()
    assert store.calls["get"] == before
    put_snapshot(repository, replace(EXAMPLE, sequence=9))
    assert listed.refresh()
    assert store.calls["get"] == before + 1


@pytest.mark.expected_log("damaged")
def test_a_damaged_snapshot_is_named_each_time_and_logged_once(
    repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    stored = put_snapshot(repository, EXAMPLE)
    good = put_snapshot(repository, replace(EXAMPLE, sequence=2))
    key = f"snapshots/{stored.snapshot_id.hex()}"
    data = repository.store.get(key)
    repository.store.put(key, data[:-1])
    listed = load_snapshots(repository)
    listed.refresh()
    assert listed.snapshots == [good]
    assert list(listed.damaged) == [key]
    assert len(caplog.records) == 1
    repository.store.put(key, data)
    listed.refresh()
    assert listed.snapshots == [stored, good]
    assert not listed.damaged


def test_selection_is_by_any_host_all_tags_all_paths(repository: Repository) -> None:
    put_snapshot(repository, EXAMPLE)
    put_snapshot(repository, replace(EXAMPLE, host="beta", tags=("t", "u"), paths=(b"/a", b"/b"), sequence=2))
    listed = load_snapshots(repository)
    assert len(listed.selected([], [], [])) == 2
    assert len(listed.selected(["alpha", "beta"], ["t"], [b"/a"])) == 2
    assert [snapshot.host for snapshot in listed.selected([], ["t", "u"], [])] == ["beta"]
    assert [snapshot.host for snapshot in listed.selected([], [], [b"/b"])] == ["beta"]
    assert listed.selected(["alpha"], ["u"], []) == []


def test_a_clock_that_is_a_day_off_is_told() -> None:
    assert not has_doubtful_time(EXAMPLE)
    assert has_doubtful_time(replace(EXAMPLE, time_ns=3 * DAY_NS))
    assert has_doubtful_time(replace(EXAMPLE, time_ns=-DAY_NS))


@pytest.mark.expected_log
def test_an_earlier_snapshot_is_not_passed_off_as_the_latest(repository: Repository) -> None:
    stored = in_a_row(repository, 3)
    store = repository.store
    keys = [f"snapshots/{snapshot.snapshot_id.hex()}" for snapshot in stored]
    contents = [store.get(key) for key in keys]
    # One that another follows is no matter, whenever the store got it.
    for key, content in list(zip(keys, contents, strict=True))[1::-1]:
        store.put(key, content[:-1])
        assert load_snapshots(repository).find("latest") == stored[2]
        store.put(key, content)
    store.put(keys[0], contents[0][:-1])
    store.put(keys[2], contents[2][:-1])
    for name in ("latest", "alpha:latest"):
        with pytest.raises(DamagedObject, match=f"{keys[2]}.*can be read is {short(stored[1].snapshot_id)}"):
            load_snapshots(repository).find(name)
    assert load_snapshots(repository).find(short(stored[1].snapshot_id)) == stored[1]
    assert {doubt.host_id for doubt in load_snapshots(repository).doubts().found} == {bytes(16), b""}
    # Once it is known, the one before is the latest.
    assert load_snapshots(repository).find_any(keys[2][10:18]) == stored[2].snapshot_id
    notes.put_note(repository, notes.new_note(stored[2].snapshot_id, notes.FORGET))
    listed = load_snapshots(repository)
    assert listed.find("latest") == stored[1]
    assert listed.damaged.keys() == {keys[0]}
    assert listed.damaged_forgotten.keys() == {keys[2]}
    with pytest.raises(UnknownSnapshot):
        listed.find_any(keys[2][10:18])


def in_a_row(repository: Repository, count: int, **fields: Any) -> list[Snapshot]:
    """Return snapshots of a host, each of which names the one before."""
    stored: list[Snapshot] = []
    for number in range(1, count + 1):
        previous = stored[-1].snapshot_id if stored else b""
        made = replace(EXAMPLE, sequence=number, time_ns=number, previous=previous, **fields)
        stored.append(put_snapshot(repository, made))
    return stored


def test_what_this_machine_saw_and_is_gone_is_not_hidden(tmp_path: Path) -> None:
    repository = new_repository(folders=folders_in(tmp_path))
    stored = in_a_row(repository, 3)
    other = in_a_row(repository, 1, host="beta", host_id=bytes(15) + b"b")
    load_snapshots(repository).note_seen()
    assert load_snapshots(repository).losses() == []
    repository.store.delete(f"snapshots/{stored[2].snapshot_id.hex()}")
    listed = load_snapshots(repository)
    [loss] = listed.losses()
    assert (loss.host, loss.first, loss.last, loss.snapshot_id, loss.named_by) == (
        "alpha", 3, 3, stored[2].snapshot_id, b"",
    )  # fmt: skip
    assert "snapshot 3 of the host alpha is gone" in str(loss)
    for name in ("latest", "alpha:latest"):
        with pytest.raises(DamagedObject, match=f"snapshot 3.*gone.*{short(stored[1].snapshot_id)}"):
            listed.find(name)
    assert listed.find("beta:latest") == other[0]
    # Another machine has seen nothing of it.
    assert load_snapshots(reopened(repository.store)).find("latest") == stored[1]
    # To look again changes nothing, and to forget it ends it.
    listed.note_seen()
    assert load_snapshots(repository).losses() == [loss]
    notes.put_note(repository, notes.new_note(listed.find_any(stored[2].snapshot_id.hex()), notes.FORGET))
    assert load_snapshots(repository).losses() == []
    assert load_snapshots(repository).find("latest") == stored[1]


@pytest.mark.expected_log
def test_where_all_are_lost_or_damaged_that_is_said(tmp_path: Path) -> None:
    repository = new_repository(folders=folders_in(tmp_path))
    alpha = in_a_row(repository, 1)
    beta = in_a_row(repository, 2, host="beta", host_id=bytes(15) + b"b")
    load_snapshots(repository).note_seen()
    with pytest.raises(UnknownSnapshot, match="no file snapshot of a host gamma"):
        load_snapshots(repository).find("gamma:latest")
    for snapshot in beta:
        repository.store.delete(f"snapshots/{snapshot.snapshot_id.hex()}")
    with pytest.raises(DamagedObject, match=r"fits beta:latest.*snapshots 1 to 2 of the host.*are gone"):
        load_snapshots(repository).find("beta:latest")
    assert load_snapshots(repository).find("alpha:latest") == alpha[0]
    repository.store.delete(f"snapshots/{alpha[0].snapshot_id.hex()}")
    with pytest.raises(DamagedObject, match=r"fits latest.*snapshot 1 of.*is gone.*snapshots 1 to 2 of.*are gone"):
        load_snapshots(repository).find("latest")
    # Who saw nothing knows of nothing; what is there and damaged is told.
    elsewhere = reopened(repository.store)
    with pytest.raises(UnknownSnapshot, match="yet"):
        load_snapshots(elsewhere).find("latest")
    repository.store.put(f"snapshots/{alpha[0].snapshot_id.hex()}", b"x")
    for name in ("latest", "alpha:latest"):
        with pytest.raises(DamagedObject, match=f"fits {name}.*{alpha[0].snapshot_id.hex()} is damaged"):
            load_snapshots(elsewhere).find(name)


def row(repository: Repository, *changes: dict[str, Any]) -> list[Snapshot]:
    """Return snapshots of a machine, a minute apart, with what is different in each."""
    stored: list[Snapshot] = []
    for number, change in enumerate(changes, 1):
        made_ns = 99 * DAY_NS + number * MINUTE_NS
        plain = replace(EXAMPLE, sequence=number, time_ns=made_ns, store_time_ns=made_ns + 1)
        previous = stored[-1].snapshot_id if stored else b""
        stored.append(put_snapshot(repository, replace(plain, previous=previous, **change)))
    return stored


def spoil(repository: Repository, snapshot: Snapshot, how: str) -> None:
    key = f"snapshots/{snapshot.snapshot_id.hex()}"
    data = repository.store.get(key)
    repository.store.delete(key)
    if how == "damaged":
        repository.store.put(key, data[:-1])


WEB_IMAGE = {"kind": IMAGE, "image": "web"}


@pytest.mark.expected_log
@pytest.mark.parametrize("how", ["lost", "damaged"])
@pytest.mark.parametrize(
    ("changes", "spoilt", "names"),
    [
        ([{}, {}, WEB_IMAGE], 1, ["latest", "alpha:latest"]),
        ([WEB_IMAGE, WEB_IMAGE, {}], 1, ["web:latest"]),
        ([{"host": "web"}, {"host": "web"}, {"host": "vm2"}], 1, ["web:latest"]),
        ([{"time_ns": 1 * DAY_NS}, {"time_ns": 9 * DAY_NS}, {"time_ns": 5 * DAY_NS}], 1, ["latest", "alpha:latest"]),
        # Nor where another one was made after the lost one, if that has an earlier time.
        ([{}, {}, {"time_ns": 99 * DAY_NS}], 1, ["latest"]),
        ([{}, {}, {"time_ns": 5 * DAY_NS}, {"time_ns": 6 * DAY_NS}], 1, ["latest"]),
        # Times in disorder tell that somebody chose them, or that two ran at once.
        ([WEB_IMAGE | {"time_ns": 100 * DAY_NS}, {}, {}], 1, ["latest"]),
    ],
)  # fmt: skip
def test_what_cannot_be_the_answer_itself_takes_no_doubt_away(
    repository: Repository, changes: list[dict[str, Any]], spoilt: int, names: list[str], how: str
) -> None:
    stored = row(repository, *changes)
    listed = load_snapshots(repository)
    for name in names:
        assert listed.find(name)
    spoil(repository, stored[spoilt], how)
    for name in names:
        with pytest.raises(DamagedObject, match=f"{name} may be another snapshot"):
            load_snapshots(repository).find(name)


@pytest.mark.expected_log
@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_what_was_begun_after_the_one_that_follows_a_lost_one_is_surely_later(repository: Repository, how: str) -> None:
    # The second was said to be of another time, and so was the third.
    stored = row(repository, {}, {"time_ns": 9 * DAY_NS}, {"time_ns": 5 * DAY_NS}, {}, WEB_IMAGE, {})
    beta = {"host": "beta", "host_id": bytes(15) + b"b"}
    other = put_snapshot(repository, replace(stored[5], **beta, sequence=1, previous=b"", time_ns=200 * DAY_NS))
    spoil(repository, stored[1], how)
    listed = load_snapshots(repository)
    assert listed.find("latest") == listed.find("beta:latest") == other
    assert listed.find("alpha:latest") == stored[5]
    assert listed.find("web:latest") == stored[4]


@pytest.mark.expected_log
@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_a_name_that_nothing_fits_may_be_that_of_what_is_lost(repository: Repository, how: str) -> None:
    stored = row(repository, {}, {"host": "web"}, {})
    spoil(repository, stored[1], how)
    with pytest.raises(DamagedObject, match=r"fits web:latest, which may mean what is gone or damaged"):
        load_snapshots(repository).find("web:latest")


def test_what_only_this_machine_knows_to_be_lost_it_does_not_unlearn(tmp_path: Path) -> None:
    repository = new_repository(folders=folders_in(tmp_path))
    stored = in_a_row(repository, 3)
    load_snapshots(repository).note_seen()
    # The host went on from a copy of the repository that lacked the third: nothing in the store names it.
    repository.store.delete(f"snapshots/{stored[2].snapshot_id.hex()}")
    third = put_snapshot(repository, replace(EXAMPLE, sequence=3, time_ns=5, previous=stored[1].snapshot_id))
    fourth = put_snapshot(repository, replace(EXAMPLE, sequence=4, time_ns=6, previous=third.snapshot_id))
    other = in_a_row(repository, 1, host="beta", host_id=bytes(15) + b"b")
    seen = []
    for _ in range(2):
        listed = load_snapshots(repository)
        assert [loss.snapshot_id for loss in listed.losses()] == [stored[2].snapshot_id]
        assert listed.find("latest") in (fourth, *other)
        listed.note_seen()
        seen.append(local.last_seen(repository.local.state, repository.config.repository_id))
    assert seen == [{bytes(16): (3, (stored[2].snapshot_id,)), bytes(15) + b"b": (1, (other[0].snapshot_id,))}] * 2
    notes.put_note(repository, notes.new_note(stored[2].snapshot_id, notes.FORGET))
    load_snapshots(repository).note_seen()
    now = local.last_seen(repository.local.state, repository.config.repository_id)
    assert now[bytes(16)] == (4, (fourth.snapshot_id,))


@pytest.mark.expected_log
def test_what_is_lost_before_others_is_no_doubt_about_the_latest(tmp_path: Path) -> None:
    repository = new_repository(folders=folders_in(tmp_path))
    stored = in_a_row(repository, 2)
    load_snapshots(repository).note_seen()
    later = [replace(EXAMPLE, sequence=3, previous=stored[1].snapshot_id)]
    later.append(replace(EXAMPLE, sequence=4, time_ns=9, previous=put_snapshot(repository, later[0]).snapshot_id))
    last = put_snapshot(repository, later[1])
    # The second is gone, and the third, which names it, is damaged: only this machine knows of it.
    repository.store.delete(f"snapshots/{stored[1].snapshot_id.hex()}")
    third = f"snapshots/{last.previous.hex()}"
    repository.store.put(third, repository.store.get(third)[:-1])
    listed = load_snapshots(repository)
    [loss] = listed.losses()
    assert (loss.snapshot_id, loss.named_by) == (stored[1].snapshot_id, b"")
    assert listed.find("latest") == last
    assert listed.doubts().about([last], of_any_machine=True) == ""


def test_a_listing_that_is_stale_loses_nothing(tmp_path: Path) -> None:
    repository = new_repository(folders=folders_in(tmp_path))
    stored = in_a_row(repository, 3)
    load_snapshots(repository).note_seen()

    class Stale(PassingStore):
        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            newest = stored[2].snapshot_id.hex()
            return (info for info in super().list(prefix) if newest not in info.key)

    stale = reopened(Stale(repository.store), folders_in(tmp_path))
    listed = load_snapshots(stale)
    assert (listed.snapshots, listed.losses()) == (stored, [])
    assert not listed.refresh()
    assert listed.find("latest") == stored[2]
    repository.store.delete(f"snapshots/{stored[2].snapshot_id.hex()}")
    assert [loss.snapshot_id for loss in load_snapshots(stale).losses()] == [stored[2].snapshot_id]


@pytest.mark.parametrize("left_out", [{1}, {0, 1}, {0, 1, 2}])
def test_a_listing_that_is_stale_loses_none_that_another_one_names(left_out: set[int], tmp_path: Path) -> None:
    repository = new_repository(folders=folders_in(tmp_path))
    stored = in_a_row(repository, 4)

    class Stale(PassingStore):
        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            names = [stored[at].snapshot_id.hex() for at in left_out]
            return (info for info in super().list(prefix) if not any(name in info.key for name in names))

    # On a machine that has never seen any of them.
    stale = reopened(Stale(repository.store), folders_in(tmp_path / "other"))
    listed = load_snapshots(stale)
    assert (listed.snapshots, listed.losses()) == (stored, [])
    assert not listed.refresh()
    assert listed.find(stored[1].snapshot_id.hex()) == stored[1]
    repository.store.delete(f"snapshots/{stored[1].snapshot_id.hex()}")
    assert [loss.snapshot_id for loss in load_snapshots(stale).losses()][-1] == stored[1].snapshot_id


def test_a_mount_shows_no_latest_where_that_is_in_doubt(tmp_path: Path) -> None:
    repository = new_repository(folders=folders_in(tmp_path))
    stored = in_a_row(repository, 2)
    in_a_row(repository, 1, host="beta", host_id=bytes(15) + b"b")
    image = in_a_row(repository, 1, kind=IMAGE, image="web", host_id=bytes(15) + b"c")
    listed = load_snapshots(repository)

    def shown() -> tuple[bool, ...]:
        names = name_snapshots(listed.snapshots, {})
        top = arrange(listed.snapshots, names, listed.verifications, listed.doubts())
        folders = top.folder(b"hosts").folder(b"alpha"), top.folder(b"hosts").folder(b"beta")
        of_image = top.folder(b"images").folder(b"web")
        return tuple(b"latest" in folder.children for folder in (top, *folders, of_image))

    listed.note_seen()
    assert shown() == (True, True, True, True)
    repository.store.delete(f"snapshots/{stored[1].snapshot_id.hex()}")
    assert listed.refresh()
    assert shown() == (False, False, True, True)
    notes.put_note(repository, notes.new_note(stored[1].snapshot_id, notes.FORGET))
    assert listed.refresh()
    assert shown() == (True, True, True, True)
    key = f"snapshots/{image[0].snapshot_id.hex()}"
    local.note_seen(repository.local.state, repository.config.repository_id, {bytes(15) + b"c": (9, ())})
    listed.refresh()
    assert shown() == (False, True, True, False)
    assert key in keys_of(repository.store)
