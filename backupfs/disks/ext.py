"""ext2, ext3 and ext4: reading only, without the journal.

What is read is hostile: every count and place is checked against the volume, and trees of blocks are followed no deeper
and no wider than they can be.
Source: Linux's Documentation/filesystems/ext4, and fs/ext4/ext4.h, ext4_extents.h, inode.c, xattr.h, xattr.c.
"""

import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

from backupfs.disks import superblocks
from backupfs.disks.ext_sums import Sums, is_superblock_right
from backupfs.disks.filesystem import Entry, Extent, Read, Unreadable

_MAGIC = 0xEF53
_ROOT = 2
_JOURNAL_DEVICE = 0x8
_FILE_TYPE, _RECOVER, _META_GROUPS, _64BIT, _LARGE_DIRECTORIES, _INLINE = 0x2, 0x4, 0x10, 0x80, 0x4000, 0x8000
_VALUES_IN_INODES = 0x400
# Those that change nothing of what is read here: extents, mmp, flex_bg, csum_seed, encrypt, casefold.
_INCOMPAT_KNOWN = _FILE_TYPE | _RECOVER | _META_GROUPS | 0x40 | _64BIT | 0x100 | 0x200 | _VALUES_IN_INODES | 0x2000
_INCOMPAT_KNOWN |= _LARGE_DIRECTORIES | _INLINE | 0x10000 | 0x20000
_INCOMPAT_OF_4 = _INCOMPAT_KNOWN & ~(_FILE_TYPE | _RECOVER | _META_GROUPS)
_CLUSTERS = 0x200
_RO_COMPAT_OF_4 = 0x8 | 0x10 | 0x20 | 0x40 | _CLUSTERS | 0x400 | 0x2000 | 0x8000  # huge_file … metadata_csum …
_HAS_JOURNAL, _SPARSE_SUPER_2 = 0x4, 0x200
_SPARSE_SUPER, _HUGE_FILE = 0x1, 0x8

_ENCRYPTED, _COUNTS_IN_BLOCKS, _EXTENT_TREE, _IS_VALUE, _IS_INLINE = 0x800, 0x40000, 0x80000, 0x200000, 0x10000000
# mode, uid, size, ctime, mtime, gid, links, blocks, flags, i_block, attributes' block, high half of the size, high
# parts of blocks, attributes' block, uid, gid
_INODE = struct.Struct("<HHI4xII4xHHII4x60s4xII4xHHHH4x")
_EXTRA_TIMES = struct.Struct("<H2xII")  # bytes used behind 128, ctime, mtime
_PLAIN_INODE = 128
_HEADER = struct.Struct("<HHHH4x")
_LEAF = struct.Struct("<IHHI")
_BRANCH = struct.Struct("<IIH2x")
_TREE_MAGIC = 0xF30A
_MOST_WRITTEN = 32768  # blocks; an extent that says more was allocated and not written
_MOST_DEPTH = 5
_MOST_NODES = 1 << 20
_DIRECT = 12
_NAME = struct.Struct("<IHBB")
_ATTRIBUTE = struct.Struct("<BBHIII")
_ATTRIBUTES_MAGIC = 0xEA020000
_PREFIXES = {
    1: b"user.", 2: b"system.posix_acl_access", 3: b"system.posix_acl_default", 4: b"trusted.", 6: b"security.",
    7: b"system.", 8: b"system.richacl",
}  # fmt: skip
_ACLS = (2, 3)
_DATA = b"system.data"  # where small files go on that begin in their inode
_MOST_VALUE = 1 << 16
_MOST_LINK = 4096
_MOST_ATTRIBUTE_BLOCKS = 1024
_WINDOW = 1 << 16  # of inodes read at a time
_MOST_WINDOWS = 256
_STEP = 1 << 20
_BEHIND = "it lies behind the end of the disk, which is cut short"


class _Inode(NamedTuple):
    number: int
    raw: bytes
    mode: int
    uid: int
    gid: int
    links: int
    size: int
    mtime_ns: int
    ctime_ns: int
    flags: int
    blocks: int  # allocated, of 512 bytes
    map: bytes  # i_block
    attributes_at: int  # the block that has them; 0: none


class Ext:
    """A file system."""

    def __init__(self, read: Read, size: int, block: bytes) -> None:
        """Take the volume.

        block: the superblock. Raises: Unreadable.
        """
        self._read_volume, self._size = read, size
        self._inodes, blocks = struct.unpack_from("<II", block)
        first, log_block, log_cluster = struct.unpack_from("<III", block, 0x14)
        (per_group,) = struct.unpack_from("<I", block, 0x20)
        (self._per_group,) = struct.unpack_from("<I", block, 0x28)
        (revision,) = struct.unpack_from("<I", block, 0x4C)
        (self._inode_size,) = struct.unpack_from("<H", block, 0x58) if revision else (_PLAIN_INODE,)
        (self._first_inode,) = struct.unpack_from("<I", block, 0x54) if revision else (11,)
        compat, incompat, ro_compat = struct.unpack_from("<III", block, 0x5C) if revision else (0, 0, 0)
        if incompat & _JOURNAL_DEVICE:
            raise Unreadable("it is the journal of a file system on another volume")
        if not is_superblock_right(block, ro_compat):
            copy = superblocks.copy_of_ext(read, size)
            where = "" if copy is None else f", a copy is at byte {copy.place:,}"
            raise Unreadable(f"its superblock has a wrong checksum{where}")
        self._sums = Sums(block, incompat, ro_compat)
        if incompat & ~_INCOMPAT_KNOWN:
            raise Unreadable(f"it has features of ext4 that are not known ({incompat & ~_INCOMPAT_KNOWN:#x})")
        self._row: int = 32
        if incompat & _64BIT:
            blocks |= struct.unpack_from("<I", block, 0x150)[0] << 32
            (self._row,) = struct.unpack_from("<H", block, 0xFE)
        sane = (
            log_block <= 6
            and log_cluster <= 30
            and 0 <= first <= 1
            and first < blocks
            and 0 < per_group <= 1 << 31
            and self._per_group > 0
            and self._inodes > 0
            and 32 <= self._row <= 1024
            and _PLAIN_INODE <= self._inode_size <= 1024 << log_block
            and self._inode_size & (self._inode_size - 1) == 0
        )
        if not sane:
            raise Unreadable("its superblock makes no sense")
        self._block_size: int = 1024 << log_block
        self._cluster_size = 1024 << log_cluster if ro_compat & _CLUSTERS else self._block_size
        self._blocks, self._first, self._blocks_per_group = blocks, first, per_group
        self._first_meta = struct.unpack_from("<I", block, 0x104)[0] if incompat & _META_GROUPS else 1 << 32
        self._incompat, self._ro_compat = incompat, ro_compat
        self._copies = {0, *struct.unpack_from("<II", block, 0x24C)} if compat & _SPARSE_SUPER_2 else None
        self._tables: dict[int, list[int | None]] = {}
        self._windows: dict[tuple[int, int], bytes] = {}
        self._attributes: dict[int, list[tuple[bytes, bytes]]] = {}
        is_4 = incompat & _INCOMPAT_OF_4 or ro_compat & _RO_COMPAT_OF_4
        self.form = "ext4" if is_4 else "ext3" if compat & _HAS_JOURNAL else "ext2"
        remarks = []
        if incompat & _RECOVER:
            remarks.append("it was not unmounted: files are shown as of before its journal is replayed")
        if blocks * self._block_size > size:
            remarks.append("it is larger than the disk, which is cut short: some files cannot be whole")
        self.remarks: tuple[str, ...] = tuple(remarks)

    # Blocks.

    def _block(self, block: int, length: int = 0) -> bytes:
        """Return a block, or what begins there."""
        length = length or self._block_size
        if not 0 < block < self._blocks:
            raise Unreadable(f"it refers to the block {block}, which is nowhere")
        data = self._read_volume(block * self._block_size, length)
        if len(data) != length:
            raise Unreadable(_BEHIND)
        return data

    def _inodes_of(self, group: int) -> int:
        """Return the block where the inodes of a group begin."""
        per_block = self._block_size // self._row
        number, within = divmod(group, per_block)
        table = self._tables.get(number)
        if table is None:
            # The superblock is in the block of byte 1,024; with clusters of small blocks that is not the first one.
            if number < self._first_meta:
                at = 1024 // self._block_size + 1 + number
            else:
                # In the first group of those that it describes, behind a copy of the superblock if there is one.
                first = number * per_block
                at = self._first + first * self._blocks_per_group + self._has_superblock(first)
                at += not number and self._first < 1024 // self._block_size
            table = self._starts_in(self._block(at), number * per_block, per_block)
            self._tables[number] = table
        start = table[within]
        if start is None:
            raise Unreadable(f"the descriptor of its group {group} has a wrong checksum")
        return start

    def _starts_in(self, data: bytes, first: int, count: int) -> list[int | None]:
        """Return where the inodes of groups begin, by a block of descriptors; None for one with a wrong sum."""
        rows = [data[row * self._row : (row + 1) * self._row] for row in range(count)]
        return [
            _start_of_inodes(row) if self._sums.is_group_right(group, row) else None
            for group, row in enumerate(rows, first)
        ]

    def _has_superblock(self, group: int) -> bool:
        if self._copies is not None:
            return group in self._copies
        if group <= 1 or not self._ro_compat & _SPARSE_SUPER:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))

    # Inodes.

    def _inode(self, number: int) -> _Inode:
        if not (number == _ROOT or self._first_inode <= number <= self._inodes):
            raise Unreadable(f"it refers to the inode {number}, which is none of a file")
        group, within = divmod(number - 1, self._per_group)
        window, at = divmod(within * self._inode_size, _WINDOW)
        data = self._windows.get((group, window))
        if data is None:
            start = self._inodes_of(group) * self._block_size + window * _WINDOW
            length = min(_WINDOW, self._per_group * self._inode_size - window * _WINDOW)
            if start < self._block_size:
                raise Unreadable("a group's inodes are nowhere")
            data = self._read_volume(start, length)
            if len(self._windows) >= _MOST_WINDOWS:
                del self._windows[next(iter(self._windows))]
            self._windows[group, window] = data
        raw = data[at : at + self._inode_size]
        if len(raw) < self._inode_size:
            raise Unreadable(_BEHIND)
        self._sums.require_inode(number, raw)
        return self._parsed(number, raw)

    def _parsed(self, number: int, raw: bytes) -> _Inode:
        (
            mode, uid, size, ctime, mtime, gid, links, blocks, flags, map_, attributes, size_high, blocks_high,
            attributes_high, uid_high, gid_high,
        ) = _INODE.unpack_from(raw)  # fmt: skip
        if stat.S_ISREG(mode) or self._incompat & _LARGE_DIRECTORIES:
            size |= size_high << 32
        if self._ro_compat & _HUGE_FILE:
            blocks |= blocks_high << 32
            if flags & _COUNTS_IN_BLOCKS:
                blocks *= self._block_size // 512
        mtime_ns, ctime_ns = _signed(mtime) * 10**9, _signed(ctime) * 10**9
        if self._inode_size > _PLAIN_INODE:
            used, more_ctime, more_mtime = _EXTRA_TIMES.unpack_from(raw, _PLAIN_INODE)
            if used >= 8:
                ctime_ns += ((more_ctime & 3) << 32) * 10**9 + (more_ctime >> 2)
            if used >= 12:
                mtime_ns += ((more_mtime & 3) << 32) * 10**9 + (more_mtime >> 2)
        return _Inode(
            number, raw, mode, uid | uid_high << 16, gid | gid_high << 16, links, size, mtime_ns, ctime_ns, flags,
            blocks, map_, attributes | attributes_high << 32,
        )  # fmt: skip

    def _entry(self, name: bytes, number: int) -> Entry:
        inode = self._inode(number)
        if not inode.links:
            raise Unreadable(f"its inode {number} is not in use")
        target, device, kind = b"", (0, 0), stat.S_IFMT(inode.mode)
        if kind == stat.S_IFLNK:
            target = self._target(inode)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            device = _device(inode.map)
        elif kind not in _KINDS:
            raise Unreadable(f"its inode {number} is of a kind that is not known ({inode.mode:#o})")
        return Entry(
            name, inode.mode, inode.uid, inode.gid, inode.links, number, inode.size, inode.mtime_ns, inode.ctime_ns,
            target, device, inode,
        )  # fmt: skip

    def _target(self, inode: _Inode) -> bytes:
        if inode.flags & _ENCRYPTED:
            raise Unreadable("it is encrypted")
        if inode.size > _MOST_LINK:
            raise Unreadable(f"it is a link of {inode.size} bytes")
        if self._incompat & _VALUES_IN_INODES:
            # Values that lie elsewhere are counted as blocks of the link.
            is_short = inode.size < len(inode.map)
        else:
            of_attributes = self._cluster_size // 512 if inode.attributes_at else 0
            is_short = not inode.flags & _IS_INLINE and inode.blocks == of_attributes
        if is_short:
            return inode.map[: inode.size]
        return b"".join(self._data(inode)).partition(b"\0")[0]

    # Where the bytes of a file are.

    def _runs(self, inode: _Inode) -> list[tuple[int, int, int]]:
        """Return (place in the file, place in the file system; 0: allocated, not written; length), all in blocks."""
        if inode.flags & _EXTENT_TREE:
            return self._runs_of_tree(inode)
        return self._runs_of_map(inode)

    def _runs_of_tree(self, inode: _Inode) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []
        magic, count, _, depth = _HEADER.unpack_from(inode.map)
        if magic != _TREE_MAGIC or count > 4 or depth > _MOST_DEPTH:
            raise Unreadable("the root of its tree of extents makes no sense")
        stack = [(inode.map, count, depth)]
        nodes, end = 0, 0
        while stack:
            node, count, depth = stack.pop()
            if depth == 0:
                for blocks, length, high, low in _LEAF.iter_unpack(node[12 : 12 + count * 12]):
                    block = high << 32 | low
                    if length > _MOST_WRITTEN:
                        length, block = length - _MOST_WRITTEN, 0
                    elif not 0 < block <= self._blocks - length:
                        raise Unreadable(f"it refers to the block {block}, which is nowhere")
                    if blocks < end or not length:
                        raise Unreadable("its extents are in no order")
                    end = blocks + length
                    found.append((blocks, block, length))
                continue
            below: list[tuple[bytes, int, int]] = []
            for _, low, high in _BRANCH.iter_unpack(node[12 : 12 + count * 12]):
                nodes += 1
                child = self._block(high << 32 | low)
                magic, number, _, under = _HEADER.unpack_from(child)
                if magic != _TREE_MAGIC or under != depth - 1 or number * 12 + 12 > len(child) or nodes > _MOST_NODES:
                    raise Unreadable("a block of its tree of extents is none")
                self._sums.require_extents(inode.number, inode.raw, child)
                below.append((child, number, under))
            stack += reversed(below)
        return found

    def _runs_of_map(self, inode: _Inode) -> list[tuple[int, int, int]]:
        numbers = struct.unpack("<15I", inode.map)
        runs = _Runs(self._blocks, -(-inode.size // self._block_size))
        runs.add(0, numbers[:_DIRECT])
        per_block = self._block_size // 4
        at, span = _DIRECT, per_block
        for depth, number in enumerate(numbers[_DIRECT:]):
            self._add_below(runs, at, number, depth)
            at, span = at + span, span * per_block
        return runs.found

    def _add_below(self, runs: "_Runs", at: int, number: int, depth: int) -> None:
        """Add what a block of numbers leads to. depth: of blocks of numbers below it; 2 at most."""
        if not number or at >= runs.wanted:
            return
        runs.enter(number)
        numbers = struct.unpack(f"<{self._block_size // 4}I", self._block(number))
        if depth == 0:
            runs.add(at, numbers)
            return
        span = (self._block_size // 4) ** depth
        for place, below in enumerate(numbers):
            self._add_below(runs, at + place * span, below, depth - 1)

    def top(self) -> Entry:
        """Return the top directory."""
        return self._entry(b"", _ROOT)

    def identity(self, directory: Entry) -> object:
        """Return what tells a directory from all others."""
        return directory.inode

    def extents(self, file: Entry) -> list[Extent] | None:
        """Return where a file's bytes lie, in order; None if they lie nowhere as they are. Raises: Unreadable."""
        inode: _Inode = file.handle
        if inode.flags & _ENCRYPTED:
            raise Unreadable("it is encrypted")
        if inode.flags & _IS_INLINE:
            return None
        block_size, size = self._block_size, file.size
        found: list[Extent] = []
        at = 0
        for start, block, length in self._runs(inode):
            place = start * block_size
            if place >= size:
                break
            if not block:
                continue
            if place > at:
                found.append((place - at, None))
            end = min(size, place + length * block_size)
            offset = block * block_size
            if offset + end - place > self._size:
                raise Unreadable(_BEHIND)
            if found and place == at and found[-1][1] is not None and found[-1][1] + found[-1][0] == offset:
                found[-1] = (found[-1][0] + end - place, found[-1][1])
            else:
                found.append((end - place, offset))
            at = end
        if at < size:
            found.append((size - at, None))
        return found

    def data(self, file: Entry) -> Iterator[bytes]:
        """Yield a file's bytes. Raises: Unreadable."""
        return self._data(file.handle)

    def _data(self, inode: _Inode) -> Iterator[bytes]:
        if inode.flags & _IS_INLINE:
            data = inode.map + dict(self._all_attributes(inode)).get(_DATA, b"")
            if inode.size > max(len(data), self._block_size):
                raise Unreadable(f"it says that it has {inode.size} bytes in its inode")
            yield data[: inode.size].ljust(inode.size, b"\0")
            return
        at = 0
        for start, block, length in self._runs(inode):
            place = start * self._block_size
            while at < min(place, inode.size):
                count = min(_STEP, place - at, inode.size - at)
                yield bytes(count)
                at += count
            end = min(inode.size, (start + length) * self._block_size)
            while block and at < end:
                count = min(_STEP, end - at)
                part = self._read_volume(block * self._block_size + at - place, count)
                if len(part) != count:
                    raise Unreadable(_BEHIND)
                yield part
                at += count
        while at < inode.size:
            count = min(_STEP, inode.size - at)
            yield bytes(count)
            at += count

    # Directories.

    def entries(self, directory: Entry) -> Iterator[Entry]:
        """Yield what is in a directory. Raises: Unreadable, after all that can be read."""
        inode: _Inode = directory.handle
        if inode.flags & _ENCRYPTED:
            raise Unreadable("its names are encrypted")
        problem = ""
        for part, fault in self._parts_of_directory(inode):
            names, broken = self._names(part)
            problem = problem or fault or broken
            for name, number in names:
                try:
                    entry = self._entry(name, number)
                except Unreadable as error:
                    entry = Entry(name, 0, problem=str(error))
                yield entry
        if problem:
            raise Unreadable(problem)

    def _parts_of_directory(self, inode: _Inode) -> Iterator[tuple[bytes, str]]:
        """Yield what holds entries, or nothing and what is wrong: no entry goes from one part into another."""
        if inode.flags & _IS_INLINE:
            # Four bytes for the directory above, then entries, which go on in an attribute.
            yield inode.map[4 : max(4, min(inode.size, len(inode.map)))], ""
            yield dict(self._all_attributes(inode)).get(_DATA, b""), ""
            return
        left = -(-inode.size // self._block_size)
        for start, block, length in self._runs(inode):
            if start >= left or not block:
                continue
            for place in range(min(length, left - start)):
                data = self._block(block + place)
                fault = self._sums.fault_in_directory(inode.number, inode.raw, start + place, data)
                yield b"" if fault else data, fault

    def _names(self, part: bytes) -> tuple[list[tuple[bytes, int]], str]:
        """Return the names in a part of a directory, each with its inode, and what is wrong with it."""
        found: list[tuple[bytes, int]] = []
        at = 0
        while at + _NAME.size <= len(part):
            number, length, name_length, kind = _NAME.unpack_from(part, at)
            if self._block_size == 65536:
                length = 65536 if length in (0, 65535) else (length & 65532) | (length & 3) << 16
            if not self._incompat & _FILE_TYPE:
                name_length |= kind << 8
            if length < _NAME.size or length % 4 or at + length > len(part) or name_length + _NAME.size > length:
                return found, f"an entry of it at byte {at} of a block makes no sense"
            if number:
                name = part[at + _NAME.size : at + _NAME.size + name_length]
                if name not in (b".", b".."):
                    found.append((name, number))
            at += length
        return found, ""

    # Attributes.

    def xattrs(self, entry: Entry) -> list[tuple[bytes, bytes]]:
        """Return extended attributes, in order of names. Raises: Unreadable."""
        inode: _Inode = entry.handle
        if not inode.attributes_at and self._in_inode(inode) is None:
            return []
        found: dict[bytes, bytes] = {}
        for name, value in self._all_attributes(inode):
            if name != _DATA:
                found.setdefault(name, value)
        return sorted(found.items())

    def _in_inode(self, inode: _Inode) -> int | None:
        """Return where the attributes begin that are in an inode itself; None: it has none."""
        raw = inode.raw
        if len(raw) <= _PLAIN_INODE + 4:
            return None
        at = _PLAIN_INODE + (raw[_PLAIN_INODE] | raw[_PLAIN_INODE + 1] << 8)
        if at + 8 > len(raw) or int.from_bytes(raw[at : at + 4], "little") != _ATTRIBUTES_MAGIC:
            return None
        return at + 4

    def _all_attributes(self, inode: _Inode) -> list[tuple[bytes, bytes]]:
        start = self._in_inode(inode)
        found = [] if start is None else list(self._attributes_in(inode.raw, start, start))
        if inode.attributes_at:
            shared = self._attributes.get(inode.attributes_at)
            if shared is None:
                block = self._block(inode.attributes_at)
                magic, _, count = struct.unpack_from("<III", block)
                if magic != _ATTRIBUTES_MAGIC or count != 1:
                    raise Unreadable("the block of its attributes is none")
                self._sums.require_attributes(inode.attributes_at, block)
                shared = list(self._attributes_in(block, 32, 0))
                if len(self._attributes) >= _MOST_ATTRIBUTE_BLOCKS:
                    self._attributes.clear()
                self._attributes[inode.attributes_at] = shared
            found += shared
        return found

    def _attributes_in(self, data: bytes, at: int, base: int) -> Iterator[tuple[bytes, bytes]]:
        """Yield what a table of attributes has. base: what places of values count from."""
        while data[at : at + 4].strip(b"\0"):
            if at + _ATTRIBUTE.size > len(data):
                raise Unreadable("its attributes make no sense")
            length, prefix, place, holder, size, _ = _ATTRIBUTE.unpack_from(data, at)
            name = data[at + _ATTRIBUTE.size : at + _ATTRIBUTE.size + length]
            at += _ATTRIBUTE.size + (length + 3 & ~3)
            if len(name) < length or size > _MOST_VALUE or (not holder and base + place + size > len(data)):
                raise Unreadable("its attributes make no sense")
            if prefix not in _PREFIXES:
                continue
            value = self._held(holder, size) if holder else data[base + place : base + place + size]
            yield _PREFIXES[prefix] + name, _acl(value) if prefix in _ACLS else value

    def _held(self, number: int, size: int) -> bytes:
        """Return the value of an attribute that has an inode of its own."""
        inode = self._inode(number)
        if not inode.flags & _IS_VALUE or inode.size != size:
            raise Unreadable("the value of an attribute is not where it should be")
        return b"".join(self._data(inode))


class _Runs:
    """What a map of blocks leads to, one number for each block."""

    def __init__(self, blocks: int, wanted: int) -> None:
        """Take how many blocks there are, and how many of the file are wanted."""
        self.found: list[tuple[int, int, int]] = []
        self.wanted = wanted
        self._blocks = blocks
        self._entered: set[int] = set()
        self._left = blocks

    def enter(self, number: int) -> None:
        """Note a block of numbers, which no other may lead to. Raises: Unreadable."""
        if number in self._entered:
            raise Unreadable("the map of its blocks goes in circles")
        self._entered.add(number)

    def add(self, at: int, numbers: tuple[int, ...]) -> None:
        """Add blocks of the file, in order; 0: a hole. Raises: Unreadable."""
        first, start, length = self.found.pop() if self.found else (0, 0, 0)
        for place, block in enumerate(numbers, at):
            if not block:
                continue
            self._left -= 1
            if length and first + length == place and start + length == block:
                length += 1
                continue
            if length:
                self.found.append((first, start, length))
            first, start, length = place, block, 1
            if block >= self._blocks:
                raise Unreadable(f"it refers to the block {block}, which is nowhere")
        if length:
            self.found.append((first, start, length))
        if self._left < 0:
            raise Unreadable("it has more blocks than there are")


_KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFSOCK)


def open_ext(read: Read, size: int) -> Ext | None:
    """Return the file system in a volume; None if it is no ext. Raises: Unreadable."""
    block = read(1024, 1024)
    if len(block) < 1024 or struct.unpack_from("<H", block, 0x38)[0] != _MAGIC:
        return None
    return Ext(read, size, block)


def _start_of_inodes(descriptor: bytes) -> int:
    """Return where a group's inodes begin."""
    low: int
    high: int
    (low,), (high,) = struct.unpack_from("<I", descriptor, 8), struct.unpack_from("<I", descriptor.ljust(44, b"\0"), 40)
    return low | high << 32


def _signed(seconds: int) -> int:
    return seconds - (1 << 32) if seconds & 0x80000000 else seconds


def _device(map_: bytes) -> tuple[int, int]:
    old, new = struct.unpack_from("<II", map_)
    if old:
        return old >> 8 & 0xFF, old & 0xFF
    return new >> 8 & 0xFFF, new & 0xFF | new >> 12 & 0xFFF00


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1


def _acl(stored: bytes) -> bytes:
    """Return an ACL as getxattr(2) gives it, from the form on the disk."""
    plain = struct.pack("<I", 2)
    at = 4
    while at + 4 <= len(stored):
        tag, permissions = struct.unpack_from("<HH", stored, at)
        at += 4
        who = 0xFFFFFFFF
        if tag in (0x02, 0x08):
            if at + 4 > len(stored):
                raise Unreadable("its ACL is cut short")
            (who,) = struct.unpack_from("<I", stored, at)
            at += 4
        plain += struct.pack("<HHI", tag, permissions, who)
    return plain
