"""Content-defined cuts of large files; a small file is one chunk.

FastCDC (2020, normalised once) through pyfastcdc. The cuts of a stream depend on its bytes alone, not on how it was
read: a cut is final once `max_size` bytes from its start, or the end of the stream, have been seen.
Source: docs/format.rst, "Cutter", with test vectors; Xia et al., "The Design of Fast Content-Defined Chunking", 2020.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pyfastcdc import FastCDC

WINDOW_SIZE = 16 << 20


@dataclass(frozen=True, slots=True)
class CutSizes:
    """Bytes of the smallest, the average and the largest chunk; they are part of the repository's config."""

    min_size: int = 256 << 10
    avg_size: int = 1 << 20
    max_size: int = 4 << 20


def can_cut(min_size: int, avg_size: int, max_size: int) -> bool:
    """Tell whether the cutter takes these sizes."""
    in_bounds = 64 <= min_size <= 1 << 20 and 256 <= avg_size <= 4 << 20 and 1 << 10 <= max_size <= 16 << 20
    return in_bounds and min_size <= avg_size <= max_size


class Cutter:
    """Cuts streams into chunks. Not safe in threads: one per thread."""

    def __init__(self, sizes: CutSizes, seed: int) -> None:
        self.sizes = sizes
        self._fastcdc = FastCDC(
            avg_size=sizes.avg_size, min_size=sizes.min_size, max_size=sizes.max_size, normalized_chunking=1, seed=seed
        )
        self._window: bytearray | None = None

    def cut(self, read_into: Callable[[memoryview], int]) -> Iterator[memoryview]:
        """Yield the chunks of one stream, each valid until the next one is asked for.

        read_into: fills the buffer from its start and returns how many bytes it gave; 0 at the end.
        """
        if self._window is None:
            self._window = bytearray(max(WINDOW_SIZE, 4 * self.sizes.max_size))
        with memoryview(self._window) as window:
            filled, ended = 0, False
            while True:
                while not ended and filled < len(window):
                    count = read_into(window[filled:])
                    filled += count
                    ended = count == 0
                if filled == 0:
                    return
                start = 0
                for piece in self._fastcdc.cut_buf(window[:filled]):
                    if not ended and start + self.sizes.max_size > filled:
                        break
                    end = start + piece.length
                    yield window[start:end]
                    start = end
                window[: filled - start] = bytes(window[start:filled])
                filled -= start
                if ended and filled == 0:
                    return
