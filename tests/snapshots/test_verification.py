"""Records of verifications: bytes and back, and what is no record."""

import pytest

from backupfs.errors import DamagedObject
from backupfs.ids import SnapshotId
from backupfs.snapshots.notes import Note
from backupfs.snapshots.verification import (
    VERIFY,
    Outcome,
    Result,
    Verification,
    decode_verification,
    encode_verification,
)

SNAPSHOT = SnapshotId(b"s" * 32)
OUTCOMES = (Outcome(0, "", Result.PASSED, "all"), Outcome(2, "vda1", Result.FAILED, "ext4: a superblock"))


@pytest.mark.parametrize("tree", [b"", b"t" * 32])
def test_a_record_is_read_as_it_was_written(tree: bytes) -> None:
    made = Verification(SNAPSHOT, 5, "host", 3, 17, "backupfs 1", OUTCOMES, tree)
    assert decode_verification(Note(SNAPSHOT, VERIFY, 5, "host", encode_verification(made))) == made


@pytest.mark.parametrize(
    ("outcomes", "worst"),
    [
        ([Result.PASSED, Result.FAILED, Result.SKIPPED], Result.FAILED),
        ([Result.PASSED, Result.SKIPPED], Result.PASSED),
        ([Result.SKIPPED], Result.SKIPPED),
        ([], Result.SKIPPED),
    ],
)
def test_the_worst_outcome_counts(outcomes: list[Result], worst: Result) -> None:
    found = tuple(Outcome(0, "", one, "") for one in outcomes)
    assert Verification(SNAPSHOT, 0, "", 0, 0, "", found).result == worst


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        (3, 17, "backupfs 1", [], b"short"),
        (3, 17, "backupfs 1", [[0, "", 9, "no such result"]], b""),
        (3, 17, "backupfs 1", ["no outcome"], b""),
        ("3", 17, "backupfs 1", [], b""),
    ],
)
def test_what_is_no_record_is_damage(arguments: tuple) -> None:
    with pytest.raises(DamagedObject):
        decode_verification(Note(SNAPSHOT, VERIFY, 5, "host", arguments))
