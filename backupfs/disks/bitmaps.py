"""Bits that say what is in use, as file systems keep them. Pure."""

import re
from collections.abc import Iterator

_ZEROS = re.compile("0+")


def clear_runs(bitmap: bytes, count: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of each run of bits that are 0 among the first `count`, the lowest bit of a byte first."""
    count = min(count, len(bitmap) * 8)
    if not any(bitmap):
        if count:
            yield 0, count
        return
    digits = f"{int.from_bytes(bitmap, 'little'):0{len(bitmap) * 8}b}"[::-1]
    for run in _ZEROS.finditer(digits, 0, count):
        yield run.span()
