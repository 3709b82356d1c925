"""What was written over bytes that never change, in a file without a name: it is gone with whoever holds it.

Belongs to one thread.
"""

import os
import tempfile
from collections.abc import Iterator

# What is noted as written: the smallest unit that file systems and pages have.
BLOCK = 4096
# Blocks are noted in groups, which take memory once something in them is written: 4 KiB for 16 MiB.
_GROUP = 4096


class Overlay:
    """The blocks of one disk that were written."""

    def __init__(self, folder: str | None = None) -> None:
        """Make the file. folder: where it lies; None: where temporary files do."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._groups: dict[int, bytearray] = {}
        self.blocks = 0  # that were written

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, end, whether it was written) of all blocks that a range touches, clipped to it, in order."""
        block, last = start // BLOCK, -(-end // BLOCK)
        while start < end:
            group, inside = divmod(block, _GROUP)
            marks = self._groups.get(group)
            limit = min(last - group * _GROUP, _GROUP)
            if marks is None:
                written, following = False, limit
            else:
                written = bool(marks[inside])
                found = marks.find(0 if written else 1, inside, limit)
                following = limit if found < 0 else found
            block = group * _GROUP + following
            yield start, min(end, block * BLOCK), written
            start = block * BLOCK

    def written(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of all that was written, in whole blocks, in order; neighbours may come apart."""
        for group in sorted(self._groups):
            first = group * _GROUP * BLOCK
            yield from ((low, high) for low, high, done in self.runs(first, first + _GROUP * BLOCK) if done)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes that were written."""
        return os.pread(self._file.fileno(), length, offset)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Take whole blocks; the last one of a disk may be short. Raises: OSError."""
        view = memoryview(data)
        done = 0
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done:], offset + done)
        for block in range(offset // BLOCK, -(-(offset + len(view)) // BLOCK)):
            group, inside = divmod(block, _GROUP)
            marks = self._groups.setdefault(group, bytearray(_GROUP))
            self.blocks += not marks[inside]
            marks[inside] = 1

    def close(self) -> None:
        """Forget everything."""
        self._file.close()
