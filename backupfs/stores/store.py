"""The contract of a store: a holder of named byte objects, and nothing more.

Every store keeps it, and so does every store around a store; one contract suite checks them all. A store is plain
synchronous code and thread-safe: any thread may call any method at any time. There is no rename, there are no
folders, no metadata, no retry and no encryption here: what can be built on top is not part of the contract.
"""

import abc
import re
from collections.abc import Iterator
from dataclasses import dataclass

from backupfs.errors import DamagedObject, StoreError, shown
from backupfs.stores.requests import RequestCounts

# Room for a 64-digit name below a few folders; every file system and object store takes names of this length.
MAX_KEY_LENGTH = 200

_SEGMENT = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing tells of one object."""

    key: str
    size: int
    # Nanoseconds since 1970 by the store's clock, a moment between start and end of the put; some stores count in
    # seconds and round up.
    modified_ns: int


@dataclass(frozen=True, slots=True)
class ArchiveState:
    """Whether an object can be read now."""

    storage_class: str = ""  # as the store calls it; empty: the usual one
    is_archived: bool = False  # it must be thawed before it can be read
    is_thawing: bool = False  # that was asked for and is under way


class LastingListing(abc.ABC, Iterator[ObjectInfo]):
    """A listing that may be asked again after it raised StoreUnavailable, and then goes on where it was."""


class Store(abc.ABC):
    """Objects under keys; an object is there whole or not at all.

    Every method but `url` and `close` raises StoreUnavailable when the store fails in a way that trying again may
    mend, AccessDenied when it refuses, and StoreError for a key that `validate_key` does not pass.
    `a` and `a/b` are never both keys of one store: callers see to that, stores need not notice.
    """

    @property
    @abc.abstractmethod
    def url(self) -> str:
        """Where the store is, for messages; free of secrets, but pass it through `shown`."""

    @property
    def folder(self) -> str | None:
        """The folder of this machine that holds the objects, which a backup of this machine leaves out."""
        return None

    @property
    def is_far(self) -> bool:
        """Tell whether each call takes a network's time and costs a request."""
        return False

    @property
    def requests(self) -> RequestCounts:
        """What this process and those forked from it have asked of a server so far; all zero where there is none."""
        return RequestCounts()

    @abc.abstractmethod
    def create(self) -> None:
        """Make the place that will hold the objects; it is fine when it is there. Nothing else ever makes it."""

    @abc.abstractmethod
    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """Store an object, in place of any other under this key; durable on return.

        data: contiguous; read without a copy where the store can, so it must not change before the return. It
        belongs to the caller again afterwards, also when the put raised.
        After an error there is the old object, the new one or none under the key, never a part of one. Who reads while
        an object is replaced gets the old or the new one, or on some stores ObjectMissing for a moment.
        if_absent: refuse to replace. Two callers at once may both succeed on some stores, and a lost response may
        make a put meet its own object: nothing may rest on this being atomic.
        Raises: ObjectExists; StoreFull, after which nothing of the object takes up room.
        """

    @abc.abstractmethod
    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return `length` bytes of an object from byte `start` on, or all from there to its end.

        Raises: ObjectMissing; DamagedObject when the object ends before the range does, or its bytes cannot be read.
        """

    @abc.abstractmethod
    def size(self, key: str) -> int:
        """Return the number of bytes of an object. Raises: ObjectMissing."""

    @abc.abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose key starts with a text (any text, not only whole segments), sorted by key.

        Errors come while the iterator is read. Objects put or deleted meanwhile may be yielded or not.
        """

    @abc.abstractmethod
    def now(self) -> int:
        """Return the time of the store's clock, which stamps the objects: nanoseconds since 1970.

        It may cost a write: a store whose clock is another machine's puts a probe and reads its time.
        """

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object, durably; it is fine when there is none."""

    def note_size(self, key: str, size: int) -> None:
        """Take a caller's word for how large an object is, which saves asking."""
        del key, size

    def forget(self, key: str) -> None:
        """Drop what this machine keeps of an object: it is not what it should be."""
        del key

    def archive_state(self, key: str) -> ArchiveState:
        """Tell whether an object can be read now. Raises: ObjectMissing."""
        self.size(key)
        return ArchiveState()

    def thaw(self, key: str, days: int, tier: str) -> None:
        """Have an archived object made readable for some days; returns at once, the object follows in hours.

        tier: expedited, standard or bulk.
        Raises: StoreError where the store has no such thing.
        """
        del key, days, tier
        raise StoreError(f"nothing in {shown(self.url)} has to be thawed")

    def stop(self) -> None:  # noqa: B027 - most have nothing to stop
        """End soon what is under way, in all threads, as its errors; calls that begin later are tried once."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give back what the store holds open; no other call may follow, but closing again is fine."""


def is_key(text: str) -> bool:
    """Return whether a text can be the key of an object, by the rule of `validate_key`."""
    return len(text) <= MAX_KEY_LENGTH and _KEY.fullmatch(text) is not None


def validate_key(key: str) -> None:
    """Refuse what cannot be a key, on the way in; listings leave out such names by the same rule on the way out.

    A key is segments of the letters A-Z and a-z, digits, dot, underscore and hyphen, joined by single slashes. No
    segment is empty or starts with a dot, so that a key never leaves the store's folder nor meets a hidden file.
    Raises: StoreError.
    """
    if not is_key(key):
        raise StoreError(
            f"{shown(key) or 'an empty text'} cannot be the key of an object: keys are at most {MAX_KEY_LENGTH} "
            "letters, digits, '.', '_' and '-' in segments joined by '/', none starting with a dot"
        )


def range_length(key: str, size: int, start: int, length: int | None) -> int:
    """Return how many bytes a range means in an object of `size` bytes.

    Raises: DamagedObject when the object ends before the range does.
    """
    if start < 0 or (length is not None and length < 0):
        raise ValueError(f"a range has no negative start or length: {start}, {length}")
    end = max(start, size) if length is None else start + length
    if end > size:
        raise DamagedObject(f"object {shown(key)} is cut short: it has {size} bytes, bytes {start} to {end} are needed")
    return end - start
