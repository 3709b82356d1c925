"""Storing the files of a volume as a tree whose contents are extents of it, as a confined process finds them."""

import os
import pickle
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from backupfs.disks.filesystem import Extent
from backupfs.disks.ranges import Ranges, overlapping
from backupfs.disks.table import VolumeReader
from backupfs.errors import shown
from backupfs.forked import Line, fork
from backupfs.ids import ChunkId
from backupfs.snapshots.content import EXTENT, HOLE, INLINE_MARK, Content, ContentBuilder
from backupfs.snapshots.node import STAT_ROW
from backupfs.snapshots.tree import TreeBuilder
from backupfs.usecases.archive_context import ArchiveContext
from backupfs.usecases.archive_files import FileStorer
from backupfs.usecases.events import FileSkipped, Remark
from backupfs.usecases.image_unread import unread_line, volume_line
from backupfs.usecases.image_walk import (
    MESSAGES,
    Closed,
    Found,
    Gap,
    Listed,
    Node,
    Nothing,
    Part,
    PartsEnd,
    Problem,
    Touched,
    walk_volume,
)

# A reader that says nothing for so long is not believed to say anything any more.
_PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a volume lies."""

    name: str
    number: int  # in the table of volumes
    size: int
    reader: VolumeReader
    free: Ranges  # what is to be left out of it


@dataclass(frozen=True, slots=True)
class VolumeTree:
    """The files of a volume: its top directory."""

    tree: ChunkId
    row: bytes
    xattrs: "tuple[tuple[bytes, bytes], ...] | bytes"


@dataclass(frozen=True, slots=True)
class Looked:
    """What was found in a volume when it was looked through."""

    tree: VolumeTree | None  # None: nothing that can be read
    unread: tuple[bytes, ...] = ()  # lines: what could not be read, and what is to be known of the whole
    nothing: str = ""  # why there are no files, if that may well be
    in_free: str = ""  # what lies where nothing should be in use


class VolumeFiles:
    """Builds the tree of one volume. Belongs to one scanning process."""

    def __init__(self, context: ArchiveContext, files: FileStorer, place: Place) -> None:
        """Take the parts.

        files: stores what has no place in the volume.
        """
        self._context = context
        self._files = files
        self._place = place
        self._builder: TreeBuilder | None = None
        self._trees: dict[int, ChunkId] = {}
        self._contents: dict[int, Content] = {}
        self._top: VolumeTree | None = None
        self._unread: list[bytes] = []
        self._in_free = self._nothing = ""

    def store(self) -> Looked:
        """Walk the volume and store its tree."""
        place = self._place

        def run(line: Line) -> None:
            walk_volume(line, place.reader.read, place.size, place.reader.descriptors(), place.free)

        process = fork(run, lambda error: Problem(b"/", f"its reader failed: {error}"), [])
        try:
            self._take_all(process.messages(_PATIENCE_S, MESSAGES))
        except TimeoutError:
            self._skip(b"/", f"its reader has said nothing for {_PATIENCE_S:.0f} seconds and was ended")
        except (pickle.UnpicklingError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
            # A reader that what it reads has taken over may say anything.
            self._skip(b"/", f"its reader said what makes no sense: {error}")
            self._top = None
        finally:
            process.kill()
        return Looked(self._top, tuple(self._unread), self._nothing, self._in_free)

    def _take_all(self, messages: Iterator[object]) -> None:
        is_known = False
        for message in messages:
            match message:
                case Found(form, remarks):
                    is_known = True
                    for remark in remarks:
                        self._context.scanner.send(Remark(f"{self._place.name} ({form}): {remark}"))
                        self._unread.append(volume_line(self._place.name, remark))
                case Nothing(reason):
                    self._nothing = f"{reason}"
                case Listed(nodes):
                    for node in nodes:
                        self._add(node)
                case Closed(number, top):
                    tree = (self._builder or self._context.builder()).finish()
                    self._builder = None
                    self._context.counts.directories += 1
                    self._context.tell_counts()
                    if top is None:
                        self._trees[number] = tree
                    else:
                        _require_kind(top.row, is_directory=True)
                        self._top = VolumeTree(tree, top.row, self._context.save_xattrs(top.xattrs))
                case Part() | Gap():
                    self._store_parts(message, messages)
                case PartsEnd(number, ""):
                    self._contents[number] = b""
                case PartsEnd():
                    pass
                case Problem(path, text):
                    self._skip(path, text)
                case Touched(offset):
                    self._in_free = self._in_free or f"byte {int(offset):,}"
        if is_known and self._top is None:
            self._skip(b"/", "its reader ended before its work did, for want of memory or time perhaps")

    def _store_parts(self, first: Part | Gap, messages: Iterator[object]) -> None:
        """Store a file that comes in parts: runs of bytes, and extents between them."""
        waiting = memoryview(b"")
        current: object = first

        def read_into(buffer: memoryview) -> int:
            nonlocal waiting, current
            while not waiting and isinstance(current, Part):
                waiting, current = memoryview(current.data), next(messages, None)
            count = min(len(buffer), len(waiting))
            buffer[:count], waiting = waiting[:count], waiting[count:]
            return count

        builder = ContentBuilder(self._context.save_tree)
        while isinstance(current, Part | Gap):
            if isinstance(current, Part):
                self._files.add_stream(builder, read_into)
            else:
                # There are no names here: what lies in free space is told by its place.
                self._add_extents(builder, current.extents, b"")
                current = next(messages, None)
        if isinstance(current, PartsEnd) and not current.problem:
            self._contents[current.number] = builder.finish()

    def _add(self, node: Node) -> None:
        if self._builder is None:
            self._builder = self._context.builder()
        content: Content
        mode, uid, gid, names, *_ = STAT_ROW.unpack(node.row)
        _require_kind(node.row, is_directory=bool(node.directory))
        if node.directory:
            content = self._trees.pop(node.directory)
        elif node.extents is not None:
            content = self._extents(node)
        elif node.data:
            content = self._contents.pop(node.data)
        elif node.kept and stat.S_ISREG(mode):
            content = INLINE_MARK + node.kept
        else:
            content = node.kept
        filesystem = self._place.number if names > 1 and not node.directory else 0
        if not node.directory:
            self._context.counts.files += 1
        xattrs = self._context.save_xattrs(node.xattrs)
        self._builder.add(node.name, node.row, content, 0, xattrs, filesystem, (uid, b""), (gid, b""))

    def _extents(self, node: Node) -> Content:
        builder = ContentBuilder(self._context.save_tree)
        self._add_extents(builder, node.extents or (), node.name)
        return builder.finish()

    def _add_extents(self, builder: ContentBuilder, extents: Iterable[Extent], name: bytes) -> None:
        """Add extents to a content; name: of the file, to tell that it lies where nothing should be in use."""
        for length, offset in extents:
            if length < 0:
                raise ValueError(f"an extent of {length} bytes")
            if offset is None:
                builder.add([length, HOLE])
            elif not 0 <= offset <= self._place.size - length:
                raise ValueError(f"an extent of {length} bytes at {offset}, outside of its volume")
            else:
                builder.add([length, EXTENT, self._place.number, offset])
                if not self._in_free and next(overlapping(self._place.free, offset, offset + length), None):
                    self._in_free = f"the file {shown(name)}" if name else f"byte {offset:,}"

    def _skip(self, path: bytes, text: str) -> None:
        path = os.fsencode(self._place.name) + b":" + path
        self._context.counts.files_skipped += 1
        self._context.scanner.send(FileSkipped(path, text))
        self._unread.append(unread_line(path, text))


def _require_kind(row: bytes, is_directory: bool) -> None:
    """Raises: ValueError when what was sent as a directory is none, or the other way round."""
    if stat.S_ISDIR(STAT_ROW.unpack(row)[0]) != is_directory:
        raise ValueError("a directory that is none")
