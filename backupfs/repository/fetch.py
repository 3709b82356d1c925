"""Reading many chunks at once: which ranges of which packs hold them, and their stored bytes.

A `WantedChunk` carries whatever its user wants to remember with it. Damage in one place leads to another copy: plan
what failed again, and the places tried are left out. Threading: a wanted chunk belongs to one thread at a time.
"""

from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from backupfs.errors import DamagedObject, ObjectMissing
from backupfs.ids import ChunkId, short
from backupfs.repository.chunks import ChunkReader
from backupfs.repository.pack import PackRef

Use = TypeVar("Use")
# A pack, the offset of a block in it and its stored length; the chunk's offset and length in the block. Whatever of it
# was wrong in a garbled cache file, it is another place when the file was made again.
Place = tuple[PackRef, int, int, int, int]

# Reading what is between two blocks costs less than another request up to about here. Requests overlap, bytes do not:
# over 100 Mbit/s and 50 ms a restore was a tenth faster with this than with eight times as much.
MOST_GAP = 128 << 10
# Of a range, where what is between its blocks is not lost.
_DENSE = 0.5
# One request; several of them are under way at once, and their bytes are held in memory.
MOST_RANGE = 8 << 20


class WantedChunk(Generic[Use]):
    """A chunk that is wanted, for one use or more."""

    __slots__ = ("chunk_id", "failures", "is_second_try", "length", "offset", "tried", "uses")

    def __init__(self, chunk_id: ChunkId) -> None:
        self.chunk_id = chunk_id
        self.uses: list[Use] = []
        self.offset = self.length = 0  # in the block it is read from
        self.is_second_try = False  # of the same place
        self.tried: tuple[Place, ...] = ()
        self.failures: tuple[str, ...] = ()  # why the copies tried so far could not be read


class WantedBlock(Generic[Use]):
    """A block with the chunks that are wanted of it."""

    __slots__ = ("chunks", "offset", "pack", "stored_length")

    def __init__(self, pack: PackRef, offset: int, stored_length: int) -> None:
        self.pack = pack
        self.offset = offset
        self.stored_length = stored_length
        self.chunks: list[WantedChunk[Use]] = []


class PackRange(Generic[Use]):
    """Neighbouring blocks of a pack, for one request."""

    __slots__ = ("blocks", "length", "start")

    def __init__(self, block: WantedBlock[Use]) -> None:
        self.start = block.offset
        self.length = block.stored_length
        self.blocks = [block]

    @property
    def pack(self) -> PackRef:
        """The pack that all blocks are in."""
        return self.blocks[0].pack


def plan_ranges(
    reader: ChunkReader, wanted: Iterable[WantedChunk[Use]]
) -> tuple[list[PackRange[Use]], list[WantedChunk[Use]]]:
    """Return (what to request, in the order in which the packs were wanted first; chunks of which no copy is left).

    Where none is left of any, the index is mended first. Raises: StoreError.
    """
    blocks: dict[tuple[PackRef, int, int], WantedBlock[Use]] = {}
    packs: dict[PackRef, list[WantedBlock[Use]]] = {}
    lost: list[WantedChunk[Use]] = []
    wanted = list(wanted)
    for chunk, place in zip(wanted, _places_after_mending(reader, wanted), strict=True):
        if place is None:
            if not chunk.failures:
                chunk.failures = (f"the chunk {short(chunk.chunk_id)} is in no index",)
            lost.append(chunk)
            continue
        pack, offset, stored_length, chunk.offset, chunk.length = place
        block = blocks.get((pack, offset, stored_length))
        if block is None:
            block = blocks[pack, offset, stored_length] = WantedBlock(pack, offset, stored_length)
            packs.setdefault(pack, []).append(block)
        block.chunks.append(chunk)
    return [joined for of_pack in packs.values() for joined in _joined(of_pack, reader.keeps)], lost


def _places_after_mending(reader: ChunkReader, wanted: Sequence[WantedChunk[Use]]) -> list[Place | None]:
    places = _places(reader, wanted)
    if None not in places:
        return places
    for _ in reader.index.mend():
        without = [at for at, place in enumerate(places) if place is None]
        for at, place in zip(without, _places(reader, [wanted[at] for at in without]), strict=True):
            places[at] = place
        if None not in places:
            break
    return places


def _places(reader: ChunkReader, wanted: Sequence[WantedChunk[Use]]) -> list[Place | None]:
    """Return for each chunk a place that was not tried, if the index knows one."""
    fresh = {chunk.chunk_id for chunk in wanted if not chunk.tried}
    first: dict[ChunkId, Place] = {row[0]: row[1:] for row in reader.index.find_first(fresh)}
    return [_untried(reader, chunk) if chunk.tried else first.get(chunk.chunk_id) for chunk in wanted]


def _joined(blocks: list[WantedBlock[Use]], keeps: bool) -> list[PackRange[Use]]:
    """Return ranges of one pack that hold some blocks of it.

    keeps: what lies between them is kept; where most of a range is wanted, the rest will be.
    """
    ranges: list[PackRange[Use]] = []
    wanted = 0  # bytes of the last range
    for block in sorted(blocks, key=lambda block: block.offset):
        if ranges:
            current = ranges[-1]
            length = block.offset + block.stored_length - current.start
            gap = block.offset - current.start - current.length
            is_dense = keeps and wanted + block.stored_length >= length * _DENSE
            if length <= MOST_RANGE and (gap <= MOST_GAP or is_dense):
                current.length = max(current.length, length)
                current.blocks.append(block)
                wanted += block.stored_length
                continue
        ranges.append(PackRange(block))
        wanted = block.stored_length
    return ranges


def _untried(reader: ChunkReader, chunk: WantedChunk[Use]) -> Place | None:
    for location in reader.index.find(chunk.chunk_id):
        place = (
            location.pack, location.block_offset, location.block_stored, location.offset, location.length
        )  # fmt: skip
        if place not in chunk.tried:
            return place
    return None


def fetch_range(
    reader: ChunkReader, wanted: PackRange[Use]
) -> tuple[list[tuple[PackRange[Use], bytes]], list[WantedChunk[Use]]]:
    """Return (the range with its stored bytes; chunks that the pack lacks, each of which remembers why).

    A pack that was cut short may still give the blocks before its end: then each comes as a range of its own.
    Raises: StoreError if the store does not answer.
    """
    got: list[tuple[PackRange[Use], bytes]] = []
    lost: list[WantedChunk[Use]] = []
    missing: list[WantedBlock[Use]] = []
    for block in wanted.blocks:
        # What is tried again may have been garbled on its way.
        is_again = any(chunk.is_second_try for chunk in block.chunks)
        kept = None if is_again else reader.kept(block.pack, block.offset)
        if kept is not None and len(kept) == block.stored_length:
            got.append((PackRange(block), kept))
        else:
            missing.append(block)
    ranges = [wanted] if len(missing) == len(wanted.blocks) else _joined(missing, reader.keeps)
    for part in ranges:
        try:
            stored = reader.fetch(part.pack, part.start, part.length)
            got.append((part, stored))
            if reader.keeps:
                reader.keep_all(part.pack, part.start, stored)
        except (DamagedObject, ObjectMissing) as error:
            if len(part.blocks) > 1 and isinstance(error, DamagedObject):
                ranges += [PackRange(block) for block in part.blocks]
                continue
            for block in part.blocks:
                give_up(block, block.chunks, error)
                lost += block.chunks
    return got, lost


def give_up(block: WantedBlock[Use], chunks: Iterable[WantedChunk[Use]], error: Exception | str) -> None:
    """Note that chunks cannot be had from a block, so that the next plan takes another copy."""
    for chunk in chunks:
        chunk.tried += ((block.pack, block.offset, block.stored_length, chunk.offset, chunk.length),)
        chunk.failures += (str(error),)
