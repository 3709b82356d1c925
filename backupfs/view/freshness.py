"""Keeping the list of snapshots fresh while it is looked at.

Nothing is asked of the store while nobody looks: the virtual directories raise `Stale` when the list is older than
`MOST_AGE_S`, and the operation waits for a fresh one, but never longer than `MOST_WAIT_S`. Belongs to the trio thread.
"""

import logging
from collections.abc import Callable

import trio

from backupfs import workers
from backupfs.errors import BackupfsError
from backupfs.repository.repository import Repository
from backupfs.snapshots.listing import SnapshotList

log = logging.getLogger(__name__)

MOST_AGE_S = 5.0
MOST_WAIT_S = 2.0
# A store that does not answer is asked less often.
_AGE_AFTER_FAILURE_S = 30.0


class Stale(Exception):
    """The list of snapshots may be out of date: wait for `Freshness.refreshed` and run the operation again."""


class Freshness:
    """Refreshes a list of snapshots, one refresh at a time."""

    def __init__(
        self,
        repository: Repository,
        listed: SnapshotList,
        changed: Callable[[], None],
        nursery: trio.Nursery | None,
        most_age_s: float = MOST_AGE_S,
    ) -> None:
        """Take the parts; the list was read just now.

        changed: called on the trio thread after a refresh that found a change.
        nursery: where refreshes run; without one the list stays as it is.
        """
        self._repository = repository
        self._listed = listed
        self._changed = changed
        self._nursery = nursery
        self._most_age_s = most_age_s
        self._due = self._now() + most_age_s
        self._running: trio.Event | None = None

    def _now(self) -> float:
        return trio.current_time() if self._nursery is not None else 0.0

    def check(self) -> None:
        """Raise `Stale` when the list is due to be read again. Costs next to nothing."""
        if self._nursery is not None and trio.current_time() >= self._due:
            raise Stale

    async def refreshed(self) -> None:
        """Wait until the list was read again, or for `MOST_WAIT_S`."""
        assert self._nursery is not None
        if self._running is None:
            self._running = trio.Event()
            self._nursery.start_soon(self._refresh, self._running)
        with trio.move_on_after(MOST_WAIT_S):
            await self._running.wait()
            return
        # It goes on in the background; until it ends, operations answer from the old list.
        self._due = max(self._due, trio.current_time() + self._most_age_s)

    async def _refresh(self, done: trio.Event) -> None:
        age = self._most_age_s
        try:
            if await workers.request(self._read):
                self._changed()
        except BackupfsError as error:
            log.warning("the list of snapshots could not be read again: %s", error)
            age = max(age, _AGE_AFTER_FAILURE_S)
        except Exception:
            # The mount goes on with what it knows.
            log.exception("a fault in backupfs while the list of snapshots was read again, please report it")
            age = max(age, _AGE_AFTER_FAILURE_S)
        finally:
            self._running = None
            self._due = trio.current_time() + age
            done.set()

    def _read(self) -> bool:
        changed = self._listed.refresh()
        if changed:
            # What new snapshots need is then found without a second look.
            self._repository.load_indexes()
        return changed
