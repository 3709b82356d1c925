"""The names above the snapshots."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.ids import ChunkId, SnapshotId
from backupfs.snapshots.snapshot import FILES, IMAGE, Snapshot, Statistics
from backupfs.snapshots.verification import Outcome, Result, Verification
from backupfs.view.folders import VERIFY_FOLDER, Folder, Link, Root, arrange, name_snapshots, safe_name

SECOND = 10**9


def unverified(_snapshot_id: SnapshotId) -> list[Verification]:
    return []


def snapshot(number: int, time_s: int, host: str = "h", tags: tuple[str, ...] = ()) -> Snapshot:
    return Snapshot(
        kind=FILES,
        host_id=bytes(16),
        host=host,
        sequence=number,
        previous=b"",
        time_ns=time_s * SECOND,
        store_time_ns=time_s * SECOND,
        paths=(b"/",),
        tags=tags,
        parent=b"",
        root=ChunkId(bytes(32)),
        statistics=Statistics(),
        snapshot_id=SnapshotId(number.to_bytes(4, "big") * 8),
    )


def test_snapshots_of_one_second_get_numbers_and_keep_them() -> None:
    first, second, third = snapshot(1, 5), snapshot(2, 5), snapshot(3, 5)
    names = name_snapshots([first, second], {})
    assert list(names.values()) == [b"1970-01-01T00-00-05Z", b"1970-01-01T00-00-05Z-2"]
    # The first is forgotten: the second keeps its name, and nobody inherits the free one.
    names = name_snapshots([second, third], names)
    assert names[second.snapshot_id] == b"1970-01-01T00-00-05Z-2"
    assert names[third.snapshot_id] == b"1970-01-01T00-00-05Z-3"


def test_every_way_leads_to_the_same_directory() -> None:
    one, two = snapshot(1, 5, "a", ("t",)), snapshot(2, 6, "b")
    top = arrange([one, two], name_snapshots([one, two], {}), unverified)
    hosts, tags, ids = (top.children[name] for name in (b"hosts", b"tags", b"ids"))
    assert isinstance(hosts, Folder)
    assert isinstance(tags, Folder)
    assert isinstance(ids, Folder)
    name = b"1970-01-01T00-00-05Z"
    assert top.children[b"latest"] == top.children[b"snapshots"].children[b"1970-01-01T00-00-06Z"]
    assert hosts.folder(b"a").children == {name: Link(b"../../snapshots/" + name, 5 * SECOND)} | {
        b"latest": Link(b"../../snapshots/" + name, 5 * SECOND)
    }
    assert list(tags.children) == [b"t"]
    assert list(ids.children) == [b"00000001", b"00000002"]
    assert top.folder(b"snapshots").children[name] == Root(one, one.root, one.time_ns)


def test_ids_that_begin_alike_get_more_digits() -> None:
    one = snapshot(1, 5)
    two = replace(one, snapshot_id=SnapshotId(one.snapshot_id[:31] + b"x"))
    ids = arrange([one, two], name_snapshots([one, two], {}), unverified).folder(b"ids")
    assert len(ids.children) == 2


def test_an_empty_repository_has_its_folders_and_no_latest() -> None:
    assert set(arrange([], {}, unverified).children) == {b"snapshots", b"hosts", b"tags", b"ids"}


def test_verifications_of_an_image_are_beside_its_tree_by_time_and_level() -> None:
    image, other = replace(snapshot(1, 5), kind=IMAGE, image="web"), snapshot(2, 6)
    outcomes = (Outcome(0, "", Result.PASSED, ""),)
    made = Verification(image.snapshot_id, 9 * SECOND, "h", 2, 0, "", outcomes, b"t" * 32)
    # One without a directory leaves nothing to show.
    found = [made, made, replace(made, level=3, tree=b"")]
    top = arrange([image, other], name_snapshots([image, other], {}), lambda _id: found)
    root = top.folder(b"images").folder(b"web").children[b"1970-01-01T00-00-05Z"]
    assert isinstance(root, Root)
    name = b"1970-01-01T00-00-09Z-level2"
    record = Root(image, ChunkId(b"t" * 32), 9 * SECOND)
    assert root.above[VERIFY_FOLDER].children == {name: record, name + b"-2": record}
    files = top.folder(b"snapshots").children[b"1970-01-01T00-00-06Z"]
    assert isinstance(files, Root)
    assert files.above == {}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", b"%"),
        (".", b"%2E"),
        ("..", b"%2E%2E"),
        ("a/b", b"a%2Fb"),
        ("100%", b"100%25"),
        ("...", b"..."),
        ("ü", b"\xc3\xbc"),
    ],
)
def test_hosts_and_tags_become_safe_names(text: str, name: bytes) -> None:
    assert safe_name(text) == name


@given(st.text(), st.text())
def test_safe_names_are_names_and_stay_apart(one: str, other: str) -> None:
    name = safe_name(one)
    assert name not in (b"", b".", b"..")
    assert b"/" not in name
    assert b"\0" not in name
    assert (name == safe_name(other)) == (one == other)


def test_a_name_that_no_file_can_have_is_shortened_and_stays_its_own() -> None:
    one, other = safe_name("m" * 5000), safe_name("m" * 5001)
    assert one != other
    assert {len(one), len(other)} <= set(range(200, 256))
    assert safe_name("m" * 255) == b"m" * 255
    assert len(safe_name("/" * 100)) <= 255
