"""A store that keeps on this machine's disk what is read again and again, around one that is far away.

Two kinds of objects are kept, by the start of their keys: small ones whole, whose name is the BLAKE3 of their content,
and parts of large ones. Neither is ever rewritten in the store, so what is kept never goes stale. All of it may be
deleted at any time (kept_files.py).

NAME          content
NAME-PART     size of the whole object (8 bytes, little endian), content
"""

import threading
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from backupfs.errors import DamagedObject
from backupfs.stores.kept_files import KeptFiles
from backupfs.stores.passing import PassingStore
from backupfs.stores.store import Store, range_length

# A part of a large object: 0.1 s at 100 Mbit/s, as much as a request costs at 50 ms.
PART_SIZE = 1 << 20
# Who reads parts in order gets twice as many ahead each time, up to these.
_MOST_AHEAD = 4
_LENGTH_SIZE = 8
_LOCKS = 16


class CachingStore(PassingStore):
    """Passes everything on, and keeps what is read and put under some prefixes."""

    def __init__(
        self, inner: Store, folder: Path, whole: tuple[str, ...], in_parts: tuple[str, ...], limit: int
    ) -> None:
        """Take the parts; nothing is read or made yet.

        folder: of the cache; one for each repository.
        whole, in_parts: starts of keys of objects that are kept whole, or in parts.
        limit: bytes in the folder; what was not used longest goes first.
        """
        super().__init__(inner)
        self._files = KeptFiles(folder, limit)
        self._whole = whole
        self._in_parts = in_parts
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._sizes: dict[str, int] = {}  # of large objects
        self._ahead: dict[str, tuple[int, int]] = {}  # key → (the part after the last that was fetched, how many)

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """Store an object, and keep it: who wrote it will read it the next time."""
        self.inner.put(key, data, if_absent=if_absent)
        if key.startswith(self._whole):
            self._files.keep(_name(key), bytes(data))
        elif key.startswith(self._in_parts):
            view = memoryview(data)
            self._sizes[key] = len(view)
            for part in range(-(-len(view) // PART_SIZE)):
                self._keep_part(key, part, view[part * PART_SIZE : (part + 1) * PART_SIZE], len(view))

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return a range of an object, from this machine if it is there."""
        if key.startswith(self._whole):
            return self._get_whole(key, start, length)
        if key.startswith(self._in_parts) and length is not None:
            return self._get_parts(key, start, length)
        return self.inner.get(key, start=start, length=length)

    def delete(self, key: str) -> None:
        """Remove an object there and here."""
        self.inner.delete(key)
        self.forget(key)

    def note_size(self, key: str, size: int) -> None:
        """Take a caller's word for how large an object is."""
        if key.startswith(self._in_parts):
            self._sizes.setdefault(key, size)

    def forget(self, key: str) -> None:
        """Remove an object here, and what was said of its size: that may be what is wrong."""
        self._sizes.pop(key, None)
        self._ahead.pop(key, None)
        self._files.forget(_name(key), f"{_name(key)}-*")

    # Whole objects.

    def _get_whole(self, key: str, start: int, length: int | None) -> bytes:
        name = _name(key)
        content = self._files.read(name)
        if content is None or blake3(content).hexdigest() != name:
            content = self.inner.get(key)
            if blake3(content).hexdigest() == name:
                self._files.keep(name, content)
        wanted = range_length(key, len(content), start, length)
        return content[start : start + wanted]

    # Parts of large objects.

    def _get_parts(self, key: str, start: int, length: int) -> bytes:
        first, last = start // PART_SIZE, max(start, start + length - 1) // PART_SIZE
        with self._locks[hash(key) % _LOCKS]:
            parts: list[bytes] = []
            part = first
            while part <= last:
                content = self._kept_part(key, part)
                if content is not None:
                    parts.append(content)
                    part += 1
                    continue
                missing = part
                while part < last and self._kept_part(key, part + 1) is None:
                    part += 1
                fetched = self._fetch(key, missing, part)
                parts += fetched[: part - missing + 1]
                part += 1
        whole = b"".join(parts) if len(parts) > 1 else parts[0]
        at = start - first * PART_SIZE
        if len(whole) < at + length:
            size = self._size_of(key)
            range_length(key, size, start, length)
            raise DamagedObject(f"object {key} is cut short: bytes {start} to {start + length} are needed")
        return whole[at : at + length]

    def _fetch(self, key: str, first: int, last: int) -> Sequence[bytes]:
        """Return parts from the store, with some more for who reads on; keep all."""
        size = self._size_of(key)
        expected, before = self._ahead.get(key, (-1, 0))
        ahead = min(2 * before, _MOST_AHEAD) if expected == first and before else int(expected == first)
        end = min(size, (last + 1 + ahead) * PART_SIZE)
        start = first * PART_SIZE
        if end <= start:
            return [b""]
        content = self.inner.get(key, start=start, length=end - start)
        if len(content) != end - start:
            raise DamagedObject(f"object {key} is cut short: bytes {start} to {end} are needed")
        count = -(-len(content) // PART_SIZE)
        self._ahead[key] = (first + count, max(ahead, 1))
        parts = [content[at * PART_SIZE : (at + 1) * PART_SIZE] for at in range(count)]
        for number, part in enumerate(parts, first):
            self._keep_part(key, number, part, size)
        return parts

    def _size_of(self, key: str) -> int:
        size = self._sizes.get(key)
        if size is None:
            size = self._sizes[key] = self.inner.size(key)
        return size

    def _kept_part(self, key: str, part: int) -> bytes | None:
        content = self._files.read(f"{_name(key)}-{part}")
        if content is None or len(content) < _LENGTH_SIZE:
            return None
        size = int.from_bytes(content[:_LENGTH_SIZE], "little")
        if len(content) - _LENGTH_SIZE != min(PART_SIZE, size - part * PART_SIZE):
            return None
        self._sizes[key] = size
        return content[_LENGTH_SIZE:]

    def _keep_part(self, key: str, part: int, content: bytes | memoryview, size: int) -> None:
        self._files.keep(f"{_name(key)}-{part}", size.to_bytes(_LENGTH_SIZE, "little") + content)


def _name(key: str) -> str:
    return key.rpartition("/")[2]
