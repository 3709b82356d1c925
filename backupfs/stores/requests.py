"""Counting what a store costs in requests: providers charge for each, by kind."""

import fcntl
import mmap
import os
import struct
import threading
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any

# One call is one request, or two or three where a server sends on to another region.
_MOST_OF_A_CALL = 8
_COUNTS = struct.Struct("=6Q")  # as in RequestCounts


class TooManyRequests(Exception):
    """One call became more and more requests: boto3 follows redirections, also in circles."""

    def __init__(self, location: str) -> None:
        """Take where the server sends to; empty: it does not say."""
        super().__init__(location)
        self.location = location


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """Requests as they went over the network, tries that failed included, and bytes of objects."""

    put: int = 0
    get: int = 0  # heads, too: they cost the same
    list: int = 0
    delete: int = 0
    sent: int = 0  # bytes
    received: int = 0

    def __bool__(self) -> bool:
        return self != RequestCounts()

    def __add__(self, other: "RequestCounts") -> "RequestCounts":
        return RequestCounts(
            self.put + other.put, self.get + other.get, self.list + other.list, self.delete + other.delete,
            self.sent + other.sent, self.received + other.received,
        )  # fmt: skip


class Requests:
    """Counts of the process that made this and of all that are forked from it; safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._call = threading.local()
        self.was_answered = False  # by anything that speaks HTTP, ever
        # Shared memory, as many a forked process is killed when it is needed no more, and tells nothing of itself.
        self._fd = os.memfd_create("backupfs-requests", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, _COUNTS.size)
        self._memory = mmap.mmap(self._fd, _COUNTS.size)

    def __del__(self) -> None:
        with suppress(OSError):  # a confined process has closed all that it does not need
            os.close(self._fd)

    def begin_call(self) -> None:
        """Say that what this thread sends from here on belongs to another call."""
        self._call.count = 0
        self._call.status = 0
        self._call.location = ""

    def count(self, request: Any, **_: object) -> None:
        """Take a request that is about to be sent, as boto3 tells of it. Raises: TooManyRequests."""
        self._call.count = getattr(self._call, "count", 0) + 1
        if self._call.count > _MOST_OF_A_CALL:
            raise TooManyRequests(self._call.location)
        if request.method == "DELETE":
            self._add(RequestCounts(delete=1))
        elif request.method in ("PUT", "POST"):
            self._add(RequestCounts(put=1))
        elif "list-type=2" in request.url:
            self._add(RequestCounts(list=1))
        else:
            self._add(RequestCounts(get=1))

    def _add(self, more: RequestCounts) -> None:
        with self._lock:
            # Between processes, a lock that ends with whoever holds it.
            fcntl.lockf(self._fd, fcntl.LOCK_EX)
            try:
                _COUNTS.pack_into(self._memory, 0, *astuple(self._counts() + more))
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def _counts(self) -> RequestCounts:
        return RequestCounts(*_COUNTS.unpack_from(self._memory))

    def note_answer(self, response_dict: Any, **_: object) -> None:
        """Take an answer as it came, or None, before boto3 makes something else of it."""
        if response_dict is None:
            return
        self.was_answered = True
        self._call.status = response_dict["status_code"]
        if 300 <= self._call.status < 400:
            self._call.location = str(response_dict["headers"].get("location", ""))

    @property
    def last_status(self) -> int:
        """The HTTP status of the last answer to this thread's call; 0 if there was none."""
        return int(getattr(self._call, "status", 0))

    def add_sent(self, size: int) -> None:
        """Take bytes of an object that was put."""
        self._add(RequestCounts(sent=size))

    def add_received(self, size: int) -> None:
        """Take bytes of an object that came."""
        self._add(RequestCounts(received=size))

    @property
    def counts(self) -> RequestCounts:
        """What was counted so far."""
        with self._lock:
            return self._counts()
