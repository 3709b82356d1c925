"""A store in the memory of this process: for tests, and as the simplest thing that keeps the contract."""

import threading
import time
from collections.abc import Callable, Iterator

from backupfs.errors import ObjectExists, ObjectMissing
from backupfs.stores.store import ObjectInfo, Store, range_length, validate_key


class MemoryStore(Store):
    """Objects in a dictionary, stamped by a clock that the caller may replace. One lock guards both."""

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, int]] = {}  # key → content, time of the put

    @property
    def url(self) -> str:
        """Where the store is, for messages."""
        return "memory:"

    def create(self) -> None:
        """There is nothing to make."""

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """Keep a copy of the data: the buffer is the caller's again on return."""
        validate_key(key)
        content = bytes(data)
        with self._lock:
            if if_absent and key in self._objects:
                raise ObjectExists(f"object {key} is in {self.url} already")
            self._objects[key] = (content, self._clock())

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return a range of an object."""
        content = self._content(key)
        end = start + range_length(key, len(content), start, length)
        return content[start:end]

    def size(self, key: str) -> int:
        """Return the number of bytes of an object."""
        return len(self._content(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects as they were at the call."""
        with self._lock:
            found = [
                ObjectInfo(key, len(content), modified_ns)
                for key, (content, modified_ns) in self._objects.items()
                if key.startswith(prefix)
            ]
        return iter(sorted(found, key=lambda info: info.key))

    def now(self) -> int:
        """Return the time of the clock given."""
        return self._clock()

    def delete(self, key: str) -> None:
        """Remove an object."""
        validate_key(key)
        with self._lock:
            self._objects.pop(key, None)

    def close(self) -> None:
        """There is nothing to give back: the objects live as long as the store."""

    def _content(self, key: str) -> bytes:
        validate_key(key)
        with self._lock:
            if key not in self._objects:
                raise ObjectMissing(f"object {key} is not in {self.url}")
            return self._objects[key][0]
