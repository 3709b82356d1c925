"""Memory in which one process fills blocks and another compresses them, without a copy on the way.

A slot holds one block. The numbers of free slots are bytes in a pipe that all processes share: who fills a block takes
one out, and waits while there is none; who is done with the block puts it back. So the number of slots bounds the
bytes in flight, whatever goes wrong in between.
Made before the processes are forked. Safe in threads and in processes.
"""

import mmap
import os


class Slots:
    """A fixed number of buffers of one size."""

    def __init__(self, count: int, size: int) -> None:
        """Make the memory; the kernel provides a page of it when it is first written to."""
        assert 0 < count <= 256
        self.size = size
        self._memory = memoryview(mmap.mmap(-1, count * size))
        self._free, self._freed = os.pipe2(os.O_CLOEXEC)
        os.write(self._freed, bytes(range(count)))

    def take(self) -> int:
        """Return the number of a free slot, when there is one."""
        return os.read(self._free, 1)[0]

    def give_back(self, number: int) -> None:
        """Make a slot free; nobody may look at it any more."""
        os.write(self._freed, bytes([number]))

    def view(self, number: int) -> memoryview:
        """Return the memory of a slot."""
        return self._memory[number * self.size : (number + 1) * self.size]

    def close(self) -> None:
        """Close the pipe in this process."""
        os.close(self._free)
        os.close(self._freed)
