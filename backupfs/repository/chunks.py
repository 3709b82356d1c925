"""Reading chunks: index → range of a pack → unseal → decompress → check the id; decoded blocks are kept.

Threading: everything is safe in threads; a lock covers the table of blocks and nothing slow.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol

from backupfs.codec.keys import Keyring, keyed_hash
from backupfs.codec.sealing import FRAME, FRAME_MAGIC, TRAILER, Kind, OpenedHeader, UnitRole
from backupfs.errors import DamagedObject, ObjectMissing, UnknownVersion, WrongPassword
from backupfs.ids import ChunkId, ObjectId, short
from backupfs.repository import layout
from backupfs.repository.index import Index
from backupfs.repository.pack import PackRef
from backupfs.repository.run import Location
from backupfs.stores.store import Store

log = logging.getLogger(__name__)

_MOST_OPENED_PACKS = 256
# A mounted disk asks several times for each chunk's place: when it is read ahead, fetched and given. About 1 MB.
_MOST_PLACES = 4096


class Kept(Protocol):
    """Where stored blocks are kept on this machine's disk."""

    def read(self, name: str) -> bytes | None:
        """Return what is kept under a name, or None."""

    def keep(self, name: str, content: bytes | memoryview) -> None:
        """Keep something under a name, if that can be."""


class _CachedBlock:
    __slots__ = ("chunk_ids", "plain", "stored_length")

    def __init__(self, plain: bytes, stored_length: int) -> None:
        self.plain = plain
        self.stored_length = stored_length
        self.chunk_ids: list[ChunkId] = []  # those whose hash was checked


class ChunkReader:
    """Gives the plain bytes of chunks of one kind, each checked against its id."""

    def __init__(self, store: Store, keyring: Keyring, index: Index, kind: Kind, cache_size: int) -> None:
        """Take the parts.

        kind: DATA_PACK or TREE_PACK.
        cache_size: bytes of decoded blocks that are kept.
        """
        self._store = store
        self._keyring = keyring
        self._kind = kind
        self._id_key = keyring.chunk_id_key(tree=kind == Kind.TREE_PACK)
        self._cache_size = cache_size
        self._cached_bytes = 0
        self._blocks: OrderedDict[tuple[ObjectId, int], _CachedBlock] = OrderedDict()
        self._chunks: dict[ChunkId, tuple[tuple[ObjectId, int], memoryview]] = {}
        self._opened: OrderedDict[tuple[ObjectId, bytes], OpenedHeader] = OrderedDict()
        self._places: dict[ChunkId, Location] = {}
        self._lock = threading.Lock()
        self._disk: Kept | None = None
        self.index = index

    @property
    def is_far(self) -> bool:
        """Tell whether blocks come over a network, which may garble one that is sound in the store."""
        return self._store.is_far

    def chunk_id(self, data: bytes | memoryview) -> ChunkId:
        """Return the name of a chunk."""
        return ChunkId(keyed_hash(self._id_key, data))

    def keep_at_most(self, size: int) -> None:
        """Set how many bytes of decoded blocks are kept."""
        self._cache_size = size

    def keep_on_disk(self, files: Kept) -> None:
        """Keep blocks on this machine's disk, too, as they are in the store: PACK-OFFSET."""
        self._disk = files

    def cached(self, chunk_id: ChunkId) -> memoryview | None:
        """Return a chunk if no store, codec or hash is needed for it."""
        found = self._chunks.get(chunk_id)
        return None if found is None else found[1]

    def resident(self, chunk_id: ChunkId) -> memoryview | None:
        """Return a chunk whose block is decoded: a look into the local index and a hash, no store, no codec."""
        found = self._chunks.get(chunk_id)
        if found is not None:
            return found[1]
        location = self.location(chunk_id)
        if location is None:
            return None
        place = (location.pack.pack_id, location.block_offset)
        with self._lock:
            block = self._blocks.get(place)
            if block is not None:
                self._blocks.move_to_end(place)
        if block is None:
            return None
        try:
            return self._chunk_in(chunk_id, location, block)
        except DamagedObject:
            return None  # `load` says it, or finds another copy

    def location(self, chunk_id: ChunkId) -> Location | None:
        """Return where the first known copy of a chunk lies, if the index knows one.

        It may be out of date for as long as the place is kept: `load` asks the index itself.
        """
        location = self._places.get(chunk_id)
        if location is None:
            location = next(self.index.find(chunk_id), None)
            if location is not None:
                self._note(chunk_id, location)
        return location

    def locations(self, chunk_ids: Sequence[ChunkId]) -> Iterator[tuple[ChunkId, Location]]:
        """Yield where a copy of each chunk lies that the index knows, as `location` does, at less cost for many."""
        unknown = [chunk_id for chunk_id in chunk_ids if chunk_id not in self._places]
        for chunk_id, pack, block_offset, stored, offset, length in self.index.find_first(unknown):
            self._note(chunk_id, Location(pack, block_offset, stored, offset, length))
        places = self._places
        for chunk_id in chunk_ids:
            location = places.get(chunk_id)
            if location is not None:
                yield chunk_id, location

    def _note(self, chunk_id: ChunkId, location: Location) -> None:
        if len(self._places) >= _MOST_PLACES:
            self._places = {}
        self._places[chunk_id] = location

    def is_decoded(self, location: Location) -> bool:
        """Tell whether the block of a place is in memory."""
        return (location.pack.pack_id, location.block_offset) in self._blocks

    def absent_after(self, location: Location, most: int) -> int | None:
        """Return the offset of the first of the `most` blocks behind this one that is not decoded, or None."""
        offset = location.block_offset + location.block_stored
        for _ in range(most):
            block = self._blocks.get((location.pack.pack_id, offset))
            if block is None:
                return offset if offset + FRAME.size + TRAILER.size < location.pack.size else None
            offset += block.stored_length
        return None

    def load_ahead(self, pack: PackRef, offset: int, length: int) -> None:
        """Decode the blocks that start at `offset` and end within `length` bytes, with one request; for a thread.

        Stops quietly where the pack's blocks end. Raises: DamagedObject; StoreError.
        """
        while length > 0 and (kept := self._kept_block(pack, offset)) is not None:
            self._keep((pack.pack_id, offset), _CachedBlock(*kept))
            offset, length = offset + kept[1], length - kept[1]
        length = min(length, pack.size - offset)
        if length <= 0:
            return
        stored = memoryview(self.fetch(pack, offset, length))
        done = 0
        while done + FRAME.size <= length:
            magic, role, _, _, _, sealed_length = FRAME.unpack_from(stored, done)
            end = done + FRAME.size + sealed_length
            if magic != FRAME_MAGIC or role != UnitRole.BLOCK or (end > length and done):
                return
            place = (pack.pack_id, offset + done)
            if place not in self._blocks:
                unit = stored[done:end] if end <= length else self.fetch(pack, offset, end)
                self._keep(place, _CachedBlock(self.open_block(pack, unit, offset + done), end - done))
                self.keep(pack, offset + done, unit)
            done = end

    def load(self, chunk_id: ChunkId) -> memoryview:
        """Return the plain bytes of a chunk; every copy that the index knows is tried.

        Raises: DamagedObject if no copy can be read; StoreError if the store does not answer.
        """
        found = self._chunks.get(chunk_id)
        if found is not None:
            place, chunk = found
            with self._lock:
                if place in self._blocks:
                    self._blocks.move_to_end(place)
            return chunk
        failures: list[str] = []
        known = self._try_known(chunk_id, failures)
        if known is not None:
            return known
        for is_other in self.index.mend():
            if is_other:
                self._places = {}
            if is_other or not failures:
                known = self._try_known(chunk_id, failures)
                if known is not None:
                    return known
        if not failures:
            kind = layout.prefix_of(self._kind).rstrip("/")
            failures.append(f"the chunk {short(chunk_id)} is in no index and in no pack of {kind}")
        raise DamagedObject("; ".join(dict.fromkeys(failures)))

    def _try_known(self, chunk_id: ChunkId, failures: list[str]) -> memoryview | None:
        for location in self.index.find(chunk_id):
            try:
                return self.load_at(chunk_id, location)
            except (DamagedObject, ObjectMissing) as error:
                log.error("%s", error)
                failures.append(str(error))
        return None

    def load_at(self, chunk_id: ChunkId, location: Location) -> memoryview:
        """Return the plain bytes of one copy of a chunk. Raises: DamagedObject; ObjectMissing; StoreError."""
        place = (location.pack.pack_id, location.block_offset)
        with self._lock:
            block = self._blocks.get(place)
            if block is not None:
                self._blocks.move_to_end(place)
        if block is None:
            plain = self.read_block(location.pack, location.block_offset, location.block_stored)
            block = _CachedBlock(plain, location.block_stored)
            self._keep(place, block)
        return self._chunk_in(chunk_id, location, block)

    def _chunk_in(self, chunk_id: ChunkId, location: Location, block: _CachedBlock) -> memoryview:
        place = (location.pack.pack_id, location.block_offset)
        chunk = memoryview(block.plain)[location.offset : location.offset + location.length]
        self.check(chunk_id, chunk, location.pack, location.block_offset)
        with self._lock:
            if self._blocks.get(place) is block:
                block.chunk_ids.append(chunk_id)
                self._chunks[chunk_id] = (place, chunk)
        return chunk

    def check(self, chunk_id: ChunkId, chunk: memoryview, pack: PackRef, block_offset: int) -> None:
        """Compare a chunk with its name. Raises: DamagedObject."""
        # Sealing does not stop another holder of the keys from filing wrong bytes; the id does.
        if keyed_hash(self._id_key, chunk) != chunk_id:
            key = layout.key_of(self._kind, pack.pack_id)
            raise DamagedObject(
                f"the object {key} at {block_offset} is damaged: a chunk in it is not {short(chunk_id)}"
            )

    def read_block(self, pack: PackRef, offset: int, stored_length: int) -> bytes:
        """Fetch and decode one block; nothing is kept, and no chunk id is checked.

        Raises: DamagedObject; ObjectMissing; StoreError.
        """
        kept = self._kept_block(pack, offset)
        if kept is not None:
            return kept[0]
        key = layout.key_of(self._kind, pack.pack_id)
        self._store.note_size(key, pack.size)
        try:
            stored = self._store.get(key, start=offset, length=stored_length)
            plain = self.open_block(pack, stored, offset)
        except (DamagedObject, ObjectMissing) as error:
            if not self.is_far:
                raise
            # It may have been garbled on its way, and be kept like that; or be missed once by a server that has it.
            log.warning("%s; it is fetched again", error)
            self._store.forget(key)
            stored = self._store.get(key, start=offset, length=stored_length)
            plain = self.open_block(pack, stored, offset)
        self.keep(pack, offset, stored)
        return plain

    def _kept_block(self, pack: PackRef, offset: int) -> tuple[bytes, int] | None:
        """Return (plain bytes, stored length) of a block that is kept on disk, or None."""
        stored = self.kept(pack, offset)
        if stored is None:
            return None
        try:
            return self.open_block(pack, stored, offset), len(stored)
        except DamagedObject as error:
            log.warning("%s, as it is kept in the cache; it is fetched again", error)
            return None

    def kept(self, pack: PackRef, offset: int) -> bytes | None:
        """Return the stored bytes of a block, if they are kept on disk."""
        return self._disk.read(_block_name(pack, offset)) if self._disk is not None else None

    @property
    def keeps(self) -> bool:
        """Tell whether stored blocks are kept on disk."""
        return self._disk is not None

    def keep_all(self, pack: PackRef, start: int, stored: bytes) -> None:
        """Keep the blocks in a range of a pack, which begins with a block, as far as they are whole."""
        view, at = memoryview(stored), 0
        while at + FRAME.size <= len(view):
            magic, role, _, _, _, sealed_length = FRAME.unpack_from(view, at)
            end = at + FRAME.size + sealed_length
            if magic != FRAME_MAGIC or role != UnitRole.BLOCK or end > len(view):
                return
            self.keep(pack, start + at, view[at:end])
            at = end

    def keep(self, pack: PackRef, offset: int, stored: bytes | memoryview) -> None:
        """Keep the stored bytes of a block on disk, where that is wanted."""
        if self._disk is not None:
            self._disk.keep(_block_name(pack, offset), stored)

    def open_block(self, pack: PackRef, stored: bytes | memoryview, offset: int) -> bytes:
        """Decode one block that was fetched already. Raises: DamagedObject."""
        return self._opener(pack).unseal(stored, offset, UnitRole.BLOCK)

    def fetch(self, pack: PackRef, start: int, length: int) -> bytes:
        """Return stored bytes of a pack, for those who read several blocks at once.

        Raises: StoreError; DamagedObject.
        """
        key = layout.key_of(self._kind, pack.pack_id)
        self._store.note_size(key, pack.size)
        return self._store.get(key, start=start, length=length)

    def _opener(self, pack: PackRef) -> OpenedHeader:
        # By the header, too: one of a garbled cache file is another one.
        key = pack.pack_id, pack.header
        opened = self._opened.get(key)
        if opened is None:
            what = f"the object {layout.key_of(self._kind, pack.pack_id)}"
            try:
                opened = OpenedHeader(pack.header, self._kind, self._keyring, what)
            except (UnknownVersion, WrongPassword) as error:
                if self.index.is_garbled():
                    raise DamagedObject(f"{what}, as it is known to a garbled cache file: {error}") from error
                raise
            with self._lock:
                self._opened[key] = opened
                while len(self._opened) > _MOST_OPENED_PACKS:
                    self._opened.popitem(last=False)
        return opened

    def _keep(self, place: tuple[ObjectId, int], block: _CachedBlock) -> None:
        with self._lock:
            if place in self._blocks:
                return
            self._blocks[place] = block
            self._cached_bytes += len(block.plain)
            while self._cached_bytes > self._cache_size and len(self._blocks) > 1:
                _, old = self._blocks.popitem(last=False)
                self._cached_bytes -= len(old.plain)
                for chunk_id in old.chunk_ids:
                    self._chunks.pop(chunk_id, None)


def _block_name(pack: PackRef, offset: int) -> str:
    return f"{pack.pack_id.hex()}-{offset}"
