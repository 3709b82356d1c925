"""Trees: a directory as pages of nodes in byte order of names.

A page is a tree chunk, a record:
    leaf   [0, names, rows, contents, flags, owners, groups, xattrs, filesystems]
    inner  [level, [[first name, page id, count], …]]
`names` are joined by NUL; `rows` are stat rows; `flags` is one byte a node, or empty when all are 0; `owners` and
`groups` name the ids in the page; `xattrs` and `filesystems` list only nodes that have some, by position.
Pages are cut where a keyed hash of a name says so, so an insertion changes one page and the path to it.
Pure. Source: docs/format.rst, "Trees".
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import lt
from typing import TypeVar

from backupfs.codec.keys import keyed_hash
from backupfs.codec.records import Field, decode_fields, decode_record, encode_record
from backupfs.errors import DamagedObject
from backupfs.ids import ID_SIZE, ChunkId, short
from backupfs.snapshots.content import Content
from backupfs.snapshots.node import STAT_ROW, Node, Xattrs

# Cuts of pages, in bytes as `_weight` counts them; a cut falls on one name in 256 once a page has 16 KiB.
LEAST_PAGE = 16 << 10
MOST_PAGE = 256 << 10
_CUT_MASK = 0xFF
_ROW_WEIGHT = 64
_MOST_LEVELS = 8

_CONTENT_TYPES = {bytes, list}

First = TypeVar("First")
Second = TypeVar("Second")
Names = tuple[tuple[int, bytes], ...]  # (uid or gid, name)


class LeafPage:
    """Nodes of one page, decoded column by column; a `Node` is made only when asked for."""

    __slots__ = (
        "_filesystems",
        "_xattrs",
        "contents",
        "flags",
        "groups",
        "names",
        "owners",
        "rows",
    )

    def __init__(
        self,
        names: list[bytes],
        rows: bytes,
        contents: list[Content],
        flags: bytes,
        owners: Names,
        groups: Names,
        xattrs: dict[int, "Xattrs | bytes"],
        filesystems: dict[int, int],
    ) -> None:
        self.names = names
        self.rows = rows
        self.contents = contents
        self.flags = flags
        self.owners = owners
        self.groups = groups
        self._xattrs = xattrs
        self._filesystems = filesystems

    def __len__(self) -> int:
        return len(self.names)

    def row(self, position: int) -> bytes:
        """Return one node's stat row."""
        return self.rows[position * STAT_ROW.size : (position + 1) * STAT_ROW.size]

    def flag(self, position: int) -> int:
        """Return one node's flags."""
        return self.flags[position] if self.flags else 0

    def xattrs(self, position: int) -> "Xattrs | bytes":
        """Return one node's xattrs, or the id of the tree chunk that holds them."""
        return self._xattrs.get(position, ())

    def filesystem(self, position: int) -> int:
        """Return the ordinal of one node's filesystem."""
        return self._filesystems.get(position, 0)

    @property
    def sparse_columns(self) -> tuple[dict[int, "Xattrs | bytes"], dict[int, int]]:
        """The columns that list only some nodes: (xattrs, filesystems) by position."""
        return self._xattrs, self._filesystems

    def only(self, position: int, name: bytes) -> "LeafPage":
        """Return a page with one of the nodes, under another name."""
        xattrs, filesystem = self.xattrs(position), self.filesystem(position)
        return LeafPage(
            [name], self.row(position), [self.contents[position]], self.flags[position : position + 1], self.owners,
            self.groups, {0: xattrs} if xattrs else {}, {0: filesystem} if filesystem else {},
        )  # fmt: skip

    def node(self, position: int, load: Callable[[ChunkId], bytes | memoryview]) -> Node:
        """Return one node. `load` gives a large set of xattrs."""
        row = STAT_ROW.unpack_from(self.rows, position * STAT_ROW.size)
        xattrs = self._xattrs.get(position, ())
        if isinstance(xattrs, bytes):
            xattrs = load_xattrs(xattrs, load)
        return Node(  # type: ignore[call-arg]
            self.names[position],
            *row,
            self.contents[position],
            self.flag(position),
            _name_of(self.owners, row[1]),
            _name_of(self.groups, row[2]),
            xattrs,
            self._filesystems.get(position, 0),
        )


def _name_of(names: Names, number: int) -> bytes:
    for known, name in names:
        if known == number:
            return name
    return b""


@dataclass(frozen=True, slots=True)
class Branch:
    """A page below an inner page."""

    first_name: bytes
    page_id: ChunkId
    nodes: int  # below it


class InnerPage:
    """The pages below, in order of names."""

    __slots__ = ("branches", "first_names", "level")

    def __init__(self, level: int, branches: list[Branch]) -> None:
        self.level = level  # that of leaf pages would be 0
        self.branches = branches
        self.first_names = [branch.first_name for branch in branches]

    def branch_of(self, name: bytes) -> int:
        """Return the position of the branch that would hold `name`."""
        return max(0, bisect_right(self.first_names, name) - 1)


def decode_page(data: bytes | memoryview, chunk_id: ChunkId) -> LeafPage | InnerPage:
    """Return the page that a tree chunk holds. Raises: DamagedObject."""
    try:
        record = decode_fields(data)
        if len(record) >= 9 and record[0] == 0:
            page = _leaf_of(record)
            if page is not None:
                return page
        match record:
            case [int(level), list(branches), *_] if 0 < level <= _MOST_LEVELS and branches:
                return InnerPage(level, [_branch_of(branch) for branch in branches])
    except (TypeError, ValueError) as error:
        raise DamagedObject(f"the tree page {short(chunk_id)} is damaged: {error}") from error
    raise DamagedObject(f"the tree page {short(chunk_id)} is damaged: its columns do not fit")


def _leaf_of(record: list[Field]) -> LeafPage | None:
    # Plain comparisons: a pattern over so many columns would cost as much as all else here.
    _, names, rows, contents, flags, owners, groups, xattrs, filesystems, *_ = record
    if not (isinstance(names, bytes) and isinstance(rows, bytes) and isinstance(flags, bytes)):
        return None
    if not (isinstance(contents, list) and isinstance(owners, list) and isinstance(groups, list)):
        return None
    if not (isinstance(xattrs, list) and isinstance(filesystems, list)):
        return None
    split = names.split(b"\0") if names else []
    count = len(split)
    if len(rows) != count * STAT_ROW.size or len(contents) != count or len(flags) not in (0, count):
        return None
    if not (_are_names(names, split) and {*map(type, contents)} <= _CONTENT_TYPES):
        return None
    return LeafPage(
        split,
        rows,
        contents,  # type: ignore[arg-type]
        flags,
        _pairs_of(owners, int, bytes),
        _pairs_of(groups, int, bytes),
        _xattrs_of(xattrs) if xattrs else {},
        dict(_pairs_of(filesystems, int, int)) if filesystems else {},
    )


def _are_names(joined: bytes, names: list[bytes]) -> bool:
    # Another holder of the keys may have filed anything: a name like `../x` must never reach a restore.
    if b"/" in joined or b"" in names or b"." in names or b".." in names:
        return False
    return all(map(lt, names, names[1:]))


def _pairs_of(items: list[Field], first: type[First], second: type[Second]) -> tuple[tuple[First, Second], ...]:
    pairs = []
    for item in items:
        if not isinstance(item, list) or len(item) != 2:
            raise ValueError("a column is malformed")
        left, right = item
        if not isinstance(left, first) or not isinstance(right, second):
            raise ValueError("a column is malformed")
        pairs.append((left, right))
    return tuple(pairs)


def _xattrs_of(items: list[Field]) -> dict[int, "Xattrs | bytes"]:
    found: dict[int, Xattrs | bytes] = {}
    for item in items:
        match item:
            case [int(position), xattrs]:
                found[position] = decode_xattrs(xattrs)
            case _:
                raise ValueError("a column is malformed")
    return found


def _branch_of(field: Field) -> Branch:
    match field:
        case [bytes(first_name), bytes(page_id), int(count), *_] if len(page_id) == ID_SIZE and count >= 0:
            return Branch(first_name, ChunkId(page_id), count)
    raise ValueError("a branch is malformed")


def decode_xattrs(field: Field) -> "Xattrs | bytes":
    """Return the set of xattrs that a record holds: pairs, or the id of a chunk of pairs.

    Raises: DamagedObject.
    """
    if isinstance(field, bytes) and len(field) == ID_SIZE:
        return field
    try:
        if isinstance(field, list):
            return _pairs_of(field, bytes, bytes)
    except ValueError:
        pass
    raise DamagedObject("a set of xattrs is damaged")


def load_xattrs(chunk_id: bytes, load: Callable[[ChunkId], bytes | memoryview]) -> Xattrs:
    """Return a large set of xattrs, which has a tree chunk of its own. Raises: DamagedObject."""
    found = decode_xattrs(decode_record(load(ChunkId(chunk_id)), "a chunk of xattrs"))
    if isinstance(found, bytes):
        raise DamagedObject("a chunk of xattrs is damaged: it holds another one's id")
    return found


class TreeBuilder:
    """Builds one directory's tree from nodes that come in order of names."""

    def __init__(self, cut_key: bytes, save: Callable[[bytes], ChunkId]) -> None:
        """Take the parts.

        cut_key: keys the hash of names that decides the cuts.
        save: stores a page and returns its id.
        """
        self._cut_key = cut_key
        self._save = save
        self._names: list[bytes] = []
        self._rows: list[bytes] = []
        self._contents: list[Content] = []
        self._flags = bytearray()
        self._xattrs: list[Field] = []
        self._filesystems: list[Field] = []
        self._owners: dict[int, bytes] = {}
        self._groups: dict[int, bytes] = {}
        self._weight = 0
        self._branches: list[Branch] = []

    def add(
        self,
        name: bytes,
        row: bytes,
        content: Content,
        flags: int,
        xattrs: "Xattrs | bytes",
        filesystem: int,
        owner: tuple[int, bytes],
        group: tuple[int, bytes],
    ) -> None:
        """Add the next node."""
        position = len(self._names)
        self._names.append(name)
        self._rows.append(row)
        self._contents.append(content)
        self._flags.append(flags)
        if xattrs:
            self._xattrs.append([position, xattrs if isinstance(xattrs, bytes) else [list(pair) for pair in xattrs]])
        if filesystem:
            self._filesystems.append([position, filesystem])
        if owner[1]:
            self._owners[owner[0]] = owner[1]
        if group[1]:
            self._groups[group[0]] = group[1]
        self._weight += _weight(name, content, xattrs)
        if self._weight >= LEAST_PAGE and (self._weight >= MOST_PAGE or self._cuts_after(name, 0)):
            self._close_leaf()

    def finish(self) -> ChunkId:
        """Save what is left and return the id of the directory's root page."""
        if self._names or not self._branches:
            self._close_leaf()
        level, branches = 1, self._branches
        while len(branches) > 1:
            branches = [self._close_inner(level, group) for group in self._grouped(branches, level)]
            level += 1
        return branches[0].page_id

    def _close_leaf(self) -> None:
        page = [
            0,
            b"\0".join(self._names),
            b"".join(self._rows),
            self._contents,
            bytes(self._flags) if any(self._flags) else b"",
            sorted(self._owners.items()),
            sorted(self._groups.items()),
            self._xattrs,
            self._filesystems,
        ]
        first = self._names[0] if self._names else b""
        self._branches.append(Branch(first, self._save(encode_record(page)), len(self._names)))  # type: ignore[arg-type]
        self._names, self._rows, self._contents, self._flags = [], [], [], bytearray()
        self._xattrs, self._filesystems, self._owners, self._groups = [], [], {}, {}
        self._weight = 0

    def _grouped(self, branches: Sequence[Branch], level: int) -> Iterator[list[Branch]]:
        group: list[Branch] = []
        weight = 0
        for branch in branches:
            group.append(branch)
            weight += _ROW_WEIGHT + len(branch.first_name)
            if (
                len(group) > 1
                and weight >= LEAST_PAGE
                and (weight >= MOST_PAGE or self._cuts_after(branch.first_name, level))
            ):
                yield group
                group, weight = [], 0
        if group:
            yield group

    def _close_inner(self, level: int, group: list[Branch]) -> Branch:
        data = encode_record([level, [[branch.first_name, branch.page_id, branch.nodes] for branch in group]])
        return Branch(group[0].first_name, self._save(data), sum(branch.nodes for branch in group))

    def _cuts_after(self, name: bytes, level: int) -> bool:
        return keyed_hash(self._cut_key, name)[level] & _CUT_MASK == 0


def _weight(name: bytes, content: Content, xattrs: "Xattrs | bytes") -> int:
    weight = _ROW_WEIGHT + len(name) + (len(content) if isinstance(content, bytes) else 40 * len(content))
    if xattrs:
        weight += len(xattrs) if isinstance(xattrs, bytes) else sum(len(key) + len(value) for key, value in xattrs)
    return weight


def leaf_pages(root: ChunkId, load: Callable[[ChunkId], bytes | memoryview], first: bytes = b"") -> Iterator[LeafPage]:
    """Yield a directory's leaf pages in order, from the one that would hold `first` on.

    Raises: DamagedObject; whatever `load` raises.
    """
    return _leaf_pages_below(root, load, first, _MOST_LEVELS + 1)


def _leaf_pages_below(
    page_id: ChunkId, load: Callable[[ChunkId], bytes | memoryview], first: bytes, above: int
) -> Iterator[LeafPage]:
    page = decode_page(load(page_id), page_id)
    if isinstance(page, LeafPage):
        yield page
        return
    if page.level >= above:
        raise DamagedObject(f"the tree page {short(page_id)} is damaged: its levels do not go down")
    for branch in page.branches[page.branch_of(first) :]:
        yield from _leaf_pages_below(branch.page_id, load, first, page.level)


def find_node(root: ChunkId, name: bytes, load: Callable[[ChunkId], bytes | memoryview]) -> Node | None:
    """Return the node of one name in a directory, reading only the pages on its way. Raises: DamagedObject."""
    for page in leaf_pages(root, load, name):
        position = bisect_right(page.names, name) - 1
        if position >= 0 and page.names[position] == name:
            return page.node(position, load)
        return None
    return None


def nodes(root: ChunkId, load: Callable[[ChunkId], bytes | memoryview]) -> Iterator[Node]:
    """Yield a directory's nodes in order of names. Raises: DamagedObject."""
    for page in leaf_pages(root, load):
        for position in range(len(page)):
            yield page.node(position, load)
