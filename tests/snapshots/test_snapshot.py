"""Snapshots as records, and `/`, which no tree holds."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from backupfs.codec.records import Field, decode_record, encode_record
from backupfs.errors import DamagedObject, UnknownVersion
from backupfs.ids import ChunkId, SnapshotId
from backupfs.localfs import reading
from backupfs.snapshots.node import STAT_ROW
from backupfs.snapshots.snapshot import FILES, Snapshot, Statistics, decode_snapshot, encode_snapshot
from backupfs.snapshots.walk import find_path, root_node
from tests.builders import File, back_up, build, new_repository, reopened

ID = SnapshotId(bytes(range(32)))
TREE = ChunkId(b"t" * 32)
ROW = STAT_ROW.pack(stat.S_IFDIR | 0o1711, 7, 8, 21, 2, 4096, -5, 999_999_999, 1 << 33, 1)
XATTRS = ((b"security.selinux", b"root_t\0"), (b"user.top", b""))
PLAIN = Snapshot(FILES, b"h" * 16, "earth", 3, b"p" * 32, 5, 6, (b"/",), ("a", "b"), b"", TREE, Statistics(1, 2, 3))
FULL = replace(PLAIN, root_row=ROW, root_owner=b"seven", root_group=b"\xff", root_xattrs=XATTRS)
FIELDS = decode_record(encode_snapshot(FULL), "it")
ROOT = 11


def nothing(_chunk_id: ChunkId) -> bytes:
    raise AssertionError("no chunk is needed")


def with_root(*fields: Field) -> bytes:
    return encode_record([*FIELDS[:ROOT], list(fields), *FIELDS[ROOT + 1 :]])


@given(
    st.sampled_from([b"", ROW]),
    st.binary(max_size=20),
    st.one_of(st.just(b"x" * 32), st.lists(st.tuples(st.binary(), st.binary()), max_size=3).map(tuple)),
    st.integers(-(2**63), 2**63),
    st.text(max_size=10),
)
def test_a_snapshot_decodes_to_what_was_encoded(
    row: bytes, owner: bytes, xattrs: tuple[tuple[bytes, bytes], ...] | bytes, time_ns: int, host: str
) -> None:
    snapshot = replace(
        PLAIN, root_row=row, root_owner=owner, root_group=owner, root_xattrs=xattrs, time_ns=time_ns, host=host
    )
    assert decode_snapshot(encode_snapshot(snapshot), ID) == replace(snapshot, snapshot_id=ID)


def test_the_others_of_one_number_are_a_field_that_is_there_only_with_them() -> None:
    both = replace(FULL, beside=(b"a" * 32, b"b" * 32))
    assert decode_record(encode_snapshot(both), "it") == [*FIELDS, [b"a" * 32, b"b" * 32]]
    assert decode_snapshot(encode_snapshot(both), ID) == replace(both, snapshot_id=ID)
    # What a later version puts there is passed over.
    for later in (None, 5, ["x"]):
        assert decode_snapshot(encode_record([*FIELDS, later]), ID) == replace(FULL, snapshot_id=ID)


def test_the_root_is_an_array_in_the_place_of_the_tree() -> None:
    pairs: list[Field] = [list(pair) for pair in XATTRS]
    assert FIELDS[ROOT] == [TREE, ROW, b"seven", b"\xff", pairs]
    assert with_root(TREE, ROW, b"seven", b"\xff", pairs) == encode_snapshot(FULL)


def test_fields_of_later_versions_are_passed_over() -> None:
    expected = replace(FULL, snapshot_id=ID)
    assert decode_snapshot(with_root(*FIELDS[ROOT], "later", 1), ID) == expected  # type: ignore[misc]
    assert decode_snapshot(encode_record([*FIELDS, None, [b"later"]]), ID) == expected
    with pytest.raises(UnknownVersion):
        decode_snapshot(encode_record([2, *FIELDS[1:]]), ID)


@pytest.mark.parametrize(
    "root",
    [
        [],
        [TREE],
        [TREE, ROW, b"", b""],
        [TREE[:-1], ROW, b"", b"", []],
        [TREE, ROW[:-1], b"", b"", []],
        [TREE, STAT_ROW.pack(stat.S_IFREG | 0o644, *9 * [0]), b"", b"", []],
        [TREE, ROW, "owner", b"", []],
        [TREE, ROW, b"", b"", b"short"],
        [TREE, ROW, b"", b"", [[b"only a name"]]],
        [TREE, ROW, b"", b"", [[b"name", "text"]]],
        [TREE, ROW, b"", b"", None],
    ],
)
def test_a_root_of_another_form_is_damage(root: list[Field]) -> None:
    with pytest.raises(DamagedObject):
        decode_snapshot(with_root(*root), ID)
    with pytest.raises(DamagedObject):
        decode_snapshot(encode_record([*FIELDS[:ROOT], TREE, *FIELDS[ROOT + 1 :]]), ID)


def test_the_node_of_the_root_has_what_the_snapshot_says() -> None:
    node = root_node(FULL, nothing)
    assert (node.name, node.content, node.flags, node.filesystem) == (b"", TREE, 0, 0)
    assert (node.mode, node.uid, node.gid, node.nlink) == (stat.S_IFDIR | 0o1711, 7, 8, 21)
    assert (node.inode, node.size) == (2, 4096)
    assert (node.mtime_ns, node.ctime_ns) == (-4_000_000_001, (1 << 33) * 10**9 + 1)
    assert (node.owner, node.group, node.xattrs) == (b"seven", b"\xff", XATTRS)


def test_large_xattrs_of_the_root_are_loaded_from_their_chunk() -> None:
    chunk = encode_record([list(pair) for pair in XATTRS])
    chunk_id = ChunkId(blake3(chunk).digest())
    assert root_node(replace(FULL, root_xattrs=chunk_id), {chunk_id: chunk}.__getitem__).xattrs == XATTRS
    with pytest.raises(DamagedObject):
        root_node(replace(FULL, root_xattrs=chunk_id), lambda _: encode_record(["no pairs"]))


def test_an_unknown_root_is_a_directory_that_everybody_may_read() -> None:
    node = root_node(PLAIN, nothing)
    assert (node.mode, node.uid, node.gid, node.xattrs) == (stat.S_IFDIR | 0o755, 0, 0, ())
    assert node.mtime_ns == PLAIN.time_ns


def test_the_root_above_a_source_is_a_directory_on_the_way(tmp_path: Path) -> None:
    """What changes in it by itself is not recorded: two backups tell the same of it."""
    repository = new_repository()
    source = build({"a": File(b"1")}, tmp_path / "source")
    first, second = back_up(repository, source), back_up(repository, source)
    assert first.root_row == second.root_row
    assert first.root_xattrs == second.root_xattrs == ()
    node = find_path(first, b"/", reopened(repository).trees.load)
    status = os.stat("/")
    assert (node.mode, node.uid, node.gid) == (status.st_mode, status.st_uid, status.st_gid)
    assert (node.nlink, node.inode, node.size, node.mtime_ns, node.ctime_ns, node.xattrs) == (1, 0, 0, 0, 0, ())
    assert node.owner == reading.owner_name(status.st_uid)
