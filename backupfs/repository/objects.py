"""Whole immutable objects, each compared with its name before anything in it is believed.

An object that fits its name is what somebody wrote: only then does a version that this program does not know mean an
object from the future, and a key that it lacks another slot's object. Otherwise both are damage.
"""

from backupfs.codec.sealing import hash_object
from backupfs.errors import DamagedObject, ObjectMissing
from backupfs.repository import layout
from backupfs.stores.store import Store


def load_object(store: Store, key: str) -> bytes:
    """Return an object's bytes.

    Raises: DamagedObject if they are not those it is named by; ObjectMissing; StoreError.
    """
    data = get_named(store, key)
    if hash_object(data) != layout.id_in_key(key):
        raise DamagedObject(f"the object {key} is damaged: its bytes are not those it is named by")
    return data


def get_named(store: Store, key: str) -> bytes:
    """Return an object's bytes, fetched once more if they are not those it is named by and may be garbled on their way.

    Raises: ObjectMissing; StoreError.
    """
    data = get_surely(store, key)
    if store.is_far and hash_object(data) != layout.id_in_key(key):
        store.forget(key)
        data = store.get(key)
    return data


def get_surely(store: Store, key: str) -> bytes:
    """Return an object's bytes, asked for once more before it counts as missing: a server may miss one that it has.

    Raises: ObjectMissing; StoreError.
    """
    try:
        return store.get(key)
    except ObjectMissing:
        if not store.is_far:
            raise
        return store.get(key)
