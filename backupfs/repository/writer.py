"""Writing chunks: known? → block → compress → pack → put → index.

`ChunkSaver` is the thread-side half: it belongs to the one thread that makes chunks, keeps what that thread has
saved but no index names yet, and hands out full blocks. `PackWriter` is the half on the event loop: it compresses in
threads, fills packs and puts them. A pack is put before any segment names it; a segment every few dozen packs lets an
interrupted run be taken up again.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import trio

from backupfs import workers
from backupfs.codec.keys import Keyring
from backupfs.codec.sealing import Kind, hash_object
from backupfs.ids import ChunkId, ObjectId
from backupfs.repository import layout
from backupfs.repository.index import Index
from backupfs.repository.pack import (
    BLOCK_SIZE,
    PACK_SIZE,
    ROW,
    Block,
    EncodedPack,
    PackedBlock,
    PackRef,
    compress_block,
    encode_pack,
)
from backupfs.repository.segment import Segment, encode_segment, renumber, sort_rows
from backupfs.stores.store import Store

log = logging.getLogger(__name__)

# An interrupted run repeats at most this much: 32 packs are 512 MiB, 5 minutes are what a slow line may lose.
CHECKPOINT_PACKS = 32
CHECKPOINT_SECONDS = 300.0

# Each holds a pack twice, plain and sealed, while it is sealed.
MOST_PUTS = 2

_INDEX_KIND = {Kind.DATA_PACK: Kind.DATA_INDEX, Kind.TREE_PACK: Kind.TREE_INDEX}


@dataclass(frozen=True, slots=True)
class WriteSizes:
    """How large a writer makes things; its own choice, no part of the format."""

    block: int = BLOCK_SIZE
    pack: int = PACK_SIZE
    checkpoint_packs: int = CHECKPOINT_PACKS


DEFAULT_SIZES = WriteSizes()


@dataclass(slots=True)
class WriteTotals:
    """What one run has added to the repository, counted as it happens."""

    chunks: int = 0  # new ones
    plain_bytes: int = 0  # of new chunks
    stored_bytes: int = 0  # of packs and segments put
    packs: int = 0
    segments: int = 0


class ChunkSaver:
    """Collects new chunks of one kind into blocks. Belongs to one thread."""

    def __init__(self, index: Index, emit: Callable[[Block], None], block_size: int = BLOCK_SIZE) -> None:
        """Take the parts.

        emit: takes a full block; it may wait, which is what bounds the bytes in flight.
        """
        self._index = index
        self._emit = emit
        self._block_size = block_size
        self._unindexed: set[ChunkId] = set()
        self._retired: deque[bytes] = deque()  # rows that an index names now; filled by the event loop's thread
        self._ids: list[ChunkId] = []
        self._chunks: list[bytes] = []
        self._length = 0

    def save(self, chunk_id: ChunkId, data: bytes) -> bool:
        """Store a chunk unless the repository has it; return whether it was new."""
        if chunk_id in self._unindexed or self._index.has(chunk_id):
            return False
        if self._length and self._length + len(data) > self._block_size:
            self.flush()
        self._unindexed.add(chunk_id)
        self._ids.append(chunk_id)
        self._chunks.append(data)
        self._length += len(data)
        return True

    def flush(self) -> None:
        """Hand out what is collected."""
        if self._ids:
            block = Block(tuple(self._ids), tuple(self._chunks), self._length)
            self._ids, self._chunks, self._length = [], [], 0
            self._emit(block)
        while self._retired:
            rows = self._retired.popleft()
            self._unindexed.difference_update(rows[at : at + 32] for at in range(0, len(rows), ROW.size))

    def retire(self, rows: bytes) -> None:
        """Note, from any thread, that the index names these chunks now; it bounds memory."""
        self._retired.append(rows)


class PackWriter:
    """Turns blocks of one kind into packs and index segments. Belongs to the event loop."""

    def __init__(
        self,
        store: Store,
        keyring: Keyring,
        index: Index,
        kind: Kind,
        host_id: bytes,
        level: int,
        sizes: WriteSizes = DEFAULT_SIZES,
    ) -> None:
        self._store = store
        self._keyring = keyring
        self._index = index
        self._kind = kind
        self._host_id = host_id
        self._level = level
        self._sizes = sizes
        self._open: list[PackedBlock] = []
        self._open_length = 0
        self._unindexed: list[tuple[PackRef, bytes]] = []
        self._checkpoint_time: float | None = None
        self._checkpointing = trio.Lock()
        self._putting = trio.Semaphore(MOST_PUTS)
        self.totals = WriteTotals()
        self.on_indexed: Callable[[bytes], None] = lambda _rows: None

    async def add(self, block: Block) -> None:
        """Compress a block; when that fills a pack, put it. Several calls may run at once."""
        packed = await workers.cpu(compress_block, block, self._level)
        self.totals.chunks += len(block.chunk_ids)
        self.totals.plain_bytes += block.plain_length
        self._open.append(packed)
        self._open_length += packed.unit.stored_length
        if self._open_length >= self._sizes.pack:
            await self._put_open(self._sizes.pack)

    async def flush(self) -> None:
        """Put what is open and the segment that names it; nothing may be adding any more."""
        await self._put_open(1)
        await self._checkpoint()

    async def _put_open(self, least: int) -> None:
        """Put the open pack if it has at least that many bytes once there is room for a put."""
        async with self._putting:
            # Blocks stay in the open pack while all puts are busy: whoever adds waits here, which bounds memory.
            if self._open_length < least:
                return
            blocks, self._open, self._open_length = self._open, [], 0
            pack = await workers.cpu(encode_pack, self._kind, self._keyring, self._host_id, blocks)
            blocks.clear()
            await workers.io(self._put, layout.key_of(self._kind, pack.ref.pack_id), pack.data)
        self._count_pack(pack)
        now = trio.current_time()
        if self._checkpoint_time is None:
            self._checkpoint_time = now
        if len(self._unindexed) >= self._sizes.checkpoint_packs or now - self._checkpoint_time > CHECKPOINT_SECONDS:
            await self._checkpoint()

    def _put(self, key: str, data: bytearray) -> None:
        self._store.put(key, data)

    def _count_pack(self, pack: EncodedPack) -> None:
        self.totals.packs += 1
        self.totals.stored_bytes += pack.ref.size
        self._unindexed.append((pack.ref, pack.rows))

    async def _checkpoint(self) -> None:
        async with self._checkpointing:
            batch, self._unindexed = self._unindexed, []
            self._checkpoint_time = trio.current_time()
            if not batch:
                return
            kind = _INDEX_KIND[self._kind]
            segment, data, segment_id = await workers.cpu(_encode_batch, kind, self._keyring, batch)
            await workers.io(self._put, layout.key_of(kind, segment_id), data)
            self.totals.segments += 1
            self.totals.stored_bytes += len(data)
            await workers.io(self._index.add, segment, segment_id)
            self.on_indexed(segment.rows)


def _encode_batch(
    kind: Kind, keyring: Keyring, batch: list[tuple[PackRef, bytes]]
) -> tuple[Segment, bytearray, ObjectId]:
    rows = sort_rows(b"".join(renumber(own, ordinal) for ordinal, (_, own) in enumerate(batch)))
    segment = Segment(rows, tuple(ref for ref, _ in batch))
    data = encode_segment(kind, keyring, segment)
    return segment, data, hash_object(data)
