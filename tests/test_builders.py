"""The builders themselves: a declared tree is built, backed up and read back as declared."""

import stat
from pathlib import Path

from tests.builders import (
    Directory,
    File,
    Hardlink,
    Sparse,
    Special,
    Symlink,
    back_up,
    build,
    contents_of,
    new_repository,
    reopened,
    snapshot_of,
)

TREE = {
    "a": File(b"x", mode=0o600, xattrs={"user.note": b"\0y"}),
    "d": {"l": Symlink(b"../a"), "h": Hardlink("a"), b"\xff\n": File(b"z" * 5000)},
    "f": Special(stat.S_IFIFO, 0o620),
    "s": Sparse(1 << 20, {0: b"head", 1 << 19: b"middle"}),
    "e": Directory(mode=0o700),
}


def test_two_builds_of_a_tree_are_equal(tmp_path: Path) -> None:
    first, second = build(TREE, tmp_path / "1"), build(TREE, tmp_path / "2")
    seen = snapshot_of(first)
    assert seen == snapshot_of(second)
    assert seen[b"a"].links == (b"a", b"d/h")
    assert seen[b"d/l"].target == b"../a"
    assert len(seen[b"s"].data) == 2


def test_a_built_tree_reads_back_from_a_small_repository(tmp_path: Path) -> None:
    source = build(TREE, tmp_path / "source")
    repository = new_repository()
    snapshot = back_up(repository, source)
    kept = contents_of(reopened(repository), snapshot)
    for path, seen in snapshot_of(source).items():
        entry = kept[source + (b"/" + path if path else b"")]
        assert entry is not None
        assert (stat.S_IMODE(entry.node.mode), entry.node.mtime_ns) == (seen.mode, seen.mtime_ns)
        assert entry.node.xattrs == seen.xattrs
        if seen.kind == "file":
            with open(source + b"/" + path, "rb") as file:
                assert entry.content == file.read()
