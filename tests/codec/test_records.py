"""Records have one byte form, and bytes that are no record are damage."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.codec.records import decode_record, encode_record
from backupfs.errors import DamagedObject

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=40) | st.binary(max_size=300)
records = st.lists(st.recursive(scalars, lambda inner: st.lists(inner, max_size=20), max_leaves=30), max_size=20)


@given(records)
def test_what_was_encoded_is_decoded_and_encodes_to_the_same_bytes(record: list) -> None:  # type: ignore[type-arg]
    data = encode_record(record)
    assert decode_record(data, "a record") == record
    assert encode_record(decode_record(data, "a record")) == data


@given(st.binary(max_size=300))
def test_any_bytes_are_a_record_or_damage(data: bytes) -> None:
    try:
        assert isinstance(decode_record(data, "these bytes"), list)
    except DamagedObject as error:
        assert "these bytes" in str(error)  # noqa: PT017


@given(records, st.binary(min_size=1, max_size=3))
def test_bytes_behind_a_record_are_damage(record: list, behind: bytes) -> None:  # type: ignore[type-arg]
    with pytest.raises(DamagedObject):
        decode_record(encode_record(record) + behind, "a record")


@given(records)
def test_a_cut_record_is_damage(record: list) -> None:  # type: ignore[type-arg]
    data = encode_record(record)
    for length in range(0, len(data), max(1, len(data) // 10)):
        with pytest.raises(DamagedObject):
            decode_record(data[:length], "a record")


@pytest.mark.parametrize(
    "data",
    [b"\xdd\xff\xff\xff\xff", b"\x91" * 100_000, b"\xc6\xff\xff\xff\xff", b"\x81\x90\x01", b"\xa1x", b"\x91\xa1\xff"],
    ids=["huge array", "deep", "huge bytes", "map", "no array", "no utf-8"],
)
def test_hostile_bytes_are_damage(data: bytes) -> None:
    with pytest.raises(DamagedObject):
        decode_record(data, "a record")


def test_integers_take_the_shortest_form() -> None:
    assert encode_record([0, 127, 128, 255, 256, -1, -33]) == bytes.fromhex("97 00 7f cc80 ccff cd0100 ff d0df")
