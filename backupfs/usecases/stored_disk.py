"""A volume of a stored image, read as the disk that it was: for readers of file systems, and under a copy to change.

Bytes come from the repository. A process that is to be confined can reach none; what it needs first, `descriptors`,
is a line to a process of its own that reads for it.
"""

import logging
import os
import socket
import struct
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator

from backupfs.disks.source import DiskSource
from backupfs.errors import BackupfsError, DamagedObject, SourceError, shown
from backupfs.forked import Forked, fork
from backupfs.ids import ChunkId, short
from backupfs.repository.repository import Repository
from backupfs.snapshots.content import CHUNK, HOLE, Piece
from backupfs.snapshots.snapshot import Snapshot
from backupfs.snapshots.volumes import DISK, extents_of

# What a volume is made of is looked up in windows: of a disk some 128 pieces, 20 KB; so many windows are kept.
_WINDOW = 4 << 20
_MOST_WINDOWS = 256

_REQUEST = struct.Struct("<QI")  # offset, length
_REPLY = struct.Struct("<BI")  # whether it is an error's text, length of what follows


class StoredDisk(DiskSource):
    """A volume of an image in a repository; a disk is one, too. Safe in threads until `descriptors` was called."""

    form = "stored"

    def __init__(self, repository: Repository, snapshot: Snapshot, number: int) -> None:
        """Take the parts; indexes must be loaded.

        number: of the volume in the snapshot's table.
        """
        volume = snapshot.volumes[number]
        folder = "disks" if volume.kind == DISK else "volumes"
        super().__init__(volume.name, f"{short(snapshot.snapshot_id)}:/{folder}/{volume.name}.raw".encode())
        self.size = volume.size
        self.content = volume.content  # of a disk
        self._number = number
        self._repository = repository
        self._extents = extents_of(snapshot.volumes, repository.trees.load)
        self._windows: OrderedDict[int, tuple[list[int], list[Piece]]] = OrderedDict()
        self._lock = threading.Lock()
        self._line: socket.socket | None = None
        self._server: Forked | None = None
        self._pid = 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer. Raises: DamagedObject; StoreError; SourceError where there is no such place."""
        if not 0 <= offset <= self.size - len(buffer):
            raise SourceError(f"{shown(self.path)} has no bytes at {offset + len(buffer):,}: it ends at {self.size:,}")
        if self._line is not None and self._pid == os.getpid():
            self._ask(self._line, buffer, offset)
            return
        at = 0
        for piece in self._pieces(offset, offset + len(buffer)):
            end = at + piece.length
            if piece.kind == HOLE:
                buffer[at:end] = bytes(piece.length)
            else:
                whole: bytes | memoryview = piece.source
                if piece.kind == CHUNK:
                    whole = self._repository.data.load(ChunkId(piece.source))
                buffer[at:end] = piece.plain(whole)
            at = end

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield what is in no hole. Raises: DamagedObject; StoreError."""
        at = low = start
        for piece in self._pieces(start, min(end, self.size)):
            if piece.kind == HOLE:
                if low < at:
                    yield low, at
                low = at + piece.length
            at += piece.length
        if low < at:
            yield low, at

    def descriptors(self) -> list[int]:
        """Start what reads for this process, and return its line. From then on only one thread may read."""
        if self._line is None or self._pid != os.getpid():
            self._line, other = socket.socketpair()
            self._server = fork(lambda _line: self._serve(other), str, [])
            other.close()
            self._pid = os.getpid()
        return [self._line.fileno()]

    def close(self) -> None:
        """End what reads for this process, if anything does."""
        if self._line is not None and self._server is not None and self._pid == os.getpid():
            self._line.close()
            self._server.wait()
            self._line = self._server = None

    def _pieces(self, start: int, end: int) -> Iterator[Piece]:
        """Yield the pieces of [start, end), clipped to it."""
        while start < end:
            starts, found = self._window(start // _WINDOW)
            position = bisect_right(starts, start) - 1
            while start < end and position < len(found):
                inner = start - starts[position]
                count = min(found[position].length - inner, end - start)
                yield found[position].cut(inner, count)
                start += count
                position += 1

    def _window(self, number: int) -> tuple[list[int], list[Piece]]:
        with self._lock:
            window = self._windows.get(number)
            if window is not None:
                self._windows.move_to_end(number)
                return window
        at, end = number * _WINDOW, min((number + 1) * _WINDOW, self.size)
        starts, found = [], []
        for piece in self._extents(self._number, at, end - at):
            starts.append(at)
            found.append(piece)
            at += piece.length
        if at != end:
            raise DamagedObject(f"{shown(self.path)} is damaged: its segments do not add up to its size")
        with self._lock:
            self._windows[number] = starts, found
            if len(self._windows) > _MOST_WINDOWS:
                self._windows.popitem(last=False)
        return starts, found

    def _ask(self, line: socket.socket, buffer: memoryview, offset: int) -> None:
        """Have the process at the other end of a line fill a buffer."""
        try:
            line.sendall(_REQUEST.pack(offset, len(buffer)))
            failed, length = _REPLY.unpack(_received(line, _REPLY.size))
            if failed:
                raise SourceError(bytes(_received(line, length)).decode("utf-8", "replace"))
            _fill(line, buffer)
        except (OSError, EOFError) as error:
            raise SourceError(f"{shown(self.path)} cannot be read: the process that reads it ended") from error

    def _serve(self, line: socket.socket) -> None:
        """Be the process that reads for another one, until that is gone."""
        # What goes wrong is answered; the log has no reader.
        logging.disable()
        if self._line is not None:
            self._line.close()  # a copy of the other end, which would keep it open
        while True:
            try:
                offset, length = _REQUEST.unpack(_received(line, _REQUEST.size))
            except (OSError, EOFError):
                return
            buffer = memoryview(bytearray(min(length, self.size)))
            try:
                self.read_into(buffer, offset)
                line.sendall(_REPLY.pack(0, len(buffer)))
                line.sendall(buffer)
            except BackupfsError as error:
                text = str(error).encode("utf-8", "replace")
                line.sendall(_REPLY.pack(1, len(text)) + text)


def _received(line: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    _fill(line, memoryview(data))
    return data


def _fill(line: socket.socket, buffer: memoryview) -> None:
    """Fill a buffer from a line. Raises: EOFError; OSError."""
    while buffer:
        count = line.recv_into(buffer)
        if not count:
            raise EOFError
        buffer = buffer[count:]
