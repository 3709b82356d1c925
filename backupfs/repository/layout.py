"""Where each kind of object lies in the store; the only place that spells keys."""

from backupfs.codec.sealing import Kind

CONFIG = "config"
KEYS = "keys/"
PACKS = "packs/"
INDEX = "index/"
FEATURES = "features/"  # features/CLASS/NAME: what was added to the repository after init
SNAPSHOTS = "snapshots/"
NOTES = "notes/"
LEASES = "leases/"
TRASH = "trash/"

_PREFIXES = {
    Kind.DATA_PACK: "packs/data/",
    Kind.TREE_PACK: "packs/tree/",
    Kind.DATA_INDEX: "index/data/",
    Kind.TREE_INDEX: "index/tree/",
    Kind.SNAPSHOT: SNAPSHOTS,
}


def prefix_of(kind: Kind) -> str:
    """Return the prefix under which the objects of a kind are listed."""
    return _PREFIXES[kind]


def key_of(kind: Kind, object_id: bytes) -> str:
    """Return the key of an immutable object."""
    return _PREFIXES[kind] + object_id.hex()


def slot_key(object_id: bytes) -> str:
    """Return the key of a key slot."""
    return KEYS + object_id.hex()


def note_prefix(snapshot_id: bytes) -> str:
    """Return the prefix of the notes about one snapshot."""
    return f"{NOTES}{snapshot_id.hex()}/"


def id_in_key(key: str) -> bytes | None:
    """Return the object id that ends a key, or None where the key ends in something else."""
    name = key.rpartition("/")[2]
    try:
        return bytes.fromhex(name) if len(name) == 64 and name == name.lower() else None
    except ValueError:
        return None
