"""LVM2: physical volumes, and the text that says what is made of them (logical.py).

What is read is hostile: everything is bounded and checked, and what cannot be true is left out, with the reason.
Source: lvm2, lib/format_text/layout.h, lib/label/label.h and lib/misc/crc.c; the text is that of vgcfgbackup(8).
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from backupfs.disks.filesystem import Read
from backupfs.disks.superblocks import form_of

_SECTOR = 512
_LABEL = struct.Struct("<8sQII8s")
_SUMMED_OF_LABEL = 20  # from there to its sector's end
_FIRST_SUM = 0xF597A6CF
_PV_HEADER = struct.Struct("<32sQ")
_LOCATION = struct.Struct("<QQ")
_AREA_HEADER = struct.Struct("<I16sIQQ")
_AREA_MAGIC = b" LVM2 x[5A%r0N*>"
_RAW_LOCATION = struct.Struct("<QQII")
_IGNORED = 1  # a flag of a location: what is there is old
_MOST_AREAS = 16
_MOST_TEXT = 16 << 20
_MOST_DEPTH = 16
_MOST_DIGITS = 20
_TOKEN = re.compile(r'\s+|#[^\n]*|"((?:[^"\\]|\\.)*)"|([A-Za-z0-9_.+-]+)|([=\[\]{},])')


class NotLvm(Exception):
    """The volume is no physical volume, or its metadata cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class PhysicalVolume:
    """What one physical volume says: its own id, and the volume group as it knows it."""

    uuid: str
    group: str = ""  # empty: it knows none, which another physical volume may
    group_id: str = ""
    sequence: int = -1
    metadata: dict[str, Any] = field(default_factory=dict)
    damage: str = ""  # why a copy of the metadata is not believed


def read_physical_volume(read: Read) -> PhysicalVolume | None:
    """Return what a volume says of itself; None if it is no physical volume. Raises: NotLvm."""
    start = read(0, 4 * _SECTOR)
    is_damaged = False
    for sector in range(4):
        block = start[sector * _SECTOR : (sector + 1) * _SECTOR]
        if block[:8] == b"LABELONE" and len(block) == _SECTOR:
            _, number, total, offset, kind = _LABEL.unpack_from(block)
            if number != sector or kind != b"LVM2 001":
                continue
            if _sum(block[_SUMMED_OF_LABEL:]) != total:
                is_damaged = True
            elif offset + _PV_HEADER.size <= _SECTOR:
                return _read_header(read, block, offset)
    # A label that is left of what was there before is nothing that was lost.
    if is_damaged and not form_of(read):
        raise NotLvm("it is a physical volume of LVM whose label has a wrong checksum")
    return None


def _read_header(read: Read, block: bytes, offset: int) -> PhysicalVolume:
    raw, _ = _PV_HEADER.unpack_from(block, offset)
    uuid = raw.decode("ascii", "replace")
    at = offset + _PV_HEADER.size
    lists: list[list[tuple[int, int]]] = []
    for _ in range(2):  # areas of data, then of metadata, each with an end of zeros
        found: list[tuple[int, int]] = []
        while at + _LOCATION.size <= _SECTOR and len(found) < _MOST_AREAS:
            start, size = _LOCATION.unpack_from(block, at)
            at += _LOCATION.size
            if (start, size) == (0, 0):
                break
            found.append((start, size))
        lists.append(found)
    newest, damage = PhysicalVolume(uuid), ""
    for place, size in lists[1]:
        try:
            text = _read_area(read, place, size)
            known = _known(uuid, text) if text is not None else newest
        except NotLvm as error:
            damage = damage or str(error)
        else:
            newest = max(newest, known, key=lambda one: one.sequence)
    return replace(newest, damage=damage)


def _known(uuid: str, text: str) -> PhysicalVolume:
    parsed = parse(text)
    group = next((name for name, value in parsed.items() if isinstance(value, dict)), "")
    metadata = parsed.get(group)
    if not isinstance(metadata, dict):
        raise NotLvm("the metadata of LVM has no volume group")
    sequence = metadata.get("seqno", 0)
    number = sequence if isinstance(sequence, int) else 0
    return PhysicalVolume(uuid, group, str(metadata.get("id", group)), number, metadata)


def _read_area(read: Read, place: int, size: int) -> str | None:
    """Return the text of a metadata area, which goes around at its end; None if it has none. Raises: NotLvm."""
    header = read(place, _SECTOR)
    if len(header) < _SECTOR or not _SECTOR < size <= 1 << 40:
        raise NotLvm("its area of metadata makes no sense")
    total_of_header, magic, _, start, total = _AREA_HEADER.unpack_from(header)
    if magic != _AREA_MAGIC or _sum(header[4:]) != total_of_header:
        raise NotLvm("the head of its metadata has a wrong checksum")
    offset, length, total_of_text, flags = _RAW_LOCATION.unpack_from(header, _AREA_HEADER.size)
    if not offset or not length or flags & _IGNORED:
        return None
    if start != place or total > size or not _SECTOR <= offset < total:
        raise NotLvm("its area of metadata makes no sense")
    if length > min(_MOST_TEXT, total - _SECTOR):
        raise NotLvm("its metadata is larger than is believed")
    first = min(length, total - offset)
    text = read(place + offset, first) + read(place + _SECTOR, length - first)
    if _sum(text) != total_of_text:
        raise NotLvm("its metadata has a wrong checksum")
    return text.decode("utf-8", "replace").rstrip("\0")


def _sum(data: bytes) -> int:
    """Return the sum that LVM makes: CRC-32 that begins elsewhere and is not inverted."""
    return zlib.crc32(data, _FIRST_SUM ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def parse(text: str) -> dict[str, Any]:
    """Return metadata as nested dictionaries of numbers, texts and lists. Raises: NotLvm."""
    return _section(_tokens(text), 0)


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise NotLvm(f"the metadata of LVM is garbled at character {at}")
        at = found.end()
        if found[1] is not None:
            yield "text", found[1].replace('\\"', '"').replace("\\\\", "\\")
        elif found[2] is not None:
            yield "word", found[2]
        elif found[3] is not None:
            yield "sign", found[3]


def _section(tokens: Iterator[tuple[str, str]], depth: int) -> dict[str, Any]:
    if depth > _MOST_DEPTH:
        raise NotLvm("the metadata of LVM is nested deeper than is believed")
    found: dict[str, Any] = {}
    for kind, name in tokens:
        if (kind, name) == ("sign", "}"):
            return found
        if kind != "word":
            raise NotLvm(f"the metadata of LVM has {name!r} where a name should be")
        match next(tokens, ("", "")):
            case ("sign", "{"):
                found[name] = _section(tokens, depth + 1)
            case ("sign", "="):
                found[name] = _value(tokens)
            case _:
                raise NotLvm("the metadata of LVM is garbled behind a name")
    return found


def _word(text: str) -> int | str:
    return int(text) if text.isdigit() and len(text) <= _MOST_DIGITS else text


def _value(tokens: Iterator[tuple[str, str]]) -> Any:
    kind, value = next(tokens, ("", ""))
    if kind == "text":
        return value
    if kind == "word":
        return _word(value)
    if (kind, value) != ("sign", "["):
        raise NotLvm("the metadata of LVM is garbled in a value")
    found: list[int | str] = []
    for kind, value in tokens:
        if (kind, value) == ("sign", "]"):
            return found
        if kind != "sign":
            found.append(_word(value) if kind == "word" else value)
    raise NotLvm("the metadata of LVM ends within a list")
