"""Between operations that never wait and chunks that must be fetched.

An operation of the view is plain synchronous code over what is in memory; where a chunk is missing it raises
`NotCached` and is run again once the chunk is there. So what the caches can answer never leaves the event loop.
Everything here belongs to the trio thread; only fetching and decoding happen in others.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, TypeVarTuple

import trio

from backupfs import workers
from backupfs.errors import StoreError
from backupfs.ids import ChunkId, ObjectId
from backupfs.repository.chunks import ChunkReader
from backupfs.repository.pack import PackRef
from backupfs.repository.repository import Repository
from backupfs.repository.run import Location

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

# Stored bytes asked for at once when reading ahead: about three blocks, one request to a store that is far away.
AHEAD_SIZE = 1 << 20
_AHEAD_BLOCKS = 3
# How far sequential reads of a large file are read ahead, in bytes, and how many requests may be under way for it: of a
# store at hand, about three blocks; of one that is far, what a line of 400 Mbit/s brings in two times of 80 ms.
_FAR_AHEAD = {False: 3 << 20, True: 8 << 20}
_MOST_AHEAD = {False: 4, True: 10}


class NotCached(Exception):
    """An operation needs chunks that are not in memory: load them and run it again."""

    def __init__(self, reader: ChunkReader, chunk_ids: Sequence[ChunkId]) -> None:
        super().__init__()
        self.reader = reader
        self.chunk_ids = chunk_ids


@dataclass(frozen=True, slots=True, eq=False)
class _Loading:
    """A range of a pack that is being fetched."""

    pack_id: ObjectId
    start: int
    end: int
    done: trio.Event = field(default_factory=trio.Event)


def _untold(_error: StoreError) -> None:
    return


class Loader:
    """Gives chunks that are in memory, and loads those that are not: each block once, however many wait for it."""

    def __init__(
        self,
        repository: Repository,
        nursery: trio.Nursery | None = None,
        tell_unread: Callable[[StoreError], None] = _untold,
    ) -> None:
        """Take the parts.

        nursery: where reading ahead runs; without one nothing is read ahead.
        tell_unread: called where an operation fails as the store does not give something, which is no damage.
        """
        self._tell_unread = tell_unread
        self._trees = repository.trees
        self._data = repository.data
        self._nursery = nursery
        self.far_ahead = _FAR_AHEAD[repository.store.is_far]
        self._most_ahead = _MOST_AHEAD[repository.store.is_far]
        self._ahead = 0
        self._loading: list[_Loading] = []
        # What was loaded for the operation that runs now, so that evictions cannot make it start over for ever.
        self._pins: dict[ChunkId, memoryview] = {}

    def tree(self, chunk_id: ChunkId) -> memoryview:
        """Return a tree chunk. Raises: NotCached."""
        found = self._find(self._trees, chunk_id)
        if found is None:
            raise NotCached(self._trees, (chunk_id,))
        return found

    def data(self, chunk_id: ChunkId) -> memoryview:
        """Return a chunk of data. Raises: NotCached."""
        found = self._find(self._data, chunk_id)
        if found is None:
            raise NotCached(self._data, (chunk_id,))
        return found

    def all_data(self, chunk_ids: Sequence[ChunkId]) -> list[memoryview]:
        """Return several chunks of data. Raises: NotCached with all that are missing."""
        found, missing = [], []
        for chunk_id in chunk_ids:
            chunk = self._find(self._data, chunk_id)
            if chunk is None:
                missing.append(chunk_id)
            else:
                found.append(chunk)
        if missing:
            raise NotCached(self._data, missing)
        return found

    def _find(self, reader: ChunkReader, chunk_id: ChunkId) -> memoryview | None:
        found = reader.cached(chunk_id)
        if found is None:
            found = self._pins.get(chunk_id)
            if found is None:
                found = reader.resident(chunk_id)
        return found

    async def run(
        self, missing: NotCached, operation: Callable[[*Arguments], Result], *arguments: *Arguments
    ) -> Result:
        """Load what an operation missed and run it again, until it misses nothing.

        Raises: DamagedObject; StoreError; whatever the operation raises.
        """
        pins: dict[ChunkId, memoryview] = {}
        while True:
            try:
                await self._load(missing, pins)
            except StoreError as error:
                self._tell_unread(error)
                raise
            self._pins = pins
            try:
                return operation(*arguments)
            except NotCached as more:
                missing = more
            finally:
                self._pins = {}

    async def _load(self, missing: NotCached, pins: dict[ChunkId, memoryview]) -> None:
        groups: dict[tuple[ObjectId, int] | ChunkId, tuple[Location | None, list[ChunkId]]] = {}
        for chunk_id in missing.chunk_ids:
            location = missing.reader.location(chunk_id)
            key = chunk_id if location is None else (location.pack.pack_id, location.block_offset)
            groups.setdefault(key, (location, []))[1].append(chunk_id)
        if len(groups) == 1:
            [(location, chunk_ids)] = groups.values()
            await self._load_block(missing.reader, location, chunk_ids, pins)
            return
        errors: list[Exception] = []

        async def load(location: Location | None, chunk_ids: list[ChunkId]) -> None:
            try:
                await self._load_block(missing.reader, location, chunk_ids, pins)
            except Exception as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for location, chunk_ids in groups.values():
                nursery.start_soon(load, location, chunk_ids)
        if errors:
            raise errors[0]

    async def _load_block(
        self, reader: ChunkReader, location: Location | None, chunk_ids: list[ChunkId], pins: dict[ChunkId, memoryview]
    ) -> None:
        """Load chunks of one block into `pins`; who comes while another loads the block waits for that."""
        if location is not None:
            pack_id, start = location.pack.pack_id, location.block_offset
            waited = False
            while (loading := self._covering(pack_id, start)) is not None:
                await loading.done.wait()
                waited = True
            if waited:
                for chunk_id in chunk_ids:
                    found = reader.resident(chunk_id)
                    if found is not None:
                        pins[chunk_id] = found
            chunk_ids = [chunk_id for chunk_id in chunk_ids if chunk_id not in pins]
            if not chunk_ids:
                return
            loading = _Loading(pack_id, start, start + location.block_stored)
        else:
            loading = None
        if loading is not None:
            self._loading.append(loading)
        try:
            pins.update(await workers.request(_load_all, reader, chunk_ids))
        finally:
            if loading is not None:
                self._ended(loading)

    def _covering(self, pack_id: ObjectId, offset: int) -> _Loading | None:
        for loading in self._loading:
            if loading.start <= offset < loading.end and loading.pack_id == pack_id:
                return loading
        return None

    def _ended(self, loading: _Loading) -> None:
        self._loading.remove(loading)
        loading.done.set()

    def read_ahead(self, chunk_id: ChunkId) -> None:
        """See to it, in the background, that the blocks of data behind a chunk's block are decoded."""
        if self._nursery is None or self._ahead >= self._most_ahead:
            return
        location = self._data.location(chunk_id)
        if location is None:
            return
        offset = self._data.absent_after(location, _AHEAD_BLOCKS)
        if offset is not None and self._covering(location.pack.pack_id, offset) is None:
            self._start(location.pack, offset, AHEAD_SIZE)

    def prefetch(self, chunk_ids: Sequence[ChunkId]) -> None:
        """See to it, in the background, that chunks of data are decoded."""
        if self._nursery is None or self._ahead >= self._most_ahead:
            return
        for _, location in self._data.locations(chunk_ids):
            if self._ahead >= self._most_ahead:
                return
            if (
                not self._data.is_decoded(location)
                and self._covering(location.pack.pack_id, location.block_offset) is None
            ):
                self._start(location.pack, location.block_offset, location.block_stored)

    def _start(self, pack: PackRef, offset: int, length: int) -> None:
        assert self._nursery is not None
        loading = _Loading(pack.pack_id, offset, offset + length)
        self._loading.append(loading)
        self._ahead += 1
        self._nursery.start_soon(self._load_ahead, pack, loading)

    async def _load_ahead(self, pack: PackRef, loading: _Loading) -> None:
        try:
            await workers.request(self._data.load_ahead, pack, loading.start, loading.end - loading.start)
        except Exception as error:
            # Whoever really needs the bytes tries again, and tells.
            log.debug("reading ahead: %s", error)
        finally:
            self._ahead -= 1
            self._ended(loading)


def _load_all(reader: ChunkReader, chunk_ids: list[ChunkId]) -> dict[ChunkId, memoryview]:
    return {chunk_id: reader.load(chunk_id) for chunk_id in chunk_ids}
