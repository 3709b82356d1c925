"""The parent snapshot's trees, as far as they can be read: what cannot is as if it had never been backed up."""

from collections.abc import Callable, Iterator

from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId
from backupfs.snapshots.tree import LeafPage, find_node, leaf_pages
from backupfs.snapshots.walk import Load
from backupfs.usecases.events import Remark, Report


class ParentTrees:
    """Reads trees to compare with. Belongs to one thread."""

    def __init__(self, load: Load, report: Report, damaged: Callable[[], None]) -> None:
        """Take the parts.

        damaged: called when something cannot be read: what the store has of trees is not to be relied on then.
        """
        self.load = load
        self._report = report
        self._damaged = damaged

    def pages(self, tree: ChunkId) -> Iterator[LeafPage | None]:
        """Yield a directory's leaf pages in order; None, and no more, where the next one cannot be read."""
        try:
            yield from leaf_pages(tree, self.load)
        except DamagedObject as error:
            self._tell(error)
            yield None

    def page_of(self, tree: ChunkId | None, name: bytes) -> LeafPage | None:
        """Return the leaf page that would hold a name."""
        if tree is None:
            return None
        try:
            return next(leaf_pages(tree, self.load, name), None)
        except DamagedObject as error:
            self._tell(error)
            return None

    def tree_below(self, tree: ChunkId | None, name: bytes) -> ChunkId | None:
        """Return the tree of a directory's entry, if it has such a directory."""
        if tree is None:
            return None
        try:
            node = find_node(tree, name, self.load)
        except DamagedObject as error:
            self._tell(error)
            return None
        return (
            ChunkId(node.content)
            if node is not None and node.is_directory and isinstance(node.content, bytes)
            else None
        )

    def _tell(self, error: DamagedObject) -> None:
        self._damaged()
        self._report(Remark(f"the snapshot compared with is damaged ({error}): what it cannot say is read again"))
