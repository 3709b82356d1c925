"""Numbers for everything in the trees without a table of entries, and the decoded pages.

The number of an entry is (slot of its page << 16 | position in the page). A slot is a row of compact arrays, made
when its directory is first visited and kept as long as the view lives, so that a number always leads back to its
entry and nothing is to be forgotten. Belongs to the trio thread.
"""

from array import array
from bisect import bisect_right
from collections import OrderedDict

from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId, short
from backupfs.snapshots.tree import Branch, InnerPage, LeafPage, decode_page
from backupfs.view.loading import Loader

POSITION_BITS = 16
POSITION_MASK = (1 << POSITION_BITS) - 1
FIRST_ENTRY = 1 << POSITION_BITS  # smaller numbers are no entries of pages

# What decoded pages may take; a page of 4000 entries takes about 1 MB.
PAGES_SIZE = 12 << 20
# Python objects of one entry: a name, an id and two list slots; measured 190 to 230 bytes beside the row.
_ENTRY_SIZE = 200


class PageTable:
    """Slots: which page of which directory each number stands for."""

    def __init__(self, loader: Loader, size: int = PAGES_SIZE) -> None:
        """Take the parts. size: bytes of decoded pages to keep, by estimate."""
        self._loader = loader
        self._size = size
        self._kept = 0
        self._pages: OrderedDict[int, LeafPage] = OrderedDict()
        self._last_slot = -1
        self._last_page: LeafPage | None = None
        self._first_slots: dict[int, int] = {}  # number of a directory → slot of its first page
        self._first_names: dict[int, list[bytes]] = {}  # the same, of directories of several pages → their first names
        # Columns by slot. Slot 0 is never given out: its numbers are those of other things.
        self._directories = array("Q", [0])
        self._starts = array("Q", [0])  # entries of the directory before the page
        self._more = array("L", [0])  # pages of the directory behind this one
        self._page_ids = bytearray(32)

    def directory_of(self, slot: int) -> int:
        """Return the number of the directory that a page belongs to."""
        return self._directories[slot]

    def page(self, slot: int) -> LeafPage:
        """Return the decoded page of a slot. Raises: IndexError; NotCached; DamagedObject."""
        if slot == self._last_slot:
            assert self._last_page is not None
            return self._last_page
        page = self._pages.get(slot)
        if page is None:
            if not 0 < slot < len(self._starts):
                raise IndexError
            page_id = ChunkId(bytes(self._page_ids[slot * 32 : slot * 32 + 32]))
            decoded = _decode(self._loader, page_id)
            if not isinstance(decoded, LeafPage):
                raise DamagedObject(f"the tree page {short(page_id)} is damaged: it is no leaf where one must be")
            page = decoded
            self._keep(slot, page)
        else:
            self._pages.move_to_end(slot)
        self._last_slot, self._last_page = slot, page
        return page

    def _keep(self, slot: int, page: LeafPage) -> None:
        self._pages[slot] = page
        self._kept += _size_of(page)
        while self._kept > self._size and len(self._pages) > 1:
            _, old = self._pages.popitem(last=False)
            self._kept -= _size_of(old)

    def is_known(self, directory: int) -> bool:
        """Tell whether a directory was visited."""
        return directory in self._first_slots

    def visit(self, directory: int, tree: ChunkId) -> None:
        """Give slots to the pages of a directory. Raises: NotCached; DamagedObject."""
        page = _decode(self._loader, tree)
        if isinstance(page, LeafPage):
            slot = self._add(directory, tree, 0, 0)
            self._first_slots[directory] = slot
            if slot not in self._pages:
                self._keep(slot, page)
            return
        leaves: list[Branch] = []
        self._flatten(page, leaves)
        start = 0
        first = len(self._starts)
        for position, leaf in enumerate(leaves):
            self._add(directory, leaf.page_id, start, len(leaves) - position - 1)
            start += leaf.nodes
        self._first_slots[directory] = first
        self._first_names[directory] = [leaf.first_name for leaf in leaves]

    def _flatten(self, page: InnerPage, leaves: list[Branch]) -> None:
        """Collect the branches that lead to leaves."""
        if page.level == 1:
            leaves += page.branches
            return
        for branch in page.branches:
            below = _decode(self._loader, branch.page_id)
            if isinstance(below, LeafPage) or below.level >= page.level:
                raise DamagedObject(f"the tree page {short(branch.page_id)} is damaged: its levels do not go down")
            self._flatten(below, leaves)

    def _add(self, directory: int, page_id: ChunkId, start: int, more: int) -> int:
        self._directories.append(directory)
        self._starts.append(start)
        self._more.append(more)
        self._page_ids += page_id
        return len(self._starts) - 1

    def slot_of_name(self, directory: int, name: bytes) -> int:
        """Return the slot of the page that would hold a name of a visited directory."""
        slot = self._first_slots[directory]
        if self._more[slot]:
            slot += max(0, bisect_right(self._first_names[directory], name) - 1)
        return slot

    def slot_of_entry(self, directory: int, index: int) -> tuple[int, int]:
        """Return (slot, position in its page) of the entry at `index` of a visited directory.

        The position may lie behind the last entry, which ends the directory.
        """
        slot = self._first_slots[directory]
        if self._more[slot]:
            slot = bisect_right(self._starts, index, slot, slot + self._more[slot] + 1) - 1
        return slot, index - self._starts[slot]

    def next_slot(self, slot: int) -> int | None:
        """Return the slot of the same directory's next page."""
        return slot + 1 if self._more[slot] else None


def _decode(loader: Loader, page_id: ChunkId) -> LeafPage | InnerPage:
    page = decode_page(loader.tree(page_id), page_id)
    if isinstance(page, LeafPage) and len(page) > POSITION_MASK:
        raise DamagedObject(f"the tree page {short(page_id)} is damaged: it has too many entries")
    return page


def _size_of(page: LeafPage) -> int:
    return len(page.names) * _ENTRY_SIZE + len(page.rows) + 1000
