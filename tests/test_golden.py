"""Repositories that older versions wrote stay readable. What lies in tests/golden is never made anew."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import independent_reader
import pytest
from blake3 import blake3

from backupfs.codec.sealing import Kind
from backupfs.ids import ChunkId
from backupfs.repository import layout
from backupfs.repository.local import LocalFolders
from backupfs.repository.repository import Repository, open_repository
from backupfs.snapshots import content, notes
from backupfs.snapshots.listing import load_snapshot, load_snapshots
from backupfs.snapshots.node import CHANGED_WHILE_READ, RACY, Node
from backupfs.snapshots.snapshot import HAS_XATTRS, Snapshot
from backupfs.snapshots.walk import root_node, walk
from backupfs.stores.directory import DirectoryStore
from backupfs.usecases.dump import read_file

GOLDEN = Path(__file__).parent / "golden"
FOLDER = GOLDEN / "format-1"
MANIFEST = json.loads((GOLDEN / "format-1.json").read_text())
PASSWORDS = ("golden", "gülden")
RUNS = range(len(MANIFEST["snapshots"]))


def open_golden(password: str = PASSWORDS[0]) -> Repository:
    repository = open_repository(DirectoryStore(FOLDER), password.encode(), LocalFolders(None, None))
    repository.load_indexes()
    return repository


def objects() -> dict[str, int]:
    return {path.relative_to(FOLDER).as_posix(): path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}


def test_the_golden_repository_is_the_one_that_was_made() -> None:
    assert objects() == MANIFEST["objects"]
    for key in objects():
        if key != "config":
            assert blake3((FOLDER / key).read_bytes()).hexdigest() == key.rpartition("/")[2]


@pytest.mark.parametrize("password", PASSWORDS)
def test_every_key_slot_opens(password: str) -> None:
    repository = open_golden(password)
    assert [(slot.name, slot.own) for slot in repository.slots()] == [
        ("first", password == PASSWORDS[0]),
        ("second", password == PASSWORDS[1]),
    ]


def test_snapshots_are_listed_without_the_forgotten_one() -> None:
    listed = load_snapshots(open_golden())
    assert listed.damaged == {}
    expected = [snapshot["id"] for snapshot in MANIFEST["snapshots"] if not snapshot["forgotten"]]
    assert [snapshot.snapshot_id.hex() for snapshot in listed.snapshots] == expected
    assert len(expected) < len(MANIFEST["snapshots"])


def test_notes_are_read() -> None:
    repository = open_golden()
    found = sorted(notes.load_note(repository, info.key).kind for info in repository.store.list(layout.NOTES))
    assert found == 4 * [notes.FORGET] + 2 * [notes.UNDELETE]


@pytest.mark.parametrize("run", RUNS)
def test_the_fields_of_a_snapshot_are_read(run: int) -> None:
    expected = MANIFEST["snapshots"][run]
    snapshot = snapshot_of(open_golden(), run)
    for name in ("host", "sequence", "time_ns", "store_time_ns", "user", "program"):
        assert getattr(snapshot, name) == expected[name]
    assert snapshot.host_id.hex() == expected["host_id"]
    assert snapshot.previous.hex() == expected["previous"]
    assert [os.fsdecode(path) for path in snapshot.paths] == expected["paths"]
    assert list(snapshot.tags) == expected["tags"]
    statistics = snapshot.statistics
    # The source itself is among the entries of the manifest.
    assert (statistics.files, statistics.size) == (expected["files"], expected["size"])
    assert (statistics.directories, statistics.files_skipped) == (expected["directories"], 0)
    assert snapshot.traits == HAS_XATTRS


@pytest.mark.parametrize("run", RUNS)
def test_every_entry_of_a_snapshot_is_read_back(run: int) -> None:
    repository = open_golden()
    above = [b"/tmp", b"/tmp/backupfs-golden"]
    found = []
    top = root_node(snapshot_of(repository, run), repository.trees.load)
    if MANIFEST["snapshots"][run]["paths"] == ["/"]:
        found.append(entry_of(b"/", top, b"", top.xattrs, None))
    for path, node in walk(top, b"/", repository.trees.load):
        assert node.flags & CHANGED_WHILE_READ == 0
        if path not in above:
            data = b"".join(read_file(repository, node)) if node.is_file else b""
            device = node.device if stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode) else None
            found.append(entry_of(path, node, data, node.xattrs, device))
    assert found == sorted(found, key=lambda entry: os.fsencode(entry["path"]).split(b"/"))
    assert_entries(found, run)


@pytest.mark.parametrize("run", RUNS)
def test_the_independent_reader_reads_the_same(run: int) -> None:
    repository = independent_reader.Repository(FOLDER, PASSWORDS[0].encode())
    expected = MANIFEST["snapshots"][run]
    (snapshot,) = (snapshot for snapshot in repository.snapshots() if snapshot.snapshot_id == expected["id"])
    assert snapshot.is_forgotten == expected["forgotten"]
    found = []
    if expected["paths"] == ["/"]:
        top = repository.root(snapshot)
        assert top is not None
        found.append(entry_of(b"/", top, b"", top.xattrs, None))
    for path, node in repository.walk(snapshot.tree):
        if path.startswith(os.fsencode(expected["paths"][0])):
            data = repository.read(node) if node.type == independent_reader.FILE else b""
            device = independent_reader.device_of(node) if node.type in independent_reader.DEVICES else None
            found.append(entry_of(path, node, data, node.xattrs, device))
    assert_entries(found, run)


def test_the_golden_repository_has_every_form() -> None:
    """It guards little if a careless change of the maker left a form out."""
    repository = open_golden()
    suites, kinds, epochs = set(), set(), set()
    for key in objects():
        header = (FOLDER / key).read_bytes()[:48]
        if header[:4] == b"BKFS" and not key.startswith("keys/") and key != "config":
            kinds.add(header[5])
            suites.add(header[6])
            epochs.add((header[5], int.from_bytes(header[8:12], "little")))
    assert kinds == {*Kind} - {Kind.NOTE, Kind.LEASE, Kind.TRASH}
    assert suites == {1, 2}
    assert {kind for kind, epoch in epochs if epoch == 1} == {Kind.DATA_PACK}
    tops = [snapshot_of(repository, run) for run in RUNS]
    assert {type(snapshot.root_xattrs) for snapshot in tops if snapshot.root_xattrs} == {tuple, bytes}
    assert {snapshot.paths == (b"/",) for snapshot in tops} == {True, False}
    forms, racy, levels = set(), set(), set()
    for run in RUNS:
        top = root_node(snapshot_of(repository, run), repository.trees.load)
        for path, node in walk(top, b"/", repository.trees.load):
            if node.flags & RACY:
                racy.add(os.path.basename(path))
            if node.is_directory:
                page = independent_reader.read_record(bytes(repository.trees.load(ChunkId(bytes(node.content)))))
                levels.add(page[0])
            elif node.is_file:
                forms |= forms_of(node.content)
    assert {content.HOLE, content.CHUNK, content.LIST, b"", content.SINGLE_MARK, content.INLINE_MARK} <= forms
    assert racy == {b"inline"}  # its time lies in the future
    assert {0, 2} <= levels


def forms_of(found: content.Content) -> set[Any]:
    return {found[:1]} if isinstance(found, bytes) else {segment[1] for segment in found}


def snapshot_of(repository: Repository, run: int) -> Snapshot:
    return load_snapshot(repository, bytes.fromhex(MANIFEST["snapshots"][run]["id"]))


def entry_of(
    path: bytes,
    node: Node | independent_reader.Node,
    data: bytes,
    xattrs: Any,
    device: tuple[int, int] | None,
) -> dict[str, Any]:
    """Return a node as the manifest would have it."""
    entry = {
        "path": os.fsdecode(path),
        "mode": oct(node.mode),
        "uid": node.uid,
        "gid": node.gid,
        "owner": node.owner.decode(),
        "group": node.group.decode(),
        "nlink": node.nlink,
        "inode": node.inode,
        "size": node.size,
        "mtime_ns": node.mtime_ns,
        "ctime_ns": node.ctime_ns,
    }
    if stat.S_ISREG(node.mode):
        entry["blake3"] = blake3(data).hexdigest()
    elif stat.S_ISLNK(node.mode):
        assert isinstance(node.content, bytes)
        entry["target"] = os.fsdecode(node.content)
    elif device is not None:
        entry["device"] = list(device)
    if xattrs:
        entry["xattrs"] = {os.fsdecode(name): value.hex() for name, value in xattrs}
    return entry


def assert_entries(found: list[dict[str, Any]], run: int) -> None:
    expected = MANIFEST["snapshots"][run]["entries"]
    by_path = {entry["path"]: entry for entry in found}
    assert by_path.keys() == {entry["path"] for entry in expected}
    assert len(found) == len(by_path)
    for entry in expected:
        assert by_path[entry["path"]] == entry
