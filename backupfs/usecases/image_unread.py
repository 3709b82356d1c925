"""The list of what could not be read in an image: a file beside the volumes' files, kept as long as they stand.

A line is about something in a volume, VOLUME:PATH: REASON, or about a volume as a whole, VOLUME: REASON. A volume
that is the same in the next image is not looked through again, so nobody would say again what it lacks.
"""

from collections.abc import Callable, Collection, Iterable

from backupfs.disks.layout import Layout
from backupfs.disks.nbd import DAMAGED
from backupfs.errors import PathNotFound, shown
from backupfs.ids import ChunkId
from backupfs.snapshots.content import INLINE, INLINE_MARK, MOST_INLINE, Content, ContentBuilder, pieces
from backupfs.snapshots.snapshot import Snapshot
from backupfs.snapshots.walk import find_path
from backupfs.usecases.events import FileSkipped, Remark, Report

# No volume has this name: theirs begin with a letter or a digit.
UNREAD = b".unread"


def unread_line(path: bytes, reason: str) -> bytes:
    """Return the line that says why something is not among the files. path: VOLUME:PATH."""
    return f"{shown(path)}: {shown(reason)}\n".encode()


def volume_line(name: str, reason: str) -> bytes:
    """Return the line that says what is to be known of a volume as a whole."""
    return f"{shown(name)}: {shown(reason)}\n".encode()


def tell_lacks(layout: Layout, report: Report) -> None:
    """Say what is not shown of volumes as wholes."""
    for remark in layout.remarks:
        report(Remark(remark))
    for name, reason in layout.problems:
        report(FileSkipped(name.encode(), reason))


def lines_of(layout: Layout) -> list[bytes]:
    """Return the lines for what is not shown of volumes as wholes."""
    # These have names in them that are printable already.
    remarks = [f"{' '.join(remark.split())}\n".encode() for remark in layout.remarks]
    return remarks + [volume_line(*problem) for problem in layout.problems]


def split_lines(lines: Collection[bytes], name: str) -> tuple[list[str], int]:
    """Return what lines say of a volume as a whole, and how many others there are."""
    whole = f"{shown(name)}: ".encode()
    remarks = [line.decode().rstrip("\n") for line in lines if line.startswith(whole)]
    return remarks, sum(not line.startswith(whole) for line in lines)


def unread_content(lines: Iterable[bytes], save: Callable[[bytes], ChunkId]) -> tuple[Content, int]:
    """Return the content of the list, and its size. save: stores a tree chunk."""
    whole = b"".join(lines)
    if len(whole) <= MOST_INLINE:
        return INLINE_MARK + whole, len(whole)
    builder = ContentBuilder(save)
    for at in range(0, len(whole), MOST_INLINE):
        part = whole[at : at + MOST_INLINE]
        builder.add([len(part), INLINE, part])
    return builder.finish(), len(whole)


def unread_before(snapshot: Snapshot, name: str, load: Callable[[ChunkId], bytes | memoryview]) -> tuple[bytes, ...]:
    """Return the lines of one volume in an image. load: gives tree chunks. Raises: DamagedObject; StoreError."""
    try:
        node = find_path(snapshot, b"/files/" + UNREAD, load)
        found = b"".join(bytes(piece.source) for piece in pieces(node.content, node.size, 0, node.size, load))
    except PathNotFound:
        return ()
    return tuple(line for line in found.splitlines(keepends=True) if line.startswith(shown(name).encode() + b":"))


def damage_before(snapshot: Snapshot, name: str, load: Callable[[ChunkId], bytes | memoryview]) -> tuple[str, ...]:
    """Return what an image says is damaged of the file that a disk of it was read from: the disk does not show it.

    Raises: DamagedObject; StoreError.
    """
    start = f"{shown(name)}: "
    lines = (line.decode().rstrip("\n") for line in unread_before(snapshot, name, load))
    return tuple(line.removeprefix(start) for line in lines if line.startswith(start) and DAMAGED in line)
