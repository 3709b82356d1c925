"""btrfs by fs-explorer, which is given nothing but what has the right checksum, from whatever copy has it.

The library reads the first copy and compares nothing. Here blocks of trees, and bytes that are unpacked, are compared
with their sums; where one is wrong the next copy on the device counts, as for the kernel. What of a file lies in the
volume as it is is not read at all: whoever reads it later gets what the disk has.
Source: btrfs-progs' kernel-shared/uapi/btrfs_tree.h; Linux's fs/btrfs/disk-io.c (btrfs_validate_extent_buffer).
"""

import importlib
import struct
from bisect import bisect_right
from collections.abc import Iterator
from functools import partial
from typing import Any

from backupfs.disks.btrfs_sums import Sums, sums_of
from backupfs.disks.filesystem import Unreadable

EMPTY_INODE = 2  # of an empty directory
PLACE = "backupfs place"  # under which a node of a subvolume keeps where it belongs

_SUPERBLOCKS, _SUPERBLOCK_SIZE = (64 << 10, 64 << 20, 256 << 30), 4096
_CHUNK, _STRIPE = struct.Struct("<QQQQIIIHH"), struct.Struct("<QQ16s")
# Of a block of a tree: sum, file system, own address, flags, tree of chunks, generation.
_HEAD = struct.Struct("<32s16sQQ16sQ")
_HEAD_SIZE = 101
_POINTER = struct.Struct("<QBQQQ")  # key, address, generation
# Types of items; (directory, sequence, length of the name) before a name.
_ROOT_ITEM, _ROOT_REF = 132, 156
_ROOT_REFERENCE = struct.Struct("<QQH")
_ROOT = struct.Struct("<QQQ")  # generation, inode of the top, address, in the item of a root
_ROOT_AT, _LEVEL_AT = 160, 238
# The tree of sums, and the key of its items before the address.
_SUM_TREE, _SUM_KEY = 7, ((1 << 64) - 10, 128)
_TOP_INODE = 256


def open_tree(volume: Any, context: Any) -> Any:
    """Return the library's tree of a volume. Raises: anything."""
    btree = importlib.import_module("fs_explorer.filesystems.btrfs.btree")
    maps = importlib.import_module("fs_explorer.filesystems.btrfs.chunks")
    library = importlib.import_module("fs_explorer.filesystems.btrfs.fs")

    class Tree(library.BtrfsFS):  # type: ignore[misc, name-defined]
        """Is made of other parts than the library's."""

        def __init__(self) -> None:
            self.ra, self.ctx = volume, context
            self._tok = context.cache.token()
            self.sb, sums = _superblock(volume)
            chunks = maps.ChunkMap()
            self._space = _Space(volume, chunks, partial(maps.parse_chunk, devid=self.sb.devid), self.sb.devid)
            array = self.sb.sys_chunk_array[: self.sb.sys_chunk_array_size]
            at = 0
            while at < len(array):
                _, kind, logical = struct.unpack_from("<QBQ", array, at)
                if kind != maps.CHUNK_ITEM_KEY:
                    raise Unreadable("its superblock has something else than chunks")
                at += 17 + self._space.add(logical, array[at + 17 :])
            self._blocks = _Blocks(self._space, sums, self.sb.meta_fsid)
            self.trees = btree.BTrees(
                self._blocks, self.sb.nodesize, self.sb.meta_fsid, context.cache, self.sb.csum_type
            )
            self.trees._child = partial(_child, self.trees, self._blocks)
            self._blocks.roots |= {
                self.sb.chunk_root: self.sb.chunk_root_generation, self.sb.root: self.sb.generation,
            }  # fmt: skip
            root = self.trees.node(self.sb.chunk_root, self.sb.chunk_root_level)
            key = maps.FIRST_CHUNK_TREE_OBJECTID, maps.CHUNK_ITEM_KEY
            for (_, _, logical), item in self.trees.iter_range(root.bytenr, *key):
                self._space.add(logical, item)
            self.trees.node(self.sb.root, self.sb.root_level)
            self._roots: dict[int, tuple[int, int]] = {}
            self.lra = _Bytes(self._space, sums, self.sb.sectorsize, self._sums_from)
            self.default_subvol = self._default_subvol()

        def subvol_root(self, number: int) -> tuple[int, int]:
            """Return where the root of a tree is, and the inode of its top."""
            if number not in self._roots:
                for key, item in self.trees.iter_range(self.sb.root, number, _ROOT_ITEM):
                    if len(item) <= _LEVEL_AT:
                        break
                    generation, top, address = _ROOT.unpack_from(item, _ROOT_AT)
                    self._blocks.roots[address] = generation
                    self.trees.node(address, item[_LEVEL_AT])
                    self._roots[key[0]] = address, top or _TOP_INODE
                    break
            if number not in self._roots:
                raise Unreadable(f"its tree {number} has no root")
            return self._roots[number]

        def _sums_from(self, address: int) -> Iterator[tuple[int, bytes]]:
            """Yield (address, sums) of the items of sums, from that on which an address may lie in."""
            root, _ = self.subvol_root(_SUM_TREE)
            key = (*_SUM_KEY, address)
            node = self.trees.node(root)
            while node.level:
                node = self.trees._child(node, max(0, bisect_right(node.keys, key) - 1))
            before = bisect_right(node.keys, key) - 1
            start = node.keys[before] if before >= 0 and node.keys[before][:2] == _SUM_KEY else key
            for (_, _, place), item in self.trees.iter_range(root, *start):
                yield place, item

        def _entry_node(self, number: int, name: bytes, place: tuple[int, int, int], kind: int) -> Any:
            """Return the node of an entry; of a subvolume with the place where it belongs, as the tree of roots has it.

            A snapshot keeps the entries of the subvolumes in what it was made of, and has none of these itself.
            """
            if place[1] != _ROOT_ITEM:
                return super()._entry_node(number, name, place, kind)
            reference = self.trees.get(self.sb.root, (number, _ROOT_REF, place[0])) or b""
            belongs: tuple[tuple[int, int], bytes] | None = None
            if len(reference) >= _ROOT_REFERENCE.size:
                directory, _, length = _ROOT_REFERENCE.unpack_from(reference)
                belongs = (number, directory), bytes(reference[_ROOT_REFERENCE.size :][:length])
            if belongs is None or belongs[1] != name:
                # The inode that the library knows as an empty directory.
                node = importlib.import_module("fs_explorer.tree").Node(
                    name.decode("utf-8", "surrogateescape"),
                    importlib.import_module("fs_explorer.entry").EntryType.DIR,
                    ref=(number, EMPTY_INODE), statted=False,
                )  # fmt: skip
                node.extra[PLACE] = ()
                return node
            node = super()._entry_node(number, name, place, kind)
            node.extra[PLACE] = belongs
            return node

    return Tree()


def _superblock(volume: Any) -> tuple[Any, Sums]:
    """Return the newest superblock that is whole, and the kind of its sums."""
    superblocks = importlib.import_module("fs_explorer.filesystems.btrfs.super")
    found: list[tuple[Any, Sums]] = []
    for place in _SUPERBLOCKS:
        block = volume.read_at(place, _SUPERBLOCK_SIZE)
        if len(block) < _SUPERBLOCK_SIZE or block[0x40:0x48] != superblocks.MAGIC:
            continue
        sums = sums_of(block)
        parsed = superblocks.parse(block, place)
        if sums.is_whole(block) and parsed.bytenr == place and (not found or parsed.fsid == found[0][0].fsid):
            found.append((parsed, sums))
    if not found:
        raise Unreadable("no copy of its superblock has the right checksum")
    newest = max(found, key=lambda one: one[0].generation)
    superblocks.validate(newest[0])
    return newest


class _Space:
    """The addresses of btrfs: where they are on the device, with all copies."""

    def __init__(self, volume: Any, chunks: Any, parse: Any, device: int) -> None:
        self.volume = volume
        self.chunks = chunks
        self._parse = parse
        self._device = device
        self._places: dict[int, tuple[int, ...]] = {}  # of copies, by the start of a chunk

    def add(self, logical: int, item: bytes) -> int:
        """Add a chunk; return the bytes of its item."""
        chunk, size = self._parse(item, 0, logical)
        self.chunks.add(chunk)
        stripes = _STRIPE.iter_unpack(item[_CHUNK.size : size])
        self._places[logical] = tuple(place for device, place, _ in stripes if device == self._device)
        return int(size)

    def copies(self, address: int, length: int) -> Iterator[bytes]:
        """Yield the copies of what is somewhere, those that are there."""
        chunk = self.chunks.find(address)
        if chunk.refusal is not None:
            raise Unreadable(chunk.refusal)
        if address + length > chunk.end:
            raise Unreadable("it lies over the end of a chunk")
        is_there = False
        for place in self._places[chunk.logical]:
            data = self.volume.read_at(place + address - chunk.logical, length)
            if len(data) == length:
                is_there = True
                yield data
        if not is_there:
            raise Unreadable("it lies behind the end of the disk, which is cut short")

    def physical_ranges(self, offset: int, length: int) -> list[tuple[int | None, int, int]] | None:
        """Return where a range lies in the volume, the first copy; None if it lies on several devices."""
        found: list[tuple[int | None, int, int]] = []
        while length > 0:
            chunk = self.chunks.find(offset)
            if chunk.refusal is not None:
                return None
            count = min(length, chunk.end - offset)
            found += self.volume.physical_ranges(chunk.phys + offset - chunk.logical, count)
            offset, length = offset + count, length - count
        return found


class _Blocks:
    """What the library reads the blocks of trees from."""

    def __init__(self, space: _Space, sums: Sums, filesystem: bytes) -> None:
        self._space = space
        self._sums = sums
        self._filesystem = filesystem
        # Of which generation blocks must be: an old one, of a write that was lost, has the right sum, too.
        self.roots: dict[int, int] = {}
        self.below: tuple[int, int] = 0, 0  # the same of the one that is followed just now

    def read_at(self, address: int, length: int) -> bytes:
        """Return a block. Raises: Unreadable if no copy of it is what it should be."""
        problem = ""
        wanted = self.below[1] if self.below[0] == address else self.roots.get(address)
        for block in self._space.copies(address, length):
            _, filesystem, own, _, _, generation = _HEAD.unpack_from(block)
            if not self._sums.is_whole(block):
                problem = "a block of its trees has a wrong checksum"
            elif (filesystem, own) != (self._filesystem, address) or wanted not in (None, generation):
                problem = "a block of its trees is another one, or an old one"
            else:
                return block
        raise Unreadable(problem)


def _child(trees: Any, blocks: _Blocks, node: Any, number: int) -> Any:
    """Return the block that one refers to."""
    *_, address, generation = _POINTER.unpack_from(node.data, _HEAD_SIZE + number * _POINTER.size)
    blocks.below = address, generation
    return trees.node(address, node.level - 1)


class _Bytes:
    """What the library reads the bytes of files from, where they are packed; it asks of others where they lie."""

    size = 1 << 64

    def __init__(self, space: _Space, sums: Sums, sector: int, sums_from: Any) -> None:
        self._sums = sums
        self._space = space
        self._sector = sector
        self._sums_from = sums_from
        self.physical_ranges = space.physical_ranges

    def read_at(self, address: int, length: int) -> bytes:
        """Return bytes; what has no sums is believed. Raises: Unreadable."""
        wanted = self._wanted(address, address + length)
        found = bytearray(length)
        left = set(range(0, length, self._sector))
        for copy in self._space.copies(address, length):
            for at in list(left):
                sector = copy[at : at + self._sector]
                if at not in wanted or wanted[at].startswith(self._sums.of(sector)):
                    found[at : at + self._sector] = sector
                    left.remove(at)
            if not left:
                return bytes(found)
        raise Unreadable("what it is unpacked from has a wrong checksum")

    def _wanted(self, start: int, end: int) -> dict[int, bytes]:
        """Return the sums of a range, by how far from its start."""
        found: dict[int, bytes] = {}
        size, sector = self._sums.size, self._sector
        for place, sums in self._sums_from(start):
            if place >= end:
                break
            low, high = max(start, place), min(end, place + len(sums) // size * sector)
            for address in range(low, high, sector):
                at = (address - place) // sector * size
                found[address - start] = sums[at : at + size]
        return found
