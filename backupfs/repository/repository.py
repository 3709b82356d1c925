"""A repository, opened: its config, its keys, its indexes, and readers of its chunks."""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backupfs.chunking.cutter import CutSizes
from backupfs.codec import keys
from backupfs.codec.keys import KdfCost, Keyring
from backupfs.codec.sealing import Kind, hash_object
from backupfs.errors import (
    DamagedObject,
    NotARepository,
    ObjectExists,
    ObjectMissing,
    RepositoryExists,
    RepositoryLocked,
    StoreError,
    StoreMissing,
    UnknownVersion,
    WrongPassword,
    shown,
)
from backupfs.ids import ObjectId, short
from backupfs.repository import layout
from backupfs.repository.chunks import ChunkReader
from backupfs.repository.config import REMEDY, Config, check_mac, encode_config, read_config, unknown_features
from backupfs.repository.index import Index
from backupfs.repository.local import LocalFolders, known_slot, note_slot
from backupfs.repository.objects import get_named, get_surely
from backupfs.stores.caching import CachingStore
from backupfs.stores.listed import ListedStore
from backupfs.stores.store import Store
from backupfs.stores.together import at_once, each, threads

# What decoded blocks may take; trees are asked for again and again, data mostly once.
TREE_CACHE_SIZE = 32 << 20
DATA_CACHE_SIZE = 48 << 20
# What whoever wants to read files lists, and whoever wants to know of snapshots only.
LISTED_FOR_SNAPSHOTS = (layout.SNAPSHOTS, layout.NOTES)
LISTED_FOR_FILES = (*LISTED_FOR_SNAPSHOTS, layout.prefix_of(Kind.TREE_INDEX), layout.prefix_of(Kind.DATA_INDEX))
# What trees, snapshots and notes of a store that is far away may take on this machine's disk.
HOT_CACHE_SIZE = 2 << 30
# A key slot without a config that is older than this is of an init that was killed. All tries of a put take less.
_INIT_NS = 5 * 60 * 10**9


@dataclass(frozen=True, slots=True)
class KeySlot:
    """A key slot as it lies in the store."""

    slot_id: ObjectId
    name: str
    created_ns: int
    own: bool  # the slot that the present password opened


class Repository:
    """Everything under one store that makes backups readable. Safe in threads."""

    def __init__(
        self,
        store: Store,
        config: Config,
        keyring: Keyring,
        slot_id: ObjectId,
        local: LocalFolders,
        unwritable: frozenset[str] = frozenset(),
    ) -> None:
        """Take the parts; use `open_repository` or `create_repository`.

        unwritable: features that this program lacks and that it must not write without.
        """
        self._unwritable = unwritable
        self.store = store
        self.config = config
        self.keyring = keyring
        self.slot_id = slot_id
        self.local = local
        cache = local.cache / config.repository_id.hex() if local.cache is not None else None
        self.cache = cache  # this repository's own folder on this machine
        self.hot = _cached(store, cache)
        self.tree_index = Index(store, Kind.TREE_INDEX, keyring, cache / "index-tree" if cache else None)
        self.data_index = Index(store, Kind.DATA_INDEX, keyring, cache / "index-data" if cache else None)
        self.trees = ChunkReader(self.hot, keyring, self.tree_index, Kind.TREE_PACK, TREE_CACHE_SIZE)
        self.data = ChunkReader(store, keyring, self.data_index, Kind.DATA_PACK, DATA_CACHE_SIZE)

    # `store` is what is there; `hot` is the same with what is read often kept on this machine, for objects that are
    # never rewritten. Who checks the store asks `store`.

    def require_writable(self) -> None:
        """Raise UnknownVersion if this program may only read the repository."""
        if self._unwritable:
            names = ", ".join(sorted(map(shown, self._unwritable)))
            raise UnknownVersion(
                f"writing to this repository needs features this backupfs lacks ({names}): upgrade backupfs"
            )

    def load_indexes(self) -> None:
        """Bring both indexes up to date with the store. Raises: StoreError."""
        at_once(self.store, self.tree_index.refresh, self.data_index.refresh)

    def slots(self) -> list[KeySlot]:
        """Return the key slots, oldest first; damaged ones under the name they show."""
        found = dict(_read_slots(self.store))
        if self.slot_id not in found:
            # A listing may be stale.
            found.update(_get_slots(self.store, [layout.slot_key(self.slot_id)]))
        return sorted((self._slot(*item) for item in found.items()), key=lambda slot: slot.created_ns)

    def slot(self, slot_id: ObjectId) -> KeySlot:
        """Return a key slot, listed or not. Raises: ObjectMissing; StoreError."""
        return self._slot(slot_id, get_named(self.store, layout.slot_key(slot_id)))

    def _slot(self, slot_id: ObjectId, data: bytes) -> KeySlot:
        try:
            info = keys.read_slot_info(data, f"the object {layout.slot_key(slot_id)}")
            return KeySlot(slot_id, info.name, info.created_ns, slot_id == self.slot_id)
        except DamagedObject:
            return KeySlot(slot_id, "(damaged)", 0, False)
        except UnknownVersion:
            return KeySlot(slot_id, "(of a newer format)", 0, False)

    def add_slot(self, password: bytes, name: str, cost: KdfCost) -> ObjectId:
        """Put a key slot that gives this keyring to another password."""
        self.require_writable()
        data = keys.seal_slot(self.keyring, password, name, time.time_ns(), cost)
        slot_id = hash_object(data)
        self.store.put(layout.slot_key(slot_id), data)
        # Read back and opened before anybody trusts it: a slot that does not open is a repository lost.
        key = layout.slot_key(slot_id)
        keys.open_slot(get_named(self.store, key), password, f"the object {key}")
        return slot_id

    def remove_slot(self, slot_id: ObjectId) -> None:
        """Delete a key slot; the caller makes sure that another one opens.

        Raises: StoreError; for the own slot, which goes when another has been put in its place, with what that leaves.
        """
        self.require_writable()
        try:
            self.store.delete(layout.slot_key(slot_id))
        except StoreError as error:
            if slot_id != self.slot_id:
                raise
            raise type(error)(
                f"{error}; the new password opens the repository, but the old one still does, too: take its key slot "
                f"away with `backupfs key remove {short(slot_id)}`, the new password, and the right to delete (on S3: "
                "s3:DeleteObject)"
            ) from error


def _cached(store: Store, cache: Path | None) -> Store:
    if cache is None or not store.is_far:
        return store
    return CachingStore(
        store, cache / "objects", (layout.SNAPSHOTS, layout.NOTES), (layout.prefix_of(Kind.TREE_PACK),), HOT_CACHE_SIZE
    )


@dataclass(frozen=True, slots=True)
class Found:
    """What opens a repository, as it lies in the store; none of it was looked into yet."""

    config: bytes
    features: list[tuple[str, str]]  # that were added later: (kind, name)
    slots: list[tuple[ObjectId, bytes]]
    others: tuple[str, ...] = ()  # keys of slots that were not fetched, as one is known that should do


def find_repository(store: Store, local: LocalFolders | None = None) -> Found:
    """Return what opens the repository, for `open_repository`; before a password is asked for in vain.

    local: where the key slot is noted that opened it the last time: it need not be listed before it is fetched.
    Raises: NotARepository; StoreError.
    """
    known = known_slot(local.cache, store.url) if local is not None and store.is_far else None
    if known is None:
        readers: tuple[Callable[[Store], Any], ...] = (_read_config, _added_features, _read_slots)
        return Found(*each(store, lambda read: read(store), readers))
    key = layout.slot_key(known)
    readers = (_read_config, _added_features, _slot_keys, lambda store: _get_slots(store, [key]))
    read: list[Any] = list(each(store, lambda read: read(store), readers))
    # One that was given is there, listed or not: a listing may be stale.
    config, features, keys_listed, slots = read
    return Found(config, features, slots, tuple(other for other in keys_listed if other != key or not slots))


def _read_config(store: Store) -> bytes:
    try:
        return get_surely(store, layout.CONFIG)
    except ObjectMissing as error:
        if any(True for _ in store.list(layout.SNAPSHOTS)) or any(True for _ in store.list(layout.PACKS)):
            raise NotARepository(
                f"{store.url} holds the rest of a repository whose object config is gone: put that back from a copy"
            ) from error
        raise NotARepository(f"there is no repository at {store.url}; `backupfs init` makes one") from error
    except StoreMissing as error:
        raise NotARepository(f"there is no repository: {error}") from error


def require_no_repository(store: Store) -> None:
    """Raise RepositoryExists where there is a repository, or the rest of one. Raises: StoreError."""
    # A key slot alone is what an init leaves that was killed before its config: it opens nothing, nobody needs it.
    for key in (layout.CONFIG, layout.SNAPSHOTS, layout.PACKS, layout.INDEX):
        try:
            first = next(iter(store.list(key)), None)
        except StoreMissing:
            return
        if first is not None:
            raise RepositoryExists(
                f"{store.url} holds a repository, or the rest of one ({key}): nothing was changed; use another place"
            )


def create_repository(
    store: Store, password: bytes, slot_name: str, cost: KdfCost, sizes: CutSizes, local: LocalFolders
) -> Repository:
    """Make a new repository; the key slot first, then the config, which makes it one.

    Raises: RepositoryExists; RepositoryLocked for the loser of a race between two inits; StoreError.
    """
    require_no_repository(store)
    keyring = keys.new_keyring()
    now = time.time_ns()
    config = Config(os.urandom(16), now, sizes)
    slot = keys.seal_slot(keyring, password, slot_name, now, cost)
    slot_id = hash_object(slot)
    store.put(layout.slot_key(slot_id), slot)
    _require_no_other_init(store, slot_id)
    data = encode_config(config, keyring)
    # A put may come twice, and conditional puts are not atomic on every store: what is there now tells who has won.
    with contextlib.suppress(ObjectExists):
        store.put(layout.CONFIG, data, if_absent=True)
    if not _is_in_place(store, data):
        store.delete(layout.slot_key(slot_id))
        raise RepositoryLocked(f"another init made a repository at {store.url} just now: use that one")
    return Repository(store, config, keyring, slot_id, local)


def _require_no_other_init(store: Store, own: ObjectId) -> None:
    """Take the own key slot away and raise RepositoryLocked where another init is under way. Raises: StoreError.

    Each puts its slot, then lists all: of two at once, at least one finds the other's.
    """
    if not store.is_far:
        # There a config is put in one step, and whoever comes second knows it.
        return
    slots = {info.key: info.modified_ns for info in store.list(layout.KEYS)}
    own_key = layout.slot_key(own)
    own_ns = slots.pop(own_key, None) or store.now()
    for key, modified_ns in slots.items():
        # What an init leaves that was killed opens nothing, and stays.
        if own_ns - modified_ns < _INIT_NS:
            with contextlib.suppress(StoreError):
                store.delete(own_key)
            raise RepositoryLocked(
                f"another init makes a repository at {store.url}, or was killed in the last {_INIT_NS // 60 // 10**9} "
                f"minutes: use that one, or try again then (its key slot is {key})"
            )


def _is_in_place(store: Store, data: bytes) -> bool:
    """Tell whether a config is the one in the store, or another is. Raises: DamagedObject if it is none."""
    there = store.get(layout.CONFIG)
    if there != data:
        # An answer may have been garbled on its way: then the next one is not, or not in the same way.
        again = store.get(layout.CONFIG)
        if again not in (there, data):
            raise DamagedObject(
                f"the object config in {store.url} was read twice and was not the same: try again, over https"
            )
        there = again
    if there == data:
        return True
    read_config(there)
    return False


def open_repository(
    store: Store,
    password: bytes,
    local: LocalFolders,
    found: Found | None = None,
    ahead: Sequence[str] = (),
) -> Repository:
    """Open a repository with a password; indexes are not loaded yet.

    found: from `find_repository`, if that was called.
    ahead: prefixes that the caller will list next; a store that is far is asked for them meanwhile.
    Raises: NotARepository; WrongPassword; UnknownVersion; DamagedObject; StoreError.
    """
    found = found or find_repository(store)
    with threads(1) as pool:
        listed = ListedStore(store) if store.is_far and ahead else None
        listing = pool.submit(listed.list_ahead, ahead) if listed is not None else None
        try:
            opened = _open_found(store, password, found)
        except (DamagedObject, UnknownVersion):
            if not store.is_far:
                raise
            # Any of it may have been garbled on its way. If it is the same again, so is the error.
            opened = _open_found(store, password, find_repository(store))
        if listing is not None:
            listing.result()
    if store.is_far:
        note_slot(local.cache, store.url, opened.slot_id)
    return Repository(
        listed or store, opened.config, opened.keyring, opened.slot_id, local, frozenset(opened.unwritable)
    )


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a password gives."""

    config: Config
    keyring: Keyring
    slot_id: ObjectId
    unwritable: set[str]  # features


def _open_found(store: Store, password: bytes, found: Found) -> _Opened:
    config, mac = read_config(found.config)
    unreadable, unwritable = unknown_features(config, found.features)
    if unreadable:
        names = ", ".join(sorted(map(shown, unreadable)))
        raise UnknownVersion(f"this repository needs features this backupfs lacks ({names}): upgrade backupfs")
    try:
        slot_id, keyring = _open_slots(store, password, found.slots, config, mac)
    except (WrongPassword, DamagedObject, UnknownVersion):
        if not found.others:
            raise
        slots = found.slots + _get_slots(store, found.others)
        slot_id, keyring = _open_slots(store, password, slots, config, mac)
    return _Opened(config, keyring, slot_id, unwritable)


def _open_slots(
    store: Store, password: bytes, slots: list[tuple[ObjectId, bytes]], config: Config, mac: bytes
) -> tuple[ObjectId, Keyring]:
    """Return the slot that the password opens, and what is in it. Raises: WrongPassword and the like."""
    if not slots:
        remedy = "put one back from a copy"
        if store.is_far:
            remedy = (
                f"either the answer is garbled or cut short (try again, over https), or they are gone: then {remedy}"
            )
        raise DamagedObject(f"the listing of {layout.KEYS} in {store.url} names no key slot that is there: {remedy}")
    damage: list[str] = []
    newer: list[str] = []
    for slot_id, data in slots:
        what = f"the object {layout.slot_key(slot_id)}"
        try:
            if hash_object(data) != slot_id:
                raise DamagedObject(f"{what} is damaged: its bytes are not those it is named by")
            keyring = keys.open_slot(data, password, what)
        except WrongPassword:
            continue
        except DamagedObject as error:
            damage.append(str(error))
            continue
        except UnknownVersion as error:
            newer.append(str(error))
            continue
        if check_mac(config, mac, keyring):
            return slot_id, keyring
        damage.append(f"{what} opens, but the object config is not what was written with its keys; {REMEDY}")
    if damage:
        raise DamagedObject("the password opens no key slot, and some are damaged: " + "; ".join(damage))
    if newer:
        raise UnknownVersion("the password opens no key slot that this backupfs knows: " + "; ".join(newer))
    raise WrongPassword(f"the password opens no key slot of {store.url}")


def _added_features(store: Store) -> list[tuple[str, str]]:
    added = []
    for info in store.list(layout.FEATURES):
        kind, slash, name = info.key.removeprefix(layout.FEATURES).partition("/")
        added.append((kind, name) if slash else ("", kind))
    return added


def _read_slots(store: Store) -> list[tuple[ObjectId, bytes]]:
    return _get_slots(store, _slot_keys(store))


def _slot_keys(store: Store) -> list[str]:
    return [info.key for info in store.list(layout.KEYS) if layout.id_in_key(info.key) is not None]


def _get_slots(store: Store, slot_keys: Sequence[str]) -> list[tuple[ObjectId, bytes]]:
    slots = []
    for key in slot_keys:
        slot_id = layout.id_in_key(key)
        if slot_id is not None:
            try:
                slots.append((ObjectId(slot_id), get_named(store, key)))
            except ObjectMissing:
                continue  # removed since it was listed
            except DamagedObject:
                slots.append((ObjectId(slot_id), b""))  # it opens with nothing, and another one may open
    return slots
