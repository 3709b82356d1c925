"""The paths a backup starts from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.errors import SourceError, UsageError
from backupfs.localfs.sources import existing_sources, minimal_roots, normalise, read_list


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"/", b"/"),
        (b"//", b"/"),
        (b"//a", b"/a"),
        (b"/a//b/./c/", b"/a/b/c"),
        (b"/a/../b", b"/b"),
        (b"/../..", b"/"),
        (b".", b"/w/d"),
        (b"..", b"/w"),
        (b"../../..", b"/"),
        (b"x", b"/w/d/x"),
        (b"./x/..", b"/w/d"),
        (b"...", b"/w/d/..."),
        (b"a\n\xff ", b"/w/d/a\n\xff "),
    ],
)
def test_a_path_becomes_absolute_and_plain(path: bytes, expected: bytes) -> None:
    assert normalise(path, b"/w/d") == expected


def test_a_relative_path_in_the_root_has_one_slash() -> None:
    assert normalise(b"x", b"/") == b"/x"


@pytest.mark.parametrize("path", [b"", b"a\0b"])
def test_a_path_that_cannot_be_is_refused(path: bytes) -> None:
    with pytest.raises(UsageError):
        normalise(path, b"/")


@given(st.binary(min_size=1).filter(lambda path: b"\0" not in path))
def test_a_normal_path_stays_as_it_is(path: bytes) -> None:
    normal = normalise(path, b"/w")
    assert normalise(normal, b"/elsewhere") == normal
    assert normal == b"/" or not {b"", b".", b".."} & set(normal[1:].split(b"/"))


def test_a_list_of_lines_passes_over_blank_lines_and_comments() -> None:
    assert read_list(b"/a\n\n  \t\n# note\n b \n./#c\n/d#\r") == [b"/a", b" b ", b"./#c", b"/d#\r"]


def test_a_list_with_a_nul_takes_every_byte_between_nuls() -> None:
    assert read_list(b"/a\nb\0#c\0\0 \0/d") == [b"/a\nb", b"#c", b" ", b"/d"]


@pytest.mark.parametrize("data", [b"", b"\n", b"#\n", b"\0"])
def test_a_list_of_nothing_is_empty(data: bytes) -> None:
    assert read_list(data) == []


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([], []),
        ([b"/b", b"/a", b"/b"], [b"/a", b"/b"]),
        ([b"/a", b"/a-b", b"/a/c", b"/ab"], [b"/a", b"/a-b", b"/ab"]),
        ([b"/a/b/c", b"/a"], [b"/a"]),
        ([b"/x/y", b"/"], [b"/"]),
        ([b"/"], [b"/"]),
        ([b"/a/\xff\n", b"/a/\xff"], [b"/a/\xff", b"/a/\xff\n"]),
    ],
)
def test_paths_below_another_are_dropped(paths: list[bytes], expected: list[bytes]) -> None:
    assert minimal_roots(paths) == expected


@given(st.lists(st.lists(st.sampled_from([b"a", b"b", b"a-"]), max_size=4).map(lambda parts: b"/" + b"/".join(parts))))
def test_every_path_is_at_or_below_exactly_one_root(paths: list[bytes]) -> None:
    roots = minimal_roots(paths)
    for path in paths:
        assert sum(path == root or path.startswith(root.rstrip(b"/") + b"/") for root in roots) == 1


def test_missing_sources_are_left_to_the_report_while_one_is_there() -> None:
    assert existing_sources([b"/c", b"/a", b"/b"], {b"/a"}) == [b"/c", b"/b"]


def test_a_backup_whose_sources_are_all_missing_is_refused_and_names_them() -> None:
    with pytest.raises(SourceError, match=r"'/a\\x0a', '/b' not found"):
        existing_sources([b"/a\n", b"/b"], {b"/a\n", b"/b"})
    many = [b"/%d" % number for number in range(9)]
    with pytest.raises(SourceError, match="'/4' and 4 more not found"):
        existing_sources(many, set(many))


def test_a_backup_of_no_source_is_refused() -> None:
    with pytest.raises(SourceError, match="no path was given"):
        existing_sources([], set())
