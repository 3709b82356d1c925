"""A second reader of repositories, written from docs/format.rst alone: it imports nothing of backupfs.

It is slow, keeps everything in memory, and checks all that the document says must hold.

    python tests/independent_reader.py FOLDER PASSWORD [SNAPSHOT]     lists snapshots, or the files of one
"""

import hmac
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgpack
import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

HEADER = struct.Struct("<4sBBBBII32s")
FRAME = struct.Struct("<4sBBHII")
TRAILER = struct.Struct("<QII8s")
ROW = struct.Struct("<32sIIIII")
PACK_ROW = struct.Struct("<32sQ48s")
FAN_OUT_ROW = struct.Struct("<32sI")
STAT_ROW = struct.Struct("<IIIIQQqIqI")

ROLE_OF_KIND = {1: "data", 2: "tree", 3: "index", 4: "index", 5: "tree", 6: "tree", 7: "maintain"}
SUITES = {1: AESGCM, 2: ChaCha20Poly1305}
BLOCK, PAGE, RECORD, DIRECTORY = 1, 2, 3, 4
MOST_PLAIN = 64 << 20

FILE, TREE, SYMLINK = 0o100000, 0o040000, 0o120000
DEVICES = (0o020000, 0o060000)


class FormatError(Exception):
    """The bytes are not what docs/format.rst says."""


def require(condition: object, message: str) -> None:
    """Raise FormatError unless the condition holds."""
    if not condition:
        raise FormatError(message)


def hashed(data: bytes, key: bytes | None = None) -> bytes:
    """Return the plain or the keyed BLAKE3."""
    return blake3(data, key=key).digest()


def read_record(data: bytes) -> list:
    """Return the fields of a record, which must be in the one form that a writer may choose."""
    try:
        fields = msgpack.unpackb(data, raw=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise FormatError(f"no record: {error}") from error
    require(isinstance(fields, list), "a record is an array")
    require(msgpack.packb(fields) == data, "a record is not in its shortest form")
    return fields


@dataclass
class Snapshot:
    """A snapshot's record, field by field."""

    snapshot_id: str
    kind: int
    host_id: bytes
    host: str
    sequence: int
    previous: bytes
    time: int
    store_time: int
    paths: list[bytes]
    tags: list[str]
    parent: bytes
    root: list
    statistics: list[int]
    user: str
    program: str
    traits: int
    is_forgotten: bool = False

    @property
    def tree(self) -> bytes:
        """The root page of the tree of `/`."""
        return self.root[0]


@dataclass
class Node:
    """One entry of a directory."""

    name: bytes
    mode: int
    uid: int
    gid: int
    nlink: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    content: bytes | list
    flags: int
    owner: bytes
    group: bytes
    xattrs: list[tuple[bytes, bytes]]
    filesystem: int

    @property
    def type(self) -> int:
        """The type's bits of the mode."""
        return self.mode & 0o170000


@dataclass
class SealedObject:
    """An object's header and key, which open its units."""

    data: bytes
    kind: int
    keys: dict[tuple[str, int], bytes]
    header: bytes = b""  # from a reference; else the object's own

    def __post_init__(self) -> None:
        self.header = self.header or self.data[:48]
        require(len(self.header) == 48, "no header")
        magic, version, kind, suite, key_form, epoch, _, salt = HEADER.unpack(self.header)
        require(magic == b"BKFS" and version == 1 and key_form == 0 and suite in SUITES, "an unknown object")
        require(kind == self.kind, f"kind {kind} instead of {self.kind}")
        role_key = self.keys[ROLE_OF_KIND[kind], epoch]
        self.cipher = SUITES[suite](hashed(b"backupfs 1 object key" + salt, role_key))

    def unit(self, offset: int, role: int, length: int | None = None) -> tuple[bytes, int]:
        """Return (plain bytes, offset of what follows)."""
        frame = self.data[offset : offset + 16]
        require(len(frame) == 16, "no frame")
        magic, own_role, codec, _, plain_length, sealed_length = FRAME.unpack(frame)
        require(magic == b"UNIT" and own_role == role, f"no unit of role {role} at {offset}")
        require(length in (None, 16 + sealed_length), "a reference gives another stored length")
        require(plain_length <= MOST_PLAIN, "an impossible length")
        end = offset + 16 + sealed_length
        associated = self.header + frame + offset.to_bytes(8, "little")
        try:
            body = self.cipher.decrypt(offset.to_bytes(12, "little"), self.data[offset + 16 : end], associated)
        except InvalidTag as error:
            raise FormatError(f"the unit at {offset} does not open") from error
        if codec == 1:
            require(zstandard.frame_content_size(body) == plain_length, "another length inside")
            body = zstandard.ZstdDecompressor().decompress(body, max_output_size=plain_length, allow_extra_data=False)
        require(codec in (0, 1) and len(body) == plain_length, "a unit is not as long as it says")
        return body, end

    def directory(self) -> tuple[list, int]:
        """Return (record of the directory, its offset)."""
        offset, length, _, magic = TRAILER.unpack(self.data[-24:])
        require(magic == b"BKFSEND1" and offset + length + 24 == len(self.data), "no trailer")
        return read_record(self.unit(offset, DIRECTORY, length)[0]), offset

    def record(self) -> list:
        """Return the record that is the object's only unit."""
        plain, end = self.unit(48, RECORD)
        require(end == len(self.data), "bytes behind the only unit")
        return read_record(plain)


@dataclass
class Place:
    """Where a copy of a chunk lies."""

    pack: str
    header: bytes
    block_offset: int
    block_length: int
    offset: int
    length: int


@dataclass
class Repository:
    """A repository in a folder, opened with a password."""

    folder: Path
    password: bytes
    keys: dict[tuple[str, int], bytes] = field(default_factory=dict)
    data_chunks: dict[bytes, list[Place]] = field(default_factory=dict)
    tree_chunks: dict[bytes, list[Place]] = field(default_factory=dict)
    _objects: dict[str, bytes] = field(default_factory=dict)
    _blocks: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = (self.folder / "config").read_bytes()
        require(config[:8] == b"BKFSCFG1", "no config of format 1")
        self.config = read_record(config[8:])
        require(len(self.config) == 8 and self.config[0] == 1, "no config of format 1")
        least, average, most = self.config[3]
        require(64 <= least <= 1 << 20 and 256 <= average <= 4 << 20 and 1024 <= most <= 16 << 20, "impossible cuts")
        require(least <= average <= most, "impossible cuts")
        require(self.config[6] == [], "features that this reader does not know")
        self._refuse_unknown_features()
        self._open_a_slot()
        mac = hashed(config[:8] + msgpack.packb(self.config[:7]), self.keys["config", 0])
        require(hmac.compare_digest(mac, self.config[7]), "the config is another repository's")
        self._read_index("index/data/", 3, "packs/data/", 1, self.data_chunks)
        self._read_index("index/tree/", 4, "packs/tree/", 2, self.tree_chunks)

    def ids(self, prefix: str) -> list[str]:
        """Return the ids under a prefix, in order."""
        folder = self.folder / prefix
        return sorted(path.name for path in folder.iterdir() if len(path.name) == 64) if folder.exists() else []

    def load(self, key: str) -> bytes:
        """Return an object whose bytes have the hash that it is named by."""
        if key not in self._objects:
            data = (self.folder / key).read_bytes()
            require(hashed(data).hex() == key.rpartition("/")[2], f"{key} is not what it was")
            self._objects[key] = data
        return self._objects[key]

    def _refuse_unknown_features(self) -> None:
        folder = self.folder / "features"
        for path in folder.rglob("*") if folder.exists() else ():
            readable = path.relative_to(folder).parts[0] in ("compatible", "read-compatible") and path.parent != folder
            require(path.is_dir() or readable, f"the feature {path.name}, which this reader does not know")

    def _open_a_slot(self) -> None:
        for slot_id in self.ids("keys/"):
            slot = self.load(f"keys/{slot_id}")
            require(slot[:7] == b"BKFSKEY", "no key slot")
            if slot[7:8] != b"1":
                continue  # of another version
            fields = read_record(slot[8:])
            require(len(fields) == 9, "no key slot of format 1")
            _, _, memory, passes, lanes, salt, check, nonce, wrapped = fields
            require(8 * lanes <= memory <= 4 << 20 and 1 <= passes <= 64 and 1 <= lanes <= 64, "an impossible cost")
            kdf = Argon2id(salt=salt, length=64, iterations=passes, lanes=lanes, memory_cost=memory)
            stretched = kdf.derive(self.password)
            if hmac.compare_digest(stretched[32:], check):
                plain = AESGCM(stretched[:32]).decrypt(nonce, wrapped, slot[:8] + msgpack.packb(fields[:7]))
                self.keys = {(role, epoch): key for role, epoch, key in read_record(plain)}
                return
        raise FormatError("the password opens no key slot")

    def _read_index(self, prefix: str, kind: int, packs: str, pack_kind: int, chunks: dict[bytes, list[Place]]) -> None:
        indexed = set()
        for segment_id in self.ids(prefix):
            for row, pack in self._segment_rows(f"{prefix}{segment_id}", kind):
                chunk_id, _, block_offset, block_length, offset, length = row
                place = Place(packs + pack[0].hex(), pack[2], block_offset, block_length, offset, length)
                chunks.setdefault(chunk_id, []).append(place)
                indexed.add((place.pack, chunk_id, block_offset, block_length, offset, length))
        in_packs = set()
        for pack_id in self.ids(packs):
            key = packs + pack_id
            for row in self._pack_rows(key, pack_kind):
                in_packs.add((key, row[0], *row[2:]))
        require(indexed == in_packs, "segments and packs say different things")

    def _segment_rows(self, key: str, kind: int) -> Iterator[tuple[tuple, tuple[bytes, int, bytes]]]:
        segment = SealedObject(self.load(key), kind, self.keys)
        record, end = segment.directory()
        packs = list(PACK_ROW.iter_unpack(record[0]))
        for pack_id, size, header in packs:
            data = self.load(f"packs/{'data' if kind == 3 else 'tree'}/{pack_id.hex()}")
            require(len(data) == size and data[:48] == header, "a segment describes another pack")
        rows, at = b"", 48
        for first, offset in FAN_OUT_ROW.iter_unpack(record[1]):
            require(offset == at, "a gap between pages")
            page, at = segment.unit(offset, PAGE)
            require(page[:32] == first and 0 < len(page) <= 65520, "a page is not what the fan-out table says")
            rows += page
        require(at == end, "a gap before the directory")
        split = [rows[start : start + 52] for start in range(0, len(rows), 52)]
        require(split == sorted(set(split)), "rows are not sorted, or there twice")
        for row in split:
            fields = ROW.unpack(row)
            yield fields, packs[fields[1]]

    def _pack_rows(self, key: str, kind: int) -> Iterator[tuple]:
        pack = SealedObject(self.load(key), kind, self.keys)
        (host_id, rows), end = pack.directory()
        require(len(host_id) == 16, "a pack does not name its host")
        at = next_block = 48
        filled = block_size = 0
        for row in ROW.iter_unpack(rows):
            _, ordinal, block_offset, block_length, offset, length = row
            require(ordinal == 0, "a pack's own row has another ordinal")
            if block_offset != at or next_block == 48:
                require(block_offset == next_block and filled == block_size, "a gap between blocks or chunks")
                plain, next_block = pack.unit(block_offset, BLOCK, block_length)
                at, filled, block_size = block_offset, 0, len(plain)
            require(offset == filled, "a gap between chunks")
            filled += length
            yield row
        require(next_block == end and filled == block_size, "a gap before the directory")

    def chunk(self, chunk_id: bytes, kind: int) -> bytes:
        """Return a chunk, compared with its id."""
        places = (self.data_chunks if kind == 1 else self.tree_chunks).get(chunk_id)
        require(places, f"the chunk {chunk_id.hex()} is nowhere")
        place = places[0]
        block = self._blocks.get((place.pack, place.block_offset))
        if block is None:
            pack = SealedObject(self.load(place.pack), kind, self.keys, place.header)
            block, _ = pack.unit(place.block_offset, BLOCK, place.block_length)
            self._blocks[place.pack, place.block_offset] = block
        plain = block[place.offset : place.offset + place.length]
        id_key = self.keys["chunk-id-data" if kind == 1 else "chunk-id-tree", 0]
        require(hashed(plain, id_key) == chunk_id, "a chunk does not have its id")
        return plain

    def snapshots(self) -> list[Snapshot]:
        """Return all snapshots in order of time, forgotten ones marked."""
        found = []
        for snapshot_id in self.ids("snapshots/"):
            record = SealedObject(self.load(f"snapshots/{snapshot_id}"), 5, self.keys).record()
            require(record[0] == 1 and len(record) >= 19 and record[16:19] == [[], [], b""], "no snapshot of format 1")
            require(len(record[11]) >= 5 and len(record[11][0]) == 32, "no root")
            snapshot = Snapshot(snapshot_id, *record[1:16])
            snapshot.is_forgotten = self._is_forgotten(snapshot_id)
            found.append(snapshot)
        return sorted(found, key=lambda snapshot: snapshot.time)

    def _is_forgotten(self, snapshot_id: str) -> bool:
        forgets, taken_back = set(), set()
        for note_id in self.ids(f"notes/{snapshot_id}"):
            data = self.load(f"notes/{snapshot_id}/{note_id}")
            kind = data[5]
            require(kind in (6, 7), "no note")
            version, about, note_type, _, _, arguments, *_ = SealedObject(data, kind, self.keys).record()
            require(version == 1 and about.hex() == snapshot_id, "a note about another snapshot")
            if note_type == "forget" and kind == 7:
                forgets.add(bytes.fromhex(note_id))
            elif note_type == "undelete" and kind == 7:
                taken_back.update(argument for argument in arguments if isinstance(argument, bytes))
        return bool(forgets - taken_back)

    def root(self, snapshot: Snapshot) -> Node | None:
        """Return the node of `/`, or None where the snapshot does not know it."""
        tree, row, owner, group, xattrs, *_ = snapshot.root
        if row == b"":
            return None
        require(len(row) == 56, "a stat row of another length")
        node = self._node(b"", STAT_ROW.unpack(row), tree, 0, owner, group, xattrs, 0)
        require(node.type == TREE, "a root that is no directory")
        return node

    def nodes(self, page_id: bytes, level: int | None = None) -> Iterator[Node]:
        """Yield the nodes below a page in order of names."""
        page = read_record(self.chunk(page_id, 2))
        require(level is None or page[0] == level, "a page is not of the level below")
        if page[0] == 0:
            yield from self._leaf_nodes(page)
            return
        for first_name, below, count, *_ in page[1]:
            found = list(self.nodes(below, page[0] - 1))
            require(found[0].name == first_name and len(found) == count, "a branch says other things than its page")
            yield from found

    def _leaf_nodes(self, page: list) -> Iterator[Node]:
        _, joined, rows, contents, flags, owners, groups, xattrs, filesystems, *_ = page
        names = joined.split(b"\0") if joined else []
        require(names == sorted(set(names)), "names are not in order")
        require(len(rows) == 56 * len(names) and len(contents) == len(names), "columns of different lengths")
        require(flags == b"" or (len(flags) == len(names) and any(flags)), "flags of another length")
        owner_names, group_names, sets, ordinals = dict(owners), dict(groups), dict(xattrs), dict(filesystems)
        for at, (name, row) in enumerate(zip(names, STAT_ROW.iter_unpack(rows), strict=True)):
            owner, group = owner_names.get(row[1], b""), group_names.get(row[2], b"")
            flag = flags[at] if flags else 0
            yield self._node(name, row, contents[at], flag, owner, group, sets.get(at, []), ordinals.get(at, 0))

    def _node(
        self,
        name: bytes,
        row: tuple,
        content: bytes | list,
        flags: int,
        owner: bytes,
        group: bytes,
        found: bytes | list,
        filesystem: int,
    ) -> Node:
        mode, uid, gid, nlink, inode, size, mtime, mtime_part, ctime, ctime_part = row
        require(max(mtime_part, ctime_part) < 10**9, "too many nanoseconds")
        pairs = read_record(self.chunk(found, 2)) if isinstance(found, bytes) else found
        xattrs = [(key, value) for key, value in pairs]
        require(xattrs == sorted(dict(xattrs).items()), "xattrs are not in order")
        mtime_ns, ctime_ns = mtime * 10**9 + mtime_part, ctime * 10**9 + ctime_part
        return Node(
            name, mode, uid, gid, nlink, inode, size, mtime_ns, ctime_ns, content, flags, owner, group, xattrs,
            filesystem,
        )  # fmt: skip

    def walk(self, root: bytes, above: bytes = b"") -> Iterator[tuple[bytes, Node]]:
        """Yield (path, node) of everything below a tree."""
        names = []
        for node in self.nodes(root):
            names.append(node.name)
            yield above + b"/" + node.name, node
            if node.type == TREE:
                yield from self.walk(node.content, above + b"/" + node.name)
        require(names == sorted(set(names)), "names are not in order across pages")

    def read(self, node: Node) -> bytes:
        """Return the bytes of a file."""
        return b"".join(data if data is not None else bytes(length) for length, data in self.segments(node))

    def segments(self, node: Node) -> Iterator[tuple[int, bytes | None]]:
        """Yield (length, bytes or None for a hole) of a file."""
        content, total = node.content, 0
        if isinstance(content, list):
            found = self._segments(content, node.size, 0)
        elif content == b"":
            found = iter(())
        elif content[0] == 1 and len(content) == 33:
            found = iter([(node.size, self.chunk(content[1:], 1))])
        else:
            require(content[0] == 3 and len(content) <= 513, "content of no known form")
            found = iter([(len(content) - 1, content[1:])])
        for length, data in found:
            require(data is None or len(data) == length, "a segment of another length")
            total += length
            yield length, data
        require(total == node.size, "segments do not add up to the size")

    def _segments(self, segments: list, size: int, depth: int) -> Iterator[tuple[int, bytes | None]]:
        require(depth <= 8, "list pages too deep")
        require(sum(segment[0] for segment in segments) == size, "segments do not add up")
        for length, kind, *arguments in segments:
            if kind == 0:
                yield length, None
            elif kind == 1:
                yield length, self.chunk(arguments[0], 1)
            elif kind == 3:
                yield length, arguments[0]
            elif kind == 4:
                yield from self._segments(read_record(self.chunk(arguments[0], 2)), length, depth + 1)
            else:
                raise FormatError(f"a segment of kind {kind}")


def device_of(node: Node) -> tuple[int, int]:
    """Return (major, minor) of a device's node."""
    require(node.type in DEVICES and len(node.content) == 8, "no device")
    return struct.unpack("<II", node.content)


def main(folder: str, password: str, wanted: str | None = None) -> None:
    """List snapshots, or the entries of one with the hash of each file."""
    repository = Repository(Path(folder), password.encode())
    for snapshot in repository.snapshots():
        if wanted is None:
            mark = "(forgotten)" if snapshot.is_forgotten else ""
            print(snapshot.snapshot_id[:8], snapshot.time // 10**9, snapshot.host, snapshot.paths, snapshot.tags, mark)
        elif snapshot.snapshot_id.startswith(wanted):
            for path, node in repository.walk(snapshot.tree):
                shown = hashed(repository.read(node)).hex()[:16] if node.type == FILE else ""
                print(f"{node.mode:6o} {node.size:9} {path.decode('utf-8', 'replace')} {shown}")


if __name__ == "__main__":
    main(*sys.argv[1:])
