"""Writing chunks: known? → block → compress → pack → put → index.

`ChunkSaver` is the half that makes blocks: it belongs to one scanning process, and leaves out what the index had when
that process began, and what it met itself of late. `NewChunks` then decides for all of them. `PackWriter` is the half
on the event loop: it compresses in threads, fills packs and puts them. A pack is put before any segment names it; a
segment every few dozen packs lets an interrupted run be taken up again.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

from backupfs import memory, workers
from backupfs.codec.keys import Keyring
from backupfs.codec.sealing import Kind, hash_object
from backupfs.ids import ID_SIZE, ChunkId
from backupfs.repository import layout
from backupfs.repository.index import Index
from backupfs.repository.pack import (
    BLOCK_SIZE,
    PACK_SIZE,
    ROW,
    Block,
    PackedBlock,
    PackRef,
    compress_block,
    encode_pack,
)
from backupfs.repository.segment import Segment, encode_segment, renumber, sort_rows
from backupfs.repository.slots import Slots
from backupfs.stores.store import Store

log = logging.getLogger(__name__)

# An interrupted run repeats at most this much: 32 packs are 512 MiB, 5 minutes are what a slow line may lose.
CHECKPOINT_PACKS = 32
CHECKPOINT_SECONDS = 300.0
# Each row waits with its id in a set, 250 bytes in all.
CHECKPOINT_ROWS = 1 << 19

# Ids of its own that a process remembers, some 30 MB: what comes again after that is sent once more and found out then.
_MOST_RECENT = 1 << 18

# Of a store that is far; each following one is twice as large, up to the usual size.
_FIRST_PACK_SIZE = 4 << 20

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


@dataclass(frozen=True, slots=True)
class FilledBlock:
    """A block on its way from the process that filled it."""

    kind: Kind
    chunk_ids: bytes  # 32 each
    lengths: tuple[int, ...]
    slot: int  # where the chunks are, one after the other
    data: bytes = b""  # or a chunk that is too large for a slot; then there is no slot


class ChunkSaver:
    """Collects chunks of one kind into blocks. Belongs to one thread of one process."""

    def __init__(
        self, kind: Kind, index: Index, slots: Slots, emit: Callable[[FilledBlock], None], block_size: int = BLOCK_SIZE
    ) -> None:
        """Take the parts.

        index: as it was when this process began; what other clients or processes add meanwhile it lacks.
        emit: takes a full block, and its slot with it.
        """
        self._kind = kind
        self._index = index
        self.distrusts: Callable[[], bool] = lambda: False  # tells when what the index knows is to be stored again
        self._slots = slots
        self._emit = emit
        self._block_size = min(block_size, slots.size)
        self._recent: set[ChunkId] = set()
        self._ids: list[ChunkId] = []
        self._lengths: list[int] = []
        self._filled = 0
        self._slot = -1
        self._view = memoryview(b"")

    def knows(self, chunk_id: ChunkId) -> bool:
        """Tell whether the chunk is stored, or on its way."""
        return chunk_id in self._recent or (self._index.has(chunk_id) and not self.distrusts())

    def room(self, length: int) -> memoryview:
        """Return the memory of the block's next chunk, to read it into; at most a slot."""
        if self._filled + length > self._block_size and self._filled:
            self.flush()
        if self._slot < 0:
            self._slot = self._slots.take()
            self._view = self._slots.view(self._slot)
        return self._view[self._filled : self._filled + length]

    def keep(self, chunk_id: ChunkId, length: int) -> None:
        """Take what stands at the start of the room as a chunk, unless it is known."""
        if not self.knows(chunk_id):
            self._add(chunk_id, length)
            self._filled += length

    def save(self, chunk_id: ChunkId, data: bytes | memoryview) -> None:
        """Store a chunk unless it is known."""
        if self.knows(chunk_id):
            return
        if len(data) > self._slots.size:
            self._emit(FilledBlock(self._kind, chunk_id, (len(data),), -1, bytes(data)))
            return
        self.room(len(data))[:] = data
        self._add(chunk_id, len(data))
        self._filled += len(data)

    def _add(self, chunk_id: ChunkId, length: int) -> None:
        if len(self._recent) >= _MOST_RECENT:
            self._recent.clear()
        self._recent.add(chunk_id)
        self._ids.append(chunk_id)
        self._lengths.append(length)

    def flush(self) -> None:
        """Hand out what is collected."""
        if self._ids:
            block = FilledBlock(self._kind, b"".join(self._ids), tuple(self._lengths), self._slot)
            self._ids, self._lengths, self._filled, self._slot = [], [], 0, -1
            self._emit(block)


class NewChunks:
    """Decides which chunks of a run are new, for all the processes that send some. Belongs to the event loop."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self.distrusts: Callable[[], bool] = lambda: False  # as in ChunkSaver
        self._unindexed: set[ChunkId] = set()
        self._has_retired = False

    def block_of(self, filled: FilledBlock, slots: Slots) -> Block | None:
        """Return the chunks that nobody has stored yet, from now on stored by whoever asks; None if there are none."""
        data = memoryview(filled.data) if filled.slot < 0 else slots.view(filled.slot)
        ids = [ChunkId(filled.chunk_ids[at : at + ID_SIZE]) for at in range(0, len(filled.chunk_ids), ID_SIZE)]
        unindexed = self._unindexed
        if unindexed.isdisjoint(ids) and not self._has_retired and len({*ids}) == len(ids):
            unindexed.update(ids)
            return Block(tuple(ids), filled.lengths, (data[: sum(filled.lengths)],))
        asks = self._has_retired and not self.distrusts()
        indexed = {row[0] for row in self._index.find_first(ids)} if asks else set()
        kept: list[tuple[ChunkId, int, memoryview]] = []
        offset = 0
        for chunk_id, length in zip(ids, filled.lengths, strict=True):
            if chunk_id not in unindexed and chunk_id not in indexed:
                unindexed.add(chunk_id)
                kept.append((chunk_id, length, data[offset : offset + length]))
            offset += length
        if not kept:
            return None
        chunk_ids, lengths, parts = zip(*kept, strict=True)
        return Block(chunk_ids, lengths, parts)

    def retire(self, rows: bytes) -> None:
        """Note that the index names these chunks now; it bounds memory."""
        self._has_retired = True
        self._unindexed.difference_update(ChunkId(rows[at : at + ID_SIZE]) for at in range(0, len(rows), ROW.size))


def _nothing() -> None:
    pass


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
        # A folder's files are waited for, as one that is half written would stay.
        self._thread = workers.request if store.is_far else workers.io
        self.totals = WriteTotals()
        self.on_indexed: Callable[[bytes], None] = lambda _rows: None

    async def add(self, block: Block, compressed: Callable[[], None] = _nothing) -> None:
        """Compress a block; when that fills a pack, put it. Several calls may run at once.

        compressed: called when the block's memory is not needed any more.
        """
        packed = await workers.cpu(compress_block, block, self._level)
        compressed()
        self.totals.chunks += len(block.chunk_ids)
        self.totals.plain_bytes += block.plain_length
        self._open.append(packed)
        self._open_length += packed.unit.stored_length
        if self._open_length >= self._pack_size():
            await self._put_open(self._pack_size())

    async def flush(self) -> None:
        """Put what is open and the segment that names it; nothing may be adding any more."""
        await self._put_open(1)
        await self.checkpoint()

    async def _put_open(self, least: int) -> None:
        """Put the open pack if it has at least that many bytes once there is room for a put."""
        async with self._putting:
            # Blocks stay in the open pack while all puts are busy: whoever adds waits here, which bounds memory.
            if self._open_length < least:
                return
            blocks, self._open, self._open_length = self._open, [], 0
            pack = await workers.cpu(encode_pack, self._kind, self._keyring, self._host_id, blocks)
            blocks.clear()
            await self._thread(self._put, layout.key_of(self._kind, pack.ref.pack_id), pack.data)
            self._count_pack(pack.ref, pack.rows)
            del pack
        # Measured over a first backup: without this a process grows to 240 MB, with it to 160, for 2 % of the CPU time.
        await workers.cpu(memory.return_freed_memory)
        now = trio.current_time()
        if self._checkpoint_time is None:
            self._checkpoint_time = now
        if (
            len(self._unindexed) >= self._sizes.checkpoint_packs
            or sum(len(rows) for _, rows in self._unindexed) >= CHECKPOINT_ROWS * ROW.size
            or now - self._checkpoint_time > CHECKPOINT_SECONDS
        ):
            await self.checkpoint()

    def _pack_size(self) -> int:
        # A line is not to lie idle while the first pack fills.
        return min(self._sizes.pack, _FIRST_PACK_SIZE << self.totals.packs) if self._store.is_far else self._sizes.pack

    def _put(self, key: str, data: bytearray) -> None:
        self._store.put(key, data)

    def _count_pack(self, ref: PackRef, rows: bytes) -> None:
        self.totals.packs += 1
        self.totals.stored_bytes += ref.size
        self._unindexed.append((ref, rows))

    async def checkpoint(self) -> None:
        """Put the segment that names what was put since the last one."""
        async with self._checkpointing:
            batch, self._unindexed = self._unindexed, []
            self._checkpoint_time = trio.current_time()
            if not batch:
                return
            try:
                segment = await workers.cpu(_segment_of, batch)
                await self._thread(self.name_packs, segment)
            except BaseException:
                self._unindexed = batch + self._unindexed
                raise
            self.on_indexed(segment.rows)

    def name_packs(self, segment: Segment) -> None:
        """Put an index segment, for packs that are put, and take it into the index. Raises: StoreError."""
        kind = _INDEX_KIND[self._kind]
        data = encode_segment(kind, self._keyring, segment)
        segment_id = hash_object(data)
        self._put(layout.key_of(kind, segment_id), data)
        self.totals.segments += 1
        self.totals.stored_bytes += len(data)
        self._index.add(segment, segment_id)


def _segment_of(batch: list[tuple[PackRef, bytes]]) -> Segment:
    rows = sort_rows(b"".join(renumber(own, ordinal) for ordinal, (_, own) in enumerate(batch)))
    return Segment(rows, tuple(ref for ref, _ in batch))
