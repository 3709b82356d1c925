"""Which snapshots are lost: each host numbers its own from 1 without a gap, and each names the one before. Pure.

What is in the store cannot tell of the last ones: their numbers, and the id of the last, are what this machine saw.
"""

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from backupfs.codec.sealing import hash_object
from backupfs.errors import shown
from backupfs.ids import short
from backupfs.repository.local import Last, later_of
from backupfs.snapshots.snapshot import Snapshot, has_doubtful_time

Run = tuple[int, int]  # the first and the last of numbers that follow on each other


class LetGo(NamedTuple):
    """Numbers of a host that somebody forgot."""

    host_id: bytes
    first: int
    last: int
    name: bytes  # what was forgotten: the id of a snapshot, or a name that stands for one


class Loss(NamedTuple):
    """Snapshots of a host that were made, one after the other, and are not there."""

    host_id: bytes
    host: str  # the name of the nearest one that is there; empty if none is
    has_names: bool  # those of the machine have several names, so that of this one is anybody's guess
    first: int
    last: int
    snapshot_id: bytes  # of the last of them; empty if not known
    named_by: bytes  # the snapshot after them; empty if that is not there either
    is_newest: bool  # none that is there is later: only this machine knows of them, which saw them or the last one

    @property
    def name(self) -> bytes:
        """What it is forgotten by: the id, or where that is not known one that stands for it."""
        return self.snapshot_id or _stand_in(self.host_id, self.last)

    @property
    def numbers(self) -> str:
        """Say which ones of which host, as part of a sentence."""
        what = f"snapshots {self.first:,} to {self.last:,}" if self.last > self.first else f"snapshot {self.last:,}"
        whose = "the machine of the host" if self.has_names else "the host"
        return f"{what} of {whose} {shown(self.host) if self.host else f'with the id {short(self.host_id)}'}"

    def __str__(self) -> str:
        """Say what is gone, as part of a sentence."""
        several = self.last > self.first
        told = f"{self.numbers} {'are' if several else 'is'} gone"
        if self.is_newest:
            return f"{told}, though this machine saw {'them' if several else 'it'}"
        if self.named_by:
            return f"{told}; the next one is {short(self.named_by)}"
        return f"{told}; later ones are there"


class Doubt(NamedTuple):
    """What was made and cannot be read: of which names, kind and time it is, nobody knows."""

    host_id: bytes  # empty if not known
    number: int
    what: str


@dataclass(frozen=True, slots=True)
class Doubts:
    """All that is lost or damaged, and so may be later than what is there."""

    found: tuple[Doubt, ...]
    present: Collection[Snapshot]  # forgotten ones too

    def about(self, fitting: Sequence[Snapshot], of_any_machine: bool = False) -> str:
        """Say what may be later than the last one of those that fit a name; nothing if that is surely the latest.

        of_any_machine: what other machines made would fit, too.
        """
        machines = {one.host_id for one in fitting}
        for doubt in self.found if fitting else ():
            is_meant = of_any_machine or not doubt.host_id or doubt.host_id in machines
            if is_meant and not self._is_earlier(doubt, fitting[-1]):
                return doubt.what
        return ""

    def _is_earlier(self, doubt: Doubt, answer: Snapshot) -> bool:
        """Tell whether the answer was begun after another of that machine was stored, which is after the doubted one.

        So the time that somebody gave either of them does not matter. The answer itself may be the other one where its
        time is nobody's invention, as far as that can be seen: only what ran beside it could have been begun later.
        """
        own = [one for one in self.present if one.host_id == doubt.host_id]
        if any(one.sequence > doubt.number and one.store_time_ns <= answer.time_ns for one in own):
            return True
        if answer.host_id != doubt.host_id or answer.sequence <= doubt.number or has_doubtful_time(answer):
            return False
        return all(one.time_ns <= answer.time_ns for one in own if one.sequence < answer.sequence)


NO_DOUBTS = Doubts((), ())


def _stand_in(host_id: bytes, number: int) -> bytes:
    return hash_object(b"lost" + host_id + max(number, 0).to_bytes(8, "little"))


def find_losses(
    present: Collection[Snapshot],
    seen: Mapping[bytes, Last],
    forgotten: Container[bytes],
    unreadable: Collection[bytes],
    let_go: Collection[LetGo] = (),
) -> list[Loss]:
    """Return what is lost, and not known to be: by host, oldest first.

    present: all that can be read, forgotten ones too. seen: of hosts, by id. forgotten: ids. unreadable: ids of what is
    there, so not lost.
    One whose id is known is lost, whatever else is damaged or was forgotten. Numbers in a gap that come with no id may
    be those of unreadable objects, or be let go as a range.
    """
    hosts: dict[bytes, dict[int, Snapshot]] = {host_id: {} for host_id in seen}
    for snapshot in present:
        hosts.setdefault(snapshot.host_id, {})[snapshot.sequence] = snapshot
    absent = find_absent(present, seen)
    names = {one.name for one in let_go}
    runs = {host_id: _unnamed(host_id, numbered, seen, absent, let_go) for host_id, numbered in hosts.items()}
    # The number of what cannot be read is known where another names it, or where it was forgotten with its number.
    left = len(set(unreadable) - absent.keys() - names)
    if sum(last - first + 1 for of_host in runs.values() for first, last in of_host) <= left:
        runs = {}
    losses: list[Loss] = []
    for host_id, numbered in sorted(hosts.items()):
        firsts = {last: first for first, last in runs.get(host_id, ())}
        found: list[tuple[int, int, bytes, bytes]] = []
        for number, key, by in sorted((one.number, key, one.by) for key, one in absent.items() if one.host == host_id):
            if key not in forgotten and key not in unreadable and _stand_in(host_id, number) not in names:
                # A run is told of, and forgotten, with the one right after it.
                found.append((firsts.pop(number - 1, number), number, key, by))
        found += [(first, last, b"", b"") for last, first in firsts.items()]
        newest = max(numbered, default=0)
        has_names = len({snapshot.host for snapshot in numbered.values()}) > 1
        for first, last, key, by in sorted(found):
            following = numbered.get(last + 1)
            named_by = by or (following.snapshot_id if following else b"")
            name = _nearest_name(numbered, last)
            losses.append(Loss(host_id, name, has_names, first, last, key, named_by, last >= newest))
    return losses


def _nearest_name(numbered: Mapping[int, Snapshot], number: int) -> str:
    """Return the name of the nearest snapshot by number, of two that of the later one; empty if there is none."""
    nearest = min(numbered, key=lambda other: (abs(other - number), -other), default=None)
    return numbered[nearest].host if nearest is not None else ""


class Absent(NamedTuple):
    """What is not present, though its id is known; several may have one number, if they were made at once."""

    host: bytes
    number: int
    by: bytes  # which snapshot names it; empty: this machine saw it


def find_absent(present: Iterable[Snapshot], seen: Mapping[bytes, Last]) -> dict[bytes, Absent]:
    """Return what is not present but known, by its id."""
    named = {last_id: Absent(host_id, last, b"") for host_id, (last, ids) in seen.items() for last_id in ids}
    for one in present:
        for before in (one.previous, *one.beside):
            if before:
                named[before] = Absent(one.host_id, one.sequence - 1, one.snapshot_id)
    for one in present:
        named.pop(one.snapshot_id, None)
    return named


def _unnamed(
    host_id: bytes,
    numbered: Collection[int],
    seen: Mapping[bytes, Last],
    absent: Mapping[bytes, Absent],
    let_go: Iterable[LetGo],
) -> list[Run]:
    """Return the numbers of a host that are missing with no id, and were not let go."""
    named = {one.number for one in absent.values() if one.host == host_id}
    top = max([seen.get(host_id, (0, ()))[0], *numbered])
    runs = _gaps(sorted({0, *numbered, *named, top + 1}))
    for one in let_go:
        if one.host_id == host_id:
            runs = _without(runs, one.first, one.last)
    return runs


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
        own = snapshot.sequence, (snapshot.snapshot_id,)
        found[snapshot.host_id] = later_of(found.get(snapshot.host_id, own), own)
    return found
