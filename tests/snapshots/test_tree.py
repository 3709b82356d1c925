"""Trees: any set of names comes back in order, an edit changes few pages, and strange pages are damage."""

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.codec.records import Field, encode_record
from backupfs.codec.sealing import hash_object
from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId
from backupfs.snapshots.node import CHANGED_WHILE_READ, RACY, STAT_ROW, Node, Xattrs
from backupfs.snapshots.tree import InnerPage, LeafPage, TreeBuilder, decode_page, find_node, leaf_pages, nodes

KEY = bytes(range(32))


class Pages:
    def __init__(self) -> None:
        self.saved: dict[ChunkId, bytes] = {}
        self.loads = 0

    def save(self, data: bytes) -> ChunkId:
        chunk_id = ChunkId(hash_object(data))
        self.saved[chunk_id] = data
        return chunk_id

    def load(self, chunk_id: ChunkId) -> bytes:
        self.loads += 1
        return self.saved[chunk_id]


def node_of(name: bytes, number: int = 0, content: bytes = b"", xattrs: Xattrs = ()) -> Node:
    return Node(
        name, stat.S_IFREG | 0o644, number % 3, number % 2, 1, number, len(content), -5, 7, number, 8, content,
        (0, 0, RACY, CHANGED_WHILE_READ)[number % 4], (b"", b"ann", b"\xff")[number % 3], (b"", b"staff")[number % 2],
        xattrs, number % 2,
    )  # fmt: skip


def build(pages: Pages, entries: list[Node], key: bytes = KEY) -> ChunkId:
    builder = TreeBuilder(key, pages.save)
    for node in entries:
        times = (node.mtime_s, node.mtime_part_ns, node.ctime_s, node.ctime_part_ns)
        row = STAT_ROW.pack(node.mode, node.uid, node.gid, node.nlink, node.inode, node.size, *times)
        owner, group = (node.uid, node.owner), (node.gid, node.group)
        builder.add(node.name, row, node.content, node.flags, node.xattrs, node.filesystem, owner, group)
    return builder.finish()


names = st.binary(min_size=1, max_size=40).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
xattr_sets = st.lists(st.tuples(st.binary(min_size=1, max_size=9), st.binary(max_size=9)), max_size=3).map(tuple)


@given(st.dictionaries(names, st.tuples(st.integers(0, 2**40), st.binary(max_size=60), xattr_sets), max_size=60))
def test_any_set_of_names_comes_back_in_order(drawn: dict[bytes, tuple[int, bytes, Xattrs]]) -> None:
    pages = Pages()
    entries = [node_of(name, *drawn[name]) for name in sorted(drawn)]
    root = build(pages, entries)
    assert list(nodes(root, pages.load)) == entries
    for node in entries:
        assert find_node(root, node.name, pages.load) == node
    assert find_node(root, b"\xff" * 41, pages.load) is None
    assert find_node(root, b"\x01", pages.load) == next((node for node in entries if node.name == b"\x01"), None)


def many(count: int) -> list[Node]:
    return [node_of(b"name-%07d" % number, number) for number in range(count)]


@pytest.fixture(scope="module")
def large() -> tuple[Pages, list[Node], ChunkId]:
    pages, entries = Pages(), many(40_000)
    return pages, entries, build(pages, entries)


def test_a_large_directory_comes_back_and_is_read_by_page(large: tuple[Pages, list[Node], ChunkId]) -> None:
    pages, entries, root = large
    assert list(nodes(root, pages.load)) == entries
    assert isinstance(decode_page(pages.saved[root], root), InnerPage)
    assert len(pages.saved) > 40
    assert max(map(len, pages.saved.values())) < 300 << 10
    for number in (0, 1, 12_345, 39_999):
        pages.loads = 0
        assert find_node(root, b"name-%07d" % number, pages.load) == entries[number]
        assert pages.loads <= 3
    assert find_node(root, b"name-0000000x", pages.load) is None
    assert find_node(root, b"a", pages.load) is None
    assert find_node(root, b"z", pages.load) is None
    first = next(leaf_pages(root, pages.load, b"name-0012345"))
    assert b"name-0012345" in first.names


def test_the_counts_of_branches_add_up(large: tuple[Pages, list[Node], ChunkId]) -> None:
    pages, entries, root = large
    page = decode_page(pages.saved[root], root)
    assert isinstance(page, InnerPage)
    assert sum(branch.nodes for branch in page.branches) == len(entries)
    assert page.first_names == sorted(page.first_names)


@pytest.mark.parametrize("at", [0, 1, 777, 20_000, 39_999, 40_000])
def test_one_more_name_changes_few_pages(large: tuple[Pages, list[Node], ChunkId], at: int) -> None:
    pages, entries, _ = large
    after = Pages()
    name = entries[at].name[:-1] + b"!" if at < len(entries) else b"zzz"
    build(after, sorted([*entries, node_of(name)], key=lambda node: node.name))
    assert len(after.saved.keys() - pages.saved.keys()) <= 5


def test_a_tree_is_the_same_each_time_and_another_under_another_key(large: tuple[Pages, list[Node], ChunkId]) -> None:
    _, entries, root = large
    assert build(Pages(), entries) == root
    assert build(Pages(), entries, bytes(32)) != root


def test_an_empty_directory_is_one_page() -> None:
    pages = Pages()
    root = build(pages, [])
    assert len(pages.saved) == 1
    assert list(nodes(root, pages.load)) == []
    assert find_node(root, b"x", pages.load) is None
    page = decode_page(pages.saved[root], root)
    assert isinstance(page, LeafPage)
    assert len(page) == 0


def test_a_large_set_of_xattrs_is_a_chunk_of_its_own() -> None:
    pages = Pages()
    xattrs = ((b"user.a", bytes(5000)), (b"user.b", b""))
    chunk_id = pages.save(encode_record([list(pair) for pair in xattrs]))
    builder = TreeBuilder(KEY, pages.save)
    row = STAT_ROW.pack(stat.S_IFREG, 0, 0, 1, 1, 0, 0, 0, 0, 0)
    builder.add(b"x", row, b"", 0, chunk_id, 0, (0, b""), (0, b""))
    (node,) = nodes(builder.finish(), pages.load)
    assert node.xattrs == xattrs


# Pages that nobody who means well writes; another holder of the keys may.

ROW = STAT_ROW.pack(stat.S_IFREG, 0, 0, 1, 1, 0, 0, 0, 0, 0)
AN_ID = hash_object(b"x")


def leaf(**changed: Field) -> list[Field]:
    fields: dict[str, Field] = {
        "kind": 0, "names": b"a\0b", "rows": ROW * 2, "contents": [b"", b""], "flags": b"", "owners": [], "groups": [],
        "xattrs": [], "filesystems": [],
    }  # fmt: skip
    return list((fields | changed).values())


def test_the_example_page_is_fine() -> None:
    assert isinstance(decode_page(encode_record(leaf()), ChunkId(AN_ID)), LeafPage)
    assert isinstance(decode_page(encode_record([1, [[b"a", AN_ID, 1]]]), ChunkId(AN_ID)), InnerPage)


@pytest.mark.parametrize(
    "record",
    [
        [],
        [0],
        leaf(kind=-1),
        leaf(kind=9),
        leaf(kind=b""),
        leaf(names=b"a"),
        leaf(names=b"b\0a"),
        leaf(names=b"a\0a"),
        leaf(names=b"a\0../b"),
        leaf(names=b".\0b"),
        leaf(names=b"..\0b"),
        leaf(names=b"\0b"),
        leaf(rows=ROW),
        leaf(rows=ROW * 2 + b"x"),
        leaf(contents=[b""]),
        leaf(contents=[b"", 7]),
        leaf(contents=[b"", None]),
        leaf(flags=b"\0"),
        leaf(owners=[[1]]),
        leaf(owners=[[b"", 1]]),
        leaf(owners=7),
        leaf(groups=["x"]),
        leaf(xattrs=[[0, 7]]),
        leaf(xattrs=[[0, b"short"]]),
        leaf(xattrs=[[0, [[b"a"]]]]),
        leaf(xattrs=[7]),
        leaf(filesystems=[[0, b""]]),
        [1, []],
        [1, [[b"a", b"short", 1]]],
        [1, [[b"a", AN_ID]]],
        [1, ["x"]],
        [9, [[b"a", AN_ID, 1]]],
    ],
)
def test_a_page_whose_columns_do_not_fit_is_damage(record: list[Field]) -> None:
    with pytest.raises(DamagedObject):
        decode_page(encode_record(record), ChunkId(AN_ID))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_page_or_damage(data: bytes) -> None:
    with pytest.raises(DamagedObject):
        decode_page(data, ChunkId(AN_ID))


def test_inner_pages_that_do_not_go_down_are_damage() -> None:
    pages = Pages()
    below = pages.save(encode_record(leaf()))
    for _ in range(2000):
        below = pages.save(encode_record([1, [[b"a", below, 2]]]))
    with pytest.raises(DamagedObject, match="levels"):
        list(nodes(below, pages.load))
