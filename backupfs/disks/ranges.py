"""Sets of bytes of a disk as ranges (start, end), in order, none touching the next. Pure."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator

Ranges = list[tuple[int, int]]


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return the set of what is in any of some ranges, which may be in any order and overlap."""
    found: Ranges = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            if end > found[-1][1]:
                found[-1] = (found[-1][0], end)
        elif start < end:
            found.append((start, end))
    return found


def without(ranges: Iterable[tuple[int, int]], others: Ranges) -> Iterator[tuple[int, int]]:
    """Yield what is in the first set and not in the second, in order; both are in order."""
    at = 0
    for start, end in ranges:
        while at < len(others) and others[at][1] <= start:
            at += 1
        place = at
        while place < len(others) and others[place][0] < end:
            low, high = others[place]
            if start < low:
                yield start, low
            start = max(start, high)
            place += 1
        if start < end:
            yield start, end


def whole_chunks(ranges: Iterable[tuple[int, int]], chunk: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield what ranges have of whole chunks, counted from the start of a disk, whose last one may be shorter."""
    for start, end in ranges:
        low, high = -(-start // chunk) * chunk, end if end >= size else end - end % chunk
        if low < high:
            yield low, high


def overlapping(ranges: Ranges, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield those of some ranges that have bytes in common with one; found without a look at all."""
    number = max(0, bisect_right(ranges, (start, 1 << 63)) - 1)
    while number < len(ranges) and ranges[number][0] < end:
        if ranges[number][1] > start:
            yield ranges[number]
        number += 1
