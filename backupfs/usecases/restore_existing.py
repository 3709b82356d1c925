"""What a restore does about files that stand in the target already: keeps, replaces, mends or deletes them.

Threading: belongs to the thread that walks.
"""

import errno
import os
import stat
from collections.abc import Callable
from functools import partial

from backupfs.localfs.directories import Directory
from backupfs.localfs.metadata import Metadata
from backupfs.localfs.removing import Removal, is_empty, remove_tree
from backupfs.localfs.writing import Target
from backupfs.usecases.events import Deleted, Report
from backupfs.usecases.restore_items import (
    IF_CHANGED,
    IF_NEWER,
    NEVER,
    Blocked,
    Counts,
    Item,
    RestoreOptions,
    State,
    device_of,
)

_NOT_EMPTY = "a directory that is not empty stands in its place; --delete removes it"
_HOLDS_KEPT = "a directory stands in its place that holds what is excluded"
# A hardlinked file, by which all its names are found: its file system and inode where it was backed up.
LinkKey = tuple[int, int]


class ExistingFiles:
    """Decides by the rule of `overwrite`, and clears the way."""

    def __init__(
        self,
        target: Target,
        options: RestoreOptions,
        counts: Counts,
        links: dict[LinkKey, Item],
        report: Report,
        is_excluded: Callable[[bytes, bool], bool],
    ) -> None:
        """Take the parts.

        links: the first names of hardlinked files met so far; a first name that is kept is added.
        is_excluded: tells of a path below the target, and whether it is a directory, if it is not to be touched.
        """
        self._target = target
        self._options = options
        self._counts = counts
        self._links = links
        self._report = report
        self._is_excluded = is_excluded
        self._own_folders = _paths_below(target.path, options.own_folders) if options.delete else frozenset()

    def may_replace(self, status: os.stat_result, metadata: Metadata) -> bool:
        """Tell whether the rule lets something be replaced."""
        overwrite = self._options.overwrite
        if overwrite == IF_NEWER:
            return metadata.mtime_ns is not None and metadata.mtime_ns > status.st_mtime_ns
        return overwrite != NEVER

    def keeps(self, item: Item, key: LinkKey | None) -> bool:
        """Decide about what stands under the item's name: it is kept, can be renamed over, or the item makes way.

        Raises: Blocked if it is a directory that must stay; OSError.
        """
        directory, name = item.directory, item.name
        status = self._target.status(directory, name)
        if status is None:
            return False
        is_directory = stat.S_ISDIR(status.st_mode)
        if not self.may_replace(status, item.metadata):
            if is_directory:
                raise Blocked(f"a directory stands in its place and --overwrite {self._options.overwrite} keeps it")
            self._count_unchanged(item)
            return True
        if is_directory:
            self._plan_to_make_way(item)
            return False
        if self._options.overwrite != IF_CHANGED or not self._is_unchanged(item, status, key):
            return False
        if not self._options.dry_run:
            self._target.mend(directory, name, status, item.metadata)
            item.state = State.DONE
        if key is not None and key not in self._links:
            item.state = State.DONE
            item.content = b""
            self._links[key] = item
        self._count_unchanged(item)
        return True

    def delete_others(self, directory: Directory, wanted: set[bytes]) -> list[tuple[bytes, OSError, bool]]:
        """Delete what stands in a directory under other names than those wanted, or count it in a dry run.

        Return (name, error, whether something of it went) of what could not be deleted.
        """
        failed: list[tuple[bytes, OSError, bool]] = []
        for name in sorted(name for name in directory.names if name not in wanted):
            try:
                removal = remove_tree(self._target, directory, name, self._stays, self._options.dry_run)
            except FileNotFoundError:
                continue
            except OSError as error:
                failed.append((name, error, False))
                continue
            self._count_deleted(directory, name, removal)
            if removal.error is not None:
                failed.append((name, removal.error, removal.gone > 0))
        return failed

    def _count_deleted(self, directory: Directory, name: bytes, removal: Removal) -> None:
        self._counts.deleted += removal.gone
        if removal.gone and removal.error is None:
            self._report(Deleted(self._target.path_of(directory, name), self._options.dry_run))

    def _stays(self, path: bytes, is_directory: bool) -> bool:
        return path in self._own_folders or self._is_excluded(path, is_directory)

    def _count_unchanged(self, item: Item) -> None:
        self._counts.unchanged += 1
        self._counts.unchanged_size += item.size if stat.S_ISREG(item.metadata.mode) else 0

    def _plan_to_make_way(self, item: Item) -> None:
        """Have the directory in an item's place removed when the item is whole. Raises: Blocked; OSError."""
        directory, name = item.directory, item.name
        if not is_empty(self._target, directory, name):
            if not self._options.delete:
                raise Blocked(_NOT_EMPTY)
            removal = remove_tree(self._target, directory, name, self._stays, dry_run=True)
            if removal.error is not None:
                raise removal.error
            if removal.stays:
                raise Blocked(_HOLDS_KEPT)
            if self._options.dry_run:
                self._count_deleted(directory, name, removal)
        if not self._options.dry_run:
            item.make_way = partial(self._make_way, directory, name)

    def _make_way(self, directory: Directory, name: bytes) -> None:
        """Remove a directory. Raises: OSError."""
        try:
            self._target.remove_empty(directory, name)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not self._options.delete:
                raise OSError(errno.ENOTEMPTY, _NOT_EMPTY) from error
            removal = remove_tree(self._target, directory, name, self._stays)
            self._count_deleted(directory, name, removal)
            if removal.error is not None:
                raise removal.error from error
            if removal.stays:
                raise OSError(errno.ENOTEMPTY, _HOLDS_KEPT) from error

    def _is_unchanged(self, item: Item, status: os.stat_result, key: LinkKey | None) -> bool:
        metadata, content = item.metadata, item.content
        if stat.S_IFMT(status.st_mode) != stat.S_IFMT(metadata.mode) or status.st_mtime_ns != metadata.mtime_ns:
            return False
        if stat.S_ISREG(metadata.mode) and status.st_size != item.size:
            return False
        if stat.S_ISLNK(metadata.mode) and self._target.read_link(item.directory, item.name) != content:
            return False
        if stat.S_ISCHR(metadata.mode) or stat.S_ISBLK(metadata.mode):
            device = device_of(content)
            if (os.major(status.st_rdev), os.minor(status.st_rdev)) != device:
                return False
        first = self._links.get(key) if key is not None else None
        if first is None:
            return True
        # A name of a hardlinked file must be a name of that very file.
        other = self._target.status(first.directory, first.name) if first.state is State.DONE else None
        return other is not None and (other.st_dev, other.st_ino) == (status.st_dev, status.st_ino)


def _paths_below(target: bytes, folders: tuple[bytes, ...]) -> frozenset[bytes]:
    """Return where folders lie below the target, with a leading slash."""
    top = os.path.realpath(target).rstrip(b"/") + b"/"
    return frozenset(
        b"/" + real[len(top) :] for real in (os.path.realpath(folder) for folder in folders) if real.startswith(top)
    )
