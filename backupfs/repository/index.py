"""The working index: which chunks the repository has and where, local, on disk, rebuildable.

It is a set of runs, one or more segments each. Segments that are new in the store are fetched when the index is
opened or refreshed; many small runs are merged into a larger one, so that a lookup asks few of them.
Threading: safe in threads. `find` and `has` take no lock: the tuple of runs is replaced and never changed.
"""

import logging
import os
import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backupfs.codec.keys import Keyring
from backupfs.codec.sealing import Kind
from backupfs.errors import DamagedObject, ObjectMissing, RepositoryError, StoreError, UnknownVersion
from backupfs.ids import ChunkId, ObjectId
from backupfs.repository import layout
from backupfs.repository.objects import load_object
from backupfs.repository.pack import ROW, PackRef, read_directory
from backupfs.repository.run import Location, Run, open_run, run_in_memory, write_run
from backupfs.repository.segment import Segment, decode_segment, renumber, sort_rows
from backupfs.stores.store import ObjectInfo, Store
from backupfs.stores.together import each

log = logging.getLogger(__name__)

# A lookup of a new chunk asks every run, at 2 µs each.
_MOST_RUNS = 8
# Runs are merged by ranges of ids; a range is about this many rows of all runs together (25 MB of Python objects).
_MERGE_ROWS = 1 << 17

_PACK_KIND = {Kind.DATA_INDEX: Kind.DATA_PACK, Kind.TREE_INDEX: Kind.TREE_PACK}


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the packs that an index names differ from those that are there."""

    absent: frozenset[ObjectId]  # named, and not in the listing, or not of their size
    unnamed: tuple[ObjectInfo, ...]  # there, and in no segment


class Index:
    """Chunk id → places, over all index segments of one kind."""

    def __init__(self, store: Store, kind: Kind, keyring: Keyring, cache: Path | None) -> None:
        """Take what is needed; call `refresh` before the first lookup.

        cache: a folder of this index's own, or None to keep everything in memory.
        """
        self._store = store
        self._kind = kind
        self._keyring = keyring
        self._cache = cache
        self._runs: tuple[Run, ...] = ()
        self._is_rebuilt = self._rebuilding_paid = self._is_proven = False
        self._changing = threading.Lock()
        self.damaged: dict[str, str] = {}  # keys of segments that did not open → what is wrong
        self.newer: set[str] = set()  # keys of those among them that a newer program can read
        self._missed: set[str] = set()  # keys of those among them that are listed and were not given

    @property
    def count(self) -> int:
        """The number of rows; a chunk stored twice counts twice."""
        return sum(run.count for run in self._runs)

    def has(self, chunk_id: ChunkId) -> bool:
        """Tell whether any segment names the chunk."""
        return any(run.has(chunk_id) for run in self._runs)

    def find(self, chunk_id: ChunkId) -> Iterator[Location]:
        """Yield every known copy of a chunk, newest runs first."""
        for run in reversed(self._runs):
            yield from run.find(chunk_id)

    def find_first(self, chunk_ids: Iterable[ChunkId]) -> Iterator[tuple[ChunkId, PackRef, int, int, int, int]]:
        """Yield (chunk id, pack, block's offset, its stored length, offset, length) of one copy of each known chunk."""
        left = sorted(set(chunk_ids))
        for run in reversed(self._runs):
            packs = run.packs
            found = set()
            for chunk_id, pack, block_offset, stored, offset, length in run.find_first(left):
                found.add(chunk_id)
                yield chunk_id, packs[pack], block_offset, stored, offset, length
            if found:
                left = [chunk_id for chunk_id in left if chunk_id not in found]

    def locate(self, chunk_id: ChunkId) -> Iterator[tuple[int, Location]]:
        """Yield (position, copy) for every known copy of a chunk.

        A position is below `count` and stands for one row as long as the index does not change.
        """
        first = 0
        for run in self._runs:
            for number, location in run.locate(chunk_id):
                yield first + number, location
            first += run.count

    def packs(self) -> dict[ObjectId, PackRef]:
        """Return every pack that the index names."""
        return {pack.pack_id: pack for run in self._runs for pack in run.packs}

    def windows(self, rows: int = _MERGE_ROWS) -> Iterator[tuple[Run, bytes]]:
        """Yield all rows, run by run, for those who must see everything."""
        for run in self._runs:
            for window in run.windows(rows):
                yield run, window

    def refresh(self) -> bool:
        """Take in the segments that are new in the store; return whether there were any.

        A segment that does not open is left out, logged, and named in `damaged`: its packs still say what is in them.
        One that is listed and not given is asked for again the next time.
        """
        with self._changing:
            return self._refresh()

    def _refresh(self) -> bool:
        is_new = self._take_new()
        if is_new:
            self._merge_small()
        return is_new

    def _take_new(self) -> bool:
        listed = {}
        for info in self._store.list(layout.prefix_of(self._kind)):
            segment_id = layout.id_in_key(info.key)
            if segment_id is not None:
                listed[ObjectId(segment_id)] = info.key
        if not self._runs:
            self._open_cached(listed)
        known = frozenset[ObjectId]().union(*(run.sources for run in self._runs))
        present = set(listed.values())
        self.damaged = {key: what for key, what in self.damaged.items() if key in present}
        fresh = []
        wanted = [
            (segment_id, key)
            for segment_id, key in listed.items()
            if segment_id not in known and (key not in self.damaged or key in self._missed)
        ]
        for (segment_id, _), segment in zip(wanted, each(self._store, self._load, wanted), strict=True):
            if segment is not None:
                fresh.append(self._keep(segment, frozenset([segment_id])))
        self._runs = (*self._runs, *fresh)
        return bool(fresh)

    def _load(self, segment: tuple[ObjectId, str]) -> Segment | None:
        _, key = segment
        self._missed.discard(key)
        try:
            found = decode_segment(load_object(self._store, key), self._kind, self._keyring, f"the object {key}")
            self.damaged.pop(key, None)
            return found
        except (RepositoryError, ObjectMissing) as error:
            if self.damaged.get(key) != str(error):
                log.warning("%s; the index goes on without it", error)
            self.damaged[key] = str(error)
            if isinstance(error, ObjectMissing):
                self._missed.add(key)
            if isinstance(error, UnknownVersion):
                self.newer.add(key)
            return None

    def add(self, segment: Segment, segment_id: ObjectId) -> None:
        """Take in a segment that this process has just put."""
        with self._changing:
            self._runs = (*self._runs, self._keep(segment, frozenset([segment_id])))
            self._merge_small()

    def mend(self) -> Iterator[bool]:
        """Do one after another what may help where a chunk is not found, or is not where it should be.

        Whoever cannot go on without the chunk looks for it again after each, until it is there. Yields whether the
        index may be another than before. Raises: StoreError.
        """
        # Another client may have repacked since the index was read.
        yield self.refresh()
        yield self.drop_garbled_runs()
        self.rebuild_from_packs()
        yield True  # another thread may have done any of it just now

    def is_garbled(self) -> bool:
        """Tell whether any cache file in use is not what was written.

        Each is read whole, until all were found sound: what is garbled later is met by the next process.
        """
        with self._changing:
            return bool(self._garbled_runs())

    def drop_garbled_runs(self) -> bool:
        """Make those cache files again that are not what was written; return whether there were any."""
        with self._changing:
            garbled = self._garbled_runs()
            self._make_again(garbled)
            self._is_proven = True
            return bool(garbled)

    def _garbled_runs(self) -> list[Run]:
        garbled = [] if self._is_proven else [run for run in self._runs if not run.is_intact()]
        self._is_proven = not garbled
        return garbled

    def _make_again(self, garbled: list[Run]) -> None:
        if not garbled:
            return
        for run in garbled:
            log.warning("the cache file %s is damaged; it is made again", run.path)
            _forget_file(run)
        if any(run.path is not None and run.path.exists() for run in garbled):
            self._cache = None  # it cannot be deleted; without it, everything is in memory
        self._runs = tuple(run for run in self._runs if run not in garbled)
        self._take_new()

    def rebuild_from_packs(self) -> bool:
        """Read the directories of packs that no segment names, once per process, when a chunk is missing.

        It makes a repository readable whose index was lost. Return whether chunks were found, now or before.
        """
        with self._changing:
            if self._is_rebuilt:
                return self._rebuilding_paid
            self._is_rebuilt = True
            kind = _PACK_KIND[self._kind]
            segment = self.segment_of(self.compare(self._store.list(layout.prefix_of(kind))).unnamed, _any_pack)
            if segment is not None:
                log.info("the index was incomplete: read the directories of %d packs", len(segment.packs))
                sources = frozenset(pack.pack_id for pack in segment.packs)
                self._runs = (*self._runs, run_in_memory(segment, sources))
                self._rebuilding_paid = True
            return self._rebuilding_paid

    def compare(self, listed: Iterable[ObjectInfo]) -> Comparison:
        """Compare the packs that segments name with a listing of them."""
        named = self.packs()
        unnamed: list[ObjectInfo] = []
        intact: set[ObjectId] = set()
        for info in listed:
            identity = layout.id_in_key(info.key)
            if identity is None:
                continue
            pack = named.get(ObjectId(identity))
            if pack is None:
                unnamed.append(info)
            elif pack.size == info.size:
                intact.add(pack.pack_id)
        return Comparison(frozenset(named.keys() - intact), tuple(unnamed))

    def still_absent(self, pack_ids: Collection[ObjectId]) -> frozenset[ObjectId]:
        """Return those of some packs that are not there in their size when each is asked for: a listing may be stale.

        What nobody can ask for counts as absent.
        """
        named = self.packs()
        asked = [named[pack_id] for pack_id in pack_ids]
        sizes = each(self._store, self._size_in_store, asked)
        return frozenset(pack.pack_id for pack, size in zip(asked, sizes, strict=True) if size != pack.size)

    def _size_in_store(self, pack: PackRef) -> int | None:
        try:
            return self._store.size(layout.key_of(_PACK_KIND[self._kind], pack.pack_id))
        except StoreError:
            return None

    def leave_out(self, pack_ids: Collection[ObjectId]) -> None:
        """Go on as if some packs were named by no segment, as long as this process lives."""
        with self._changing:
            self._runs = tuple(run.without(pack_ids) for run in self._runs)

    def segment_of(
        self, listed: Iterable[ObjectInfo], is_wanted: Callable[[ObjectInfo, bytes], bool]
    ) -> Segment | None:
        """Return what the directories of some packs say is in them; None for nothing. Raises: StoreError.

        is_wanted: (pack, id of the host that wrote it) → take it. One that cannot be read is left out, and logged.
        """
        rows = bytearray()
        packs: list[PackRef] = []
        for info in listed:
            try:
                found = read_directory(self._store, info.key, info.size, _PACK_KIND[self._kind], self._keyring)
            except (RepositoryError, ObjectMissing) as error:
                log.warning("%s; left out of the index", error)
                continue
            if is_wanted(info, found.host_id):
                rows += renumber(found.rows, len(packs))
                packs.append(found.ref)
        return Segment(sort_rows(rows), tuple(packs)) if packs else None

    def _open_cached(self, listed: dict[ObjectId, str]) -> None:
        if self._cache is None:
            return
        runs: list[Run] = []
        for path in self._cached_paths():
            try:
                run = open_run(path)
            except FileNotFoundError:
                continue
            except (DamagedObject, OSError) as error:
                what = f"the cache file {path}: {error.strerror}" if isinstance(error, OSError) else error
                log.warning("%s; it is made again", what)
                _forget_path(path)
                continue
            # Rows of a segment that is gone from the store may name packs that are gone.
            if run.sources <= listed.keys():
                runs.append(run)
            else:
                _forget_file(run)
        # A merged run and its parts may both be there when two processes met: the larger first, parts are dropped.
        runs.sort(key=lambda run: -len(run.sources))
        kept: list[Run] = []
        for run in runs:
            if any(run.sources <= other.sources for other in kept):
                _forget_file(run)
            else:
                kept.append(run)
        self._runs = tuple(kept)

    def _cached_paths(self) -> list[Path]:
        try:
            return sorted(self._cache.glob("*.run")) if self._cache is not None else []
        except OSError:
            return []

    def _keep(self, segment: Segment, sources: frozenset[ObjectId]) -> Run:
        run = run_in_memory(segment, sources)
        if self._cache is None:
            return run
        return self._written(iter([segment.rows]), segment.packs, sources) or run

    def _written(
        self, windows: Iterator[bytes], packs: tuple[PackRef, ...], sources: frozenset[ObjectId]
    ) -> Run | None:
        """Write a run file and open it; None where the cache folder cannot be used."""
        if self._cache is None:
            return None
        name = next(iter(sources)).hex() if len(sources) == 1 else f"merged-{os.urandom(8).hex()}"
        path = self._cache / f"{name}.run"
        try:
            write_run(path, windows, packs, sources)
            return open_run(path)
        except OSError as error:
            log.warning("the index cache %s cannot be written (%s); going on in memory", self._cache, error.strerror)
            self._cache = None  # once is enough
            return None

    def _merge_small(self) -> None:
        """Merge the smaller runs into one while there are too many."""
        if len(self._runs) <= _MOST_RUNS or any(run.lacks_packs for run in self._runs):
            return
        by_size = sorted(self._runs, key=lambda run: run.rows_size)
        # All runs up to the first that is larger than everything below it together: merging costs stay logarithmic.
        total, count = by_size[0].rows_size, 1
        while count < len(by_size) and (by_size[count].rows_size <= 2 * total or len(by_size) - count >= _MOST_RUNS):
            total += by_size[count].rows_size
            count += 1
        if count < 2:
            return
        parts = by_size[:count]
        # What is merged gets a hash of its own, and nobody would notice any more that it is garbled.
        garbled = [run for run in parts if not run.is_intact()]
        if garbled:
            self._make_again(garbled)
            return  # the next time
        packs = tuple(pack for run in parts for pack in run.packs)
        sources = frozenset[ObjectId]().union(*(run.sources for run in parts))
        merged = self._written(merged_windows(parts), packs, sources)
        if merged is None:
            rows = b"".join(merged_windows(parts))
            merged = run_in_memory(Segment(rows, packs), sources)
        self._runs = (*(run for run in self._runs if run not in parts), merged)
        for run in parts:
            _forget_file(run)


def _any_pack(_info: ObjectInfo, _host_id: bytes) -> bool:
    return True


def _forget_file(run: Run) -> None:
    if run.path is not None:
        _forget_path(run.path)


def _forget_path(path: Path) -> None:
    # A file that cannot be deleted costs room, no more: whoever opens it finds its parts named by another run.
    with suppress(OSError):
        path.unlink(missing_ok=True)


def merged_windows(runs: list[Run]) -> Iterator[bytes]:
    """Yield the rows of several runs in order, each once, with ordinals of packs counted over all of them.

    Memory: a few times `_MERGE_ROWS` rows, whatever the size of the runs.
    """
    total = sum(run.count for run in runs)
    parts = max(1, -(-total // _MERGE_ROWS))
    streams = []
    first = 0
    for run in runs:
        streams.append(_RowStream(run, first))
        first += len(run.packs)
    for part in range(1, parts + 1):
        # Ids are hashes, so equal ranges of their first 8 bytes hold about equally many rows.
        limit = (part * (1 << 64) // parts).to_bytes(9, "big")[1:] if part < parts else None
        rows = set[bytes]().union(*(stream.rows_below(limit) for stream in streams))
        if rows:
            yield b"".join(sorted(rows))


class _RowStream:
    """Gives the rows of one run range by range."""

    def __init__(self, run: Run, first_pack: int) -> None:
        self._windows = run.windows(8192)
        self._first_pack = first_pack
        self._rows: list[bytes] = []

    def rows_below(self, limit: bytes | None) -> list[bytes]:
        taken: list[bytes] = []
        while True:
            if not self._rows:
                window = next(self._windows, None)
                if window is None:
                    return taken
                window = renumber(window, self._first_pack)
                self._rows = [window[at : at + ROW.size] for at in range(0, len(window), ROW.size)]
            if limit is None or self._rows[-1] < limit:
                taken += self._rows
                self._rows = []
                continue
            count = bisect_left(self._rows, limit)
            taken += self._rows[:count]
            self._rows = self._rows[count:]
            return taken
