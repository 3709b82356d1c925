"""XFS, versions 4 and 5: reading only, without its journal.

What is read is hostile: every count and place is checked against the volume, and trees of blocks are followed no deeper
and no wider than they can be.
Source: "XFS Algorithms & Data Structures" (kernel.org, 3rd edition), and fs/xfs/libxfs/xfs_format.h,
xfs_da_format.h of Linux for what came later (bigtime, nrext64).
"""

import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

from backupfs.disks import superblocks
from backupfs.disks.crc32c import SEED, crc32c
from backupfs.disks.filesystem import Entry, Extent, Read, Unreadable, append_extent

_MAGIC = b"XFSB"
_INODE_MAGIC = b"IN"
_VERSION_5 = 5
# Features that change what is read here, and those whose absence would.
_INCOMPAT_FTYPE, _INCOMPAT_META_UUID, _INCOMPAT_KNOWN = 0x1, 0x4, 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80
_FEATURES2_FTYPE = 0x200
_FLAGS2_BIGTIME, _FLAGS2_NREXT64 = 1 << 3, 1 << 4
_FLAG_REALTIME = 1
_BIGTIME_EPOCH_S = 1 << 31
_DEVICE, _LOCAL, _EXTENTS, _BTREE = range(4)
_BMAP_MAGICS = {b"BMAP": 24, b"BMA3": 72}  # with the sizes of their headers


class _Mark(NamedTuple):
    """Where version 5 keeps what a block or inode is known by."""

    sum: int
    filesystem: int
    inode: int  # that it belongs to
    place: int  # in the file system; -1: nowhere


_OF_INODE, _OF_BMAP, _OF_DIRECTORY = _Mark(100, 160, 152, -1), _Mark(64, 40, 56, 24), _Mark(4, 24, 40, 8)
_OF_ATTRIBUTES, _OF_REMOTE = _Mark(12, 32, 48, 16), _Mark(12, 16, 32, 40)
_SUM_OF_SUPERBLOCK = 224
_DIRECTORY_MAGICS = {b"XD2B": 16, b"XD2D": 16, b"XDB3": 64, b"XDD3": 64}
_BLOCK_DIRECTORIES = (b"XD2B", b"XDB3")
_LEAF_OFFSET = 1 << 35  # where a directory's entries end and its hash tables begin
_ATTRIBUTE_LEAVES = {0xFBEE: (12, 32), 0x3BEE: (56, 80)}  # magic → place of the count, size of the header
_ATTRIBUTE_NODES = {0xFEBE: (12, 16), 0x3EBE: (56, 64)}  # the same of what is above them; the level follows the count
_MAGICS_OF_5 = (0x3BEE, 0x3EBE)
_MOST_DEPTH = 9
_MOST_EXTENTS = 1 << 24
_MOST_LINK = 1024
_MOST_VALUE = 1 << 16
# The head of a block of a remote value, or of an extent of a link, in version 5: magic, how many bytes came before, how
# many follow.
_HEAD, _SIZE_OF_HEAD = struct.Struct(">4sII"), 56
_VALUE_MAGIC, _LINK_MAGIC = b"XARM", b"XSLM"
_OF_VALUE, _OF_LINK = "the value of an attribute", "the target of a link"
_PREFIXES = {0: b"user.", 2: b"trusted.", 4: b"security."}
_ACLS = {b"trusted.SGI_ACL_FILE": b"system.posix_acl_access", b"trusted.SGI_ACL_DEFAULT": b"system.posix_acl_default"}
_LOG_MAGIC = 0xFEEDBABE
_UNMOUNT = 0x20
_PER_HEADER = 32 << 10
_STEP = 1 << 20


class _Extent(NamedTuple):
    offset: int  # in the file, in blocks
    block: int  # in the file system, as it counts
    blocks: int
    is_unwritten: bool


class _Inode(NamedTuple):
    number: int
    raw: bytes
    mode: int
    form: int
    size: int
    extents: int  # of data
    fork_at: int  # where the attributes begin; 0: nowhere
    attribute_form: int
    attribute_extents: int
    flags: int


class Xfs:
    """A file system."""

    form = "xfs"

    def __init__(self, read: Read, size: int) -> None:
        """Take the volume. Raises: Unreadable."""
        self._read_volume = read
        block = read(0, 512)
        self._block_size, blocks = struct.unpack_from(">IQ", block, 4)
        log_start, self._root = struct.unpack_from(">QQ", block, 48)
        self._group_blocks, self._groups = struct.unpack_from(">II", block, 84)
        (log_blocks, version, _, self._inode_size, self._per_block) = struct.unpack_from(">IHHHH", block, 96)
        self._per_block_log, self._group_log = block[123], block[124]
        (self._directory_size,) = (self._block_size << block[192],)
        features2, _, _, _, incompatible = struct.unpack_from(">IIIII", block, 200)
        self._is_5 = version & 0xF == _VERSION_5
        self._has_types = bool(incompatible & _INCOMPAT_FTYPE if self._is_5 else features2 & _FEATURES2_FTYPE)
        has_own_id = self._is_5 and incompatible & _INCOMPAT_META_UUID
        self._id = block[248:264] if has_own_id else block[32:48]
        (sector,) = struct.unpack_from(">H", block, 102)
        if self._is_5 and not _has_sum(read(0, sector), _SUM_OF_SUPERBLOCK):
            copy = superblocks.copy_of_xfs(read, size)
            where = "" if copy is None else f", a copy is at byte {copy.place:,}"
            raise Unreadable(f"its superblock has a wrong checksum{where}")
        if self._is_5 and incompatible & ~_INCOMPAT_KNOWN:
            raise Unreadable(f"it has features of XFS that are not known ({incompatible:#x})")
        sane = (
            512 <= self._block_size <= 65536
            and self._block_size & (self._block_size - 1) == 0
            and 256 <= self._inode_size <= 2048
            and self._per_block == self._block_size // self._inode_size == 1 << self._per_block_log
            and 0 < self._group_blocks <= 1 << self._group_log <= 1 << 31
            and self._groups > 0
            and self._directory_size <= 1 << 16
        )
        if not sane:
            raise Unreadable("its superblock makes no sense")
        is_clean = not log_start or self._is_clean(log_start, log_blocks)
        remarks = [] if is_clean else ["it was not unmounted: files are shown as of before its journal is replayed"]
        if blocks * self._block_size > size:
            remarks.append("it is larger than the disk, which is cut short: some files cannot be whole")
        self.remarks: tuple[str, ...] = tuple(remarks)

    # Blocks.

    def _place(self, block: int) -> int:
        """Return where a block is in the volume: numbers of blocks have gaps between groups."""
        group, within = block >> self._group_log, block & ((1 << self._group_log) - 1)
        if group >= self._groups or within >= self._group_blocks:
            raise Unreadable(f"it refers to the block {block}, which is nowhere")
        return int((group * self._group_blocks + within) * self._block_size)

    def _read(self, place: int, length: int) -> bytes:
        data = self._read_volume(place, length)
        if len(data) != length:
            raise Unreadable("it refers to what is behind the end of the volume")
        return data

    def _is_clean(self, start: int, blocks: int) -> bool:
        """Tell whether the journal ends with an unmount."""
        length = min(blocks * self._block_size, 1 << 31)
        newest, last = (-1, -1), -1
        place = self._place(start)
        for at in range(0, length, _STEP):
            part = self._read_volume(place + at, min(_STEP, length - at))
            for sector in range(0, len(part) - 511, 512):
                magic, cycle = struct.unpack_from(">II", part, sector)
                if magic == _LOG_MAGIC and (cycle, at + sector) > newest:
                    newest, last = (cycle, at + sector), at + sector
        if last < 0:
            return True
        header = self._read_volume(place + last, 512)
        version, operations, largest = (struct.unpack_from(">I", header, at)[0] for at in (8, 40, 320))
        # Where records may be larger (logbsize), each has a sector of header for so much; a journal goes round.
        headers = -(-largest // _PER_HEADER) if version & 2 and largest > _PER_HEADER else 1
        first = self._read_volume(place + (last + headers * 512) % length, 16)
        return operations == 1 and len(first) == 16 and bool(first[9] & _UNMOUNT)

    def _require_own(self, data: bytes, mark: _Mark, number: int, place: int, what: str) -> None:
        """Compare what version 5 knows a block or inode by: what went to a wrong place has the right sum, too.

        number: of the inode. place: where it was read in the volume. Raises: Unreadable.
        """
        if not _has_sum(data, mark.sum):
            raise Unreadable(f"{what} has a wrong checksum")
        (owner,) = struct.unpack_from(">Q", data, mark.inode)
        (sector,) = struct.unpack_from(">Q", data, mark.place) if mark.place >= 0 else (place // 512,)
        own_id = data[mark.filesystem : mark.filesystem + 16]
        if (own_id, owner, sector) != (self._id, number, place // 512):
            raise Unreadable(f"{what} is another one, or an old one")

    # Inodes.

    def _inode(self, number: int) -> _Inode:
        block, within = number >> self._per_block_log, number & (self._per_block - 1)
        place = self._place(block) + within * self._inode_size
        raw = self._read(place, self._inode_size)
        if raw[:2] != _INODE_MAGIC:
            raise Unreadable(f"its inode {number} is none")
        if self._is_5:
            self._require_own(raw, _OF_INODE, number, place, f"its inode {number}")
        (mode,) = struct.unpack_from(">H", raw, 2)
        version, form = raw[4], raw[5]
        (size,) = struct.unpack_from(">Q", raw, 56)
        extents, attribute_extents = struct.unpack_from(">IH", raw, 76)
        fork, attribute_form = raw[82], raw[83]
        (flags,) = struct.unpack_from(">H", raw, 90)
        start = 176 if version >= 3 else 100
        if version >= 3 and struct.unpack_from(">Q", raw, 120)[0] & _FLAGS2_NREXT64:
            (extents,) = struct.unpack_from(">Q", raw, 24)
            (attribute_extents,) = struct.unpack_from(">I", raw, 76)
        fork_at = start + fork * 8 if fork else 0
        if fork_at >= self._inode_size or extents > _MOST_EXTENTS or attribute_extents > _MOST_EXTENTS:
            raise Unreadable(f"its inode {number} makes no sense")
        return _Inode(number, raw, mode, form, size, extents, fork_at, attribute_form, attribute_extents, flags)

    def _data_fork(self, inode: _Inode) -> bytes:
        return inode.raw[176 if inode.raw[4] >= 3 else 100 : inode.fork_at or self._inode_size]

    def _times(self, raw: bytes) -> tuple[int, int]:
        is_big = raw[4] >= 3 and struct.unpack_from(">Q", raw, 120)[0] & _FLAGS2_BIGTIME
        found = []
        for place in (40, 48):
            if is_big:
                (count,) = struct.unpack_from(">Q", raw, place)
                found.append(count - _BIGTIME_EPOCH_S * 10**9)
            else:
                seconds, part = struct.unpack_from(">iI", raw, place)
                found.append(seconds * 10**9 + part)
        return found[0], found[1]

    # Extents.

    def _extents_of(self, inode: _Inode, form: int, fork: bytes, count: int) -> list[_Extent]:
        if form == _EXTENTS:
            if count * 16 > len(fork):
                raise Unreadable("an inode has more extents than room for them")
            found = [_unpacked(fork, at * 16) for at in range(count)]
        elif form == _BTREE:
            found = list(self._tree(inode, fork))
        else:
            raise Unreadable("its inode has no extents")
        return sorted(found)

    def _tree(self, inode: _Inode, fork: bytes) -> Iterator[_Extent]:
        level, records = struct.unpack_from(">HH", fork)
        most = (len(fork) - 4) // 16
        if not 0 < level <= _MOST_DEPTH or records > most:
            raise Unreadable("the root of a tree of extents makes no sense")
        stack = [(block, level - 1) for block in struct.unpack_from(f">{records}Q", fork, 4 + most * 8)]
        seen: set[int] = set()
        total = 0
        while stack:
            block, wanted = stack.pop()
            if block in seen:
                raise Unreadable("a tree of extents goes in circles")
            seen.add(block)
            place = self._place(block)
            data = self._read(place, self._block_size)
            header = _BMAP_MAGICS.get(data[:4])
            if header is None:
                raise Unreadable("a block of a tree of extents is none")
            if self._is_5:
                self._require_own(data, _OF_BMAP, inode.number, place, "a block of a tree of extents")
            level, records = struct.unpack_from(">HH", data, 4)
            most = (self._block_size - header) // 16
            total += records
            if level != wanted or records > most or total > _MOST_EXTENTS:
                raise Unreadable("a block of a tree of extents makes no sense")
            if level:
                pointers = struct.unpack_from(f">{records}Q", data, header + most * 8)
                stack += [(pointer, level - 1) for pointer in pointers]
            else:
                for at in range(records):
                    yield _unpacked(data, header + at * 16)

    def _content(self, extents: list[_Extent], start: int, length: int) -> bytes:
        """Return bytes of a fork; what has no block is zeros."""
        data = bytearray(length)
        for extent in extents:
            if extent.is_unwritten:
                continue
            low = max(start, extent.offset * self._block_size)
            high = min(start + length, (extent.offset + extent.blocks) * self._block_size)
            if low < high:
                place = self._place(extent.block) + low - extent.offset * self._block_size
                data[low - start : high - start] = self._read(place, high - low)
        return bytes(data)

    def _place_in(self, extents: list[_Extent], start: int) -> int:
        """Return where in the volume a block of a fork is, by the byte that it begins at; -1: nowhere."""
        block = start // self._block_size
        for extent in extents:
            if extent.offset <= block < extent.offset + extent.blocks:
                return self._place(extent.block + block - extent.offset)
        return -1

    # What a file system gives.

    def top(self) -> Entry:
        """Return the top directory."""
        return self._entry(b"", self._root)

    def _entry(self, name: bytes, number: int) -> Entry:
        inode = self._inode(number)
        uid, gid, nlink = struct.unpack_from(">III", inode.raw, 8)
        if inode.raw[4] == 1:
            (nlink,) = struct.unpack_from(">H", inode.raw, 6)
        mtime_ns, ctime_ns = self._times(inode.raw)
        kind = stat.S_IFMT(inode.mode)
        target, device = b"", (0, 0)
        if kind == stat.S_IFLNK:
            target = self._target(inode)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            (number_of_device,) = struct.unpack_from(">I", self._data_fork(inode))
            device = number_of_device >> 18, number_of_device & 0x3FFFF
        return Entry(
            name, inode.mode, uid, gid, nlink, number, inode.size, mtime_ns, ctime_ns, target, device, inode
        )  # fmt: skip

    def _target(self, inode: _Inode) -> bytes:
        if inode.size > _MOST_LINK:
            raise Unreadable("it is a link that is too long")
        if inode.form == _LOCAL:
            return self._data_fork(inode)[: inode.size]
        found, has_heads = b"", False
        for extent in self._extents_of(inode, inode.form, self._data_fork(inode), inode.extents):
            if extent.blocks * self._block_size > _MOST_VALUE:
                raise Unreadable("it is a link that is too long")
            part = self._content([extent], extent.offset * self._block_size, extent.blocks * self._block_size)
            has_heads = has_heads or (self._is_5 and part[:4] == _LINK_MAGIC)
            if has_heads:
                part = self._behind_head(part, _LINK_MAGIC, inode, len(found), self._place(extent.block), _OF_LINK)
            found += part
        # Some mkfs.xfs forget the heads; one that is garbled has zeros in it.
        if len(found) < inode.size or (self._is_5 and b"\0" in found[: inode.size]):
            raise Unreadable(f"{_OF_LINK} has no head that makes sense")
        return found[: inode.size]

    def _value(self, inode: _Inode, extents: list[_Extent], block: int, length: int) -> bytes:
        """Return the value of an attribute that lies in blocks, which have heads in version 5."""
        found = b""
        while len(found) < length:
            part = self._content(extents, block * self._block_size, self._block_size)
            if self._is_5:
                place = self._place_in(extents, block * self._block_size)
                part = self._behind_head(part, _VALUE_MAGIC, inode, len(found), place, _OF_VALUE)
            found += part
            block += 1
        return found[:length]

    def _behind_head(self, block: bytes, wanted: bytes, inode: _Inode, at: int, place: int, what: str) -> bytes:
        """Return the bytes behind a head; at: how many came before. Raises: Unreadable."""
        magic, start, count = _HEAD.unpack_from(block)
        if magic != wanted:
            raise Unreadable(f"{what} has no head that makes sense")
        self._require_own(block, _OF_REMOTE, inode.number, place, what)
        if start != at or not 0 < count <= len(block) - _SIZE_OF_HEAD:
            raise Unreadable(f"{what} has a head that makes no sense")
        return block[_SIZE_OF_HEAD : _SIZE_OF_HEAD + count]

    def identity(self, directory: Entry) -> object:
        """Return the inode's number."""
        return directory.inode

    def entries(self, directory: Entry) -> Iterator[Entry]:
        """Yield what is in a directory."""
        inode: _Inode = directory.handle
        names = self._short_names(inode) if inode.form == _LOCAL else self._long_names(inode)
        for name, number in names:
            if name not in (b".", b".."):
                try:
                    yield self._entry(name, number)
                except (Unreadable, struct.error) as error:
                    # One that is garbled must not hide the others.
                    yield Entry(name, 0, problem=str(error))

    def _short_names(self, inode: _Inode) -> Iterator[tuple[bytes, int]]:
        fork = self._data_fork(inode)[: inode.size]
        if len(fork) < 6:
            raise Unreadable("a directory has no entries at all")
        count, large = fork[0], fork[1]
        width = 8 if large else 4
        at = 2 + width
        for _ in range(count):
            end = at + 3 + (fork[at] if at < len(fork) else 0)
            name = fork[at + 3 : end]
            end += 1 if self._has_types else 0
            if not name or end + width > len(fork):
                raise Unreadable("a directory in an inode is cut short")
            yield name, int.from_bytes(fork[end : end + width], "big")
            at = end + width

    def _long_names(self, inode: _Inode) -> Iterator[tuple[bytes, int]]:
        extents = self._extents_of(inode, inode.form, self._data_fork(inode), inode.extents)
        done: set[int] = set()
        for extent in extents:
            first = extent.offset * self._block_size // self._directory_size
            last = -(-(extent.offset + extent.blocks) * self._block_size // self._directory_size)
            for number in range(first, last):
                start = number * self._directory_size
                if start < _LEAF_OFFSET and number not in done:
                    done.add(number)
                    block = self._content(extents, start, self._directory_size)
                    yield from self._names_in(inode, block, self._place_in(extents, start))

    def _names_in(self, inode: _Inode, block: bytes, place: int) -> Iterator[tuple[bytes, int]]:
        header = _DIRECTORY_MAGICS.get(block[:4])
        if header is None:
            raise Unreadable("a block of a directory is none")
        if self._is_5:
            self._require_own(block, _OF_DIRECTORY, inode.number, place, "a block of a directory")
        end = len(block)
        if block[:4] in _BLOCK_DIRECTORIES:
            count, _ = struct.unpack_from(">II", block, end - 8)
            end -= 8 + count * 8
        at = header
        while at + 8 <= end:
            if block[at : at + 2] == b"\xff\xff":
                (length,) = struct.unpack_from(">H", block, at + 2)
            else:
                number, size = struct.unpack_from(">QB", block, at)
                length = -(-(8 + 1 + size + self._has_types + 2) // 8) * 8
                if at + length > end or not size:
                    raise Unreadable("an entry of a directory goes beyond its block")
                yield block[at + 9 : at + 9 + size], number
            if length < 8 or length % 8:
                raise Unreadable("a block of a directory makes no sense")
            at += length

    def extents(self, file: Entry) -> list[Extent] | None:
        """Return where a file's bytes lie; what is allocated and was never written is a hole."""
        inode: _Inode = file.handle
        if inode.flags & _FLAG_REALTIME:
            raise Unreadable("it lies on a realtime device")
        found: list[Extent] = []
        at = 0
        for extent in self._extents_of(inode, inode.form, self._data_fork(inode), inode.extents):
            start = extent.offset * self._block_size
            length = min(extent.blocks * self._block_size, file.size - start)
            if length <= 0:
                break
            if start < at:
                raise Unreadable("its extents overlap")
            append_extent(found, start - at, None)
            place = self._place(extent.block)
            self._place(extent.block + extent.blocks - 1)
            append_extent(found, length, None if extent.is_unwritten else place)
            at = start + length
        append_extent(found, file.size - at, None)
        return found

    def data(self, file: Entry) -> Iterator[bytes]:
        """Refuse: all bytes lie somewhere."""
        raise Unreadable(f"the bytes of {file.inode} lie nowhere")

    # Attributes.

    def xattrs(self, entry: Entry) -> list[tuple[bytes, bytes]]:
        """Return the attributes, ACLs in the kernel's form."""
        inode: _Inode = entry.handle
        if not inode.fork_at:
            return []
        fork = inode.raw[inode.fork_at :]
        if inode.attribute_form == _LOCAL:
            found = list(_short_attributes(fork))
        elif inode.attribute_extents:
            found = list(self._long_attributes(inode, fork))
        else:
            found = []
        shown = []
        for flags, name, value in found:
            prefix = _PREFIXES.get(flags & 0x0E)
            if prefix is None or flags & 0x80:
                continue  # a pointer to a parent, or one that was never finished
            key = prefix + name
            shown.append((_ACLS[key], _acl(value)) if key in _ACLS else (key, value))
        return sorted(shown)

    def _long_attributes(self, inode: _Inode, fork: bytes) -> Iterator[tuple[int, bytes, bytes]]:
        extents = self._extents_of(inode, inode.attribute_form, fork, inode.attribute_extents)
        stack: list[tuple[int, int | None]] = [(0, None)]  # blocks of the fork, with the levels that they must have
        seen: set[int] = set()
        while stack:
            number, wanted = stack.pop()
            if number in seen:
                raise Unreadable("the tree of its attributes goes in circles")
            seen.add(number)
            start = number * self._block_size
            block = self._content(extents, start, self._block_size)
            magic = int.from_bytes(block[8:10], "big")
            leaf, node = _ATTRIBUTE_LEAVES.get(magic), _ATTRIBUTE_NODES.get(magic)
            if (leaf is None and node is None) or self._is_5 != (magic in _MAGICS_OF_5):
                raise Unreadable("a block of attributes is none")
            if self._is_5:
                place = self._place_in(extents, start)
                self._require_own(block, _OF_ATTRIBUTES, inode.number, place, "a block of attributes")
            if leaf is not None and wanted in (None, 0):
                yield from self._attributes_in(inode, block, extents, *leaf)
                continue
            count, level = struct.unpack_from(">HH", block, node[0]) if node is not None else (0, 0)
            if node is None or not 0 < level <= _MOST_DEPTH or wanted not in (None, level):
                raise Unreadable("a block of attributes makes no sense")
            if node[1] + count * 8 > len(block):
                raise Unreadable("a block of attributes makes no sense")
            below = [before for _, before in struct.iter_unpack(">II", block[node[1] : node[1] + count * 8])]
            stack += ((one, level - 1) for one in reversed(below))

    def _attributes_in(
        self, inode: _Inode, block: bytes, extents: list[_Extent], count_at: int, header: int
    ) -> Iterator[tuple[int, bytes, bytes]]:
        (count,) = struct.unpack_from(">H", block, count_at)
        if header + count * 8 > len(block):
            raise Unreadable("a block of attributes makes no sense")
        for number in range(count):
            _, at, flags = struct.unpack_from(">IHB", block, header + number * 8)
            # One of few bytes may be the last thing in the block.
            if at + (3 if flags & 1 else 9) > len(block):
                raise Unreadable("an attribute lies outside of its block")
            if flags & 1:
                size, length = struct.unpack_from(">HB", block, at)
                name = block[at + 3 : at + 3 + length]
                value = block[at + 3 + length : at + 3 + length + size]
                if len(value) != size:
                    raise Unreadable("an attribute lies outside of its block")
            else:
                first, size, length = struct.unpack_from(">IIB", block, at)
                name = block[at + 9 : at + 9 + length]
                if size > _MOST_VALUE:
                    raise Unreadable("an attribute is too large")
                value = self._value(inode, extents, first, size)
            yield flags & ~1, name, value


def open_xfs(read: Read, size: int) -> Xfs | None:
    """Return the file system in a volume; None if it is no XFS. Raises: Unreadable."""
    return Xfs(read, size) if read(0, 4) == _MAGIC else None


def _has_sum(data: bytes, place: int) -> bool:
    """Tell whether what has its sum at a place is what was written."""
    found = crc32c(SEED, data[:place] + bytes(4) + data[place + 4 :]) ^ SEED
    return found.to_bytes(4, "little") == data[place : place + 4]


def _unpacked(data: bytes, at: int) -> _Extent:
    high, low = struct.unpack_from(">QQ", data, at)
    return _Extent(
        high >> 9 & ((1 << 54) - 1), (high & 0x1FF) << 43 | low >> 21, low & ((1 << 21) - 1), bool(high >> 63)
    )  # fmt: skip


def _short_attributes(fork: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    if len(fork) < 4:
        return
    count = fork[2]
    at = 4
    for _ in range(count):
        if at + 3 > len(fork):
            raise Unreadable("attributes in an inode are cut short")
        length, size, flags = fork[at : at + 3]
        end = at + 3 + length + size
        if end > len(fork):
            raise Unreadable("attributes in an inode are cut short")
        yield flags, fork[at + 3 : at + 3 + length], fork[at + 3 + length : end]
        at = end


def _acl(stored: bytes) -> bytes:
    """Return an ACL as getxattr(2) gives it."""
    (count,) = struct.unpack_from(">I", stored)
    if 4 + count * 12 > len(stored):
        raise Unreadable("its ACL is cut short")
    plain = struct.pack("<I", 2)
    for number in range(count):
        tag, who, permissions = struct.unpack_from(">IIH", stored, 4 + number * 12)
        plain += struct.pack("<HHI", tag, permissions, who if tag in (0x02, 0x08) else 0xFFFFFFFF)
    return plain
