"""Not faster than so many bytes a second, all threads of a process together."""

import io
import threading
import time
from collections.abc import Callable

from backupfs.errors import StoreUnavailable

# A step is no longer than this, so that others get their turn and the line sees an even flow.
_STEP_S = 0.05
_LEAST_STEP = 4 << 10
_MOST_STEP = 256 << 10


class Pace:
    """Lets bytes pass at a rate."""

    def __init__(
        self,
        rate: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take the rate, in bytes a second; 0 is no bound."""
        self.rate = rate
        self.step = max(_LEAST_STEP, min(_MOST_STEP, int(rate * _STEP_S))) if rate else _MOST_STEP
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_at = 0.0
        self.stops = 0  # how often it was stopped

    def stop(self) -> None:
        """Let nothing pass any more of what has begun to."""
        with self._lock:
            self.stops += 1
            self._free_at = 0.0

    def pass_on(self, size: int, begun: int) -> None:
        """Return when so many bytes may have passed.

        begun: how often it had been stopped when the first of them passed.
        Raises: StoreUnavailable if it was stopped since then.
        """
        if begun != self.stops:
            raise StoreUnavailable("a transfer was stopped")
        if not self.rate:
            return
        with self._lock:
            now = self._clock()
            self._free_at = max(now, self._free_at) + size / self.rate
            wait_s = self._free_at - now
        self._sleep(wait_s)


class PacedBody(io.RawIOBase):
    """Bytes as a file that is read at a pace; a piece at a time is sent, and may take as long as one of them may."""

    def __init__(self, data: bytes | bytearray | memoryview, pace: Pace) -> None:
        super().__init__()
        self._data = memoryview(data).cast("B")
        self._pace = pace
        self._begun = pace.stops
        self._at = 0

    def __len__(self) -> int:
        return len(self._data)

    def close(self) -> None:
        """Let go of the bytes: their owner may change them again."""
        self._data.release()
        super().close()

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is: whoever sends it may ask for its length that way."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        self._at = max(0, min(len(self._data), base + offset))
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return bytes from the position on, when it is their time."""
        left = len(self._data) - self._at
        size = left if size < 0 else min(size, left)
        if not self._pace.rate:
            self._pace.pass_on(size, self._begun)
            self._at += size
            return bytes(self._data[self._at - size : self._at])
        parts = []
        while size:
            part = self._data[self._at : self._at + min(size, self._pace.step)]
            self._pace.pass_on(len(part), self._begun)
            self._at += len(part)
            size -= len(part)
            parts.append(part)
        return b"".join(parts)
