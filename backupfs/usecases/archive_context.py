"""What every step of a walk shares: counts, trees, names of file systems and owners. One per scanning process."""

import os
import time

from backupfs.codec.keys import keyed_hash
from backupfs.codec.records import encode_record
from backupfs.ids import ChunkId
from backupfs.localfs import mounts, reading
from backupfs.localfs.selection import Selection
from backupfs.repository.writer import ChunkSaver
from backupfs.snapshots.content import Content
from backupfs.snapshots.node import NANOSECONDS, STAT_ROW, Xattrs
from backupfs.snapshots.tree import LeafPage, TreeBuilder
from backupfs.usecases.archive_counts import Counts
from backupfs.usecases.events import FileSkipped, FileVanished, LeftOut
from backupfs.usecases.scanner import Counted, Scanner

# Xattrs beyond this go to a chunk of their own.
_MOST_XATTRS = 4096
# A time this close to the look may hide a later change within the same tick of the file system's clock.
_TICK_NS = 10 * 10**6
_FAT_TICK_NS = 2 * 10**9
_TELLING_SECONDS = 0.1
_COARSE = frozenset({"vfat", "msdos", "exfat"})


class ArchiveContext:
    """What is asked and told at every step."""

    def __init__(
        self,
        tree_id_key: bytes,
        page_cut_key: bytes,
        trees: ChunkSaver,
        selection: Selection,
        scanner: Scanner,
        ordinals: dict[int, int],
    ) -> None:
        """Take the parts.

        tree_id_key, page_cut_key: name tree chunks and cut pages.
        ordinals: the numbers of file systems that are known.
        """
        self._tree_id_key = tree_id_key
        self._page_cut_key = page_cut_key
        self._trees = trees
        self._ordinals = dict(ordinals)
        self._current_owners: dict[object, bool] = {}
        self._coarse_devices = {os.makedev(*mount.device) for mount in mounts.read_mounts() if mount.fstype in _COARSE}
        self._counts_told = 0.0
        self.scanner = scanner
        self.selection = selection
        self.counts = Counts()

    def empty_tree(self) -> ChunkId:
        """Return the tree of a directory with nothing in it."""
        return self.builder().finish()

    def builder(self) -> TreeBuilder:
        """Return a builder of one directory's tree."""
        return TreeBuilder(self._page_cut_key, self.save_tree)

    def add_plain(self, builder: TreeBuilder, name: bytes, row: bytes, content: Content) -> None:
        """Add a node without xattrs or flags to a tree."""
        _, uid, gid, *_ = STAT_ROW.unpack(row)
        builder.add(name, row, content, 0, (), 0, (uid, reading.owner_name(uid)), (gid, reading.group_name(gid)))

    def save_tree(self, data: bytes) -> ChunkId:
        """Store a tree chunk and return its id."""
        chunk_id = ChunkId(keyed_hash(self._tree_id_key, data))
        self._trees.save(chunk_id, data)
        return chunk_id

    def save_xattrs(self, xattrs: Xattrs) -> "Xattrs | bytes":
        """Return xattrs as a node holds them: themselves, or the id of a chunk."""
        if not xattrs:
            return ()
        self.counts.has_xattrs = True
        if sum(len(name) + len(value) + 4 for name, value in xattrs) <= _MOST_XATTRS:
            return xattrs
        return self.save_tree(encode_record([list(pair) for pair in xattrs]))

    def ordinal(self, device: int) -> int:
        """Return the number of a file system within this snapshot."""
        known = self._ordinals.get(device)
        if known is None:
            known = self._ordinals[device] = self.scanner.ordinal(device)
        return known

    def owners_are_current(self, page: LeafPage) -> bool:
        """Tell whether the names of owners in a page are still those of this machine."""
        key = (page.owners, page.groups)
        known = self._current_owners.get(key)
        if known is None:
            known = all(reading.owner_name(uid) == name for uid, name in page.owners) and all(
                reading.group_name(gid) == name for gid, name in page.groups
            )
            self._current_owners[key] = known
        return known

    def is_racy(self, status: os.stat_result, looked_ns: int) -> bool:
        """Tell whether a later change could leave the same times."""
        tick = _FAT_TICK_NS if status.st_dev in self._coarse_devices else _TICK_NS
        return max(status.st_mtime_ns, status.st_ctime_ns) >= looked_ns - tick

    def skip(self, path: bytes, error: OSError) -> None:
        """Report that something could not be read."""
        self.counts.files_skipped += 1
        self.scanner.send(FileSkipped(path, error.strerror or str(error)))

    def vanish(self, path: bytes) -> None:
        """Report that something is gone that was there a moment ago."""
        self.scanner.send(FileVanished(path))

    def leave_out(self, path: bytes, reason: str) -> None:
        """Report a directory whose content is left out on purpose."""
        self.scanner.send(LeftOut(path, reason))

    def tell_counts(self, at_once: bool = False) -> None:
        """Tell what was seen so far, now and then."""
        now = time.monotonic()
        if at_once or now - self._counts_told > _TELLING_SECONDS:
            self._counts_told = now
            self.scanner.send(Counted(self.counts))


def row_of(status: os.stat_result, size: int) -> bytes:
    """Return the stat row of a look at a file, with the size of what was read of it."""
    return STAT_ROW.pack(
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_nlink,
        status.st_ino,
        size,
        status.st_mtime_ns // NANOSECONDS,
        status.st_mtime_ns % NANOSECONDS,
        status.st_ctime_ns // NANOSECONDS,
        status.st_ctime_ns % NANOSECONDS,
    )
