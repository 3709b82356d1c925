"""The config: its MAC, its features, its future; and making and opening repositories."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backupfs.chunking.cutter import CutSizes
from backupfs.codec.keys import MAINTAIN, Keyring, new_keyring, seal_slot
from backupfs.codec.sealing import hash_object
from backupfs.errors import (
    AccessDenied,
    DamagedObject,
    NotARepository,
    RepositoryError,
    RepositoryExists,
    UnknownVersion,
    WrongPassword,
)
from backupfs.ids import short
from backupfs.repository import layout
from backupfs.repository.config import MAGIC, Config, check_mac, encode_config, read_config
from backupfs.repository.local import LocalFolders
from backupfs.repository.repository import find_repository, open_repository
from backupfs.snapshots import notes
from backupfs.snapshots.listing import load_snapshots
from backupfs.stores.memory import MemoryStore
from backupfs.stores.store import ObjectInfo, Store
from tests.builders import (
    CHEAP,
    CUT_SIZES,
    NOWHERE,
    PASSWORD,
    back_up,
    build,
    copy_of,
    keys_of,
    new_repository,
    reopened,
)
from tests.faults import AroundStore

KEYRING = new_keyring()
CONFIG = Config(bytes(range(16)), 123, CutSizes(), ("may be ignored",))


def test_a_config_reads_back_and_knows_its_keyring() -> None:
    config, mac = read_config(encode_config(CONFIG, KEYRING))
    assert config == CONFIG
    assert check_mac(config, mac, KEYRING)
    assert not check_mac(config, mac, new_keyring())
    assert not check_mac(replace(config, created_ns=124), mac, KEYRING)
    assert not check_mac(replace(config, cut_sizes=CUT_SIZES), mac, KEYRING)


def test_no_flipped_bit_passes() -> None:
    data = encode_config(CONFIG, KEYRING)
    for at in range(len(data)):
        for bit in range(8):
            changed = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            try:
                config, mac = read_config(changed)
            except RepositoryError:
                continue
            assert not check_mac(config, mac, KEYRING), (at, bit)


def test_a_feature_that_readers_must_know_asks_for_an_upgrade() -> None:
    repository = new_repository()
    for name, features in (("incompatible", ("time-travel",)), ("read_compatible", ("appending",))):
        store = copy_of(repository.store)
        config = replace(repository.config, **{name: features})  # type: ignore[arg-type]
        store.put(layout.CONFIG, encode_config(config, repository.keyring))
        if name == "incompatible":
            with pytest.raises(UnknownVersion, match=r"time-travel.*upgrade backupfs"):
                reopened(store)
        else:
            with pytest.raises(UnknownVersion):
                reopened(store).require_writable()
    store = copy_of(repository.store)
    store.put("features/compatible/colour", b"")
    reopened(store).require_writable()
    store.put("features/read-compatible/appending", b"")
    with pytest.raises(UnknownVersion):
        reopened(store).add_slot(b"x", "x", CHEAP)
    store.put("features/unheard-of/time-travel", b"")
    with pytest.raises(UnknownVersion, match=r"time-travel.*upgrade backupfs"):
        reopened(store)


def test_a_later_format_asks_for_an_upgrade() -> None:
    data = bytearray(encode_config(CONFIG, KEYRING))
    data[len(MAGIC) + 1] = 2
    with pytest.raises(UnknownVersion, match=r"format 2.*upgrade backupfs"):
        read_config(bytes(data))
    with pytest.raises(UnknownVersion, match="upgrade backupfs"):
        read_config(b"BKFSCFG2" + bytes(data[8:]))


@pytest.mark.parametrize("data", [b"", MAGIC, MAGIC + b"\x90", MAGIC + b"\x91\xa1x", bytes(100), MAGIC[:4]])
def test_what_is_no_config_is_damage(data: bytes) -> None:
    with pytest.raises(DamagedObject, match=r"config.*put it back from a copy"):
        read_config(data)


@pytest.mark.parametrize("sizes", [CutSizes(0, 1, 2), CutSizes(2000, 1000, 4000), CutSizes(1 << 20, 1 << 30, 1 << 40)])
def test_impossible_sizes_of_chunks_are_damage(sizes: CutSizes) -> None:
    with pytest.raises(DamagedObject):
        read_config(encode_config(replace(CONFIG, cut_sizes=sizes), KEYRING))


# Repositories.


def test_a_repository_opens_with_each_of_its_passwords_only() -> None:
    repository = new_repository()
    repository.add_slot(b"second", "other", CHEAP)
    assert open_repository(repository.store, b"second", NOWHERE).keyring == repository.keyring
    assert reopened(repository).config == repository.config
    with pytest.raises(WrongPassword):
        open_repository(repository.store, b"third", NOWHERE)
    repository.remove_slot(repository.slot_id)
    with pytest.raises(WrongPassword):
        open_repository(repository.store, PASSWORD, NOWHERE)
    assert [slot.name for slot in open_repository(repository.store, b"second", NOWHERE).slots()] == ["other"]


def test_an_old_key_slot_that_may_not_be_deleted_is_told_with_what_to_do() -> None:
    class Keeping(AroundStore):
        def delete(self, key: str) -> None:
            raise AccessDenied(f"cannot delete object {key}: the server refuses it")

    repository = reopened(Keeping(new_repository().store))
    added = repository.add_slot(b"second", "other", CHEAP)
    says = rf"refuses it; .*the old one still does.*`backupfs key remove {short(repository.slot_id)}`.*s3:DeleteObject"
    with pytest.raises(AccessDenied, match=says):
        repository.remove_slot(repository.slot_id)
    # Both open, as it says; of another's slot there is nothing to add.
    assert open_repository(repository.store, b"second", NOWHERE).slot_id == added
    assert reopened(repository.store).slot_id == repository.slot_id
    with pytest.raises(AccessDenied, match=r"refuses it$"):
        repository.remove_slot(added)


def test_an_empty_store_is_no_repository_and_a_repository_is_not_made_twice() -> None:
    with pytest.raises(NotARepository, match="init"):
        open_repository(MemoryStore(), PASSWORD, NOWHERE)
    repository = new_repository()
    before = keys_of(repository.store)
    with pytest.raises(RepositoryExists):
        new_repository(repository.store)
    assert keys_of(repository.store) == before


@pytest.mark.parametrize("key", ["packs/data/" + "0" * 64, "index/tree/" + "0" * 64, "snapshots/" + "0" * 64])
def test_the_rest_of_a_repository_is_not_made_a_new_one(key: str) -> None:
    store = MemoryStore()
    store.put(key, b"x")
    with pytest.raises(RepositoryExists, match="nothing was changed"):
        new_repository(store)


def test_a_repository_without_key_slots_says_that_they_are_lost() -> None:
    repository = new_repository()
    repository.remove_slot(repository.slot_id)
    with pytest.raises(DamagedObject, match="no key slot"):
        reopened(repository.store)


class FarStore(AroundStore):
    """A store that is far, the first answers of which are garbled on their way."""

    def __init__(self, inner: Store, verb: str, key: str, times: int, garble: Callable[[Any], Any]) -> None:
        super().__init__(inner)
        self._verb, self._key, self.left, self._garble = verb, key, times, garble

    @property
    def is_far(self) -> bool:
        return True

    def around(self, verb: str, key: str, call: Callable[[], Any]) -> Any:
        answer = call()
        if verb == self._verb and key == self._key and self.left:
            self.left -= 1
            return self._garble(answer)
        return answer


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


GARBLED: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "start": ("get", "config", flipped(0)),
    "version": ("get", "config", flipped(7)),
    "structure": ("get", "config", flipped(8)),
    "content": ("get", "config", flipped(20)),
    "page": ("get", "config", lambda _: b"<html>log in first</html>"),
    "no slots": ("list", "keys/", lambda _: ()),
    "another slot": ("list", "keys/", lambda _: (ObjectInfo("keys/" + "0" * 64, 1, 1),)),
    "features": ("list", "features/", lambda _: (ObjectInfo("features/incompatible/x", 1, 1),)),
}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("what", GARBLED)
def test_what_opens_a_repository_is_fetched_again_when_it_is_garbled(what: str, known: bool, tmp_path: Path) -> None:
    repository = new_repository()
    local = LocalFolders(tmp_path / "cache", None)
    if known:
        open_repository(FarStore(repository.store, "", "", 0, bytes), PASSWORD, local)
    verb, key, garble = GARBLED[what]
    store = FarStore(repository.store, verb, key, 1, garble)
    found = find_repository(store, local)
    assert open_repository(store, PASSWORD, local, found).config == repository.config
    assert store.left == 0
    store = FarStore(repository.store, verb, key, 99, garble)
    if key == "keys/":
        # The slot that opened it before is there, whatever a listing says, which may be stale.
        opened = open_repository(store, PASSWORD, local, find_repository(store, local))
        assert opened.slot_id == repository.slot_id
        local = LocalFolders(tmp_path / "fresh", None)
    # What is wrong each time is told.
    with pytest.raises((DamagedObject, UnknownVersion)) as caught:
        open_repository(store, PASSWORD, local, find_repository(store, local))
    if key == "keys/":
        assert "names no key slot that is there: either the answer is garbled or cut short" in str(caught.value)


def test_the_config_of_another_repository_does_not_open_with_these_keys() -> None:
    first, second = new_repository(), new_repository()
    store = copy_of(first.store)
    store.put(layout.CONFIG, second.store.get(layout.CONFIG))
    with pytest.raises(DamagedObject, match=r"config.*put it back from a copy"):
        reopened(store)


def test_a_slot_that_may_not_destroy_backs_up_and_reads_but_cannot_forget(tmp_path: Path) -> None:
    repository = new_repository()
    first = back_up(repository, source := build({"a": {}}, tmp_path / "source"))
    notes.put_note(repository, notes.new_note(first.snapshot_id, notes.FORGET))
    subset = Keyring(tuple(entry for entry in repository.keyring.keys if entry[0] != MAINTAIN))
    slot = seal_slot(subset, b"host", "host", 1, CHEAP)
    repository.store.put(layout.slot_key(hash_object(slot)), slot)
    host = open_repository(repository.store, b"host", NOWHERE)
    second = back_up(host, source)
    with pytest.raises(WrongPassword, match="maintain"):
        notes.put_note(host, notes.new_note(second.snapshot_id, notes.FORGET))
    # It cannot tell a forgotten snapshot, which is no damage.
    assert {item.snapshot_id for item in load_snapshots(host).snapshots} == {first.snapshot_id, second.snapshot_id}
    assert not load_snapshots(host).damaged
    assert [item.snapshot_id for item in load_snapshots(reopened(repository)).snapshots] == [second.snapshot_id]
