"""The free space of btrfs on one device: what no extent, no superblock and not the first MiB takes.

Extents have logical addresses; chunks say where those are on the device, twice where a chunk has a copy.
Source: btrfs-progs' kernel-shared/uapi/btrfs_tree.h; the wiki's "On-disk Format".
"""

import struct
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from backupfs.disks.btrfs_sums import sums_of
from backupfs.disks.filesystem import Read, Unreadable
from backupfs.disks.ranges import joined, without

_SUPERBLOCKS = (64 << 10, 64 << 20, 256 << 30)
_KEPT_OF_SUPERBLOCK = 64 << 10
_RESERVED = 1 << 20
_MAGIC = b"_BHRfS_M"
# mixed backrefs, default subvolume, mixed groups, lzo, zstd, big metadata, extended irefs, skinny metadata, no holes,
# metadata uuid.
_INCOMPAT_KNOWN = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x200 | 0x400
_PROFILES, _DUP = 0x7F8, 0x20
_EXTENT_TREE = 2
_ROOT_ITEM, _EXTENT_ITEM, _METADATA_ITEM, _CHUNK_ITEM = 132, 168, 169, 228
_HEADER = 101
_KEY = struct.Struct("<QBQ")
_MOST_DEPTH = 8
_MOST_CHUNKS = 1 << 20
_MOST_EXTENTS = 1 << 24


class _Chunk(NamedTuple):
    logical: int
    length: int
    places: tuple[int, ...]  # on the device, one for each copy


class _Item(NamedTuple):
    object_id: int
    kind: int
    offset: int
    data: memoryview


def free_ranges(read: Read, size: int) -> Iterator[tuple[int, int]] | None:
    """Return the free ranges; None if it is no btrfs. Raises: Unreadable."""
    block = read(_SUPERBLOCKS[0], 4096)
    if block[64:72] != _MAGIC or len(block) < 4096:
        return None
    return _Btrfs(read, size, block).free()


class _Btrfs:
    def __init__(self, read: Read, size: int, block: bytes) -> None:
        self._read = read
        self._sums = sums_of(block)
        if not self._sums.is_whole(block):
            raise Unreadable("its superblock has a wrong checksum")
        self._root, self._chunk_root, log_root = struct.unpack_from("<QQQ", block, 80)
        (devices,) = struct.unpack_from("<Q", block, 136)
        _, self._node_size = struct.unpack_from("<II", block, 144)
        (array_size,) = struct.unpack_from("<I", block, 160)
        (incompat,) = struct.unpack_from("<Q", block, 188)
        self._root_level, self._chunk_level = block[198], block[199]
        self._device, self._end = struct.unpack_from("<QQ", block, 201)
        if log_root:
            raise Unreadable("it was not unmounted")
        if incompat & ~_INCOMPAT_KNOWN:
            raise Unreadable(f"it has features that are not known here ({incompat:#x})")
        if devices != 1:
            raise Unreadable(f"it is on {devices} devices")
        if (
            not 4096 <= self._node_size <= 65536
            or self._node_size & (self._node_size - 1)
            or array_size > 2048
            or not _RESERVED < self._end <= size
        ):
            raise Unreadable("its superblock makes no sense, or it is larger than its volume")
        self._chunks: list[_Chunk] = []
        array, at = memoryview(block)[811 : 811 + array_size], 0
        while at + _KEY.size + 48 <= len(array):
            _, kind, logical = _KEY.unpack_from(array, at)
            if kind != _CHUNK_ITEM:
                raise Unreadable("its superblock has something else than chunks")
            (stripes,) = struct.unpack_from("<H", array, at + _KEY.size + 44)
            at += _KEY.size
            self._chunks.append(self._chunk(logical, array[at:]))
            at += 48 + stripes * 32
        self._sort()
        found = [self._chunk(item.offset, item.data) for item in self._items(self._chunk_root, self._chunk_level)
                 if item.kind == _CHUNK_ITEM]  # fmt: skip
        self._chunks = found
        self._sort()

    def free(self) -> Iterator[tuple[int, int]]:
        """Yield the free ranges."""
        used = [(0, _RESERVED)]
        used += ((place, place + _KEPT_OF_SUPERBLOCK) for place in _SUPERBLOCKS)
        used += self._used()
        return without([(0, self._end)], joined(used))

    def _used(self) -> Iterator[tuple[int, int]]:
        root, level = self._extent_tree()
        count = 0
        # Extents come in the order of their addresses: neighbours become one at once.
        start = end = 0
        for item in self._items(root, level):
            if item.kind not in (_EXTENT_ITEM, _METADATA_ITEM):
                continue
            count += 1
            if count > _MOST_EXTENTS:
                raise Unreadable("it has more extents than are believed")
            length = item.offset if item.kind == _EXTENT_ITEM else self._node_size
            if item.object_id != end:
                yield from self._places(start, end)
                start = item.object_id
            end = item.object_id + length
        yield from self._places(start, end)

    def _extent_tree(self) -> tuple[int, int]:
        for item in self._items(self._root, self._root_level):
            if (item.object_id, item.kind) == (_EXTENT_TREE, _ROOT_ITEM) and len(item.data) >= 239:
                (root,) = struct.unpack_from("<Q", item.data, 176)
                return root, item.data[238]
        raise Unreadable("it has no tree of extents")

    def _chunk(self, logical: int, data: memoryview) -> _Chunk:
        if len(data) < 48 or len(self._chunks) > _MOST_CHUNKS:
            raise Unreadable("its table of chunks makes no sense")
        length, _, _, kind = struct.unpack_from("<QQQQ", data)
        (stripes,) = struct.unpack_from("<H", data, 44)
        if kind & _PROFILES not in (0, _DUP) or len(data) < 48 + stripes * 32 or not 0 < stripes <= 2:
            raise Unreadable("its chunks are spread over devices")
        places = []
        for number in range(stripes):
            device, place = struct.unpack_from("<QQ", data, 48 + number * 32)
            if device != self._device or place + length > self._end:
                raise Unreadable("a chunk of it is on another device, or nowhere")
            places.append(place)
        return _Chunk(logical, length, tuple(places))

    def _sort(self) -> None:
        self._chunks.sort()
        self._starts = [chunk.logical for chunk in self._chunks]

    def _places(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield where a range of addresses is on the device, all copies of it."""
        while start < end:
            number = bisect_right(self._starts, start) - 1
            chunk = self._chunks[number] if number >= 0 else None
            if chunk is None or start >= chunk.logical + chunk.length:
                raise Unreadable("an address of it is in no chunk")
            stop = min(end, chunk.logical + chunk.length)
            for place in chunk.places:
                yield place + start - chunk.logical, place + stop - chunk.logical
            start = stop

    def _items(self, root: int, level: int) -> Iterator[_Item]:
        """Yield the items of a tree, in order."""
        if level >= _MOST_DEPTH:
            raise Unreadable("a tree of it is deeper than is believed")
        stack = [(root, level)]
        seen: set[int] = set()
        while stack:
            address, wanted = stack.pop()
            if address in seen:
                raise Unreadable("a tree of it goes in circles")
            seen.add(address)
            data = memoryview(self._block(address))
            (own,) = struct.unpack_from("<Q", data, 48)
            (count,) = struct.unpack_from("<I", data, 96)
            if own != address or data[100] != wanted or _HEADER + count * (33 if wanted else 25) > self._node_size:
                raise Unreadable("a block of a tree makes no sense")
            if wanted:
                pointers = [struct.unpack_from("<Q", data, _HEADER + at * 33 + 17)[0] for at in range(count)]
                stack += ((pointer, wanted - 1) for pointer in reversed(pointers))
                continue
            for at in range(count):
                place = _HEADER + at * 25
                offset, length = struct.unpack_from("<II", data, place + 17)
                if _HEADER + offset + length > self._node_size:
                    raise Unreadable("an item of a tree goes beyond its block")
                object_id, kind, of_key = _KEY.unpack_from(data, place)
                yield _Item(object_id, kind, of_key, data[_HEADER + offset : _HEADER + offset + length])

    def _block(self, address: int) -> bytes:
        """Return a block of a tree, from the first copy that is whole."""
        for place, end in self._places(address, address + self._node_size):
            if end - place != self._node_size:
                raise Unreadable("a block of a tree lies over the end of a chunk")
            data = self._read(place, self._node_size)
            if len(data) == self._node_size and self._sums.is_whole(data):
                return data
        raise Unreadable("a block of a tree has a wrong checksum")
