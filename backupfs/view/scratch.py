"""A scratch copy of an image: its disks and volumes as files that can be written; the image never changes.

disks/NAME.raw, volumes/NAME.raw   as in the image; what is written to one shows in the others
changes/NAME.map                   for each disk what was written, as lines `start length data|same`

Operations are synchronous over what is in memory, as those of SnapshotView are, and raise `NotCached` for the rest.
Belongs to the trio thread.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from backupfs.codec.sectors import BLOCK as CIPHER_BLOCK
from backupfs.codec.sectors import decrypt, encrypt
from backupfs.snapshots.snapshot import Snapshot
from backupfs.snapshots.volumes import Place, places_of
from backupfs.view.content import FileReader
from backupfs.view.filesystem import NoSuchEntry
from backupfs.view.loading import Loader
from backupfs.view.overlay import BLOCK, Overlay

TOP = 1
DISKS, VOLUMES, CHANGES = b"disks", b"volumes", b"changes"


class ReadOnly(Exception):
    """What is to be written belongs to no disk, or cannot be changed."""


class ScratchAttributes(NamedTuple):
    """What a look at an entry gives."""

    inode: int
    is_directory: bool
    is_writable: bool
    size: int
    time_ns: int


@dataclass(frozen=True, slots=True)
class _Volume:
    number: int  # in the table of volumes


@dataclass(frozen=True, slots=True)
class _Changes:
    disk: int  # its number in the table of volumes


_Entry = _Volume | _Changes | dict[bytes, int]


class ScratchDisks:
    """The disks and volumes of an image, and what was written to them."""

    def __init__(
        self,
        snapshot: Snapshot,
        shown: Mapping[str, int],
        protected: Collection[int],
        loader: Loader,
        folder: str | None = None,
    ) -> None:
        """Take the parts.

        shown: the volumes that are files, their numbers by name. protected: those that cannot be written.
        folder: where what is written lies, in files without names; None: where temporary files do.
        """
        self._snapshot = snapshot
        self._protected = protected
        self._files = FileReader(loader)
        self._places_of = places_of(snapshot.volumes, loader.tree)
        self._overlays = {disk.volume: Overlay(folder) for disk in snapshot.disks}
        self._entries: dict[int, _Entry] = {}
        self._names: dict[int, bytes] = {}
        folders: dict[bytes, dict[bytes, _Entry]] = {DISKS: {}, VOLUMES: {}, CHANGES: {}}
        for disk in snapshot.disks:
            folders[DISKS][disk.name.encode() + b".raw"] = _Volume(disk.volume)
            folders[CHANGES][disk.name.encode() + b".map"] = _Changes(disk.volume)
        for name, number in shown.items():
            folders[VOLUMES][name.encode() + b".raw"] = _Volume(number)
        top: dict[bytes, int] = {}
        self._entries[TOP] = top
        for folder_name, entries in folders.items():
            inode = top[folder_name] = len(self._entries) + 1
            below: dict[bytes, int] = {}
            self._entries[inode], self._names[inode] = below, b"/" + folder_name
            for entry_name, entry in sorted(entries.items()):
                number = below[entry_name] = len(self._entries) + 1
                self._entries[number], self._names[number] = entry, b"/" + folder_name + b"/" + entry_name

    @property
    def is_changed(self) -> bool:
        """Tell whether anything was written."""
        return any(overlay.blocks for overlay in self._overlays.values())

    def _entry(self, inode: int) -> _Entry:
        try:
            return self._entries[inode]
        except KeyError:
            raise NoSuchEntry from None

    def lookup(self, parent: int, name: bytes) -> ScratchAttributes:
        """Return the attributes of a name. Raises: NoSuchEntry; NotADirectoryError."""
        try:
            return self.attributes(self._folder(parent)[name])
        except KeyError:
            raise NoSuchEntry from None

    def _folder(self, inode: int) -> dict[bytes, int]:
        entry = self._entry(inode)
        if not isinstance(entry, dict):
            raise NotADirectoryError
        return entry

    def attributes(self, inode: int) -> ScratchAttributes:
        """Return the attributes of an entry. Raises: NoSuchEntry."""
        entry = self._entry(inode)
        time_ns = self._snapshot.time_ns
        if isinstance(entry, dict):
            return ScratchAttributes(inode, True, False, 0, time_ns)
        if isinstance(entry, _Changes):
            return ScratchAttributes(inode, False, False, len(self._map_of(entry.disk)), time_ns)
        return ScratchAttributes(
            inode, False, entry.number not in self._protected, self._snapshot.volumes[entry.number].size, time_ns
        )

    def entries(self, inode: int, start: int) -> Iterator[tuple[bytes, ScratchAttributes, int]]:
        """Yield (name, attributes, where the next entry starts) of a directory. Raises: NoSuchEntry."""
        for position, (name, number) in enumerate(self._folder(inode).items()):
            if position >= start:
                yield name, self.attributes(number), position + 1

    def path_of(self, inode: int) -> bytes:
        """Return the path of an entry, for messages."""
        return self._names.get(inode, b"/")

    def read(self, inode: int, offset: int, length: int) -> bytes | memoryview:
        """Return bytes, fewer at the end. Raises: NoSuchEntry; IsADirectoryError; NotCached; DamagedObject."""
        entry = self._entry(inode)
        if isinstance(entry, dict):
            raise IsADirectoryError
        if isinstance(entry, _Changes):
            return self._map_of(entry.disk)[offset : offset + length]
        parts = [self._read(place) for place in self._places(entry.number, offset, length)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _places(self, number: int, offset: int, length: int) -> list[Place]:
        length = max(0, min(length, self._snapshot.volumes[number].size - offset))
        return list(self._places_of(number, offset, length)) if length else []

    def _read(self, place: Place) -> bytes | memoryview:
        if place.cipher is None:
            return self._stored(place.disk, place.offset, place.length)
        before, behind = place.position % CIPHER_BLOCK, -(place.position + place.length) % CIPHER_BLOCK
        sealed = self._stored(place.disk, place.offset - before, before + place.length + behind)
        return memoryview(decrypt(place.cipher, place.position - before, sealed))[before : before + place.length]

    def _stored(self, disk: int | None, offset: int, length: int) -> bytes | memoryview:
        """Return the bytes of a disk as they are there; zeros where they are nowhere."""
        if disk is None:
            return bytes(length)
        overlay = self._overlays[disk]
        runs = list(overlay.runs(offset, offset + length))
        parts = [
            overlay.read(low, high - low) if written else self._base(disk, low, high - low)
            for low, high, written in runs
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _base(self, disk: int, offset: int, length: int) -> bytes | memoryview:
        volume = self._snapshot.volumes[disk]
        return self._files.read(disk, volume.content, volume.size, offset, length, self._snapshot.volumes)

    def write(self, inode: int, offset: int, data: bytes) -> int:
        """Take bytes and return how many that were; what does not fit is left out.

        Raises: NoSuchEntry; ReadOnly; NotCached; DamagedObject; OSError.
        """
        entry = self._entry(inode)
        if not isinstance(entry, _Volume) or entry.number in self._protected:
            raise ReadOnly
        places = self._places(entry.number, offset, len(data))
        if any(place.disk is None for place in places):
            raise ReadOnly
        view = memoryview(data)
        # Who lacks a block begins again, and what was written by then is written once more.
        for place in places:
            assert place.disk is not None
            offset, stored = self._to_store(place, view[: place.length])
            there = Place(place.disk, offset, len(stored))
            self._overlays[place.disk].write(*self._in_blocks(there, memoryview(stored)))
            view = view[place.length :]
        return len(data) - len(view)

    def _to_store(self, place: Place, data: memoryview) -> tuple[int, bytes | memoryview]:
        """Return (offset on the disk, bytes as they are there) of what is written to a place."""
        disk, offset, length, cipher, position = place
        if cipher is None:
            return offset, data
        before, behind = position % CIPHER_BLOCK, -(position + length) % CIPHER_BLOCK
        head = self._read(Place(disk, offset - before, before, cipher, position - before)) if before else b""
        tail = self._read(Place(disk, offset + length, behind, cipher, position + length)) if behind else b""
        return offset - before, encrypt(cipher, position - before, b"".join((head, data, tail)))

    def _in_blocks(self, place: Place, data: memoryview) -> tuple[int, bytes | memoryview]:
        """Return (start, bytes) of the whole blocks that a write touches, with what is there around it."""
        assert place.disk is not None
        size = self._snapshot.volumes[place.disk].size
        low, high = place.offset, place.offset + place.length
        start, end = low - low % BLOCK, min(size, -(-high // BLOCK) * BLOCK)
        if (start, end) == (low, high):
            return start, data
        before = self._read(Place(place.disk, start, low - start)) if start < low else b""
        behind = self._read(Place(place.disk, high, end - high)) if high < end else b""
        return start, b"".join((before, data, behind))

    def _map_of(self, disk: int) -> bytes:
        """Return what was written to a disk as the map that `image --hints` takes."""
        size = self._snapshot.volumes[disk].size
        lines = [f"since {self._snapshot.snapshot_id.hex()}"]
        position = 0
        for start, end in _joined(self._overlays[disk].written()):
            if start > position:
                lines.append(f"{position} {start - position} same")
            lines.append(f"{start} {min(end, size) - start} data")
            position = min(end, size)
        if position < size:
            lines.append(f"{position} {size - position} same")
        return "\n".join(lines).encode() + b"\n"

    def close(self) -> None:
        """Forget all that was written."""
        for overlay in self._overlays.values():
            overlay.close()


def _joined(ranges: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield ranges with neighbours joined."""
    current: tuple[int, int] | None = None
    for start, end in ranges:
        if current is not None and current[1] == start:
            current = (current[0], end)
            continue
        if current is not None:
            yield current
        current = (start, end)
    if current is not None:
        yield current
