"""CRC-32C as Linux computes it for metadata: by the library's native code where it is installed, else in Python.

A `crc` is the register itself: begun with SEED, and inverted by nobody.
Source: RFC 3720, appendix B.4; slicing by eight, two bytes at a time.
"""

import importlib
import importlib.util
import struct
from array import array
from collections.abc import Callable
from functools import cache

SEED = 0xFFFFFFFF

_POLYNOMIAL = 0x82F63B78
_PAIRS = struct.Struct("<II")


def crc32c(crc: int, data: bytes) -> int:
    """Return the sum of what came before and some bytes."""
    return _function()(crc, data)


@cache
def _function() -> Callable[[int, bytes], int]:
    # It is loaded with the rest of the library, before a reader is confined.
    if importlib.util.find_spec("fs_explorer") is not None:
        kernel = importlib.import_module("fs_explorer.codecs.native").kernel("fsmeta")
        if kernel is not None:
            found: Callable[[int, bytes], int] = kernel.crc32c_raw
            return found
    return plain_crc32c


@cache
def _tables() -> "list[array[int]]":
    """Return the tables of single bytes first, then of pairs in eight bytes, the first pair first."""
    first = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
        first.append(crc)
    single = [first]
    for _ in range(7):
        single.append([crc >> 8 ^ first[crc & 0xFF] for crc in single[-1]])
    pairs = [
        array("I", (low[two & 0xFF] ^ high[two >> 8] for two in range(1 << 16)))
        for low, high in zip(single[7::-2], single[6::-2], strict=True)
    ]
    return [array("I", first), *pairs]


def plain_crc32c(crc: int, data: bytes) -> int:
    """Return the same, without the library."""
    single, one, two, three, four = _tables()
    whole = len(data) - len(data) % 8
    for low, high in _PAIRS.iter_unpack(data[:whole]):
        low ^= crc
        crc = one[low & 0xFFFF] ^ two[low >> 16] ^ three[high & 0xFFFF] ^ four[high >> 16]
    for byte in data[whole:]:
        crc = crc >> 8 ^ single[(crc ^ byte) & 0xFF]
    return crc
