"""Index segments: immutable objects that say where chunks lie. Pure: records to bytes and back.

    segment = header | page unit … | directory unit | trailer

A page holds rows in the order of their ids, at most 64 KiB of them; the directory is a record
[packs, fan-out, superseded]: 88 bytes a pack (id, size, header), 36 bytes a page (first id, offset in the segment),
and the ids of the segments that this one replaces. A row's pack is an ordinal in `packs`.
Source: docs/format.rst, "Index".
"""

import struct
from dataclasses import dataclass
from itertools import pairwise

from backupfs.codec import compression
from backupfs.codec.keys import Keyring
from backupfs.codec.records import decode_record, encode_record
from backupfs.codec.sealing import (
    HEADER,
    TRAILER,
    Kind,
    OpenedHeader,
    UnitRole,
    make_unit,
    read_trailer,
    seal_object,
    unit_offsets,
)
from backupfs.errors import DamagedObject
from backupfs.ids import ObjectId
from backupfs.repository.pack import ROW, PackRef

PAGE_ROWS = (64 << 10) // ROW.size
PACK_ROW = struct.Struct("<32sQ48s")
_FAN_OUT_ROW = struct.Struct("<32sI")


@dataclass(frozen=True, slots=True)
class Segment:
    """One index segment, plain."""

    rows: bytes  # sorted
    packs: tuple[PackRef, ...]
    superseded: tuple[ObjectId, ...] = ()


def sort_rows(rows: bytes | bytearray) -> bytes:
    """Return the rows in order, each once."""
    data = bytes(rows)
    unique = {data[start : start + ROW.size] for start in range(0, len(data), ROW.size)}
    return b"".join(sorted(unique))


def renumber(rows: bytes, first: int) -> bytes:
    """Return rows whose ordinals of packs are moved up by `first`."""
    if first == 0:
        return rows
    moved = bytearray(rows)
    for at in range(32, len(rows), ROW.size):
        moved[at : at + 4] = (int.from_bytes(rows[at : at + 4], "little") + first).to_bytes(4, "little")
    return bytes(moved)


def encode_segment(kind: Kind, keyring: Keyring, segment: Segment) -> bytearray:
    """Return the bytes of a segment object."""
    step = PAGE_ROWS * ROW.size
    starts = range(0, len(segment.rows), step)
    pages = [
        make_unit(UnitRole.PAGE, segment.rows[start : start + step], compression.DEFAULT_LEVEL) for start in starts
    ]
    fan_out = b"".join(
        _FAN_OUT_ROW.pack(segment.rows[start : start + 32], offset)
        for start, offset in zip(starts, unit_offsets(pages), strict=True)
    )
    directory = encode_record([encode_packs(segment.packs), fan_out, list(segment.superseded)])
    unit = make_unit(UnitRole.DIRECTORY, directory, compression.DEFAULT_LEVEL)
    return seal_object(kind, keyring, pages, unit)


def decode_segment(data: bytes, kind: Kind, keyring: Keyring, what: str) -> Segment:
    """Return the content of a segment object. Raises: DamagedObject."""
    opened = OpenedHeader(data[: HEADER.size], kind, keyring, what)
    end, length = read_trailer(data[-TRAILER.size :], len(data), what)
    record = decode_record(opened.unseal(data[end : end + length], end, UnitRole.DIRECTORY), what)
    match record:
        case [bytes(packed), bytes(fan_out), list(superseded), *_]:
            packs = decode_packs(packed, what)
        case _:
            raise DamagedObject(f"{what} has a damaged directory")
    if len(fan_out) % _FAN_OUT_ROW.size:
        raise DamagedObject(f"{what} has a damaged directory")
    offsets = [offset for _, offset in _FAN_OUT_ROW.iter_unpack(fan_out)] + [end]
    view = memoryview(data)
    pages = [
        opened.unseal(view[start:stop], start, UnitRole.PAGE)
        for start, stop in pairwise(offsets)
        if HEADER.size <= start < stop <= end
    ]
    rows = b"".join(pages)
    if len(pages) != len(offsets) - 1 or len(rows) % ROW.size:
        raise DamagedObject(f"{what} has damaged pages")
    return Segment(rows, packs, tuple(ObjectId(item) for item in superseded if isinstance(item, bytes)))


def encode_packs(packs: tuple[PackRef, ...]) -> bytes:
    """Return the table of packs that rows refer to by ordinal."""
    return b"".join(PACK_ROW.pack(pack.pack_id, pack.size, pack.header) for pack in packs)


def decode_packs(packed: bytes, what: str) -> tuple[PackRef, ...]:
    """Return the packs of a table. Raises: DamagedObject."""
    if len(packed) % PACK_ROW.size:
        raise DamagedObject(f"{what} has a damaged table of packs")
    return tuple(PackRef(ObjectId(pack_id), size, header) for pack_id, size, header in PACK_ROW.iter_unpack(packed))
