"""What happened, as values: the only way in which verbs tell their progress."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FileSkipped:
    """A source could not be read, or a target not be written; the run goes on and ends with exit code 3."""

    path: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class FileVanished:
    """A file or a folder was deleted or moved away after its folder was listed, as happens while a system is in use."""

    path: bytes


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A directory whose content was left out on purpose."""

    path: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Deleted:
    """A restore deleted something, with all that was in it."""

    path: bytes
    dry_run: bool = False  # it would have


@dataclass(frozen=True, slots=True)
class FileChanged:
    """A file changed while it was read, twice; what was read is kept and flagged."""

    path: bytes


@dataclass(frozen=True, slots=True)
class Remark:
    """Something worth knowing that is no failure."""

    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far long work has come; totals are 0 where they are not known."""

    verb: str
    files: int
    size: int
    files_total: int = 0
    size_total: int = 0
    current: bytes = b""


Event = FileSkipped | FileVanished | LeftOut | Deleted | FileChanged | Remark | Progress
Report = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """Take an event and do nothing."""
