"""Snapshots: the record, its place in the store, its future."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.codec.records import decode_record, encode_record
from backupfs.codec.sealing import hash_object
from backupfs.errors import DamagedObject, UnknownVersion
from backupfs.ids import ChunkId, SnapshotId
from backupfs.snapshots.listing import load_snapshot, put_snapshot
from backupfs.snapshots.snapshot import (
    FILES,
    IMAGE,
    Snapshot,
    Statistics,
    decode_snapshot,
    encode_snapshot,
    time_name,
)
from tests.builders import keys_of, new_repository

ROOT = ChunkId(hash_object(b"root"))
NO_ID = SnapshotId(b"")

numbers = st.integers(0, 2**63 - 1)
snapshots = st.builds(
    Snapshot,
    kind=st.sampled_from([FILES, IMAGE]),
    host_id=st.binary(min_size=16, max_size=16),
    host=st.text(max_size=20),
    sequence=numbers,
    previous=st.sampled_from([b"", bytes(32)]),
    time_ns=st.integers(-(2**62), 2**62),
    store_time_ns=numbers,
    paths=st.lists(st.binary(max_size=20), max_size=4).map(tuple),
    tags=st.lists(st.text(max_size=9), max_size=4).map(tuple),
    parent=st.sampled_from([b"", bytes(32)]),
    root=st.just(ROOT),
    statistics=st.builds(Statistics, *[numbers] * len(fields(Statistics))),
    user=st.text(max_size=9),
    program=st.text(max_size=9),
    traits=st.integers(0, 255),
)


@given(snapshots)
def test_a_snapshot_reads_back_and_has_one_byte_form(snapshot: Snapshot) -> None:
    data = encode_snapshot(snapshot)
    assert decode_snapshot(data, NO_ID) == snapshot
    assert encode_snapshot(decode_snapshot(data, NO_ID)) == data


EXAMPLE = Snapshot(FILES, bytes(16), "h", 1, b"", 5, 6, (b"/a",), ("t",), b"", ROOT, Statistics())


def test_a_stored_snapshot_is_named_by_its_bytes() -> None:
    repository = new_repository()
    stored = put_snapshot(repository, EXAMPLE)
    assert keys_of(repository.store, "snapshots/") == [f"snapshots/{stored.snapshot_id.hex()}"]
    assert load_snapshot(repository, stored.snapshot_id) == stored == replace(EXAMPLE, snapshot_id=stored.snapshot_id)


def test_a_later_record_asks_for_an_upgrade() -> None:
    record = decode_record(encode_snapshot(EXAMPLE), "it")
    record[0] = 2
    with pytest.raises(UnknownVersion, match="upgrade backupfs"):
        decode_snapshot(encode_record(record), NO_ID)


def test_fields_that_a_later_version_appends_are_ignored() -> None:
    record = decode_record(encode_snapshot(EXAMPLE), "it")
    assert decode_snapshot(encode_record([*record, b"new"]), NO_ID) == EXAMPLE


@pytest.mark.parametrize("position", range(19))
def test_a_field_of_the_wrong_type_is_damage(position: int) -> None:
    record = decode_record(encode_snapshot(EXAMPLE), "it")
    record[position] = None
    with pytest.raises(DamagedObject):
        decode_snapshot(encode_record(record), NO_ID)
    with pytest.raises(DamagedObject):
        decode_snapshot(encode_record(record[:position]), NO_ID)


def test_times_are_named_without_colons() -> None:
    assert time_name(1_795_335_191_999_999_999) == "2026-11-22T08-13-11Z"
    assert time_name(-1) == "1969-12-31T23-59-59Z"
