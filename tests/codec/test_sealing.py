"""Sealed objects: what was sealed opens, and nothing else does."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.codec import compression, sealing
from backupfs.codec.keys import MAINTAIN, TREE, Keyring, new_keyring
from backupfs.codec.sealing import (
    FRAME,
    HEADER,
    TAG_SIZE,
    TRAILER,
    Kind,
    OpenedHeader,
    UnitRole,
    make_unit,
    read_trailer,
    seal_object,
    seal_record,
    unit_offsets,
    unseal_record,
)
from backupfs.errors import BackupfsError, DamagedObject, RepositoryError, UnknownVersion, WrongPassword

KEYRING = new_keyring()
LEVELS = [compression.OFF, 1, 3]


@given(st.binary(max_size=5000), st.sampled_from(LEVELS), st.sampled_from([*Kind]))
def test_a_record_opens_to_what_was_sealed(plain: bytes, level: int, kind: Kind) -> None:
    data = bytes(seal_record(kind, KEYRING, plain, level))
    assert unseal_record(data, kind, KEYRING, "it") == plain


@pytest.mark.parametrize("suite", [sealing.AES_256_GCM, sealing.CHACHA20_POLY1305])
def test_any_flipped_bit_is_damage(suite: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "_best_suite", lambda: suite)
    data = bytes(seal_record(Kind.SNAPSHOT, KEYRING, b"a snapshot " * 20))
    for at in range(len(data)):
        for bit in range(8):
            changed = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            # The version, the suite, the key form and the epoch stand for another program or key as long as nobody
            # has compared the object with its name.
            other = RepositoryError if at in (4, 6, 7, 8, 9, 10, 11) else DamagedObject
            with pytest.raises(other):
                unseal_record(changed, Kind.SNAPSHOT, KEYRING, "it")


@given(st.binary(min_size=100, max_size=3000), st.data())
def test_a_cut_or_longer_record_is_damage(plain: bytes, data: st.DataObject) -> None:
    sealed = bytes(seal_record(Kind.NOTE, KEYRING, plain))
    for changed in (sealed[: data.draw(st.integers(0, len(sealed) - 1))], sealed + b"\0", b""):
        with pytest.raises(DamagedObject):
            unseal_record(changed, Kind.NOTE, KEYRING, "it")


def sealed_pack() -> tuple[bytes, list[int], list[bytes]]:
    plains = [b"first " * 100, os.urandom(500), b""]
    units = [make_unit(UnitRole.BLOCK, plain, 1) for plain in plains]
    data = bytes(seal_object(Kind.DATA_PACK, KEYRING, units, make_unit(UnitRole.DIRECTORY, b"directory", 1)))
    return data, unit_offsets(units), plains


def test_units_open_at_their_place_only() -> None:
    data, offsets, plains = sealed_pack()
    opened = OpenedHeader(data[: HEADER.size], Kind.DATA_PACK, KEYRING)
    directory, length = read_trailer(data[-TRAILER.size :], len(data), "it")
    ends = [*offsets[1:], directory]
    for offset, end, plain in zip(offsets, ends, plains, strict=True):
        stored = data[offset:end]
        assert opened.unseal(stored, offset, UnitRole.BLOCK) == plain
        for wrong_offset in (offset + 1, 0, *set(offsets) - {offset}):
            with pytest.raises(DamagedObject):
                opened.unseal(stored, wrong_offset, UnitRole.BLOCK)
        with pytest.raises(DamagedObject):
            opened.unseal(stored, offset, UnitRole.PAGE)
    assert opened.unseal(data[directory : directory + length], directory, UnitRole.DIRECTORY) == b"directory"


def test_a_unit_of_another_object_does_not_open() -> None:
    first, second = sealed_pack(), sealed_pack()
    opened = OpenedHeader(first[0][: HEADER.size], Kind.DATA_PACK, KEYRING)
    offset, end = second[1][0], second[1][1]
    with pytest.raises(DamagedObject):
        opened.unseal(second[0][offset:end], offset, UnitRole.BLOCK)


def test_an_object_opens_with_its_own_keyring_and_kind_only() -> None:
    data = bytes(seal_record(Kind.SNAPSHOT, KEYRING, b"x"))
    with pytest.raises(DamagedObject):
        unseal_record(data, Kind.SNAPSHOT, new_keyring(), "it")
    with pytest.raises(DamagedObject):
        unseal_record(data, Kind.NOTE, KEYRING, "it")


@pytest.mark.parametrize(("at", "value"), [(4, 2), (6, 3), (6, 0), (7, 1)])
def test_an_object_from_the_future_asks_for_an_upgrade(at: int, value: int) -> None:
    data = seal_record(Kind.SNAPSHOT, KEYRING, b"x")
    data[at] = value
    with pytest.raises(UnknownVersion, match="upgrade backupfs"):
        unseal_record(bytes(data), Kind.SNAPSHOT, KEYRING, "it")


def test_a_key_that_the_slot_does_not_give_is_said() -> None:
    subset = Keyring(tuple(entry for entry in KEYRING.keys if entry[0] != MAINTAIN))
    data = bytes(seal_record(Kind.MAINTENANCE_NOTE, KEYRING, b"x"))
    with pytest.raises(WrongPassword, match="maintain"):
        unseal_record(data, Kind.MAINTENANCE_NOTE, subset, "it")
    later = Keyring((*KEYRING.keys, (TREE, 1, os.urandom(32))))
    data = bytes(seal_record(Kind.SNAPSHOT, later, b"x"))
    assert unseal_record(data, Kind.SNAPSHOT, later, "it") == b"x"
    with pytest.raises(WrongPassword, match="epoch 1"):
        unseal_record(data, Kind.SNAPSHOT, KEYRING, "it")


def test_a_claimed_plain_length_never_makes_the_reader_allocate() -> None:
    """The frame is not believed before the tag fits; a holder of the keys may still claim anything."""
    body = compression.compress(bytes(1000), 1)[1]
    unit = sealing.Unit(UnitRole.RECORD, compression.ZSTD, sealing.MAX_PLAIN + 1, body)
    data = bytes(seal_object(Kind.NOTE, KEYRING, [unit]))
    with pytest.raises(DamagedObject, match="impossible"):
        unseal_record(data, Kind.NOTE, KEYRING, "it")
    for plain_length in (999, 1001, 0):
        unit = sealing.Unit(UnitRole.RECORD, compression.ZSTD, plain_length, body)
        with pytest.raises(DamagedObject, match="decompress"):
            unseal_record(bytes(seal_object(Kind.NOTE, KEYRING, [unit])), Kind.NOTE, KEYRING, "it")


def test_a_unit_that_no_reader_would_take_is_not_made() -> None:
    unit = make_unit(UnitRole.BLOCK, bytes(sealing.MAX_PLAIN), 1)
    data = bytes(seal_object(Kind.DATA_PACK, KEYRING, [unit]))
    opened = OpenedHeader(data[: HEADER.size], Kind.DATA_PACK, KEYRING)
    assert len(opened.unseal(data[HEADER.size :], HEADER.size, UnitRole.BLOCK)) == sealing.MAX_PLAIN == 64 << 20
    with pytest.raises(BackupfsError, match="too many"):
        make_unit(UnitRole.BLOCK, bytes(sealing.MAX_PLAIN + 1), 1)


def test_an_unknown_codec_asks_for_an_upgrade() -> None:
    """Only where the unit authenticates: a flipped bit is damage."""
    data = bytes(seal_object(Kind.NOTE, KEYRING, [sealing.Unit(UnitRole.RECORD, 2, 10, b"x" * 10)]))
    with pytest.raises(UnknownVersion, match="codec 2"):
        unseal_record(data, Kind.NOTE, KEYRING, "it")
    data = bytes(seal_object(Kind.NOTE, KEYRING, [sealing.Unit(UnitRole.RECORD, 0, 10, b"x" * 10)]))
    changed = data[: HEADER.size + 5] + b"\2" + data[HEADER.size + 6 :]
    with pytest.raises(DamagedObject):
        unseal_record(changed, Kind.NOTE, KEYRING, "it")


def test_the_trailer_must_stand_where_it_says() -> None:
    data, _, _ = sealed_pack()
    trailer = data[-TRAILER.size :]
    for size in (len(data) - 1, len(data) + 1):
        with pytest.raises(DamagedObject):
            read_trailer(trailer, size, "it")
    with pytest.raises(DamagedObject):
        read_trailer(trailer[1:], len(data), "it")


def test_sealing_adds_what_the_format_says() -> None:
    data = seal_record(Kind.NOTE, KEYRING, b"x" * 10, compression.OFF)
    assert len(data) == HEADER.size + FRAME.size + 10 + TAG_SIZE == 90
