"""Content-defined cuts: pinned by vectors, independent of how the stream was read."""

import hashlib
import io
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.chunking import cutter
from backupfs.chunking.cutter import CutSizes, Cutter

SMALL = CutSizes(1 << 10, 4 << 10, 16 << 10)


def stream(size: int) -> bytes:
    """Return the stream of the vectors: SHA-256 of the counters 0, 1, 2 … as 8 bytes, little-endian."""
    return b"".join(hashlib.sha256(count.to_bytes(8, "little")).digest() for count in range(-(-size // 32)))[:size]


def lengths(data: bytes, sizes: CutSizes, seed: int) -> list[int]:
    return [len(chunk) for chunk in Cutter(sizes, seed).cut(io.BytesIO(data).readinto)]


# The cuts are part of the format: a repository whose cuts move stores everything again. docs/format.rst cites these.
SMALL_VECTORS = {
    1: [4648, 5361, 2672, 4796, 7821, 6750, 6002, 4105, 10170, 2821, 1429, 2390, 2892, 7004, 9030, 6872, 2209, 4513,
        4124, 4028, 6793, 1806, 4232, 4846, 6773, 1685, 1174, 3965, 4261, 4428, 4392, 4216, 3599, 4556, 1278, 1987,
        5001, 10442, 7266, 5031, 4516, 4158, 1267, 2691],
    0x0123456789ABCDEF: [
        8473, 4667, 8785, 2237, 4548, 6598, 5326, 5160, 5889, 6949, 4808, 4769, 4525, 1457, 2607, 6447, 5395, 5608,
        4561, 4459, 4356, 3804, 4077, 4151, 4209, 5254, 8490, 7133, 4626, 1775, 1733, 9526, 7460, 1227, 5100, 6420,
        5287, 4857, 4290, 2957],
    (1 << 63) - 1: [
        5152, 4010, 5973, 4735, 7185, 4355, 7291, 4230, 2590, 6413, 4397, 7257, 7852, 5369, 3420, 2980, 2510, 3705,
        6639, 5171, 4670, 1748, 3691, 6401, 7873, 5662, 6122, 4324, 12915, 5186, 4790, 4466, 5659, 1129, 3088, 3597,
        3564, 5702, 4630, 3549],
}  # fmt: skip
DEFAULT_VECTORS = {
    1: [608477, 1559427, 1826666, 544304, 2331984, 1066493, 1938201, 1873474, 1688488, 1044174, 325667, 375193, 1564785,
        1499848, 988931, 1099203, 1607297, 919336, 2091321, 212555],
    0x0123456789ABCDEF: [
        1507179, 411092, 1120404, 1351372, 1094012, 736746, 1322467, 584788, 1332910, 1537252, 1435833, 1336311,
        1328128, 1382748, 2369497, 1346178, 1309751, 1269784, 324933, 2064439],
}  # fmt: skip


@pytest.mark.parametrize("seed", SMALL_VECTORS)
def test_small_cuts_are_those_of_the_format(seed: int) -> None:
    assert lengths(stream(200_000), SMALL, seed) == SMALL_VECTORS[seed]


@pytest.mark.parametrize("seed", DEFAULT_VECTORS)
def test_cuts_of_the_default_sizes_are_those_of_the_format(seed: int) -> None:
    assert lengths(stream(24 << 20), CutSizes(), seed) == DEFAULT_VECTORS[seed]


def test_a_stream_without_content_is_cut_at_the_largest_size() -> None:
    assert lengths(bytes(100_000), SMALL, 1) == [16384] * 6 + [1696]
    assert lengths(b"", SMALL, 1) == []
    assert lengths(b"x", SMALL, 1) == [1]


def reader(data: bytes, step: Callable[[], int]) -> Callable[[memoryview], int]:
    source = io.BytesIO(data)
    return lambda buffer: source.readinto(buffer[: max(1, step())])


@given(
    st.integers(0, 150_000),
    st.lists(st.integers(1, 70_000), min_size=1, max_size=8),
    st.sampled_from([64 << 10, 80_001, 1 << 20]),
    st.integers(1, (1 << 63) - 1),
)
def test_cuts_join_to_the_stream_and_do_not_depend_on_how_it_was_read(
    size: int, steps: list[int], window: int, seed: int
) -> None:
    data = stream(size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutter, "WINDOW_SIZE", window)
        at = iter(steps * 200_000)
        chunks = list(map(bytes, Cutter(SMALL, seed).cut(reader(data, lambda: next(at)))))
        assert b"".join(chunks) == data
        assert all(len(chunk) <= SMALL.max_size for chunk in chunks)
        assert all(len(chunk) >= SMALL.min_size for chunk in chunks[:-1])
        patch.setattr(cutter, "WINDOW_SIZE", 1 << 20)
        assert [len(chunk) for chunk in chunks] == lengths(data, SMALL, seed)


def test_a_cutter_is_used_for_one_stream_after_another() -> None:
    shared = Cutter(SMALL, 1)
    data = stream(60_000)
    abandoned = shared.cut(io.BytesIO(data[::-1]).readinto)
    next(abandoned)
    del abandoned
    assert b"".join(map(bytes, shared.cut(io.BytesIO(data).readinto))) == data
    assert [len(chunk) for chunk in shared.cut(io.BytesIO(data).readinto)] == lengths(data, SMALL, 1)


@given(st.integers(0, 149_999), st.binary(min_size=1, max_size=3000))
def test_an_insertion_changes_few_chunks(where: int, inserted: bytes) -> None:
    data = stream(150_000)
    edited = data[:where] + inserted + data[where:]
    before = set(map(bytes, Cutter(SMALL, 1).cut(io.BytesIO(data).readinto)))
    after = list(map(bytes, Cutter(SMALL, 1).cut(io.BytesIO(edited).readinto)))
    assert sum(chunk not in before for chunk in after) <= 8
