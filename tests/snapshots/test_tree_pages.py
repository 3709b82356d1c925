"""Pages of trees: what later versions may add is passed over, and xattrs count when a page is cut."""

import pytest
from blake3 import blake3

from backupfs.codec.records import Field, decode_record, encode_record
from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId
from backupfs.snapshots.node import STAT_ROW
from backupfs.snapshots.tree import InnerPage, LeafPage, TreeBuilder, decode_page, nodes

ROW = STAT_ROW.pack(0o100644, 0, 0, 1, 1, 1, 0, 0, 0, 0)
ID = ChunkId(b"i" * 32)


class Saved(dict[ChunkId, bytes]):
    """Chunks by their ids."""

    def save(self, data: bytes) -> ChunkId:
        chunk_id = ChunkId(blake3(data).digest())
        self[chunk_id] = data
        return chunk_id


def tree_of(saved: Saved, count: int, xattrs: tuple[tuple[bytes, bytes], ...] | bytes = ()) -> ChunkId:
    builder = TreeBuilder(bytes(32), saved.save)
    for number in range(count):
        builder.add(b"%06d" % number, ROW, b"\x03x", 0, xattrs, 0, (0, b"root"), (0, b"root"))
    return builder.finish()


def test_fields_that_later_versions_append_are_passed_over() -> None:
    saved = Saved()
    root = tree_of(saved, 5000)
    for chunk_id, data in saved.items():
        page = decode_page(data, chunk_id)
        record = decode_record(data, "it")
        again = decode_page(encode_record([*record, "later"]), chunk_id)
        if isinstance(page, LeafPage):
            assert isinstance(again, LeafPage)
            assert (again.names, again.rows, again.contents) == (page.names, page.rows, page.contents)
            continue
        branches: list[Field] = [[*branch, 7, b"later"] for branch in record[1]]  # type: ignore[misc, union-attr]
        longer = decode_page(encode_record([record[0], branches, None]), chunk_id)
        for other in (again, longer):
            assert isinstance(other, InnerPage)
            assert (other.level, other.branches) == (page.level, page.branches)
    assert isinstance(decode_page(saved[root], root), InnerPage)


@pytest.mark.parametrize("branch", [[], [b"a", ID], [b"a", ID[:-1], 1], [b"a", ID, -1], ["a", ID, 1], b"a"])
def test_a_branch_of_another_form_is_damage(branch: Field) -> None:
    with pytest.raises(DamagedObject):
        decode_page(encode_record([1, [branch]]), ID)


def test_xattrs_weigh_so_that_pages_stay_small() -> None:
    """ACLs of 4000 bytes on each file would else make pages of megabytes."""
    saved = Saved()
    pairs = tuple((b"user.%d" % number, bytes(1000)) for number in range(4))
    root = tree_of(saved, 2000, pairs)
    assert max(map(len, saved.values())) < 400 << 10
    assert [node.xattrs for node in nodes(root, saved.__getitem__)] == 2000 * [pairs]
    by_id, bare = Saved(), Saved()
    tree_of(by_id, 2000, b"x" * 32)
    tree_of(bare, 2000)
    assert len(saved) > 2 * len(by_id) >= 2 * len(bare)
