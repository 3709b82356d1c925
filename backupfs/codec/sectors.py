"""Sectors of an encrypted disk, as dm-crypt has them: AES-XTS, each sector by itself, under its number.

Source: IEEE 1619 (XTS); Linux, drivers/md/dm-crypt.c: `plain64` counts 512 bytes, whatever the size of a sector.
"""

from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

AES_XTS_PLAIN64 = "aes-xts-plain64"
BLOCK = 16  # bytes of the cipher's block: a sector can be decrypted from any of them on
KEY_SIZES = (32, 64)
SECTOR_SIZES = (512, 1024, 2048, 4096)
_UNIT = 512


class SectorCipher(NamedTuple):
    """How the sectors of a volume are encrypted."""

    key: bytes
    sector: int  # bytes of one
    first: int  # number of the volume's first sector, in units of 512 bytes


def decrypt(cipher: SectorCipher, position: int, data: bytes | memoryview) -> bytes:
    """Return the plain bytes of a part of a volume.

    position, data: from a block on, whole blocks.
    """
    return _through(cipher, position, data, is_decrypting=True)


def encrypt(cipher: SectorCipher, position: int, data: bytes | memoryview) -> bytes:
    """Return a part of a volume that holds plain bytes. Parameters as for `decrypt`."""
    return _through(cipher, position, data, is_decrypting=False)


def _through(cipher: SectorCipher, position: int, data: bytes | memoryview, is_decrypting: bool) -> bytes:
    algorithm = algorithms.AES(cipher.key)
    found: list[bytes] = []
    at = 0
    while at < len(data):
        number, within = divmod(position + at, cipher.sector)
        count = min(cipher.sector - within, len(data) - at)
        # What is before a part of a sector counts for its place only.
        tweak = (cipher.first + number * (cipher.sector // _UNIT)).to_bytes(BLOCK, "little")
        both = Cipher(algorithm, modes.XTS(tweak))
        one = both.decryptor() if is_decrypting else both.encryptor()
        part = data[at : at + count]
        found.append(one.update(bytes(within) + part)[within:] if within else one.update(part))
        at += count
    return found[0] if len(found) == 1 else b"".join(found)
