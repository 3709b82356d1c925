"""Keys: the keyring of independent keys, what is derived from it, and the slots that wrap it under a password.

A slot's bytes: magic (8), then one record [name, created_ns, memory_kib, passes, lanes, salt, check, nonce, wrapped].
Argon2id gives 64 bytes: the key that wraps, and `check`, which commits the slot to one password.
Source: docs/format.rst, "Keys"; RFC 9106.
"""

import os
from dataclasses import dataclass
from hmac import compare_digest

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from backupfs.codec.records import Encodable, decode_record, encode_record
from backupfs.errors import DamagedObject, UnknownVersion, WrongPassword

KEY_SIZE = 32
SLOT_MAGIC = b"BKFSKEY1"

# Roles of keys. The first three are never rotated: chunk ids and cuts must stay comparable.
CHUNK_ID_DATA = "chunk-id-data"
CHUNK_ID_TREE = "chunk-id-tree"
CUTTER = "cutter"
CONFIG = "config"
TREE = "tree"
DATA = "data"
INDEX = "index"
MAINTAIN = "maintain"
FIXED_ROLES = (CHUNK_ID_DATA, CHUNK_ID_TREE, CUTTER, CONFIG)
SEALING_ROLES = (TREE, DATA, INDEX, MAINTAIN)


@dataclass(frozen=True, slots=True)
class KdfCost:
    """What opening a slot costs: memory in KiB, passes over it, lanes."""

    memory_kib: int = 64 << 10
    passes: int = 3
    lanes: int = 1


# A damaged or hostile slot must not make the reader allocate or compute without end.
_HIGHEST_COST = KdfCost(memory_kib=4 << 20, passes=64, lanes=64)


@dataclass(frozen=True, slots=True)
class Keyring:
    """The keys of one repository that one slot gives: (role, epoch) → key."""

    keys: tuple[tuple[str, int, bytes], ...]

    def key(self, role: str, epoch: int) -> bytes:
        """Return a key. Raises: WrongPassword if this slot does not give it."""
        for own_role, own_epoch, key in self.keys:
            if own_role == role and own_epoch == epoch:
                return key
        raise WrongPassword(
            f"this key slot does not give the {role} key of epoch {epoch}: use the password of another slot"
        )

    def has(self, role: str) -> bool:
        """Tell whether the slot gives any key of this role."""
        return any(own_role == role for own_role, _, _ in self.keys)

    def epoch(self, role: str) -> int:
        """Return the newest epoch of a role, which new objects are sealed under; 0 where the slot lacks the role."""
        return max((epoch for own_role, epoch, _ in self.keys if own_role == role), default=0)

    def chunk_id_key(self, tree: bool) -> bytes:
        """Return the key that names chunks: tree pages and file data have different ones."""
        return self.key(CHUNK_ID_TREE if tree else CHUNK_ID_DATA, 0)

    def file_cut_seed(self) -> int:
        """Return the cutter's 63-bit seed; never 0, which would mean unkeyed cuts."""
        derived = keyed_hash(self.key(CUTTER, 0), b"backupfs 1 file cuts")
        # FastCDC rolls two bytes at once with a table shifted by one bit: a 64th bit would not fit.
        return int.from_bytes(derived[:8], "little") & ((1 << 63) - 1) or 1

    def page_cut_key(self) -> bytes:
        """Return the key of the hash of names that cuts tree pages."""
        return keyed_hash(self.key(CUTTER, 0), b"backupfs 1 page cuts")


def new_keyring() -> Keyring:
    """Return a keyring of fresh random keys, all roles, at epoch 0."""
    return Keyring(tuple((role, 0, os.urandom(KEY_SIZE)) for role in (*FIXED_ROLES, *SEALING_ROLES)))


def keyed_hash(key: bytes, data: bytes | bytearray | memoryview) -> bytes:
    """Return the 32-byte keyed BLAKE3 of `data`."""
    return blake3(data, key=key).digest()


def object_key(role_key: bytes, salt: bytes) -> bytes:
    """Return the key of one object, from the key of its role and epoch and the object's salt."""
    return blake3(b"backupfs 1 object key" + salt, key=role_key).digest()


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """What a key slot shows without its password."""

    name: str
    created_ns: int


def _stretch(password: bytes, salt: bytes, cost: KdfCost) -> tuple[bytes, bytes]:
    # Imported here: it costs 10 ms that only the opening of a slot needs to pay.
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    kdf = Argon2id(
        salt=salt, length=2 * KEY_SIZE, iterations=cost.passes, lanes=cost.lanes, memory_cost=cost.memory_kib
    )
    stretched = kdf.derive(password)
    return stretched[:KEY_SIZE], stretched[KEY_SIZE:]


def seal_slot(keyring: Keyring, password: bytes, name: str, created_ns: int, cost: KdfCost) -> bytes:
    """Return the bytes of a new key slot that gives `keyring` to whoever has the password."""
    salt, nonce = os.urandom(16), os.urandom(12)
    wrapping_key, check = _stretch(password, salt, cost)
    head: list[Encodable] = [name, created_ns, cost.memory_kib, cost.passes, cost.lanes, salt, check]
    plain = encode_record([list(entry) for entry in keyring.keys])
    wrapped = AESGCM(wrapping_key).encrypt(nonce, plain, SLOT_MAGIC + encode_record(head))
    return SLOT_MAGIC + encode_record([*head, nonce, wrapped])


def _slot_fields(data: bytes, what: str) -> list:  # type: ignore[type-arg]
    if data[: len(SLOT_MAGIC)] != SLOT_MAGIC:
        if data[: len(SLOT_MAGIC) - 1] == SLOT_MAGIC[:-1]:
            raise UnknownVersion(f"{what} is a key slot of a newer format: upgrade backupfs")
        raise DamagedObject(f"{what} is not a key slot")
    fields = decode_record(data[len(SLOT_MAGIC) :], what)
    kinds = [str, int, int, int, int, bytes, bytes, bytes, bytes]
    if [type(field) for field in fields] != kinds:
        raise DamagedObject(f"{what} is not a key slot of format 1")
    return fields


def read_slot_info(data: bytes, what: str) -> SlotInfo:
    """Return the clear part of a slot. Raises: DamagedObject."""
    name, created_ns, *_ = _slot_fields(data, what)
    return SlotInfo(name, created_ns)


def open_slot(data: bytes, password: bytes, what: str) -> Keyring:
    """Return the keyring that a slot gives to the holder of its password.

    Raises: WrongPassword; DamagedObject.
    """
    fields = _slot_fields(data, what)
    _, _, memory_kib, passes, lanes, salt, check, nonce, wrapped = fields
    cost = KdfCost(memory_kib, passes, lanes)
    too_much = memory_kib > _HIGHEST_COST.memory_kib or passes > _HIGHEST_COST.passes or lanes > _HIGHEST_COST.lanes
    if too_much or passes < 1 or lanes < 1 or memory_kib < 8 * lanes or len(salt) < 8 or len(nonce) != 12:
        raise DamagedObject(f"{what} asks for an impossible password cost; it is damaged")
    wrapping_key, own_check = _stretch(password, salt, cost)
    if not compare_digest(check, own_check):
        raise WrongPassword("the password opens no key slot of this repository")
    try:
        plain = AESGCM(wrapping_key).decrypt(nonce, wrapped, SLOT_MAGIC + encode_record(fields[:7]))
    except (InvalidTag, ValueError) as error:
        raise DamagedObject(f"{what} is damaged: the password fits, its keys do not open") from error
    keys = []
    for entry in decode_record(plain, what):
        match entry:
            case [str(role), int(epoch), bytes(key)] if len(key) == KEY_SIZE:
                keys.append((role, epoch, key))
            case _:
                raise DamagedObject(f"{what} holds no keyring")
    return Keyring(tuple(keys))
