"""Which snapshots are lost: each host numbers its own from 1 without a gap, and each names the one before. Pure.

What is in the store cannot tell of the last ones: their numbers, and the id of the last, are what this machine saw.
"""

from collections.abc import Collection, Container, Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

from backupfs.codec.sealing import hash_object
from backupfs.errors import shown
from backupfs.ids import short
from backupfs.snapshots.snapshot import Snapshot

LetGo = tuple[bytes, int, int]  # a host, and the first and the last number of what was forgotten of it
Last = tuple[int, bytes]  # the number of a host's last snapshot, and its id; empty if not known


class Loss(NamedTuple):
    """Snapshots of a host that were made, one after the other, and are not there."""

    host_id: bytes
    host: str  # its name; empty if not known
    first: int
    last: int
    snapshot_id: bytes  # of the last of them; empty if not known
    named_by: bytes  # the snapshot after them; empty: there is none, they were seen by this machine

    @property
    def name(self) -> bytes:
        """What it is forgotten by: the id, or where that is not known one that stands for it."""
        return self.snapshot_id or hash_object(b"lost" + self.host_id + self.last.to_bytes(8, "little"))

    def __str__(self) -> str:
        """Say what is gone, as part of a sentence."""
        several = self.last > self.first
        what = f"snapshots {self.first:,} to {self.last:,}" if several else f"snapshot {self.last:,}"
        host = shown(self.host) if self.host else f"with the id {short(self.host_id)}"
        told = f"{what} of the host {host} {'are' if several else 'is'} gone"
        if self.named_by:
            return f"{told}; the next one is {short(self.named_by)}"
        return f"{told}, though this machine saw {'them' if several else 'it'}"


def find_losses(
    present: Collection[Snapshot],
    seen: Mapping[bytes, Last],
    forgotten: Container[bytes],
    unreadable: Collection[bytes],
    let_go: Iterable[LetGo] = (),
) -> list[Loss]:
    """Return what is lost, and not known to be: by host, oldest first.

    present: all that can be read, forgotten ones too. seen: of hosts, by id. forgotten: ids. unreadable: ids of what is
    there, so not lost. let_go: the numbers that were forgotten.
    """
    hosts: dict[bytes, dict[int, Snapshot]] = {host_id: {} for host_id in seen}
    for snapshot in present:
        hosts.setdefault(snapshot.host_id, {})[snapshot.sequence] = snapshot
    known: dict[bytes, list[tuple[int, int]]] = {}
    for host_id, first, last in let_go:
        known.setdefault(host_id, []).append((first, last))
    named = _named(present, seen)
    # Of one that is damaged the number is known only where another names it.
    left = len(set(unreadable) - named.keys())
    losses: list[Loss] = []
    for host_id, numbered in sorted(hosts.items()):
        top = max([seen.get(host_id, (0, b""))[0], *numbered])
        own = {number: (key, by) for key, (host, number, by) in named.items() if host == host_id}
        missing = _gaps([0, *sorted(numbered), top + 1])
        # Two that ran at once may have one number: then it is not missing, and still one of them can be.
        missing = sorted({*missing, *((number, number) for number in own if number in numbered)})
        for first, last in known.get(host_id, ()):
            missing = _without(missing, first, last)
        for number, (key, _) in own.items():
            if key in forgotten or key in unreadable:
                missing = _without(missing, number, number)
        name = next((snapshot.host for snapshot in numbered.values()), "")
        for first, last in missing:
            key, by = own.get(last, (b"", b""))
            following = numbered.get(last + 1)
            losses.append(Loss(host_id, name, first, last, key, by or (following.snapshot_id if following else b"")))
    if sum(loss.last - loss.first + 1 for loss in losses) <= left:
        return []
    return losses


def _named(present: Iterable[Snapshot], seen: Mapping[bytes, Last]) -> dict[bytes, tuple[bytes, int, bytes]]:
    """Return what is not present but known by its id: id → host, number, and which snapshot names it, if any."""
    named = {last_id: (host_id, last, b"") for host_id, (last, last_id) in seen.items() if last_id}
    for one in present:
        if one.previous:
            named[one.previous] = one.host_id, one.sequence - 1, one.snapshot_id
    for one in present:
        named.pop(one.snapshot_id, None)
    return named


Run = tuple[int, int]  # the first and the last of numbers that follow on each other


def _gaps(numbers: list[int]) -> list[Run]:
    """Return the runs between numbers that are in order."""
    return [(one + 1, other - 1) for one, other in pairwise(numbers) if other > one + 1]


def _without(runs: list[Run], first: int, last: int) -> list[Run]:
    """Return runs without the numbers of another."""
    parts = [part for low, high in runs for part in ((low, min(high, first - 1)), (max(low, last + 1), high))]
    return sorted({(low, high) for low, high in parts if low <= high})


def lasts_of(present: Iterable[Snapshot]) -> dict[bytes, Last]:
    """Return the last snapshot of each host."""
    found: dict[bytes, Last] = {}
    for snapshot in present:
        found[snapshot.host_id] = max(found.get(snapshot.host_id, (0, b"")), (snapshot.sequence, snapshot.snapshot_id))
    return found
