"""Compression: what was compressed comes back, and nothing makes the reader allocate without bound."""

import os
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from backupfs.codec.compression import OFF, RAW, ZSTD, compress, decompress
from backupfs.errors import DamagedObject, UnknownVersion


@given(st.binary(max_size=2000), st.integers(1, 40), st.sampled_from([OFF, 1, 3, 19]))
def test_what_was_compressed_comes_back(part: bytes, times: int, level: int) -> None:
    plain = part * times
    codec, body = compress(plain, level)
    assert decompress(codec, bytes(body), len(plain), "it") == plain


def test_what_does_not_pay_stays_as_it_is() -> None:
    noise = os.urandom(10_000)
    assert compress(noise, 3) == (RAW, noise)
    assert compress(bytes(10_000), OFF)[0] == RAW
    assert compress(bytes(10), 3)[0] == RAW


def test_a_bomb_is_damage_before_it_is_allocated() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    with pytest.raises(DamagedObject):
        decompress(ZSTD, bomb, 100, "it")
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 24))
    with pytest.raises(DamagedObject):
        decompress(ZSTD, unsized, 100, "it")


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 3))
def test_any_bytes_decompress_or_are_damage(body: bytes, length: int, codec: int) -> None:
    with suppress(DamagedObject, UnknownVersion):
        assert len(decompress(codec, body, length, "it")) == length
