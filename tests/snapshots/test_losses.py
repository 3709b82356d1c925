"""What is lost, by what is left of it."""

from dataclasses import replace

from backupfs.codec.sealing import hash_object
from backupfs.ids import ChunkId, SnapshotId, short
from backupfs.repository.local import Last
from backupfs.snapshots.losses import LetGo, find_losses, lasts_of
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


def run(first: int, last: int, host: bytes = HOST) -> LetGo:
    """Return what forgetting a loss of some numbers leaves, whose last one is known by its id."""
    return LetGo(host, first, last, snapshot_id(last, host))


def found(
    present: list[Snapshot],
    seen: dict[bytes, Last] | None = None,
    forgotten: tuple[int, ...] = (),
    unreadable: tuple[int, ...] = (),
    let_go: tuple[LetGo, ...] = (),
) -> list[tuple[int, int, bytes, bytes]]:
    ids = set(map(snapshot_id, forgotten)), set(map(snapshot_id, unreadable))
    losses = find_losses(present, seen or {}, *ids, let_go)
    newest = max((one.sequence for one in present if one.host_id == HOST), default=0)
    assert [loss.is_newest for loss in losses] == [loss.last >= newest for loss in losses]
    return [(loss.first, loss.last, loss.snapshot_id, loss.named_by) for loss in losses]


def test_what_is_whole_has_lost_nothing() -> None:
    whole = [made(1), made(2), made(3), made(1, host=OTHER)]
    assert found(whole) == []
    assert found(whole, lasts_of(whole)) == []
    assert lasts_of(whole) == {HOST: (3, (snapshot_id(3),)), OTHER: (1, (snapshot_id(1, OTHER),))}
    assert found([]) == []


def test_a_gap_is_a_loss_that_the_next_one_names() -> None:
    assert found([made(1), made(3)]) == [(2, 2, snapshot_id(2), snapshot_id(3))]
    assert found([made(1), made(5), made(7)]) == [
        (2, 4, snapshot_id(4), snapshot_id(5)), (6, 6, snapshot_id(6), snapshot_id(7)),
    ]  # fmt: skip
    assert found([made(4)]) == [(1, 3, snapshot_id(3), snapshot_id(4))]


def test_two_that_ran_at_once_are_no_loss() -> None:
    assert found([made(1), made(2), made(3, previous=1)]) == []
    twin = replace(made(2), snapshot_id=snapshot_id(9))
    assert found([made(1), made(2), twin]) == []
    # Of two of one number, too, the one that is gone is missed by who names it and by who saw it.
    assert found([made(1), twin, made(3)]) == [(2, 2, snapshot_id(2), snapshot_id(3))]
    assert found([made(1), twin], {HOST: (2, (snapshot_id(2),))}) == [(2, 2, snapshot_id(2), b"")]
    assert found([made(1), twin, made(3)], forgotten=(2,)) == []
    # Which one was lost is not known then.
    assert found([made(1), made(3, previous=1)]) == [(2, 2, b"", snapshot_id(3))]


def test_what_was_seen_last_is_missed_though_nothing_names_it() -> None:
    assert found([made(1)], {HOST: (3, (snapshot_id(3),))}) == [(2, 3, snapshot_id(3), b"")]
    assert found([], {HOST: (2, (snapshot_id(2),))}) == [(1, 2, snapshot_id(2), b"")]
    assert found([made(1), made(2)], {HOST: (1, (snapshot_id(1),))}) == []


def test_what_was_forgotten_is_not_missed_and_nothing_else() -> None:
    assert found([made(1), made(3)], forgotten=(2,)) == []
    assert found([made(1)], {HOST: (2, (snapshot_id(2),))}, forgotten=(2,)) == []
    # Of those before it nobody said so.
    assert [one[:2] for one in found([made(1), made(5)], forgotten=(4,))] == [(2, 3)]
    assert found([made(1), made(5)], forgotten=(4,), let_go=(run(2, 4),)) == []
    assert found([made(5)], forgotten=(4,), let_go=(run(2, 4),)) == [(1, 1, b"", b"")]
    assert found([made(1), made(9)], forgotten=(5,), let_go=(run(4, 5), run(1, 9, OTHER))) == [
        (2, 3, b"", b""), (6, 8, snapshot_id(8), snapshot_id(9)),
    ]  # fmt: skip
    # Whatever the numbers are, it takes no longer.
    last = (1 << 60) - 1
    assert found([made(1), made(1 << 60)], forgotten=(last,), let_go=(run(1, last),)) == []


def test_what_is_there_and_damaged_is_not_gone() -> None:
    assert found([made(1), made(3)], unreadable=(2,)) == []
    assert found([made(1)], {HOST: (2, (snapshot_id(2),))}, unreadable=(2,)) == []
    assert found([], {HOST: (5, (snapshot_id(5),))}, unreadable=(1, 2, 3, 4, 5)) == []
    # Which number a damaged one has is known only where another names it.
    assert found([made(1), made(4)], unreadable=(2, 3)) == []
    assert [one[:2] for one in found([made(1), made(4)], unreadable=(3,))] == [(2, 2)]
    assert [one[:2] for one in found([made(1), made(5)], unreadable=(3, 4))] == [(2, 3)]


def test_what_is_known_by_its_id_is_lost_whatever_else_is_damaged() -> None:
    # An object of no known number explains a number that nobody knows more of, and no id.
    assert found([made(1), made(3)], unreadable=(77,)) == [(2, 2, snapshot_id(2), snapshot_id(3))]
    assert found([made(1)], {HOST: (2, (snapshot_id(2),))}, unreadable=(77,)) == [(2, 2, snapshot_id(2), b"")]
    assert found([made(1), made(3, previous=1)], unreadable=(77,)) == []
    # One that was forgotten with its number explains no other.
    forgotten = LetGo(OTHER, 4, 4, snapshot_id(77))
    assert found([made(1), made(3, previous=1)], unreadable=(77,), let_go=(forgotten,)) == [
        (2, 2, b"", snapshot_id(3)),
    ]  # fmt: skip


def test_of_two_of_one_number_each_is_lost_and_forgotten_on_its_own() -> None:
    other = replace(made(3), snapshot_id=snapshot_id(33), previous=snapshot_id(22))
    both = [made(1), made(3), other]
    ids = sorted([(snapshot_id(2), snapshot_id(3)), (snapshot_id(22), snapshot_id(33))])
    assert found(both) == [(2, 2, *pair) for pair in ids]
    assert found(both, forgotten=(22,), let_go=(LetGo(HOST, 2, 2, snapshot_id(22)),)) == [
        (2, 2, snapshot_id(2), snapshot_id(3)),
    ]  # fmt: skip
    assert found(both, forgotten=(2, 22)) == []


def test_what_was_let_go_with_others_and_is_named_later_is_missed() -> None:
    # 2 and 3 were forgotten with 4; 3 came back from a copy, and names 2.
    let_go = (run(2, 4),)
    assert found([made(1), made(5)], forgotten=(4,), let_go=let_go) == []
    assert found([made(1), made(3), made(5)], forgotten=(4,), let_go=let_go) == [
        (2, 2, snapshot_id(2), snapshot_id(3)),
    ]  # fmt: skip
    # Forgotten before its id was known, by the name that stood for it alone.
    [loss] = find_losses([made(1), made(3, previous=1)], {}, (), ())
    let_go = (LetGo(HOST, 2, 2, loss.name),)
    assert found([made(1), made(3, previous=1)], let_go=let_go) == []
    assert found([made(1), made(3)], let_go=let_go) == []


def test_a_loss_has_the_name_of_the_nearest_one() -> None:
    def named(number: int, host: str) -> Snapshot:
        return replace(made(number), host=host)

    present = [named(9, "nine"), named(1, "one"), named(2, "two"), named(4, "four"), named(8, "nine")]
    losses = find_losses(present, {}, (), ())
    assert [(loss.first, loss.last, loss.host) for loss in losses] == [(3, 3, "four"), (5, 7, "nine")]
    assert str(losses[0]).startswith("snapshot 3 of the machine of the host four is gone")
    *_, loss = find_losses(present, {HOST: (10, (snapshot_id(10),))}, (), ())
    assert (loss.last, loss.host) == (10, "nine")
    [loss] = find_losses([named(1, "one"), named(3, "one")], {}, (), ())
    assert loss.numbers == "snapshot 2 of the host one"


def test_a_loss_says_whether_later_ones_are_there() -> None:
    seen = {HOST: (3, (snapshot_id(3),))}
    [newest] = find_losses([made(1)], seen, (), ())
    assert "saw" in str(newest)
    assert newest.is_newest
    # What follows on it is damaged, and later ones are there.
    [loss] = find_losses([made(1), made(2), made(5)], seen, (), {snapshot_id(4)})
    assert (loss.last, loss.named_by, loss.is_newest) == (3, b"", False)
    assert str(loss).endswith("is gone; later ones are there")
    [loss] = find_losses([made(1), made(2), made(4)], {}, (), ())
    assert str(loss).endswith(f"is gone; the next one is {short(snapshot_id(4))}")
