"""Compression of units: zstd, or nothing where it does not pay; bounded when decompressing."""

import threading

import zstandard

from backupfs.errors import DamagedObject

RAW = 0
ZSTD = 1

OFF = -(1 << 20)  # a level that means: do not compress
DEFAULT_LEVEL = 1  # level 3 stores a tenth less and costs half again the time of a whole first backup
MAX_LEVEL = 19

# Below this gain decompressing at each read costs more than the bytes are worth.
_LEAST_GAIN = 64

_local = threading.local()


def compress(plain: bytes | bytearray | memoryview, level: int) -> tuple[int, bytes | bytearray | memoryview]:
    """Return (codec, body); the body is `plain` itself where compression saves less than 1/64."""
    if level == OFF or len(plain) < _LEAST_GAIN:
        return RAW, plain
    compressors: dict[int, zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    compressor = compressors.get(level)
    if compressor is None:
        compressor = compressors[level] = zstandard.ZstdCompressor(level=level, write_checksum=False)
    body = compressor.compress(plain)
    if len(body) > len(plain) - len(plain) // _LEAST_GAIN:
        return RAW, plain
    return ZSTD, body


def decompress(codec: int, body: bytes, plain_length: int, what: str) -> bytes:
    """Return the `plain_length` plain bytes of a unit's body.

    Never allocates more than `plain_length`, whatever the body claims.
    Raises: DamagedObject.
    """
    if codec == RAW:
        if len(body) != plain_length:
            raise DamagedObject(f"{what} has {len(body)} bytes instead of {plain_length}")
        return body
    if codec != ZSTD:
        raise DamagedObject(f"{what} uses the unknown codec {codec}")
    decompressor = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    try:
        if zstandard.frame_content_size(body) != plain_length:
            raise DamagedObject(f"{what} does not decompress to {plain_length} bytes")
        plain: bytes = decompressor.decompress(body, max_output_size=plain_length)
    except zstandard.ZstdError as error:
        raise DamagedObject(f"{what} does not decompress: {error}") from error
    if len(plain) != plain_length:
        raise DamagedObject(f"{what} does not decompress to {plain_length} bytes")
    return plain
