"""What became of what a restore began: files that are whole, directories that everything is in, and what failed.

A directory gets its metadata when everything in it is done; a hardlink is made when the file it names is there.
Threading: one thread at a time, the target's.
"""

import logging
from collections.abc import Iterator

from backupfs.errors import shown
from backupfs.localfs.directories import Directory
from backupfs.localfs.fatal import is_fatal
from backupfs.localfs.writing import Target
from backupfs.usecases.events import FileSkipped, Remark, Report
from backupfs.usecases.restore_items import Counts, Item, State

log = logging.getLogger(__name__)

_NAMED_AT_MOST = 5


class Outcome:
    """Keeps count of what is done and what is not, and finishes what can be finished."""

    def __init__(self, target: Target, report: Report) -> None:
        self.target = target
        self._report = report
        self.counts = Counts()
        self.told: set[bytes] = set()  # paths that are there, but not with everything
        self.undeleted: list[bytes] = []  # directories that the snapshot does not know whole, with more in them
        self.late: list[Item] = []  # links that have to become files of their own
        self.owners_kept = False  # by a process that writes
        self._unfinished: set[Item] = set()  # with a temporary file
        self._done = bytearray()  # a bit for each number of the walk

    # Telling.

    def skip(self, path: bytes, reason: str, is_damage: bool = False) -> None:
        """Tell that a path is not, or not wholly, as in the snapshot."""
        self.counts.errors += 1
        self.counts.damaged += is_damage
        self._report(FileSkipped(path, reason))

    def failed(self, path: bytes, error: OSError, prefix: str = "") -> None:
        """Tell what the system said about a path. Raises: SourceError where every other would meet it, too."""
        if is_fatal(error):
            raise self.target.full(error) from error
        self.skip(path, prefix + (error.strerror or str(error)))

    def problem(self, path: bytes, reason: str) -> None:
        """Take what could not be set on a file that is otherwise there."""
        self.told.add(path)
        self.skip(path, reason)

    def remarks(self) -> Iterator[Remark]:
        """Yield what is worth saying once at the end."""
        if self.target.owners_kept or self.owners_kept:
            yield Remark("only root can give files to their owners: they belong to the user who restored them")
        if self.undeleted:
            named = ", ".join(shown(path) for path in self.undeleted[:_NAMED_AT_MOST])
            more = f" and {count} more" if (count := len(self.undeleted) - _NAMED_AT_MOST) > 0 else ""
            yield Remark(f"nothing was deleted in {named}{more}: the backup left out or could not read what was there")

    # Files.

    def begin(self, item: Item, temporary: bytes) -> None:
        """Take a file that lies under a temporary name until its last piece is done."""
        item.temporary = temporary
        item.directory.pending += 1
        self._unfinished.add(item)

    def fail(self, item: Item, reason: str, is_damage: bool = False) -> None:
        """Give a file up; told once. Its temporary file goes when nobody can be writing to it."""
        if not item.failure:
            item.failure, item.is_damaged = reason, is_damage
            self.skip(self.target.path_of(item.directory, item.name), reason, is_damage)

    def piece_done(self, item: Item) -> None:
        """Take that one piece of a file is written or given up; after the last, finish it."""
        item.remaining -= 1
        if item.remaining:
            return
        if item.temporary:
            self._unfinished.discard(item)
            if item.failure:
                self.target.remove_temporary(item.directory, item.temporary)
            else:
                self._finish_large(item)
        directory = item.directory
        if item.failure:
            self.give_up_name(item)
        else:
            self.finished(item, item.size)
        self.release(directory)

    def give_up_name(self, item: Item) -> None:
        """Let the other names of a file that failed, and was told, be made without it, or fail with it."""
        item.state = State.FAILED
        links, item.links = item.links, []
        if links and not item.is_damaged:
            # What kept this name from being made may not keep the next.
            heir, *heir.links = links
            self.late.append(heir)
            return
        for link in links:
            self.fail(link, item.failure, is_damage=True)
            link.state = State.FAILED
            self.release(link.directory)

    def _finish_large(self, item: Item) -> None:
        try:
            fd = self.target.reopen(item.directory, item.temporary)
            self.target.finish_file(fd, item.directory, item.temporary, item.name, item.metadata, item.make_way)
        except OSError as error:
            self.target.remove_temporary(item.directory, item.temporary)
            if is_fatal(error):
                raise self.target.full(error) from error
            self.fail(item, error.strerror or str(error))

    def finished(self, item: Item, size: int) -> None:
        """Count a file that is there, and give it its other names."""
        item.state = State.DONE
        item.content = b""
        self.counts.files += 1
        self.counts.size += size
        self.mark(item.number)
        links, item.links = item.links, []
        for link in links:
            try:
                if not self.link(item, link):
                    self.late.append(link)
                    continue  # its directory is released when it is there
            except OSError as error:
                self.failed(self.target.path_of(link.directory, link.name), error)
            self.release(link.directory)

    def link(self, first: Item, item: Item, dry_run: bool = False) -> bool:
        """Give a restored file another name; False if it has to be a file of its own. Raises: OSError."""
        if not dry_run:
            try:
                self.target.link(first.directory, first.name, item.directory, item.name, item.make_way)
            except OSError as error:
                if is_fatal(error):
                    raise
                log.info("a hardlink could not be made, a copy is restored instead: %s", error)
                return False
            self.mark(item.number)
        self.counts.files += 1
        return True

    # Directories.

    def release(self, directory: Directory) -> None:
        """Note that one thing in a directory is done; finish it, and those above, when it was the last."""
        above: Directory | None = directory
        while above is not None:
            above.pending -= 1
            if above.pending:
                return
            try:
                self.target.finish_directory(above)
                if above.parent is not None and above.metadata is not None:
                    self.mark(above.ordinal)
            except OSError as error:
                self.failed(self.target.path_of(above), error)
            above = above.parent

    # All of it.

    def mark(self, number: int) -> None:
        """Note that the entry of this number of the walk is as in the snapshot."""
        at = number >> 3
        if at >= len(self._done):
            self._done.extend(bytes(at + 4096 - len(self._done)))
        self._done[at] |= 1 << (number & 7)

    def is_done(self, number: int) -> bool:
        """Tell whether the entry of this number of the walk is as in the snapshot."""
        return number >> 3 < len(self._done) and bool(self._done[number >> 3] >> (number & 7) & 1)

    def clean_up(self) -> None:
        """Remove what an interrupted run left under temporary names, and close everything."""
        for item in self._unfinished:
            self.target.remove_temporary(item.directory, item.temporary)
        self._unfinished.clear()
        self.target.close()
