"""Packs: many sealed blocks, then a sealed directory of what is inside, so that an index can be rebuilt.

The directory is a record [writer's host id, rows]; its rows are those of the index, with 0 as the pack's ordinal.
Encoding is pure; reading takes a store. Safe in threads. Source: docs/format.rst, "Packs".
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from backupfs.codec import compression
from backupfs.codec.keys import Keyring
from backupfs.codec.records import decode_record, encode_record
from backupfs.codec.sealing import (
    HEADER,
    TRAILER,
    Kind,
    OpenedHeader,
    Unit,
    UnitRole,
    hash_object,
    make_unit,
    read_trailer,
    seal_object,
    unit_offsets,
)
from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId, ObjectId
from backupfs.stores.store import Store

# One row of a directory and of the index: chunk id, pack's ordinal, block's offset and stored length in the pack,
# chunk's offset and length in the plain block.
ROW = struct.Struct("<32s5I")

PACK_SIZE = 16 << 20  # one object put: about 1 s at 130 Mbit/s; 60 objects per GB
BLOCK_SIZE = 1 << 20  # one zstd window's worth at level 1; larger blocks gain nothing and cost random reads

_COMPRESS_DIRECTORY = compression.DEFAULT_LEVEL


@dataclass(frozen=True, slots=True)
class PackRef:
    """What a reader must know of a pack: its name, and the header that its key follows from."""

    pack_id: ObjectId
    size: int
    header: bytes


@dataclass(frozen=True, slots=True)
class Block:
    """A run of chunks, plain, as the writer collected them."""

    chunk_ids: tuple[ChunkId, ...]
    lengths: tuple[int, ...]  # of the chunks
    parts: tuple[bytes | memoryview, ...]  # what makes the block when joined: all its chunks, or each, or some of each

    @property
    def plain_length(self) -> int:
        """The bytes of all chunks."""
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class PackedBlock:
    """A block compressed, not yet sealed."""

    chunk_ids: tuple[ChunkId, ...]
    lengths: tuple[int, ...]
    unit: Unit


@dataclass(frozen=True, slots=True)
class EncodedPack:
    """A pack ready to be put."""

    ref: PackRef
    data: bytearray
    rows: bytes  # with 0 as the pack's ordinal, in the order of the blocks


def compress_block(block: Block, level: int) -> PackedBlock:
    """Compress a block, whose parts are needed no longer then; runs in a thread."""
    plain = block.parts[0] if len(block.parts) == 1 else b"".join(block.parts)
    unit = make_unit(UnitRole.BLOCK, plain, level)
    if isinstance(unit.body, memoryview):
        unit = replace(unit, body=bytes(unit.body))
    return PackedBlock(block.chunk_ids, block.lengths, unit)


def encode_pack(kind: Kind, keyring: Keyring, host_id: bytes, blocks: list[PackedBlock]) -> EncodedPack:
    """Seal blocks into one pack; runs in a thread."""
    rows = bytearray()
    for block, offset in zip(blocks, unit_offsets([block.unit for block in blocks]), strict=True):
        position = 0
        for chunk_id, length in zip(block.chunk_ids, block.lengths, strict=True):
            rows += ROW.pack(chunk_id, 0, offset, block.unit.stored_length, position, length)
            position += length
    directory = make_unit(UnitRole.DIRECTORY, encode_record([host_id, bytes(rows)]), _COMPRESS_DIRECTORY)
    data = seal_object(kind, keyring, [block.unit for block in blocks], directory)
    return EncodedPack(PackRef(hash_object(data), len(data), bytes(data[: HEADER.size])), data, bytes(rows))


@dataclass(frozen=True, slots=True)
class PackDirectory:
    """What a pack says of itself."""

    ref: PackRef
    host_id: bytes  # of its writer
    rows: bytes


def read_directory(store: Store, key: str, size: int, kind: Kind, keyring: Keyring) -> PackDirectory:
    """Return what a pack says of itself, from the pack alone: how an index is rebuilt.

    Raises: DamagedObject; StoreError.
    """
    what = f"the object {key}"
    pack_id = ObjectId(bytes.fromhex(key.rpartition("/")[2]))
    if size < HEADER.size + TRAILER.size:
        raise DamagedObject(f"{what} is cut short")
    header = store.get(key, start=0, length=HEADER.size)
    opened = OpenedHeader(header, kind, keyring, what)
    offset, length = read_trailer(store.get(key, start=size - TRAILER.size, length=TRAILER.size), size, what)
    plain = opened.unseal(store.get(key, start=offset, length=length), offset, UnitRole.DIRECTORY)
    return PackDirectory(PackRef(pack_id, size, header), *_fields_of_directory(plain, what))


def decode_directory(opened: OpenedHeader, data: bytes) -> bytes:
    """Return the rows that the directory of a whole pack holds. Raises: DamagedObject."""
    offset, length = read_trailer(data[-TRAILER.size :], len(data), opened.what)
    plain = opened.unseal(memoryview(data)[offset : offset + length], offset, UnitRole.DIRECTORY)
    return _fields_of_directory(plain, opened.what)[1]


def _fields_of_directory(plain: bytes, what: str) -> tuple[bytes, bytes]:
    match decode_record(plain, what):
        case [bytes(host_id), bytes(rows), *_] if len(rows) % ROW.size == 0:
            return host_id, rows
        case _:
            raise DamagedObject(f"{what} has a damaged directory")


@dataclass(frozen=True, slots=True)
class Span:
    """One block of a pack with the chunks that its directory says are inside."""

    offset: int
    stored_length: int
    chunks: tuple[tuple[ChunkId, int, int], ...]  # id, offset, length in the plain block


def blocks_of(rows: bytes) -> Iterator[Span]:
    """Yield the blocks that a pack's rows describe, in their order."""
    current: tuple[int, int] | None = None
    chunks: list[tuple[ChunkId, int, int]] = []
    for chunk_id, _, block_offset, stored, offset, length in ROW.iter_unpack(rows):
        if current != (block_offset, stored):
            if current is not None:
                yield Span(*current, tuple(chunks))
            current, chunks = (block_offset, stored), []
        chunks.append((ChunkId(chunk_id), offset, length))
    if current is not None:
        yield Span(*current, tuple(chunks))
