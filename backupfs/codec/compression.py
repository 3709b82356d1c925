"""Compression of units: zstd, or nothing where it does not pay; bounded when decompressing."""

import zstandard

from backupfs.errors import DamagedObject, UnknownVersion

RAW = 0
ZSTD = 1

OFF = -(1 << 20)  # a level that means: do not compress
DEFAULT_LEVEL = 1  # level 3 stores a tenth less and costs half again the time of a whole first backup
MAX_LEVEL = 19

# Below this gain decompressing at each read costs more than the bytes are worth.
_LEAST_GAIN = 64

# Level 1 with a window as large as a block, and matches of 6 bytes. Over 1 GiB of a Python toolchain in blocks of 1 MiB
# it takes 2.5 s and leaves 277 MB, zstd's own level 1 takes 2.8 s and leaves 284 MB.
_FAST = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=20, chain_log=12, hash_log=14, search_log=1, min_match=6,
    target_length=0, write_checksum=0,
)  # fmt: skip

# Contexts are used by one call at a time. They are megabytes each: as many as calls at once, not as many as threads.
_compressors: dict[int, list[zstandard.ZstdCompressor]] = {}
_decompressors: list[zstandard.ZstdDecompressor] = []


def compress(plain: bytes | bytearray | memoryview, level: int) -> tuple[int, bytes | bytearray | memoryview]:
    """Return (codec, body); the body is `plain` itself where compression saves less than 1/64."""
    if level == OFF or len(plain) < _LEAST_GAIN:
        return RAW, plain
    idle = _compressors.setdefault(level, [])
    try:
        compressor = idle.pop()
    except IndexError:
        compressor = _new_compressor(level)
    body = compressor.compress(plain)
    idle.append(compressor)
    if len(body) > len(plain) - len(plain) // _LEAST_GAIN:
        return RAW, plain
    return ZSTD, body


def _new_compressor(level: int) -> zstandard.ZstdCompressor:
    if level == 1:
        return zstandard.ZstdCompressor(compression_params=_FAST)
    return zstandard.ZstdCompressor(level=level, write_checksum=False)


def decompress(codec: int, body: bytes, plain_length: int, what: str) -> bytes:
    """Return the `plain_length` plain bytes of a unit's body.

    Never allocates more than `plain_length`, whatever the body claims.
    Raises: DamagedObject; UnknownVersion.
    """
    if codec == RAW:
        if len(body) != plain_length:
            raise DamagedObject(f"{what} has {len(body)} bytes instead of {plain_length}")
        return body
    if codec != ZSTD:
        raise UnknownVersion(f"{what} uses the codec {codec}, which this backupfs does not know: upgrade backupfs")
    try:
        decompressor = _decompressors.pop()
    except IndexError:
        decompressor = zstandard.ZstdDecompressor()
    try:
        if zstandard.frame_content_size(body) != plain_length:
            raise DamagedObject(f"{what} does not decompress to {plain_length} bytes")
        plain: bytes = decompressor.decompress(body, max_output_size=plain_length)
        _decompressors.append(decompressor)
    except zstandard.ZstdError as error:
        raise DamagedObject(f"{what} does not decompress: {error}") from error
    if len(plain) != plain_length:
        raise DamagedObject(f"{what} does not decompress to {plain_length} bytes")
    return plain
