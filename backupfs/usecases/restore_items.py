"""What a restore knows of the files that it writes: options, counts, files under way and the pieces they lack."""

from dataclasses import dataclass
from enum import Enum

from backupfs.errors import DamagedObject
from backupfs.localfs.directories import Directory
from backupfs.localfs.exclude import Pattern
from backupfs.localfs.metadata import Metadata
from backupfs.localfs.writing import MakeWay
from backupfs.snapshots.content import Content, Piece

ALWAYS, IF_CHANGED, IF_NEWER, NEVER = "always", "if-changed", "if-newer", "never"
OVERWRITE = (ALWAYS, IF_CHANGED, IF_NEWER, NEVER)
BY_NAME, BY_NUMBER = "name", "number"


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """What a user can say about a restore."""

    overwrite: str = ALWAYS  # or IF_CHANGED (size or mtime differ), IF_NEWER (than what is there), NEVER
    include: tuple[Pattern, ...] = ()  # over paths from the restored directory on, which is their `/`
    exclude: tuple[Pattern, ...] = ()
    delete: bool = False  # remove what the snapshot does not have, in directories that were restored
    dry_run: bool = False
    verify: bool = False  # read everything back afterwards
    sparse: bool = False  # make holes of long runs of zeros, too; holes of the source are always holes
    owner: str = BY_NAME  # the ids of the names where this machine has them; or BY_NUMBER
    own_folders: tuple[bytes, ...] = ()  # paths of the repository and the cache, never deleted, never the target


@dataclass(slots=True)
class Counts:
    """What was done so far; written by one thread at a time and read by any."""

    files: int = 0  # written, or linked, or made
    directories: int = 0
    size: int = 0  # bytes of the files written, holes included
    unchanged: int = 0  # files left as they were, by the rule of `overwrite`
    unchanged_size: int = 0
    deleted: int = 0
    verified: int = 0
    errors: int = 0  # paths that are not, or not wholly, as in the snapshot
    damaged: int = 0  # of those, the ones for which the repository lacks good bytes
    current: bytes = b""


class State(Enum):
    """How far a file is."""

    WAITING = 0
    DONE = 1
    FAILED = 2


class Item:
    """A file that is not written yet, or that others are links to."""

    __slots__ = (
        "content", "directory", "error", "failure", "is_damaged", "links", "make_way", "metadata", "name", "number",
        "remaining", "size", "state", "temporary", "unseen",
    )  # fmt: skip

    def __init__(
        self, directory: Directory, name: bytes, metadata: Metadata, content: Content, size: int, number: int
    ) -> None:
        self.directory = directory
        self.name = name
        self.metadata = metadata
        self.content = content
        self.size = size
        self.number = number
        self.temporary = b""  # its name until it is whole; empty for files of one chunk, which are written at once
        self.remaining = 1  # pieces that are not written, and 1 while the walk adds more
        self.error = ""  # of writing it at once
        self.failure = ""  # why it was given up
        self.is_damaged = False  # given up for want of good bytes, which other names want as well
        self.state = State.WAITING
        self.links: list[Item] = []  # other names, to be made when this one is there
        self.make_way: MakeWay | None = None  # removes a directory in its place, when the file is whole
        self.unseen = 0  # names of the same file that the walk may still meet


class PieceUse:
    """A part of a chunk that belongs at an offset of a large file."""

    __slots__ = ("at", "error", "item", "piece")

    def __init__(self, item: Item, at: int, piece: Piece) -> None:
        self.item = item
        self.at = at
        self.piece = piece
        self.error = ""  # of writing it


Use = Item | PieceUse


class Blocked(Exception):
    """Something stands in the way that the rule of `overwrite` keeps."""


def device_of(content: Content) -> tuple[int, int]:
    """Return the (major, minor) of a device. Raises: DamagedObject."""
    if not isinstance(content, bytes) or len(content) != 8:
        raise DamagedObject("the snapshot holds a device without numbers")
    return int.from_bytes(content[:4], "little"), int.from_bytes(content[4:], "little")
