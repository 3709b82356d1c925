"""What is known of a snapshot's soundness: records of verifications, kept as notes.

Arguments of a note of the kind `verify`: [level, duration_ns, program, [[level, subject, result, words], …], tree],
where tree is the id of a directory with what the verification left, or empty.
Pure. Source: docs/format.rst, "Verifications".
"""

from dataclasses import dataclass
from enum import IntEnum

from backupfs.codec.records import Field
from backupfs.errors import DamagedObject
from backupfs.ids import ID_SIZE, SnapshotId
from backupfs.snapshots.notes import Note

VERIFY = "verify"

# Levels: what they prove.
METADATA, DATA, CONTENT, BOOT = range(4)


class Result(IntEnum):
    """How one look ended."""

    PASSED = 0
    FAILED = 1
    SKIPPED = 2  # nothing can be said, and the words say why


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one look at one thing ended."""

    level: int
    subject: str  # a volume, a disk; empty: the snapshot
    result: Result
    words: str


@dataclass(frozen=True, slots=True)
class Verification:
    """One run that looked whether a snapshot is sound."""

    snapshot_id: SnapshotId
    time_ns: int
    host: str
    level: int  # the highest that was asked for
    duration_ns: int
    program: str
    outcomes: tuple[Outcome, ...]
    tree: bytes = b""  # of what it left: report, logs, pictures

    @property
    def result(self) -> Result:
        """The worst of all outcomes; what was skipped does not count beside what passed at the level asked for.

        Where all of that level was skipped, no more was proven than before it.
        """
        found = {outcome.result for outcome in self.outcomes}
        if Result.FAILED not in found and any(outcome.level == self.level for outcome in self.outcomes):
            found = {outcome.result for outcome in self.outcomes if outcome.level == self.level}
        return next((one for one in (Result.FAILED, Result.PASSED) if one in found), Result.SKIPPED)


def encode_verification(made: Verification) -> tuple[Field, ...]:
    """Return the arguments of the note."""
    outcomes: list[Field] = [[one.level, one.subject, int(one.result), one.words] for one in made.outcomes]
    return (made.level, made.duration_ns, made.program, outcomes, made.tree)


def decode_verification(note: Note) -> Verification:
    """Return what a note of the kind `verify` says. Raises: DamagedObject."""
    match note.arguments:
        case (int(level), int(duration_ns), str(program), list(records), bytes(tree), *_) if len(tree) in (0, ID_SIZE):
            outcomes: list[Outcome] = []
            for record in records:
                match record:
                    case [int(of_level), str(subject), int(result), str(words), *_] if result in tuple(Result):
                        outcomes.append(Outcome(of_level, subject, Result(result), words))
                    case _:
                        raise DamagedObject("a verification is damaged: an outcome of it is none")
            return Verification(
                note.snapshot_id, note.time_ns, note.host, level, duration_ns, program, tuple(outcomes), tree
            )
    raise DamagedObject("a verification is damaged: it is none of format 1")
