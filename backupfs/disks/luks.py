"""LUKS1 and LUKS2: the key of an encrypted volume, from a passphrase. Reading only.

What is read is hostile: all sizes, and what a key slot costs to open, are bounded before anything is computed. Only
AES-XTS is read; whatever else, and a volume that is just being encrypted anew, is named.
Source: "LUKS1 On-Disk Format Specification" 1.2.3, "LUKS2 On-Disk Format Specification" 1.1.2 (cryptsetup).
"""

import base64
import contextlib
import hashlib
import hmac
import json
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.kdf import argon2

from backupfs.codec.sectors import AES_XTS_PLAIN64, KEY_SIZES, SECTOR_SIZES, SectorCipher, decrypt
from backupfs.disks.filesystem import Read, Unreadable
from backupfs.errors import shown

_MAGIC, _SECOND_MAGIC = b"LUKS\xba\xbe", b"SKUL\xba\xbe"
_SECTOR = 512
# cipher, mode, hash, start of the data in sectors, bytes of the key, digest of the key, its salt and iterations, uuid
_HEADER_1 = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT_1 = struct.Struct(">II32sII")  # state, iterations, salt, start in sectors, stripes
_SLOTS_1 = 8
_ACTIVE = 0x00AC71F3
# magic, version, size with the text, sequence, label, how the sum is made, salt, uuid, subsystem, own place, nothing,
# sum
_HEADER_2 = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
_SUM_AT = _HEADER_2.size - 64
_BLOCK = 4096
_TEXT_SIZES = tuple(1 << bits for bits in range(14, 23))  # of a header with its text; the second one stands behind it
_MOST_SLOTS = 32
_MOST_STRIPES = 1 << 16
_MOST_MATERIAL = 16 << 20
# Half a minute on a slow processor; cryptsetup aims at two seconds.
_MOST_ITERATIONS = 1 << 26
_MOST_MEMORY_KIB = 4 << 20
_MOST_WORK_KIB = 64 << 20  # memory times passes
_MOST_LANES = 64
_MOST_SECONDS = 120  # of all slots
_HASHES = ("sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "whirlpool", "sha3-256", "sha3-512")


class NotOpened(Unreadable):
    """No passphrase that was given is one of the volume."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """How a passphrase gives the key."""

    kdf: str  # pbkdf2, argon2i, argon2id
    hash: str  # of pbkdf2
    cost: tuple[int, ...]  # iterations; or passes, KiB, lanes
    salt: bytes
    key_size: int  # of what encrypts the material
    start: int  # of the material
    stripes: int
    spread: str  # hash that spread the key over the stripes


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """What a volume says of itself."""

    version: int
    start: int  # of what is encrypted
    size: int
    sector: int
    first: int  # number of the first sector, in 512 bytes
    key_size: int
    digest: tuple[str, int, bytes, bytes]  # hash, iterations, salt, digest of the key
    slots: tuple[_Slot, ...]


def read_luks(read: Read, size: int) -> LuksHeader | None:
    """Return what a volume says; None if it is not encrypted with LUKS. Raises: Unreadable, with the reason."""
    block = read(0, _BLOCK)
    if block[:6] == _MAGIC and block[6:8] == b"\0\1":
        return _checked(_read_1(block, size), size)
    if block[:6] != _MAGIC:
        return None
    for place in (0, *_TEXT_SIZES):
        block = read(place, _BLOCK)
        if len(block) == _BLOCK and block[:8] == (_SECOND_MAGIC if place else _MAGIC) + b"\0\2":
            found = _text_of(read, place, block)
            if found is not None:
                try:
                    return _checked(_read_2(found, size), size)
                except (LookupError, TypeError, ValueError, AttributeError) as error:
                    raise Unreadable("its header of LUKS2 makes no sense") from error
    raise Unreadable("its headers of LUKS are damaged")


def _checked(header: LuksHeader, size: int) -> LuksHeader:
    if header.sector not in SECTOR_SIZES or header.key_size not in KEY_SIZES or not 0 <= header.first < 1 << 63:
        raise Unreadable("its header of LUKS makes no sense")
    if header.start % _SECTOR or header.start < 0 or header.size <= 0 or header.start + header.size > size:
        raise Unreadable("its header of LUKS says that it is larger than it is")
    return header


def _read_1(block: bytes, size: int) -> LuksHeader:
    _, _, cipher, mode, hash_name, start, key_size, digest, salt, iterations, _ = _HEADER_1.unpack_from(block)
    spread = _text(hash_name)
    _require_cipher(f"{_text(cipher)}-{_text(mode)}")
    slots = []
    for number in range(_SLOTS_1):
        state, cost, slot_salt, place, stripes = _SLOT_1.unpack_from(block, _HEADER_1.size + number * _SLOT_1.size)
        if state == _ACTIVE:
            slots.append(_Slot("pbkdf2", spread, (cost,), slot_salt, key_size, place * _SECTOR, stripes, spread))
    start *= _SECTOR
    return LuksHeader(
        1, start, (size - start) // _SECTOR * _SECTOR, _SECTOR, 0, key_size, (spread, iterations, salt, digest),
        tuple(slots),
    )  # fmt: skip


def _text_of(read: Read, place: int, block: bytes) -> dict[str, Any] | None:
    """Return the text of one copy of the header of LUKS2; None if it is damaged."""
    _, _, size, _, _, kind, _, _, _, own, _, wanted = _HEADER_2.unpack_from(block)
    if size not in _TEXT_SIZES or own != place or _text(kind) != "sha256":
        return None
    text = read(place + _BLOCK, size - _BLOCK)
    blank = block[:_SUM_AT] + bytes(64) + block[_HEADER_2.size :]
    if len(text) != size - _BLOCK or hashlib.sha256(blank + text).digest() != wanted[:32]:
        return None
    try:
        found = json.loads(text.partition(b"\0")[0])
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _read_2(text: dict[str, Any], size: int) -> LuksHeader:
    wanted = text.get("config", {}).get("requirements", {}).get("mandatory", [])
    segments = {name: one for name, one in text["segments"].items() if "backup-" not in str(one.get("flags"))}
    if wanted or len(segments) != 1:
        raise Unreadable("it is just being encrypted anew, or needs what is not known, so it is not read")
    [(name, segment)] = segments.items()
    if segment["type"] != "crypt" or "integrity" in segment:
        raise Unreadable("it is encrypted with integrity, which is not read")
    _require_cipher(str(segment["encryption"]))
    start, sector = int(segment["offset"]), int(segment["sector_size"])
    length = (size - start) // _SECTOR * _SECTOR if segment["size"] == "dynamic" else int(segment["size"])
    if sector in SECTOR_SIZES:
        length -= length % sector
    [digest] = [one for one in text["digests"].values() if name in one["segments"]]
    if digest["type"] != "pbkdf2":
        raise Unreadable("the digest of its key is of no known kind")
    slots, key_size = [], 0
    for number in digest["keyslots"][:_MOST_SLOTS]:
        slot = text["keyslots"][number]
        key_size = int(slot["key_size"])
        with contextlib.suppress(Unreadable):
            slots.append(_slot_2(slot))
    return LuksHeader(
        2, start, length, sector, int(segment["iv_tweak"]), key_size,
        (str(digest["hash"]), int(digest["iterations"]), _bytes(digest["salt"]), _bytes(digest["digest"])),
        tuple(slots),
    )  # fmt: skip


def _slot_2(slot: dict[str, Any]) -> _Slot:
    kdf, area, spread = slot["kdf"], slot["area"], slot["af"]
    _require_cipher(str(area["encryption"]))
    is_plain = kdf["type"] == "pbkdf2"
    cost = (int(kdf["iterations"]),) if is_plain else (int(kdf["time"]), int(kdf["memory"]), int(kdf["cpus"]))
    return _Slot(
        str(kdf["type"]), str(kdf["hash"]) if is_plain else "", cost, _bytes(kdf["salt"]), int(area["key_size"]),
        int(area["offset"]), int(spread["stripes"]), str(spread["hash"]),
    )  # fmt: skip


def open_luks(
    read: Read,
    header: LuksHeader,
    passphrases: Sequence[bytes],
    keys: Sequence[bytes] = (),
    used: set[bytes] | None = None,
) -> SectorCipher:
    """Return how the volume is encrypted, by the first passphrase that opens it.

    keys: of volumes; one may be this one's. used: gets the passphrase. Raises: Unreadable, if nothing opens it.
    """
    for key in keys:
        if len(key) == header.key_size and _is_key(header, key):
            return SectorCipher(key, header.sector, header.first)
    if not passphrases:
        raise Unreadable(f"it is encrypted (LUKS{header.version}): its files are not shown, as no passphrase was given")
    hindrance = ""
    end = time.monotonic() + _MOST_SECONDS
    for passphrase in passphrases:
        for slot in header.slots:
            if time.monotonic() > end:
                raise Unreadable(f"its key slots take more than {_MOST_SECONDS} seconds to open")
            try:
                found = _key_of(read, header, slot, passphrase)
            except Unreadable as error:
                hindrance = f" ({error})"
                continue
            if found is not None and found[: len(found) // 2] != found[len(found) // 2 :]:
                if used is not None:
                    used.add(passphrase)
                return SectorCipher(found, header.sector, header.first)
    raise NotOpened(f"none of the passphrases given opens it{hindrance}")


def _key_of(read: Read, header: LuksHeader, slot: _Slot, passphrase: bytes) -> bytes | None:
    """Return the volume's key; None if this is not the passphrase of the slot. Raises: Unreadable."""
    size = header.key_size * slot.stripes
    if slot.key_size not in KEY_SIZES or not 0 < slot.stripes <= _MOST_STRIPES or size > _MOST_MATERIAL:
        raise Unreadable("a key slot of it makes no sense")
    stretched = _stretched(slot, passphrase)
    sealed = read(slot.start, -(-size // _SECTOR) * _SECTOR) if slot.start >= 0 else b""
    if len(sealed) < size or len(sealed) % _SECTOR:
        raise Unreadable("a key slot of it lies behind its end")
    plain = decrypt(SectorCipher(stretched, _SECTOR, 0), 0, sealed)
    key = bytes(header.key_size)
    for number in range(slot.stripes):
        stripe = plain[number * header.key_size : (number + 1) * header.key_size]
        key = bytes(one ^ other for one, other in zip(key, stripe, strict=True))
        if number + 1 < slot.stripes:
            key = b"".join(_spread(slot.spread, key))
    return key if _is_key(header, key) else None


def _is_key(header: LuksHeader, key: bytes) -> bool:
    name, iterations, salt, digest = header.digest
    return hmac.compare_digest(_pbkdf2(name, key, salt, iterations, len(digest)), digest)


def _spread(name: str, key: bytes) -> Iterator[bytes]:
    width = _hash(name).digest_size
    for number, at in enumerate(range(0, len(key), width)):
        part = key[at : at + width]
        yield _hash(name, number.to_bytes(4, "big") + part).digest()[: len(part)]


def _stretched(slot: _Slot, passphrase: bytes) -> bytes:
    if slot.kdf == "pbkdf2":
        return _pbkdf2(slot.hash, passphrase, slot.salt, slot.cost[0], slot.key_size)
    kdf = {"argon2i": getattr(argon2, "Argon2i", None), "argon2id": argon2.Argon2id}.get(slot.kdf)
    if kdf is None:
        raise Unreadable(f"a key slot of it is of the kind {slot.kdf!r}, which is not read")
    passes, memory, lanes = slot.cost
    if not (passes > 0 and 8 * lanes <= memory <= _MOST_MEMORY_KIB and 0 < lanes <= _MOST_LANES):
        raise Unreadable("a key slot of it makes no sense")
    if passes * memory > _MOST_WORK_KIB:
        raise Unreadable("a key slot of it takes more time to open than is believed")
    if memory > _memory_kib():
        raise Unreadable(f"a key slot of it takes {memory >> 10} MiB of memory to open, more than there is")
    try:
        found: bytes = kdf(
            salt=slot.salt, length=slot.key_size, iterations=passes, lanes=lanes, memory_cost=memory
        ).derive(passphrase)
    except (ValueError, MemoryError) as error:
        raise Unreadable("a key slot of it cannot be opened here") from error
    return found


def _memory_kib() -> int:
    """Return how much memory there is for one more."""
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1])
    return _MOST_MEMORY_KIB


def _pbkdf2(name: str, secret: bytes, salt: bytes, iterations: int, size: int) -> bytes:
    _hash(name)
    if not 0 < iterations <= _MOST_ITERATIONS or not 0 < size <= 1024:
        raise Unreadable("a key slot of it takes more time to open than is believed")
    return hashlib.pbkdf2_hmac(name.replace("sha3-", "sha3_"), secret, salt, iterations, size)


def _hash(name: str, data: bytes = b"") -> "hashlib._Hash":
    try:
        if name in _HASHES:
            return hashlib.new(name.replace("sha3-", "sha3_"), data)
    except ValueError:
        pass
    raise Unreadable(f"it needs the hash {name!r}, which is not known here")


def _require_cipher(name: str) -> None:
    if name != AES_XTS_PLAIN64:
        raise Unreadable(f"it is encrypted with {shown(name)}: only {AES_XTS_PLAIN64} is read")


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("ascii", "replace")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
