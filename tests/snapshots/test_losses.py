"""What is lost, by what is left of it."""

from dataclasses import replace

from backupfs.codec.sealing import hash_object
from backupfs.ids import ChunkId, SnapshotId
from backupfs.snapshots.losses import Last, find_losses, lasts_of
from backupfs.snapshots.snapshot import FILES, Snapshot, Statistics

ROOT = ChunkId(hash_object(b"root"))
HOST, OTHER = bytes(16), bytes(15) + b"o"
EXAMPLE = Snapshot(FILES, HOST, "alpha", 1, b"", 1, 1, (b"/a",), (), b"", ROOT, Statistics())


def snapshot_id(number: int, host: bytes = HOST) -> SnapshotId:
    return SnapshotId(hash_object(b"%d of %s" % (number, host)))


def made(number: int, previous: int = -1, host: bytes = HOST) -> Snapshot:
    """Return one; the one before is the number before, unless it is said."""
    before = number - 1 if previous < 0 else previous
    named = snapshot_id(before, host) if before else b""
    return replace(EXAMPLE, sequence=number, host_id=host, snapshot_id=snapshot_id(number, host), previous=named)


def found(
    present: list[Snapshot],
    seen: dict[bytes, Last] | None = None,
    forgotten: tuple[int, ...] = (),
    unreadable: tuple[int, ...] = (),
) -> list[tuple[int, int, bytes, bytes]]:
    losses = find_losses(present, seen or {}, set(map(snapshot_id, forgotten)), set(map(snapshot_id, unreadable)))
    return [(loss.first, loss.last, loss.snapshot_id, loss.named_by) for loss in losses]


def test_what_is_whole_has_lost_nothing() -> None:
    whole = [made(1), made(2), made(3), made(1, host=OTHER)]
    assert found(whole) == []
    assert found(whole, lasts_of(whole)) == []
    assert lasts_of(whole) == {HOST: (3, snapshot_id(3)), OTHER: (1, snapshot_id(1, OTHER))}
    assert found([]) == []


def test_a_gap_is_a_loss_that_the_next_one_names() -> None:
    assert found([made(1), made(3)]) == [(2, 2, snapshot_id(2), snapshot_id(3))]
    assert found([made(1), made(5), made(7)]) == [
        (2, 4, snapshot_id(4), snapshot_id(5)), (6, 6, snapshot_id(6), snapshot_id(7)),
    ]  # fmt: skip
    assert found([made(4)]) == [(1, 3, snapshot_id(3), snapshot_id(4))]


def test_two_that_ran_at_once_are_no_loss() -> None:
    assert found([made(1), made(2), made(3, previous=1)]) == []
    assert found([made(1), made(2), replace(made(2), snapshot_id=snapshot_id(9))]) == []
    # Which one was lost is not known then.
    assert found([made(1), made(3, previous=1)]) == [(2, 2, b"", snapshot_id(3))]


def test_what_was_seen_last_is_missed_though_nothing_names_it() -> None:
    assert found([made(1)], {HOST: (3, snapshot_id(3))}) == [(2, 3, snapshot_id(3), b"")]
    assert found([], {HOST: (2, snapshot_id(2))}) == [(1, 2, snapshot_id(2), b"")]
    assert found([made(1), made(2)], {HOST: (1, snapshot_id(1))}) == []


def test_what_was_forgotten_is_not_missed() -> None:
    assert found([made(1), made(3)], forgotten=(2,)) == []
    assert found([made(1), made(5)], forgotten=(4,)) == []
    assert found([made(1)], {HOST: (3, snapshot_id(3))}, forgotten=(3,)) == []
    # Forgotten before: of those after it nobody said so.
    assert found([made(1), made(5)], forgotten=(2, 3)) == [(2, 4, snapshot_id(4), snapshot_id(5))]


def test_what_is_there_and_damaged_is_not_gone() -> None:
    assert found([made(1), made(3)], unreadable=(2,)) == []
    assert found([made(1), made(4)], unreadable=(3,)) == [(2, 2, b"", snapshot_id(4))]
    assert found([made(1)], {HOST: (2, snapshot_id(2))}, unreadable=(2,)) == []
    # Damaged and forgotten: that is known.
    assert found([made(1), made(4)], forgotten=(3,), unreadable=()) == []
