"""What a walk counts."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """What a walk has seen so far."""

    files: int = 0
    directories: int = 0
    size: int = 0
    files_new: int = 0
    files_changed: int = 0
    files_unchanged: int = 0
    files_skipped: int = 0
    has_xattrs: bool = False
    is_root_incomplete: bool = False  # `/` has more in it than was stored
    current: bytes = b""  # where it is

    def add(self, other: "Counts") -> None:
        """Add what another walk has seen."""
        self.files += other.files
        self.directories += other.directories
        self.size += other.size
        self.files_new += other.files_new
        self.files_changed += other.files_changed
        self.files_unchanged += other.files_unchanged
        self.files_skipped += other.files_skipped
        self.has_xattrs |= other.has_xattrs
        self.is_root_incomplete |= other.is_root_incomplete
        self.current = self.current or other.current
