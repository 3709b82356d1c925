"""The trees of snapshots, as a check goes through them: every page once, whatever the number of snapshots.

A page is tainted when it, a page below it or a chunk that it needs cannot be read. The walk is in post-order, so a
page's verdict is final when it is marked, and the paths that damage hits are found later by following tainted pages
only. Memory: one bit per row of the index, and the pages on the way down. Belongs to one thread.
"""

import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from backupfs.codec.records import Field, decode_record
from backupfs.errors import DamagedObject, shown
from backupfs.ids import ID_SIZE, ChunkId, short
from backupfs.snapshots import content as grammar
from backupfs.snapshots.content import INLINE_MARK, SINGLE_MARK, Content
from backupfs.snapshots.node import STAT_ROW
from backupfs.snapshots.snapshot import Snapshot
from backupfs.snapshots.tree import InnerPage, LeafPage, decode_page, decode_xattrs
from backupfs.usecases.check_copies import Copies, Unread
from backupfs.usecases.findings import Findings

_TYPE = 0o170000
_MOST_LEVELS = 8  # of list pages


class TreeChunk(Enum):
    """What a tree chunk holds, as the reference to it says."""

    PAGE = "page"
    CONTENT = "list page"
    XATTRS = "set of xattrs"


@dataclass(frozen=True, slots=True)
class _Reference:
    kind: TreeChunk
    chunk_id: ChunkId
    length: int = 0  # of the bytes that a list page stands for


@dataclass(slots=True)
class _Open:
    """A tree chunk whose references are being followed."""

    position: int
    references: list[_Reference]
    tainted: bool


@dataclass(slots=True)
class TreeCounts:
    """How far the walk has come; written by its thread, read by any."""

    tree_chunks: int = 0
    entries: int = 0
    size: int = 0  # of files, each page once


@dataclass(slots=True)
class TreeCheck:
    """Goes through trees and marks what cannot be read."""

    trees: Copies
    data: Copies
    findings: Findings
    stop: threading.Event = field(default_factory=threading.Event)
    counts: TreeCounts = field(default_factory=TreeCounts)

    def is_tainted(self, snapshot: Snapshot) -> bool:
        """Check everything that a snapshot needs, as far as that was not done; tell whether anything is damaged."""
        top = _Open(-1, [_Reference(TreeChunk.PAGE, snapshot.root)], False)
        if isinstance(snapshot.root_xattrs, bytes):
            top.references.append(_Reference(TreeChunk.XATTRS, ChunkId(snapshot.root_xattrs)))
        stack = [top]
        while stack and not self.stop.is_set():
            opened = stack[-1]
            if opened.references:
                reference = opened.references.pop()
                try:
                    position = self.trees.position(reference.chunk_id)
                except Unread:
                    continue
                if position is None:
                    opened.tainted = True
                elif position in self.trees.done:
                    opened.tainted |= position in self.trees.bad
                else:
                    stack.append(self._open(position, reference))
                continue
            stack.pop()
            if stack:
                self.trees.mark(opened.position, not opened.tainted)
                stack[-1].tainted |= opened.tainted
        return top.tainted

    def tell_paths(self, snapshot: Snapshot) -> None:
        """Note which paths of a snapshot the damage hits, object by object."""
        name = short(snapshot.snapshot_id)
        for chunk_id, is_tree, path in self._hits(snapshot):
            for key in (self.trees if is_tree else self.data).blamed(chunk_id):
                self.findings.hit(key, name, path)

    # Down: what a chunk refers to.

    def _open(self, position: int, reference: _Reference) -> _Open:
        self.counts.tree_chunks += 1
        try:
            chunk = self.trees.load(reference.chunk_id)
        except Unread:
            return _Open(position, [], False)  # nothing is known of what is below
        if chunk is None:
            return _Open(position, [], True)
        opened = _Open(position, [], False)
        try:
            match reference.kind:
                case TreeChunk.PAGE:
                    self._look_at_page(decode_page(chunk, reference.chunk_id), reference.chunk_id, opened)
                case TreeChunk.CONTENT:
                    record = decode_record(chunk, f"the list page {short(reference.chunk_id)}")
                    self._look_at_segments(record, reference.length, opened)
                case TreeChunk.XATTRS:
                    decode_xattrs(decode_record(chunk, f"the set of xattrs {short(reference.chunk_id)}"))
        except DamagedObject as error:
            self._blame(reference.chunk_id, str(error))
            opened.tainted = True
        return opened

    def _look_at_page(self, page: LeafPage | InnerPage, page_id: ChunkId, opened: _Open) -> None:
        if isinstance(page, InnerPage):
            opened.references = [_Reference(TreeChunk.PAGE, branch.page_id) for branch in page.branches]
            return
        self.counts.entries += len(page)
        for name, content, row in zip(page.names, page.contents, STAT_ROW.iter_unpack(page.rows), strict=True):
            kind = row[0] & _TYPE
            try:
                if kind == stat.S_IFREG:
                    self.counts.size += row[5]
                    self._look_at_content(content, row[5], opened)
                elif kind == stat.S_IFDIR:
                    opened.references.append(_Reference(TreeChunk.PAGE, _tree_in(content)))
            except DamagedObject as error:
                self._blame(page_id, f"a tree page in it is not valid at the entry {shown(name)}: {error}")
                opened.tainted = True
        opened.references += [_Reference(TreeChunk.XATTRS, chunk_id) for chunk_id in _xattr_chunks(page)]

    def _look_at_content(self, content: Content, size: int, opened: _Open) -> None:
        if isinstance(content, list):
            self._look_at_segments(content, size, opened)  # type: ignore[arg-type]
        elif content[:1] == SINGLE_MARK and len(content) == ID_SIZE + 1:
            self._judge(ChunkId(content[1:]), size, opened)
        elif len(content) != (size + 1 if content[:1] == INLINE_MARK else 0) or (not content and size):
            raise DamagedObject("its content is of no known form")

    def _look_at_segments(self, segments: list[Field], size: int, opened: _Open) -> None:
        position = 0
        for segment in segments:
            match segment:
                case [int(length), int(kind), *arguments] if length >= 0:
                    position += length
                case _:
                    raise DamagedObject("a segment of its content is malformed")
            match kind, arguments:
                case (grammar.HOLE, []) | (grammar.EXTENT, [int(), int()]):
                    pass
                case grammar.CHUNK, [bytes(chunk_id)]:
                    self._judge(ChunkId(chunk_id), length, opened)
                case grammar.INLINE, [bytes(inline)] if len(inline) == length:
                    pass
                case grammar.LIST, [bytes(page_id)]:
                    opened.references.append(_Reference(TreeChunk.CONTENT, ChunkId(page_id), length))
                case _:
                    raise DamagedObject("a segment of its content is of no known kind")
        if position != size:
            raise DamagedObject("the segments of its content do not add up to its size")

    def _judge(self, chunk_id: ChunkId, length: int, opened: _Open) -> None:
        verdict = self.data.judge(chunk_id)
        if not verdict.good:
            opened.tainted = True
        elif verdict.length not in (length, None):
            raise DamagedObject(f"its chunk {short(chunk_id)} has {verdict.length} bytes instead of {length}")

    def _blame(self, chunk_id: ChunkId, what: str) -> None:
        for key in self.trees.blamed(chunk_id):
            self.findings.damage(key, what)

    # The second pass: paths.

    def _hits(self, snapshot: Snapshot) -> Iterator[tuple[ChunkId, bool, bytes]]:
        """Yield (bad chunk, whether it is a tree chunk, path it hits), following tainted pages only."""
        if isinstance(snapshot.root_xattrs, bytes) and self._is_bad(ChunkId(snapshot.root_xattrs)):
            yield ChunkId(snapshot.root_xattrs), True, b"/"
        pending = [(snapshot.root, b"")]
        while pending and not self.stop.is_set():
            page_id, path = pending.pop()
            if not self._is_bad(page_id):
                continue
            try:
                chunk = self.trees.load(page_id)
                page = None if chunk is None else decode_page(chunk, page_id)
            except Unread:
                continue
            except DamagedObject:
                page = None
            if page is None:
                yield page_id, True, path or b"/"
            elif isinstance(page, InnerPage):
                pending += [(branch.page_id, path) for branch in reversed(page.branches)]
            else:
                yield from self._hits_in(page, page_id, path, pending)

    def _hits_in(
        self, page: LeafPage, page_id: ChunkId, path: bytes, pending: list[tuple[ChunkId, bytes]]
    ) -> Iterator[tuple[ChunkId, bool, bytes]]:
        below: list[tuple[ChunkId, bytes]] = []
        for position, (name, content) in enumerate(zip(page.names, page.contents, strict=True)):
            mode, _, _, _, _, size, *_ = STAT_ROW.unpack(page.row(position))
            at = path + b"/" + name
            try:
                if mode & _TYPE == stat.S_IFDIR:
                    below.append((_tree_in(content), at))
                elif mode & _TYPE == stat.S_IFREG:
                    self._look_at_content(content, size, _Open(-1, [], False))
                    for chunk_id, is_tree in self._bad_chunks(content, 0):
                        yield chunk_id, is_tree, at
            except DamagedObject:
                yield page_id, True, at  # the page says something impossible about this entry
            xattrs = page.xattrs(position)
            if isinstance(xattrs, bytes) and self._is_bad(ChunkId(xattrs)):
                yield ChunkId(xattrs), True, at
        pending += reversed(below)

    def _bad_chunks(self, content: Content | list[Field], level: int) -> Iterator[tuple[ChunkId, bool]]:
        """Yield (chunk, whether it is a tree chunk) of those a file needs that cannot be read."""
        if isinstance(content, bytes):
            if content[:1] == SINGLE_MARK and not self.data.judge(ChunkId(content[1:])).good:
                yield ChunkId(content[1:]), False
            return
        for segment in content:
            match segment:
                case [int(), grammar.CHUNK, bytes(chunk_id)]:
                    if not self.data.judge(ChunkId(chunk_id)).good:
                        yield ChunkId(chunk_id), False
                case [int(length), grammar.LIST, bytes(page_id)] if self._is_bad(ChunkId(page_id)):
                    page = self._valid_list_page(ChunkId(page_id), length) if level < _MOST_LEVELS else None
                    if page is None:
                        yield ChunkId(page_id), True
                    else:
                        yield from self._bad_chunks(page, level + 1)

    def _valid_list_page(self, page_id: ChunkId, length: int) -> list[Field] | None:
        try:
            chunk = self.trees.load(page_id)
        except Unread:
            return []
        if chunk is None:
            return None
        try:
            segments = decode_record(chunk, "a list page")
            self._look_at_segments(segments, length, _Open(-1, [], False))
        except DamagedObject:
            return None
        return segments

    def _is_bad(self, chunk_id: ChunkId) -> bool:
        try:
            position = self.trees.position(chunk_id)
        except Unread:
            return False
        return position is None or position in self.trees.bad


def _tree_in(content: Content) -> ChunkId:
    if not isinstance(content, bytes) or len(content) != ID_SIZE:
        raise DamagedObject("it is a directory without a tree")
    return ChunkId(content)


def _xattr_chunks(page: LeafPage) -> list[ChunkId]:
    return [ChunkId(xattrs) for xattrs in page.sparse_columns[0].values() if isinstance(xattrs, bytes)]
