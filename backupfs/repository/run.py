"""Runs: the local, plain, sorted form of index segments, read by position from disk and never whole.

A run file is written once under a temporary name and renamed; it can be deleted at any time, also while it is open.

    rows | samples (first 8 bytes of every 64th id, big-endian) | packs | sources | footer

A lookup bisects the samples, which are in memory (1.25 MB for 10 million chunks), and reads one window of rows. The
footer holds a hash of all before it, which is compared only when a lookup led astray: at 10 million chunks it would
cost each start a read of 520 MB.
Threading: immutable; lookups are safe in threads.
"""

import os
import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId, ObjectId
from backupfs.repository.pack import ROW, PackRef
from backupfs.repository.segment import PACK_ROW, Segment, decode_packs, encode_packs

_FOOTER = struct.Struct("<QQQ32s8s")  # bytes of rows, of packs, of sources; BLAKE3 of all before the footer; magic
_MAGIC = b"BKFSRUN2"
_SAMPLE_ROWS = 64
_WINDOW = _SAMPLE_ROWS * ROW.size
_HASH_STEP = 1 << 20


@dataclass(frozen=True, slots=True)
class Location:
    """Where one copy of a chunk lies."""

    pack: PackRef
    block_offset: int
    block_stored: int  # length of the sealed block in the pack
    offset: int  # of the chunk in the plain block
    length: int


class Run:
    """Sorted rows, in a file or in memory, with the packs that they name."""

    def __init__(
        self,
        read: Callable[[int, int], bytes],
        rows_size: int,
        samples: "array[int]",
        packs: tuple[PackRef, ...],
        sources: frozenset[ObjectId],
        path: Path | None = None,
        fd: int = -1,
    ) -> None:
        """Take the parts; use `run_in_memory` or `open_run`.

        read: (offset, length) → bytes of the rows. fd: of the file, open as long as `read` lives.
        sources: the segments (or packs, where no segment names them) whose rows are here.
        """
        self._read = read
        self._samples = samples
        self._absent: frozenset[int] = frozenset()
        self.rows_size = rows_size
        self.packs = packs
        self.sources = sources
        self.path = path
        self._fd = fd

    def without(self, pack_ids: Collection[ObjectId]) -> "Run":
        """Return this run as if the rows of some packs were not in it."""
        run = Run(self._read, self.rows_size, self._samples, self.packs, self.sources, self.path, self._fd)
        run._absent = self._absent.union(at for at, pack in enumerate(self.packs) if pack.pack_id in pack_ids)
        return run

    @property
    def lacks_packs(self) -> bool:
        """Tell whether rows are passed over; such a run stands for itself only and is merged with no other."""
        return bool(self._absent)

    @property
    def count(self) -> int:
        """The number of rows."""
        return self.rows_size // ROW.size

    def has(self, chunk_id: ChunkId) -> bool:
        """Tell whether the run has the chunk; about 2 µs."""
        return next(self._positions(chunk_id), None) is not None

    def find(self, chunk_id: ChunkId) -> Iterator[Location]:
        """Yield every copy of the chunk that the run knows."""
        for _, location in self.locate(chunk_id):
            yield location

    def locate(self, chunk_id: ChunkId) -> Iterator[tuple[int, Location]]:
        """Yield (number of its row, copy) for every copy of the chunk that the run knows."""
        for number, row in self._positions(chunk_id):
            _, pack, block_offset, stored, offset, length = ROW.unpack(row)
            # A row of a garbled cache file may name no pack at all: it leads nowhere, as if it were not there.
            if pack < len(self.packs):
                yield number, Location(self.packs[pack], block_offset, stored, offset, length)

    def _positions(self, chunk_id: ChunkId) -> Iterator[tuple[int, bytes]]:
        prefix = int.from_bytes(chunk_id[:8], "big")
        start = max(0, bisect_left(self._samples, prefix) - 1) * _WINDOW
        while start < self.rows_size:
            # Two windows: copies of one id may stand astride a sample.
            window = self._read(start, 2 * _WINDOW)
            at = window.find(chunk_id)
            while at >= 0:
                if at % ROW.size == 0 and not (self._absent and _pack_of(window, at) in self._absent):
                    yield (start + at) // ROW.size, window[at : at + ROW.size]
                at = window.find(chunk_id, at + 1)
            if len(window) < 2 * _WINDOW or window[-ROW.size : -ROW.size + 32] > chunk_id:
                return
            start += 2 * _WINDOW

    def find_first(self, chunk_ids: "list[ChunkId]") -> Iterator[tuple[ChunkId, int, int, int, int, int]]:
        """Yield (chunk id, pack's ordinal, block's offset, its stored length, offset, length) of one copy of each.

        chunk_ids: sorted; those that the run lacks are passed over. Several times faster than `find` for each.
        """
        samples, packs, rows_size = self._samples, len(self.packs), self.rows_size
        read, unpack, size = self._read, ROW.unpack_from, ROW.size
        window, window_start, at = b"", -1, 0
        for chunk_id in chunk_ids:
            start = max(0, bisect_left(samples, int.from_bytes(chunk_id[:8], "big")) - 1) * _WINDOW
            if start >= rows_size:
                return
            if start != window_start:
                window, window_start, at = read(start, 2 * _WINDOW), start, 0
            found = window.find(chunk_id, at)
            while found >= 0 and found % size:
                found = window.find(chunk_id, found + 1)
            # Rarely, more copies of one id than two windows hold stand before it.
            if found < 0:
                yield from self._first_of(chunk_id)
                continue
            at = found
            fields = unpack(window, found)
            # What names no pack is a row of a garbled file.
            if fields[1] in self._absent or fields[1] >= packs:
                yield from self._first_of(chunk_id)
            else:
                yield fields

    def _first_of(self, chunk_id: ChunkId) -> Iterator[tuple[ChunkId, int, int, int, int, int]]:
        for _, row in self._positions(chunk_id):
            fields = ROW.unpack(row)
            if fields[1] < len(self.packs):
                yield fields
                return

    def windows(self, rows: int) -> Iterator[bytes]:
        """Yield all rows in order, `rows` of them at a time."""
        for start in range(0, self.rows_size, rows * ROW.size):
            yield self._read(start, rows * ROW.size)

    def is_intact(self) -> bool:
        """Tell whether the run's file, if it has one, is what was written; it is read whole.

        That is the file which is open here: another process may have put a sound one in its place.
        """
        if self._fd < 0:
            return True
        try:
            digest, at, end = blake3(), 0, os.fstat(self._fd).st_size - _FOOTER.size
            while at < end and (data := os.pread(self._fd, min(end - at, _HASH_STEP), at)):
                digest.update(data)
                at += len(data)
            *_, expected, magic = _FOOTER.unpack(os.pread(self._fd, _FOOTER.size, max(0, end)))
            return bool(magic == _MAGIC and digest.digest() == expected)
        except (OSError, struct.error):
            return False


def _pack_of(window: bytes, at: int) -> int:
    return int.from_bytes(window[at + 32 : at + 36], "little")


def run_in_memory(segment: Segment, sources: frozenset[ObjectId]) -> Run:
    """Return a run whose rows stay in memory: for few rows, or where the cache folder cannot be written."""
    rows = segment.rows

    def read(offset: int, length: int) -> bytes:
        return rows[offset : offset + length]

    return Run(read, len(rows), _samples_of(rows), segment.packs, sources)


def _samples_of(rows: bytes) -> "array[int]":
    return array("Q", [int.from_bytes(rows[at : at + 8], "big") for at in range(0, len(rows), _WINDOW)])


def write_run(path: Path, windows: Iterator[bytes], packs: tuple[PackRef, ...], sources: frozenset[ObjectId]) -> None:
    """Write a run file from rows that come in order, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    samples = array("Q")
    digest = blake3()
    size = carried = 0
    try:
        with open(temporary, "xb") as file:
            for window in windows:
                first = (-carried) % _WINDOW
                samples.extend(int.from_bytes(window[at : at + 8], "big") for at in range(first, len(window), _WINDOW))
                file.write(window)
                digest.update(window)
                size += len(window)
                carried = size % _WINDOW
            packed, named = encode_packs(packs), b"".join(sorted(sources))
            for table in (samples.tobytes(), packed, named):
                file.write(table)
                digest.update(table)
            file.write(_FOOTER.pack(size, len(packed), len(named), digest.digest(), _MAGIC))
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_run(path: Path) -> Run:
    """Open a run file. The file may be deleted while it is open.

    Raises: DamagedObject if it is no run file or cut short; OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    closer = _FileCloser(fd)
    total = os.fstat(fd).st_size
    tail = os.pread(fd, _FOOTER.size, max(0, total - _FOOTER.size))
    what = f"the cache file {path}"
    if len(tail) != _FOOTER.size:
        raise DamagedObject(f"{what} is cut short")
    rows_size, packs_size, sources_size, _, magic = _FOOTER.unpack(tail)
    samples_size = total - _FOOTER.size - rows_size - packs_size - sources_size
    uneven = rows_size % ROW.size or sources_size % 32 or packs_size % PACK_ROW.size
    if magic != _MAGIC or uneven or samples_size != -(-rows_size // _WINDOW) * 8:
        raise DamagedObject(f"{what} is damaged")
    samples = array("Q")
    samples.frombytes(os.pread(fd, samples_size, rows_size))
    packs = decode_packs(os.pread(fd, packs_size, rows_size + samples_size), what)
    named = os.pread(fd, sources_size, rows_size + samples_size + packs_size)
    sources = frozenset(ObjectId(named[at : at + 32]) for at in range(0, sources_size, 32))

    def read(offset: int, length: int) -> bytes:
        return os.pread(closer.fd, min(length, rows_size - offset), offset)

    return Run(read, rows_size, samples, packs, sources, path, closer.fd)


class _FileCloser:
    """Closes a descriptor when the last reader is gone."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)
