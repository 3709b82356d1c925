"""Thin pools of device-mapper: where the blocks of their volumes are, from the trees in the pool's metadata.

Reading only. What is read is hostile: every node is checked (its sum, its place, its bounds), and a tree is followed
no deeper and no wider than it can be. Nodes are read as they are needed: memory does not grow with the pool.
Source: Linux, drivers/md/dm-thin-metadata.c, drivers/md/persistent-data/dm-btree-internal.h, dm-space-map-metadata.c.
"""

import struct
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from backupfs.disks.filesystem import Read, Unreadable
from backupfs.snapshots.volumes import Range

_BLOCK = 4096
_SECTOR = 512
# sum, flags, own place, uuid, magic, version, time, transaction, root that user space holds, two roots of space maps,
# roots of the mappings and of the devices, sectors in a block of data and of metadata, blocks of metadata, compatible,
# compatible to read, incompatible
_SUPERBLOCK = struct.Struct("<IIQ16sQIIQQ128s128sQQIIQIII")
_MAGIC = 27022010
_VERSIONS = (1, 2)
_NEEDS_CHECK = 1
_SUPERBLOCK_SUM, _NODE_SUM = 160774, 121107  # what sums are mixed with
# sum, flags, own place, entries, most entries, size of a value, nothing
_NODE = struct.Struct("<IIQIIII")
_INTERNAL, _LEAF = 1, 2
_DEVICE = struct.Struct("<QQII")  # mapped blocks, transaction, times
_TIME_BITS = 24  # of a mapping, below the block
_MOST_DEPTH = 16
_MOST_KEY = 1 << 64
_NODES_KEPT = 1024
_MOST_SIZE = 1 << 62
# Of all devices of a pool, each once: 16 TiB in the smallest blocks.
_MOST_MAPPINGS = 1 << 28


class _Node(NamedTuple):
    is_leaf: bool
    keys: tuple[int, ...]
    values: tuple[int, ...] | tuple[bytes, ...]


class ThinPool:
    """The metadata of a pool."""

    def __init__(self, read: Read, size: int, block_size: int, data_size: int) -> None:
        """Read the superblock.

        read, size: of the volume with the metadata. block_size, data_size: of the pool's blocks and its volume of data.
        Raises: Unreadable.
        """
        self._read = read
        self._nodes: OrderedDict[tuple[int, int], _Node] = OrderedDict()  # by place and size of values
        self._sound: set[int] = set()  # nodes whose sum was right once
        block = read(0, _BLOCK)
        if len(block) < _BLOCK:
            raise Unreadable("its metadata has no room for a superblock")
        (
            found,
            flags,
            place,
            _,
            magic,
            version,
            _,
            _,
            _,
            _,
            _,
            mappings,
            details,
            data_block,
            block_of_metadata,
            *rest,
        ) = _SUPERBLOCK.unpack_from(block)
        blocks, _, _, incompatible = rest
        if magic != _MAGIC:
            raise Unreadable("its metadata is none")
        if version not in _VERSIONS or incompatible:
            raise Unreadable(f"its metadata is of version {version} with features {incompatible:#x}, which is not read")
        if found != _sum(block) ^ _SUPERBLOCK_SUM or place or block_of_metadata * _SECTOR != _BLOCK:
            raise Unreadable("its superblock is damaged")
        if flags & _NEEDS_CHECK:
            raise Unreadable("its metadata is marked as in need of a check: `lvconvert --repair` mends it")
        if data_block * _SECTOR != block_size:
            raise Unreadable(f"its blocks have {data_block * _SECTOR} bytes and not the {block_size} that LVM knows of")
        self.block_size = block_size
        self.data_blocks = data_size // block_size
        self._blocks = min(blocks, size // _BLOCK)
        self._mappings, self._details = mappings, details
        self._counts: dict[int, int] = {}  # of mappings, by the roots of their trees
        self._left = _MOST_MAPPINGS

    def root_of(self, device: int) -> tuple[int, int]:
        """Return the root of a device's mappings and how many there are. Raises: Unreadable."""
        for _, root in self._entries(self._mappings, device, device + 1):
            for _, details in self._entries(self._details, device, device + 1, _DEVICE.size):
                assert isinstance(root, int)
                assert isinstance(details, bytes)
                return root, _DEVICE.unpack(details)[0]
        raise Unreadable(f"the pool has no device {device}")

    def count(self, root: int) -> int:
        """Return how many blocks of a device are mapped, after a look at all of them. Raises: Unreadable."""
        if root not in self._counts:
            count = 0
            for _, blocks, _ in self.runs(root, 0, _MOST_KEY):
                count += blocks
                if count > self._left:
                    raise Unreadable("its metadata has more mappings than are believed")
            self._left -= count
            self._counts[root] = count
        return self._counts[root]

    def runs(self, root: int, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield (block, count, block of data) of what is mapped between two blocks of a device. Raises: Unreadable."""
        start = count = data = 0
        for key, value in self._entries(root, first, last):
            assert isinstance(value, int)
            block = value >> _TIME_BITS
            if block >= self.data_blocks:
                raise Unreadable("its metadata is damaged: a block lies behind the end of the pool")
            if count and key == start + count and block == data + count:
                count += 1
                continue
            if count:
                yield start, count, data
            start, count, data = key, 1, block
        if count:
            yield start, count, data

    def _entries(self, root: int, first: int, last: int, width: int = 8) -> Iterator[tuple[int, int | bytes]]:
        """Yield (key, value) of a tree for keys from `first` to below `last`, in order."""
        stack = [(root, 0, 0, _MOST_KEY)]
        while stack:
            block, depth, low, high = stack.pop()
            node = self._node(block, width)
            keys = node.keys
            # Only the root of an empty tree is empty; so no node fits in two places, and none is met twice.
            if (not keys and block != root) or (keys and (keys[0] < low or keys[-1] >= high)):
                raise Unreadable("its metadata is damaged: a node of a tree has keys of another one")
            if node.is_leaf:
                at = bisect_left(keys, first)
                while at < len(keys) and keys[at] < last:
                    yield keys[at], node.values[at]
                    at += 1
                continue
            if depth > _MOST_DEPTH:
                raise Unreadable("its metadata is damaged: a tree goes in circles")
            at = max(0, bisect_right(keys, first) - 1)
            for child in range(bisect_left(keys, last) - 1, at - 1, -1):
                following = keys[child + 1] if child + 1 < len(keys) else high
                value = node.values[child]
                assert isinstance(value, int)
                stack.append((value, depth + 1, keys[child], following))

    def _node(self, block: int, width: int) -> _Node:
        known = self._nodes.get((block, width))
        if known is not None:
            self._nodes.move_to_end((block, width))
            return known
        if not 0 < block < self._blocks:
            raise Unreadable("its metadata is damaged: a tree goes out of it")
        data = self._read(block * _BLOCK, _BLOCK)
        if len(data) < _BLOCK:
            raise Unreadable("its metadata ends within a tree")
        found, flags, place, count, most, size, _ = _NODE.unpack_from(data)
        if block not in self._sound:
            if found != _sum(data) ^ _NODE_SUM or place != block:
                raise Unreadable(f"its metadata is damaged: the block {block} of it is not as it was written")
            self._sound.add(block)
        wanted = 8 if flags & _INTERNAL else width
        values_at = _NODE.size + most * 8
        if flags not in (_INTERNAL, _LEAF) or size != wanted or count > most or values_at + most * size > _BLOCK:
            raise Unreadable("its metadata is damaged: a node of a tree makes no sense")
        keys = struct.unpack_from(f"<{count}Q", data, _NODE.size)
        values: tuple[int, ...] | tuple[bytes, ...]
        if size == 8:
            values = struct.unpack_from(f"<{count}Q", data, values_at)
        else:
            values = tuple(data[values_at + at * size : values_at + (at + 1) * size] for at in range(count))
        if any(one >= other for one, other in pairwise(keys)):
            raise Unreadable("its metadata is damaged: keys of a tree are out of order")
        node = self._nodes[block, width] = _Node(flags == _LEAF, keys, values)
        if len(self._nodes) > _NODES_KEPT:
            self._nodes.popitem(last=False)
        return node


class Thin:
    """A volume in a pool: ranges of the pool's data, and holes, or what its origin outside of the pool has there."""

    def __init__(self, pool: ThinPool, device: int, size: int, data: Range, origin: Range | None) -> None:
        """Go through all mappings once.

        data, origin: where the pool's data is, and the origin if there is one. Raises: Unreadable.
        """
        if not 0 < size < _MOST_SIZE:
            raise Unreadable(f"it says that it has {size} bytes")
        self._pool = pool
        self._root, told = pool.root_of(device)
        self._data, self._origin = data, origin
        self._size = size
        mapped = pool.count(self._root)
        if mapped != told:
            raise Unreadable(f"its metadata is damaged: {mapped} blocks are mapped where {told} should be")
        self.mapped = min(size, mapped * pool.block_size)  # bytes of its own

    @property
    def size(self) -> int:
        """Its bytes."""
        return self._size

    def bases(self) -> Iterator[Range]:
        """Yield the pool's data, and the origin."""
        yield self._data
        if self._origin is not None:
            yield self._origin

    def parts(self, start: int, length: int) -> Iterator[Range]:
        """Yield the ranges that a range is made of; of volume -1 are zeros. Raises: Unreadable."""
        block = self._pool.block_size
        _, volume, offset = self._data
        at, end = start, start + length
        for first, count, data in self._pool.runs(self._root, start // block, -(-end // block)):
            low, high = max(at, first * block), min(end, (first + count) * block)
            yield from self._unmapped(at, low)
            yield high - low, volume, offset + data * block + low - first * block
            at = high
        yield from self._unmapped(at, end)

    def _unmapped(self, start: int, end: int) -> Iterator[Range]:
        if self._origin is not None:
            length, volume, offset = self._origin
            middle = min(end, length)
            if start < middle:
                yield middle - start, volume, offset + start
                start = middle
        if start < end:
            yield end - start, -1, 0


def _sum(block: bytes) -> int:
    """Return the CRC-32C of a block without its first four bytes, not inverted at the end."""
    table = _crc_table()
    crc = 0xFFFFFFFF
    for word in struct.unpack(f"<{_BLOCK // 2 - 2}H", block[4:]):
        crc = table[(crc ^ word) & 0xFFFF] ^ crc >> 16
    return crc


@cache
def _crc_table() -> tuple[int, ...]:
    """Return the table that takes two bytes at once."""
    bytes_at_once = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        bytes_at_once.append(value)
    found = []
    for value in range(1 << 16):
        value = value >> 8 ^ bytes_at_once[value & 0xFF]
        found.append(value >> 8 ^ bytes_at_once[value & 0xFF])
    return tuple(found)
