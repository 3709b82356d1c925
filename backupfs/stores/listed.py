"""A store that lists several prefixes at once, for those who will soon ask for one after the other."""

import threading
import time
from collections.abc import Iterator, Sequence

from backupfs.stores.passing import PassingStore
from backupfs.stores.store import ObjectInfo, Store
from backupfs.stores.together import each

# Who asks later than this wants to know what is there then.
_AGE_S = 10.0


class ListedStore(PassingStore):
    """Passes everything on, but answers one listing of each prefix from what was listed a moment ago."""

    def __init__(self, inner: Store) -> None:
        """Take the store inside."""
        super().__init__(inner)
        self._lock = threading.Lock()
        self._listed: dict[str, tuple[float, list[ObjectInfo]]] = {}

    def list_ahead(self, prefixes: Sequence[str]) -> None:
        """List all prefixes now. Raises: StoreError."""
        now = time.monotonic()
        found = each(self.inner, lambda prefix: list(self.inner.list(prefix)), prefixes)
        for prefix, infos in zip(prefixes, found, strict=True):
            self._listed[prefix] = (now, infos)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield objects."""
        with self._lock:
            moment, infos = self._listed.pop(prefix, (0.0, []))
        if moment and time.monotonic() < moment + _AGE_S:
            return iter(infos)
        return self.inner.list(prefix)
