"""Which snapshots are lost: each host numbers its own from 1 without a gap, and each names the one before. Pure.

What is in the store cannot tell of the last ones: their numbers, and the id of the last, are what this machine saw.
"""

from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

from backupfs.errors import shown
from backupfs.ids import short
from backupfs.snapshots.snapshot import Snapshot

Last = tuple[int, bytes]  # the number of a host's last snapshot, and its id; empty if not known


class Loss(NamedTuple):
    """Snapshots of a host that were made, one after the other, and are not there."""

    host_id: bytes
    host: str  # its name; empty if not known
    first: int
    last: int
    snapshot_id: bytes  # of the last of them; empty if not known
    named_by: bytes  # the snapshot after them; empty: there is none, they were seen by this machine

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
    present: Iterable[Snapshot],
    seen: Mapping[bytes, Last],
    forgotten: Container[bytes],
    unreadable: Container[bytes],
) -> list[Loss]:
    """Return what is lost, and not known to be: by host, oldest first.

    present: all that can be read, forgotten ones too. seen: of hosts, by id. forgotten: ids; where the last of some is
    among them, all of these were let go. unreadable: ids of what is there, so not lost.
    """
    hosts: dict[bytes, dict[int, Snapshot]] = {host: {} for host in seen}
    ids = set[bytes]()
    for snapshot in present:
        hosts.setdefault(snapshot.host_id, {})[snapshot.sequence] = snapshot
        ids.add(snapshot.snapshot_id)
    losses: list[Loss] = []
    for host_id, numbered in sorted(hosts.items()):
        last, last_id = seen.get(host_id, (0, b""))
        name = next((snapshot.host for snapshot in numbered.values()), "")
        before = 0
        for number in [*sorted(numbered), *([last + 1] if last > max(numbered, default=0) else [])]:
            following = numbered.get(number)
            first, end = before + 1, number - 1
            before = max(before, number)
            own_id = following.previous if following is not None else last_id
            own_id = b"" if own_id in ids else own_id
            if own_id in unreadable:
                own_id, end = b"", end - 1
            elif own_id in forgotten:
                continue
            if first <= end:
                by = following.snapshot_id if following is not None else b""
                losses.append(Loss(host_id, name, first, end, own_id, by))
    return losses


def lasts_of(present: Iterable[Snapshot]) -> dict[bytes, Last]:
    """Return the last snapshot of each host."""
    found: dict[bytes, Last] = {}
    for snapshot in present:
        found[snapshot.host_id] = max(found.get(snapshot.host_id, (0, b"")), (snapshot.sequence, snapshot.snapshot_id))
    return found
