"""A store that passes everything on to another: what wrappers begin with."""

from collections.abc import Iterator

from backupfs.stores.requests import RequestCounts
from backupfs.stores.store import ArchiveState, ObjectInfo, Store


class PassingStore(Store):
    """The store inside, under another name."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    @property
    def url(self) -> str:
        """Where the store inside is."""
        return self.inner.url

    @property
    def folder(self) -> str | None:
        """The folder of the store inside."""
        return self.inner.folder

    @property
    def is_far(self) -> bool:
        """As the store inside."""
        return self.inner.is_far

    @property
    def requests(self) -> RequestCounts:
        """What the store inside asked of a server."""
        return self.inner.requests

    def create(self) -> None:
        """Make the place."""
        self.inner.create()

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """Store an object."""
        self.inner.put(key, data, if_absent=if_absent)

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return a range of an object."""
        return self.inner.get(key, start=start, length=length)

    def size(self, key: str) -> int:
        """Return the length of an object."""
        return self.inner.size(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield objects."""
        return self.inner.list(prefix)

    def now(self) -> int:
        """Return the store's time."""
        return self.inner.now()

    def delete(self, key: str) -> None:
        """Remove an object."""
        self.inner.delete(key)

    def note_size(self, key: str, size: int) -> None:
        """Take a caller's word for how large an object is."""
        self.inner.note_size(key, size)

    def forget(self, key: str) -> None:
        """Drop what this machine keeps of an object."""
        self.inner.forget(key)

    def archive_state(self, key: str) -> ArchiveState:
        """Tell whether an object can be read now."""
        return self.inner.archive_state(key)

    def thaw(self, key: str, days: int, tier: str) -> None:
        """Have an archived object made readable."""
        self.inner.thaw(key, days, tier)

    def stop(self) -> None:
        """End soon what is under way."""
        self.inner.stop()

    def close(self) -> None:
        """Close the store inside."""
        self.inner.close()
