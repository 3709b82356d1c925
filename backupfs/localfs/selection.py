"""Which entries of a directory a backup takes: patterns, markers, sizes, file systems."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from backupfs.localfs import exclude, mounts
from backupfs.localfs.exclude import Excluder, Pattern

BY_PATTERN = "excluded by a pattern"


@dataclass(frozen=True, slots=True)
class SelectionRules:
    """What the user asked to leave out."""

    patterns: tuple[Pattern, ...] = ()
    caches: bool = False  # directories tagged by CACHEDIR.TAG
    if_present: tuple[bytes, ...] = ()  # names of marker files
    larger_than: int | None = None  # bytes
    one_file_system: bool = False


@dataclass(slots=True)
class Selection:
    """Answers for directories and their entries; one per backup, belongs to the scanning thread."""

    rules: SelectionRules
    own: frozenset[tuple[int, int]]  # (st_dev, st_ino) of the repository's and the cache's folders
    sources: frozenset[bytes]  # the paths that the user named: never left out for what they are
    _excluder: Excluder | None = field(init=False)
    _pseudo: dict[bytes, str] = field(init=False)
    asks: bool = field(init=False)  # whether `left_out` can ever say anything

    def __post_init__(self) -> None:
        self._excluder = Excluder(self.rules.patterns) if self.rules.patterns else None
        self._pseudo = mounts.pseudo_mount_points()
        self.asks = self._excluder is not None or self.rules.larger_than is not None

    def left_out(
        self, directory: bytes, directories: list[bytes], others: list[bytes], sizes: dict[bytes, int]
    ) -> dict[bytes, str]:
        """Return the names that are left out, with the reason.

        sizes: of regular files, asked for only when there is a limit.
        """
        reasons: dict[bytes, str] = {}
        if self._excluder is not None:
            for name in self._excluder.excluded_names(directory, directories, others):
                reasons[name] = BY_PATTERN
        limit = self.rules.larger_than
        if limit is not None:
            for name, size in sizes.items():
                if size > limit:
                    reasons.setdefault(name, f"larger than {limit} bytes")
        return reasons

    def is_own(self, device: int, inode: int) -> bool:
        """Tell whether a directory is the repository or the cache itself."""
        return (device, inode) in self.own

    def not_entered(self, path: bytes, device: int, parent_device: int) -> str | None:
        """Return why a directory's content is left out though the directory itself is kept, or None."""
        if path in self.sources:
            return None
        fstype = self._pseudo.get(path)
        if fstype is not None:
            return f"a {fstype} file system holds no files worth keeping"
        if self.rules.one_file_system and device != parent_device:
            return "another file system"
        return None

    def marked(self, dir_fd: int) -> str | None:
        """Return why an opened directory's content is left out because of a file in it, or None."""
        if self.rules.caches and exclude.is_cache_directory(dir_fd):
            return "tagged as a cache"
        for marker in self.rules.if_present:
            if exclude.has_marker(dir_fd, marker):
                return f"marked by {marker.decode('utf-8', 'replace')}"
        return None


def identities(folders: Iterable[bytes]) -> frozenset[tuple[int, int]]:
    """Return the (st_dev, st_ino) of those of some folders that are there."""
    found = set()
    for folder in folders:
        try:
            status = os.stat(folder)
        except OSError:
            continue
        found.add((status.st_dev, status.st_ino))
    return frozenset(found)
