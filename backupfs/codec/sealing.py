"""Sealed objects: a clear header, then framed units, each compressed and sealed on its own.

    object  = header (48) | unit … | [directory unit | trailer (24)]
    unit    = frame (16) | ciphertext | tag (16)

The key of an object comes from the key of its role and epoch and its salt; the nonce of a unit is its byte offset;
header, frame and offset are authenticated with it. So a unit opens only at its place in its object, and a reader
that took the header from a reference (the index) cannot be given another object in its stead.
Everything here is pure and safe in threads.
Source: docs/format.rst, "Sealed objects"; NIST SP 800-38D (AES-256-GCM), RFC 8439 (ChaCha20-Poly1305).
"""

import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from backupfs.codec import compression, keys
from backupfs.codec.keys import Keyring
from backupfs.errors import BackupfsError, DamagedObject, UnknownVersion
from backupfs.ids import ObjectId

MAGIC = b"BKFS"
FORMAT = 1
HEADER = struct.Struct("<4sBBBBII32s")  # magic, format, kind, suite, key form, key epoch, 0, salt
FRAME = struct.Struct("<4sBBHII")  # magic, role, codec, 0, plain length, sealed length (with its tag)
FRAME_MAGIC = b"UNIT"
TRAILER = struct.Struct("<QI4x8s")  # offset of the directory unit, its stored length, magic
TRAILER_MAGIC = b"BKFSEND1"
TAG_SIZE = 16
SALT_SIZE = 32

AES_256_GCM = 1
CHACHA20_POLY1305 = 2
KEY_DERIVED = 0

# No unit of any kind is larger: it bounds what a reader allocates before it has authenticated anything.
MAX_PLAIN = 64 << 20


class Kind(IntEnum):
    """What an object is; its header says so and its units authenticate it."""

    DATA_PACK = 1
    TREE_PACK = 2
    DATA_INDEX = 3
    TREE_INDEX = 4
    SNAPSHOT = 5
    NOTE = 6
    MAINTENANCE_NOTE = 7
    LEASE = 8
    TRASH = 9


ROLE_OF_KIND = {
    Kind.DATA_PACK: keys.DATA,
    Kind.TREE_PACK: keys.TREE,
    Kind.DATA_INDEX: keys.INDEX,
    Kind.TREE_INDEX: keys.INDEX,
    Kind.SNAPSHOT: keys.TREE,
    Kind.NOTE: keys.TREE,
    Kind.MAINTENANCE_NOTE: keys.MAINTAIN,
    Kind.LEASE: keys.INDEX,
    Kind.TRASH: keys.MAINTAIN,
}


class UnitRole(IntEnum):
    """What a unit is within its object."""

    BLOCK = 1
    PAGE = 2
    RECORD = 3
    DIRECTORY = 4


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit before sealing: already compressed."""

    role: UnitRole
    codec: int
    plain_length: int
    body: bytes | bytearray | memoryview

    @property
    def stored_length(self) -> int:
        """The length of the unit in its object, frame and tag included."""
        return FRAME.size + len(self.body) + TAG_SIZE


def make_unit(role: UnitRole, plain: bytes | bytearray | memoryview, level: int) -> Unit:
    """Compress one unit of at most `MAX_PLAIN` bytes. Costs what zstd costs, with the GIL released."""
    if len(plain) > MAX_PLAIN:
        raise BackupfsError(f"{len(plain)} bytes are too many for one unit; readers would refuse it")
    codec, body = compression.compress(plain, level)
    return Unit(role, codec, len(plain), body)


def hash_object(data: bytes | bytearray | memoryview) -> ObjectId:
    """Return the name of an immutable object: the plain BLAKE3-256 of its stored bytes."""
    return ObjectId(blake3(data).digest())


def seal_object(kind: Kind, keyring: Keyring, units: list[Unit], directory: Unit | None = None) -> bytearray:
    """Return the bytes of a new object with these units in order.

    directory: closes the object, with a trailer that says where it is; its content may name the offsets of the other
    units, which follow from `unit_offsets`.
    """
    epoch = keyring.epoch(ROLE_OF_KIND[kind])
    suite = _best_suite()
    header = HEADER.pack(MAGIC, FORMAT, kind, suite, KEY_DERIVED, epoch, 0, os.urandom(SALT_SIZE))
    opened = OpenedHeader(header, kind, keyring)
    everything = units if directory is None else [*units, directory]
    length = HEADER.size + sum(unit.stored_length for unit in everything)
    sealed = bytearray(length + (0 if directory is None else TRAILER.size))
    sealed[: HEADER.size] = header
    offset = HEADER.size
    with memoryview(sealed) as view:
        for unit in everything:
            opened.seal_into(unit, offset, view)
            offset += unit.stored_length
    if directory is not None:
        start = length - directory.stored_length
        TRAILER.pack_into(sealed, length, start, directory.stored_length, TRAILER_MAGIC)
    return sealed


def unit_offsets(units: list[Unit]) -> list[int]:
    """Return where each unit will stand in its object."""
    offsets, offset = [], HEADER.size
    for unit in units:
        offsets.append(offset)
        offset += unit.stored_length
    return offsets


class OpenedHeader:
    """The header of one object with the key that follows from it: seals and opens the object's units."""

    __slots__ = ("_cipher", "header", "what")

    def __init__(self, header: bytes, kind: Kind, keyring: Keyring, what: str = "a new object") -> None:
        """Derive the object's key.

        kind: what the caller expects the object to be.
        what: names the object in messages.
        Raises: DamagedObject; UnknownVersion for an object from the future.
        """
        if len(header) != HEADER.size:
            raise DamagedObject(f"{what} is cut short")
        magic, version, own_kind, suite, key_form, epoch, _, salt = HEADER.unpack(header)
        if magic != MAGIC:
            raise DamagedObject(f"{what} does not start as an object of backupfs")
        if version != FORMAT or key_form != KEY_DERIVED or suite not in (AES_256_GCM, CHACHA20_POLY1305):
            raise UnknownVersion(
                f"{what} has format {version}.{suite}.{key_form}, which this backupfs does not know: upgrade backupfs"
            )
        if own_kind != kind:
            raise DamagedObject(f"{what} is of kind {own_kind} instead of {int(kind)}")
        key = keys.object_key(keyring.key(ROLE_OF_KIND[kind], epoch), salt)
        self.header = header
        self.what = what
        self._cipher: AESGCM | ChaCha20Poly1305 = AESGCM(key) if suite == AES_256_GCM else ChaCha20Poly1305(key)

    def seal_into(self, unit: Unit, offset: int, target: memoryview) -> None:
        """Write the unit, sealed, at `offset` of the object's bytes."""
        frame = FRAME.pack(FRAME_MAGIC, unit.role, unit.codec, 0, unit.plain_length, len(unit.body) + TAG_SIZE)
        start = offset + FRAME.size
        target[offset:start] = frame
        # The cipher takes bytes-like input and writes in place: no copy of the block.
        self._cipher.encrypt_into(
            offset.to_bytes(12, "little"),
            unit.body,
            self.header + frame + offset.to_bytes(8, "little"),
            target[start : start + len(unit.body) + TAG_SIZE],
        )

    def unseal(self, stored: bytes | memoryview, offset: int, role: UnitRole) -> bytes:
        """Return the plain bytes of one unit.

        stored: the unit with its frame, exactly as long as it is.
        offset: where it starts in the object.
        Raises: DamagedObject if any bit, the offset, the role or the length differs.
        """
        what = f"{self.what} at {offset}"
        if len(stored) < FRAME.size + TAG_SIZE:
            raise DamagedObject(f"{what} is cut short")
        frame = bytes(stored[: FRAME.size])
        magic, own_role, codec, _, plain_length, sealed_length = FRAME.unpack(frame)
        if magic != FRAME_MAGIC or own_role != role or sealed_length != len(stored) - FRAME.size:
            raise DamagedObject(f"{what} is damaged: no unit of this kind stands there")
        if plain_length > MAX_PLAIN:
            raise DamagedObject(f"{what} is damaged: its length is impossible")
        try:
            body = self._cipher.decrypt(
                offset.to_bytes(12, "little"),
                memoryview(stored)[FRAME.size :],
                self.header + frame + offset.to_bytes(8, "little"),
            )
        except InvalidTag as error:
            raise DamagedObject(f"{what} is damaged: it does not authenticate") from error
        return compression.decompress(codec, body, plain_length, what)


def frame_length(stored: bytes | memoryview, what: str) -> int:
    """Return the stored length, frame included, of the unit that starts here; not yet authenticated."""
    if len(stored) < FRAME.size:
        raise DamagedObject(f"{what} is cut short")
    magic, _, _, _, _, sealed_length = FRAME.unpack(stored[: FRAME.size])
    if magic != FRAME_MAGIC:
        raise DamagedObject(f"{what} is damaged: no unit stands there")
    return FRAME.size + int(sealed_length)


def read_trailer(stored: bytes, object_size: int, what: str) -> tuple[int, int]:
    """Return (offset, stored length) of an object's directory unit from its last 24 bytes; not yet authenticated."""
    if len(stored) != TRAILER.size:
        raise DamagedObject(f"{what} is cut short")
    offset, length, magic = TRAILER.unpack(stored)
    if magic != TRAILER_MAGIC or offset + length + TRAILER.size != object_size or offset < HEADER.size:
        raise DamagedObject(f"{what} is cut short or damaged: its end is not where it should be")
    return offset, length


def seal_record(kind: Kind, keyring: Keyring, plain: bytes, level: int = compression.DEFAULT_LEVEL) -> bytearray:
    """Return an object that holds one record."""
    return seal_object(kind, keyring, [make_unit(UnitRole.RECORD, plain, level)])


def unseal_record(data: bytes, kind: Kind, keyring: Keyring, what: str) -> bytes:
    """Return the record that is the whole content of an object. Raises: DamagedObject."""
    opened = OpenedHeader(data[: HEADER.size], kind, keyring, what)
    return opened.unseal(memoryview(data)[HEADER.size :], HEADER.size, UnitRole.RECORD)


@lru_cache(maxsize=1)
def _best_suite() -> int:
    # Without AES instructions AES-GCM is slow and leaks through the cache; ChaCha20 does neither.
    try:
        with open("/proc/cpuinfo", "rb") as info:
            words = info.read().split()
    except OSError:
        return AES_256_GCM
    return AES_256_GCM if b"aes" in words else CHACHA20_POLY1305
