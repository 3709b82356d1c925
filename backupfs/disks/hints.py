"""What is said of a disk before it is read: parts that are zero, or the same as in an earlier image.

A map comes as one of
    lines `START LENGTH data|zero|same`, in bytes, and a line `since ID` that names the image which `same` means;
    what `qemu-img map --output=json` prints: what lies in a backing file (depth 1 or more) is the same as in the image
    that is named beside the map, if one is;
    what `thin_delta` prints of two snapshots of a thin volume, the first of them being what the image was made of.
What no part of a map names is read. Pure, but for the reading of a file.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from xml.etree import ElementTree as ET

from backupfs.disks.ranges import Ranges, whole_chunks, without
from backupfs.errors import UsageError, shown

_SECTOR = 512
_ID = re.compile(r"[0-9a-f]{8,64}")
_NUMBER = re.compile(r"[0-9]{1,19}")
_MOST_SIZE = 1 << 62


class Claim(IntEnum):
    """What is said of a part of a disk."""

    READ = 0  # nothing
    ZERO = 1
    SAME = 2  # as in the image that the hints name
    FREE = 3  # it holds nothing that anybody wants: it becomes zeros


Span = tuple[int, int, Claim]  # (start, end, what is said)

_WORDS = {"data": Claim.READ, "zero": Claim.ZERO, "same": Claim.SAME}


@dataclass(frozen=True, slots=True)
class Hints:
    """What is said of one disk."""

    spans: tuple[Span, ...] = ()  # in order, none overlapping, none READ
    since: str = ""  # id of the image, or its first digits, that SAME means
    is_trusted: bool = False  # whoever says so knows; else some of it is looked at, and all is read if that is wrong
    source: str = ""  # who says so, for messages

    def between(self, start: int, end: int) -> Iterator[Span]:
        """Yield what is said of each part of a range, in order, without a gap."""
        number = max(0, bisect_right(self.spans, start, key=lambda span: span[0]) - 1)
        while start < end:
            low, high, claim = self.spans[number] if number < len(self.spans) else (end, end, Claim.READ)
            number += 1
            if high <= start and low < end:
                continue
            if start < low:
                yield start, min(low, end), Claim.READ
                start = min(low, end)
            if start < end:
                yield start, min(high, end), claim
                start = min(high, end)

    def size_of(self, claim: Claim) -> int:
        """Return of how many bytes something is said."""
        return sum(end - start for start, end, said in self.spans if said == claim)

    def ranges_of(self, claim: Claim) -> Ranges:
        """Return of what something is said."""
        return [(start, end) for start, end, said in self.spans if said == claim]

    def without(self, claim: Claim) -> "Hints":
        """Return the same without one of the things that are said."""
        return replace(self, spans=tuple(span for span in self.spans if span[2] != claim))

    def in_chunks(self, chunk: int, size: int) -> "Hints":
        """Return what is said of whole chunks of a disk of some size."""
        spans: list[Span] = []
        for claim in (Claim.ZERO, Claim.SAME, Claim.FREE):
            spans += ((low, high, claim) for low, high in whole_chunks(self.ranges_of(claim), chunk, size))
        return replace(self, spans=tuple(sorted(spans)))

    def with_free(self, free: Ranges) -> "Hints":
        """Return the same, but for ranges of which nothing else counts than that they are free."""
        spans: list[Span] = [(start, end, Claim.FREE) for start, end in free]
        for claim in (Claim.ZERO, Claim.SAME):
            spans += ((start, end, claim) for start, end in without(self.ranges_of(claim), free))
        return replace(self, spans=tuple(sorted(spans)))


def read_hints(path: bytes, size: int, since: str = "") -> Hints:
    """Read the map of a disk.

    size: of the disk. since: the image that SAME means, where the user names it.
    Raises: UsageError, which says what is wrong and where.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UsageError(f"the map {shown(path)} cannot be read: {error.strerror}") from error
    return parse_hints(data, size, shown(path), since)


def parse_hints(data: bytes, size: int, name: str, since: str = "") -> Hints:
    """Return the hints in a map, whatever its form. Raises: UsageError."""
    start = data.lstrip()[:1]
    try:
        if start == b"[":
            hints = _parse_json(data, size, bool(since))
        elif start == b"<":
            hints = _parse_thin(data, size)
        else:
            hints = _parse_lines(data, size)
        hints = replace(hints, spans=tuple(_merged(hints.spans)), source=name)
    except _Malformed as error:
        raise UsageError(f"the map {name} cannot be used, {error}; no disk was read") from None
    for given in (hints.since, since):
        if given and _ID.fullmatch(given) is None:
            raise UsageError(
                f"{shown(given)} cannot be what a map of changes counts from: name the image by 8 digits or more of "
                "its id (`latest` may be another one than when the map was begun)"
            )
    if hints.since and since and not (hints.since.startswith(since) or since.startswith(hints.since)):
        raise UsageError(f"the map {name} says that it counts from the image {hints.since}, and not from {since}")
    hints = replace(hints, since=max(hints.since, since, key=len))
    if hints.size_of(Claim.SAME) and not hints.since:
        raise UsageError(
            f"the map {name} says what is the same, but not as in which image: begin it with a line `since ID`, or "
            "give --hints-since ID"
        )
    return hints


class _Malformed(Exception):
    """A map that is none; the message says where and why."""


def _span(where: str, start: object, length: object, claim: Claim, size: int, slack: int = 0) -> Span:
    """Return a checked span. slack: bytes by which it may go beyond the disk, which are cut off."""
    if type(start) is not int or type(length) is not int or start < 0 or length < 0 or start + length > _MOST_SIZE:
        raise _Malformed(f"{where}: start and length are no counts of bytes")
    if start + length >= size + max(slack, 1):
        raise _Malformed(f"{where}: it ends at byte {start + length:,}, the disk at {size:,}: it is of another disk")
    return start, max(start, min(start + length, size)), claim


def _parse_lines(data: bytes, size: int) -> Hints:
    spans: list[Span] = []
    since = ""
    try:
        lines = data.decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise _Malformed("it is neither lines of text nor of another known form") from None
    for number, line in enumerate(lines, 1):
        match line.partition("#")[0].split():
            case []:
                pass
            case ["since", name] if not since:
                since = name.lower()
            case [start, length, word] if _NUMBER.fullmatch(start) and _NUMBER.fullmatch(length) and word in _WORDS:
                spans.append(_span(f"line {number}", int(start), int(length), _WORDS[word], size))
            case _:
                raise _Malformed(f"line {number}: {shown(line[:80])} is not START LENGTH data|zero|same")
    return Hints(tuple(spans), since)


def _parse_json(data: bytes, size: int, has_since: bool) -> Hints:
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError):
        raise _Malformed("it looks like JSON and is none") from None
    spans: list[Span] = []
    for number, entry in enumerate(entries, 1):
        match entry:
            case {"start": start, "length": length, "depth": int(depth), "zero": bool(zero)}:
                # A depth of 0 is what was written since the backing file was closed.
                same = Claim.SAME if has_since and depth > 0 else Claim.READ
                # qemu counts whole sectors.
                spans.append(_span(f"entry {number}", start, length, Claim.ZERO if zero else same, size, _SECTOR))
            case _:
                raise _Malformed(f"entry {number}: it is not of `qemu-img map --output=json`")
    return Hints(tuple(spans))


def _parse_thin(data: bytes, size: int) -> Hints:
    try:
        top = ET.fromstring(data)
    except (ET.ParseError, ValueError):
        raise _Malformed("it looks like XML and is none") from None
    differences = top.find("diff")
    block = _attribute("superblock", top, "data_block_size") * _SECTOR
    if differences is None or not 0 < block <= _MOST_SIZE:
        raise _Malformed("it is XML, but not what `thin_delta` prints")
    spans: list[Span] = []
    for number, part in enumerate(differences, 1):
        # What only the first one has reads as zeros now, or from an external origin: it is read. So are the others.
        if part.tag != "same":
            continue
        for one in part.findall("range") or [part]:
            where = f"difference {number}"
            start, length = (_attribute(where, one, key) * block for key in ("begin", "length"))
            spans.append(_span(where, start, length, Claim.SAME, size, block))
    return Hints(tuple(spans))


def _attribute(where: str, element: ET.Element, key: str) -> int:
    text = element.get(key, "")
    if not _NUMBER.fullmatch(text):
        raise _Malformed(f"{where}: it has no number {key}")
    return int(text)


def _merged(spans: Iterable[Span]) -> Iterator[Span]:
    """Yield spans in order, those that go on with the same claim as one, without READ. Raises: _Malformed."""
    last: Span | None = None
    position = 0
    for start, end, claim in sorted(spans):
        if start == end:
            continue
        if start < position:
            raise _Malformed(f"it speaks of byte {start:,} twice")
        position = end
        if last is not None and last[1:] == (start, claim):
            last = (last[0], end, claim)
            continue
        if last is not None and last[2] != Claim.READ:
            yield last
        last = (start, end, claim)
    if last is not None and last[2] != Claim.READ:
        yield last
