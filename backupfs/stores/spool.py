"""Bytes that may be wanted once more, in a file without a name: it is gone with the process, whatever ends that."""

import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import IO


class Spool:
    """The newest of what it was given, up to a limit; has the interface of `KeptFiles`. Safe in threads."""

    def __init__(self, folder: Path | None, limit: int) -> None:
        """Take the parts; nothing is made before it is needed.

        folder: where the file goes, if it can be written.
        limit: bytes in the file.
        """
        self._folder = folder
        self._limit = limit
        self._file: IO[bytes] | None = None
        self._places: OrderedDict[str, tuple[int, int]] = OrderedDict()  # name → (offset, length), oldest first
        self._end = 0
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes | None:
        """Return the content that is kept under a name, or None."""
        with self._lock:
            place = self._places.get(name)
            if place is None or self._file is None:
                return None
            try:
                self._file.seek(place[0])
                content = self._file.read(place[1])
            except OSError:
                return None
            return content if len(content) == place[1] else None

    def keep(self, name: str, content: bytes | memoryview) -> None:
        """Keep content under a name, in place of the oldest where there is no room."""
        length = len(content)
        with self._lock:
            self._places.pop(name, None)
            if length > self._limit:
                return
            start = self._end if self._end + length <= self._limit else 0
            # Round and round: the oldest are the next in the way.
            while self._places and self._is_in_the_way(next(iter(self._places.values())), start, length):
                self._places.popitem(last=False)
            try:
                if self._file is None:
                    self._file = self._open()
                self._file.seek(start)
                if self._file.write(content) != length:
                    raise OSError("not all of it could be written")
            except OSError:
                self._limit = 0  # a full disk; then there is none
                self._places.clear()
                return
            self._places[name] = (start, length)
            self._end = start + length

    def _is_in_the_way(self, place: tuple[int, int], start: int, length: int) -> bool:
        # At the start of a new round everything behind the last end is older than what stands at the beginning.
        return (place[0] < start + length and start < place[0] + place[1]) or (start == 0 and place[0] >= self._end > 0)

    def _open(self) -> IO[bytes]:
        if self._folder is not None:
            try:
                return tempfile.TemporaryFile(dir=self._folder, buffering=0)
            except OSError:
                pass
        return tempfile.TemporaryFile(buffering=0)

    def close(self) -> None:
        """Drop everything."""
        with self._lock:
            self._places.clear()
            if self._file is not None:
                self._file.close()
            self._file = None
            self._limit = 0
