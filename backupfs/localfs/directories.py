"""Directories below a target, and letting their owner into those that keep him out.

An ordinary user may own a directory that he cannot list or write into. It is opened to him while a run works in it, and
its mode is given back when it is done, or when the target is closed.
"""

import os
import stat

from backupfs.localfs.metadata import Metadata, change_mode


class Directory:
    """A directory at or below the target."""

    __slots__ = (
        "closed", "existed", "foreign", "former_mode", "identity", "inherits", "metadata", "name", "names", "ordinal",
        "parent", "pending",
    )  # fmt: skip

    def __init__(self, parent: "Directory | None", name: bytes) -> None:
        self.parent = parent
        self.name = name
        self.identity: tuple[int, int] | None = None  # (st_dev, st_ino), known once it was opened
        self.existed = False  # before this run
        self.former_mode: int | None = None  # to be given back: this user was let in to write
        self.closed = False  # a dry run found that this user cannot write into it
        self.foreign = False  # a dry run found that this user cannot give it a mode or times
        self.inherits = False  # gives what is made in it a group or an ACL of its own
        self.names: frozenset[bytes] | set[bytes] = frozenset()  # what was in it before this run
        self.metadata: Metadata | None = None  # to be set when everything in it is done; None: leave it alone
        self.pending = 1  # what is not done in it, and 1 for the walk that is still in it
        self.ordinal = 0

    @property
    def depth(self) -> int:
        """The number of directories above, up to the target."""
        depth, above = 0, self.parent
        while above is not None:
            depth, above = depth + 1, above.parent
        return depth


class Access:
    """What this user may do in directories, and those that he was let into."""

    def __init__(self, is_root_user: bool, user: int, is_dry: bool) -> None:
        """Begin with nobody let in.

        is_dry: let nobody in, only tell.
        """
        self.is_root_user = is_root_user  # who needs no letting in
        self.is_dry = is_dry
        self._user = user
        self._let_in: set[Directory] = set()  # those that have a former mode

    def for_another_process(self) -> "Access":
        """Return one for a process that was just forked; modes that this one changed are none of its business."""
        return Access(self.is_root_user, self._user, self.is_dry)

    def let_owner_in(self, directory: Directory, above: int) -> bool:
        """Make a directory one that its owner, if that is this user, may list and write into; False if it cannot be.

        above: the descriptor of the one above. Raises: OSError.
        """
        if self.is_root_user:
            return True
        status = os.stat(directory.name, dir_fd=above, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode) or not self.keeps_owner_out(status):
            return True
        if self.is_dry:
            return status.st_mode & 0o500 == 0o500
        self.note_former_mode(directory, status)
        identity = (status.st_dev, status.st_ino)
        change_mode(above, directory.name, stat.S_IMODE(status.st_mode) | 0o700, identity)
        return True

    def keeps_owner_out(self, status: os.stat_result) -> bool:
        """Tell whether a directory of this user's keeps him from listing it or writing into it."""
        return not self.is_root_user and status.st_uid == self._user and status.st_mode & 0o700 != 0o700

    def refuses(self, fd: int) -> bool:
        """Tell whether this user cannot write into an open directory, nor be let in."""
        if self.is_root_user or os.fstat(fd).st_uid == self._user:
            return False
        return not os.access(b".", os.W_OK | os.X_OK, dir_fd=fd, effective_ids=True)

    def note_former_mode(self, directory: Directory, status: os.stat_result) -> None:
        """Remember the mode of a directory that its owner is let into."""
        directory.former_mode = stat.S_IMODE(status.st_mode)
        self._let_in.add(directory)

    def forget_former_mode(self, directory: Directory) -> None:
        """Take it that a directory has the mode it is to have, or is gone."""
        directory.former_mode = None
        self._let_in.discard(directory)

    def opened_to_owner(self) -> list[Directory]:
        """Return those that have a former mode, from the deepest up."""
        return sorted(self._let_in, key=lambda directory: directory.depth, reverse=True)
