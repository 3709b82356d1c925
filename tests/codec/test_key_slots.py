"""Key slots: the right password gives the keyring, a wrong one nothing, a hostile slot costs nothing."""

import time

import pytest

from backupfs.codec.keys import (
    CHUNK_ID_DATA,
    CUTTER,
    MAINTAIN,
    SLOT_MAGIC,
    KdfCost,
    Keyring,
    new_keyring,
    open_slot,
    read_slot_info,
    seal_slot,
)
from backupfs.codec.records import Field, decode_record, encode_record
from backupfs.errors import DamagedObject, UnknownVersion, WrongPassword
from tests.builders import CHEAP

KEYRING = new_keyring()
SLOT = seal_slot(KEYRING, b"right", "laptop", 123, CHEAP)


def test_the_right_password_gives_the_keyring() -> None:
    assert open_slot(SLOT, b"right", "it") == KEYRING
    assert read_slot_info(SLOT, "it").name == "laptop"
    assert read_slot_info(SLOT, "it").created_ns == 123


@pytest.mark.parametrize("password", [b"", b"wrong", b"right ", b"Right", b"right\0"])
def test_a_wrong_password_is_said(password: bytes) -> None:
    with pytest.raises(WrongPassword):
        open_slot(SLOT, password, "it")


def test_a_slot_may_give_a_subset_of_the_roles() -> None:
    subset = Keyring(tuple(entry for entry in KEYRING.keys if entry[0] != MAINTAIN))
    opened = open_slot(seal_slot(subset, b"host", "host", 1, CHEAP), b"host", "it")
    assert opened == subset
    assert not opened.has(MAINTAIN)
    assert opened.chunk_id_key(tree=False) == KEYRING.key(CHUNK_ID_DATA, 0)
    with pytest.raises(WrongPassword, match="maintain"):
        opened.key(MAINTAIN, 0)


def test_no_flipped_bit_gives_a_keyring() -> None:
    for at in range(len(SLOT)):
        changed = SLOT[:at] + bytes([SLOT[at] ^ 1 << at % 8]) + SLOT[at + 1 :]
        # The last byte of the magic is the version, as long as nobody has compared the slot with its name.
        with pytest.raises(UnknownVersion if at == 7 else (DamagedObject, WrongPassword)):
            open_slot(changed, b"right", "it")


def changed_slot(position: int, value: Field) -> bytes:
    fields = decode_record(SLOT[len(SLOT_MAGIC) :], "it")
    fields[position] = value
    return SLOT_MAGIC + encode_record(fields)


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (2, 1 << 40),
        (2, 7),
        (2, -1),
        (2, "64"),
        (3, 1 << 30),
        (3, 0),
        (3, True),
        (4, 1 << 20),
        (4, 0),
        (4, -1),
        (5, b""),
        (7, b"short"),
    ],
)
def test_hostile_parameters_are_refused_before_they_cost_anything(position: int, value: Field) -> None:
    started = time.monotonic()
    with pytest.raises(DamagedObject):
        open_slot(changed_slot(position, value), b"right", "it")
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(("position", "value"), [(0, "other"), (1, 5), (6, bytes(32))])
def test_the_clear_part_of_a_slot_is_authenticated(position: int, value: Field) -> None:
    with pytest.raises((DamagedObject, WrongPassword)):
        open_slot(changed_slot(position, value), b"right", "it")


@pytest.mark.parametrize("data", [b"", SLOT[:8], SLOT[:20], SLOT + b"\0", b"BKFSPET1" + SLOT[8:], bytes(200)])
def test_what_is_no_slot_is_damage(data: bytes) -> None:
    with pytest.raises(DamagedObject):
        open_slot(data, b"right", "it")
    with pytest.raises(DamagedObject):
        read_slot_info(data, "it")


def test_a_slot_from_the_future_asks_for_an_upgrade() -> None:
    for ask in (lambda data: open_slot(data, b"right", "it"), lambda data: read_slot_info(data, "it")):
        with pytest.raises(UnknownVersion, match="newer"):
            ask(b"BKFSKEY2" + SLOT[8:])


def test_two_slots_of_one_password_share_no_bytes() -> None:
    other = seal_slot(KEYRING, b"right", "laptop", 123, CHEAP)
    assert other[40:] != SLOT[40:]
    assert open_slot(other, b"right", "it") == KEYRING


def test_keys_are_independent_and_the_cutter_is_always_keyed() -> None:
    keys = [key for _, _, key in KEYRING.keys]
    assert len(set(keys)) == len(keys)
    assert KEYRING.chunk_id_key(tree=True) != KEYRING.chunk_id_key(tree=False)
    assert 0 < KEYRING.file_cut_seed() < 1 << 63
    assert KEYRING.page_cut_key() != KEYRING.key(CUTTER, 0)


def test_the_default_cost_is_what_the_documentation_promises() -> None:
    assert KdfCost() == KdfCost(memory_kib=64 << 10, passes=3, lanes=1)
