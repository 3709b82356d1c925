"""Maps of what changed on a disk: what they say of each byte, and what is no map."""

import itertools
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.disks.hints import Claim, Hints, parse_hints, read_hints
from backupfs.disks.ranges import joined, whole_chunks, without
from backupfs.errors import UsageError

ID = "0123abcd"
SIZE = 4000

ranges = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, 300)), max_size=20).map(
    lambda found: [(start, min(start + length, SIZE)) for start, length in found]
)
claims = st.lists(st.tuples(st.integers(1, 400), st.sampled_from(["data", "zero", "same", ""])), max_size=30)


def bytes_of(spans: list[tuple[int, int]]) -> set[int]:
    return {at for start, end in spans for at in range(start, end)}


def said_of(hints: Hints, start: int = 0, end: int = SIZE) -> list[Claim]:
    spans = list(hints.between(start, end))
    assert [low for low, _, _ in spans] == [start, *(high for _, high, _ in spans)][: len(spans)]
    found = [claim for low, high, claim in spans for _ in range(low, high)]
    assert len(found) == end - start
    return found


@given(ranges, ranges)
def test_sets_of_bytes_are_sets(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    one, other = joined(some), joined(others)
    assert bytes_of(one) == bytes_of(some)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(one))
    left = list(without(one, other))
    assert bytes_of(left) == bytes_of(some) - bytes_of(others)
    assert left == sorted(left)
    assert all(start < end for start, end in left)


@given(ranges, st.integers(1, 64))
def test_whole_chunks_are_those_of_which_every_byte_is_in_the_set(some: list[tuple[int, int]], chunk: int) -> None:
    members = bytes_of(some)
    found = bytes_of(list(whole_chunks(joined(some), chunk, SIZE)))
    for at in range(0, SIZE, chunk):
        whole = set(range(at, min(at + chunk, SIZE)))
        assert whole <= found if whole <= members else not whole & found


def lines_of(parts: list[tuple[int, str]], order: random.Random) -> tuple[list[str], list[Claim]]:
    """Return the lines of a map in any order, and what they say of each byte."""
    lines, expected, at = [], list[Claim](), 0
    for length, word in parts:
        length = min(length, SIZE - at)
        if word:
            lines.append(f"{at} {length} {word}")
        claim = {"zero": Claim.ZERO, "same": Claim.SAME}.get(word, Claim.READ)
        expected += [claim] * length
        at += length
    order.shuffle(lines)
    return lines, expected + [Claim.READ] * (SIZE - at)


@given(claims, st.randoms(use_true_random=False), st.integers(0, SIZE), st.integers(0, SIZE))
def test_a_map_says_of_each_byte_what_its_lines_say(
    parts: list[tuple[int, str]], order: random.Random, start: int, end: int
) -> None:
    lines, expected = lines_of(parts, order)
    hints = parse_hints("\n".join([f"since {ID}", "# a remark", "", *lines]).encode(), SIZE, "map")
    assert said_of(hints) == expected
    assert hints.size_of(Claim.SAME) == expected.count(Claim.SAME)
    start, end = sorted((start, end))
    assert said_of(hints, start, end) == expected[start:end]


@given(claims, ranges, st.integers(1, 64), st.randoms(use_true_random=False))
def test_in_chunks_only_what_is_said_of_all_their_bytes_counts_and_what_is_free_goes_before(
    parts: list[tuple[int, str]], free: list[tuple[int, int]], chunk: int, order: random.Random
) -> None:
    lines, expected = lines_of(parts, order)
    hints = parse_hints("\n".join(lines).encode(), SIZE, "map", ID).in_chunks(chunk, SIZE)
    whole_free = list(whole_chunks(joined(free), chunk, SIZE))
    found, with_free = said_of(hints), said_of(hints.with_free(whole_free))
    for at in range(0, SIZE, chunk):
        of_all = set(expected[at : at + chunk])
        wanted = of_all.pop() if len(of_all) == 1 else Claim.READ
        assert set(found[at : at + chunk]) == {wanted}
        is_free = at in bytes_of(whole_free)
        assert set(with_free[at : at + chunk]) == {Claim.FREE if is_free else wanted}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0 4096 same\n5 five zero", "line 2: 5 five zero is not START LENGTH"),
        ("0 4096 changed", "line 1"),
        ("-1 4096 data", "line 1"),
        ("0 10 zero\n5 10 zero", "speaks of byte 5 twice"),
        ("0 10 zero\n5 10 data", "speaks of byte 5 twice"),
        ("4090 7 zero", "it ends at byte 4,097, the disk at 4,096: it is of another disk"),
        ("0 99999999999999999999 zero", "line 1"),
        ("0 9223372036854775807 zero", "line 1: start and length are no counts of bytes"),
        ("0 10 same", "not as in which image: begin it with a line `since ID`"),
        ("since latest\n0 10 same", "8 digits or more"),
        ("since 01234567\nsince 01234567", "line 2"),
        ("since 01234567\n0 10 \xff", "neither lines of text"),
        ("[", "looks like JSON and is none"),
        ('[{"start": 0}]', "entry 1"),
        ('[{"start": 0, "length": "9", "depth": 0, "zero": true}]', "entry 1"),
        ('[{"start": 0, "length": 8192, "depth": 0, "zero": true}]', "it is of another disk"),
        ("<a", "looks like XML and is none"),
        ("<a/>", "superblock: it has no number data_block_size"),
        ("<superblock data_block_size='128'/>", "not what `thin_delta` prints"),
        ("<superblock data_block_size='1'><diff><same begin='1'/></diff></superblock>", "difference 1"),
        ("<superblock data_block_size='1'><diff><same begin='9' length='1'/></diff></superblock>", "another disk"),
    ],
)
def test_what_is_no_map_gets_one_line(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        parse_hints(text.encode("latin-1"), 4096, "/tmp/map")
    assert "\n" not in str(error.value)


def test_a_map_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nosuch cannot be read: No such file"):
        read_hints(bytes(tmp_path / "nosuch"), 4096)


def test_the_image_is_named_in_the_map_or_beside_it_and_not_two_of_them() -> None:
    assert parse_hints(b"since 0123ABCD\n0 10 same", 4096, "map").since == ID
    assert parse_hints(b"since 0123abcd\n0 10 same", 4096, "map", "0123abcdef").since == "0123abcdef"
    with pytest.raises(UsageError, match="counts from the image 0123abcd, and not from 99999999"):
        parse_hints(b"since 0123abcd\n0 10 same", 4096, "map", "99999999")


def test_what_lies_in_a_backing_file_is_the_same_if_an_image_is_named() -> None:
    entries = [
        {"start": 0, "length": 1000, "depth": 0, "present": True, "zero": False, "data": True, "offset": 5},
        {"start": 1000, "length": 1000, "depth": 0, "present": True, "zero": True, "data": False},
        {"start": 2000, "length": 1000, "depth": 1, "present": True, "zero": False, "data": True, "offset": 5},
        {"start": 3000, "length": 1096, "depth": 2, "present": False, "zero": True, "data": False},
    ]
    data = json.dumps(entries).encode()
    # qemu counts sectors: the last one may go beyond the end of a file.
    assert parse_hints(data, SIZE, "map").spans == ((1000, 2000, Claim.ZERO), (3000, SIZE, Claim.ZERO))
    assert parse_hints(data, SIZE, "map", ID).spans == (
        (1000, 2000, Claim.ZERO), (2000, 3000, Claim.SAME), (3000, SIZE, Claim.ZERO),
    )  # fmt: skip


# What thin_delta 0.9 prints of two snapshots in a pool with blocks of 64 KiB.
THIN = b"""<superblock uuid="" time="1" transaction="2" data_block_size="128" nr_data_blocks="1024">
  <diff left="1" right="2">
    <same begin="0" length="5"/>
    <different begin="5" length="3"/>
    <same begin="8" length="10"/>
    <left_only begin="18" length="2"/>
    <right_only begin="40" length="4"/>
  </diff>
</superblock>
"""
THIN_VERBOSE = b"""<superblock uuid="" time="1" transaction="2" data_block_size="128" nr_data_blocks="1024">
  <diff left="1" right="2">
    <same>
      <range begin="0" data_begin="0" length="3"/>
      <range begin="3" data_begin="9" length="2"/>
    </same>
    <different>
      <range begin="5" left_data_begin="5" right_data_begin="30" length="3"/>
    </different>
    <same>
      <range begin="8" data_begin="8" length="10"/>
    </same>
  </diff>
</superblock>
"""


@pytest.mark.parametrize("data", [THIN, THIN_VERBOSE])
def test_what_two_thin_snapshots_share_is_the_same(data: bytes) -> None:
    block = 65536
    size = 17 * block + 512  # the volume ends within its last block
    assert parse_hints(data, size, "map", ID).spans == ((0, 5 * block, Claim.SAME), (8 * block, size, Claim.SAME))
    with pytest.raises(UsageError, match="not as in which image"):
        parse_hints(data, size, "map")
