"""The list of what could not be read in an image: a file beside the volumes' files, kept as long as they stand.

A volume that is the same in the next image is not looked through again, so nobody would say again what it lacks.
"""

from collections.abc import Callable, Iterable

from backupfs.errors import DamagedObject, PathNotFound, StoreError, shown
from backupfs.ids import ChunkId
from backupfs.snapshots.content import INLINE, INLINE_MARK, MOST_INLINE, Content, ContentBuilder, pieces
from backupfs.snapshots.snapshot import Snapshot
from backupfs.snapshots.walk import find_path

# No volume has this name: theirs begin with a letter or a digit.
UNREAD = b".unread"


def unread_line(path: bytes, reason: str) -> bytes:
    """Return the line that says why something is not among the files. path: VOLUME:PATH."""
    return f"{shown(path)}: {shown(reason)}\n".encode()


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
    """Return the lines of one volume in an image. load: gives tree chunks."""
    try:
        node = find_path(snapshot, b"/files/" + UNREAD, load)
        found = b"".join(bytes(piece.source) for piece in pieces(node.content, node.size, 0, node.size, load))
    except (PathNotFound, DamagedObject, StoreError):
        return ()
    return tuple(line for line in found.splitlines(keepends=True) if line.startswith(shown(name).encode() + b":"))
