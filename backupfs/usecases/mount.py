"""Mount the snapshots of a repository, and serve the mount until it ends."""

import contextlib
import gc
import logging
import os
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from backupfs import memory, workers
from backupfs.errors import BackupfsError, MountError, StoreError
from backupfs.fuse import session
from backupfs.fuse.background import serve_in_background
from backupfs.fuse.session import SessionOptions, check_mountpoint
from backupfs.repository.repository import Repository
from backupfs.snapshots.listing import SnapshotList
from backupfs.stores.kept_files import KeptFiles
from backupfs.stores.together import at_once
from backupfs.usecases.events import Remark, Report
from backupfs.view.filesystem import MountFilter, SnapshotView
from backupfs.view.freshness import MOST_AGE_S, Freshness
from backupfs.view.loading import Loader

with contextlib.suppress(ImportError):
    # Loaded with this module, for which there is time; where pyfuse3 is missing, serving a mount says so.
    import backupfs.fuse.operations
    import backupfs.fuse.polling  # noqa: F401

__all__ = ["MountFilter", "MountOptions", "Unread", "default_log_file", "mount_in_background", "serve_mount"]

log = logging.getLogger(__name__)

# Decoded blocks. Of trees, what is looked at is kept as decoded pages (view/pages.py), so a few will do.
TREE_CACHE_SIZE = 6 << 20
# The kernel caches what is read. Freed blocks of many sizes leave holes between the next ones, so that the memory of
# a server grows to some three times this (measured: 66 MiB of blocks to 180 MB in all, 24 MiB to 137 MB).
DATA_CACHE_SIZE = 24 << 20
KEPT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What a user can say about a mount."""

    shown: MountFilter = field(default_factory=MountFilter)
    allow_other: bool = False
    allow_nonempty: bool = False
    cache_data: int = 0  # bytes of file content that may be kept on this machine's disk
    refresh_s: float = MOST_AGE_S  # how old the list of snapshots may be when it is looked at
    session: SessionOptions = field(init=False)

    def __post_init__(self) -> None:
        """Derive the session's part."""
        object.__setattr__(self, "session", SessionOptions(self.allow_other, self.allow_nonempty))


@dataclass(frozen=True, slots=True)
class Unread:
    """A file in which the server of a mount notes what the store did not give: who reads the mount gets EIO only."""

    path: Path

    def note(self, error: StoreError) -> None:
        """Note an error, in place of the one before."""
        with contextlib.suppress(OSError):
            self.path.write_text(str(error), "utf-8", "replace")

    @property
    def words(self) -> str:
        """What was noted last; empty if nothing was."""
        try:
            return self.path.read_text("utf-8", "replace")
        except OSError:
            return ""


async def serve_mount(
    repository: Repository,
    mountpoint: Path,
    options: MountOptions,
    on_ready: Callable[[], None],
    report: Report,
    unread: Unread | None = None,
) -> None:
    """Mount, call `on_ready` once the mount answers, and return when it has ended.

    unread: where to note what the store does not give.
    Raises: MountError if the mount cannot be made; StoreError.
    """
    memory.keep_freed_memory(KEPT_BYTES)
    repository.trees.keep_at_most(TREE_CACHE_SIZE)
    repository.data.keep_at_most(DATA_CACHE_SIZE)
    if options.cache_data and repository.cache is not None:
        repository.data.keep_on_disk(KeptFiles(repository.cache / "blocks", options.cache_data))
    mountpoint = check_mountpoint(mountpoint, options.session)
    listed = await workers.request(_load_trees, repository)
    for problem in {*listed.damaged.values(), *map(str, listed.losses())}:
        report(Remark(problem))
    if listed.damaged and not listed.snapshots:
        raise MountError(f"none of the snapshots can be read: {next(iter(listed.damaged.values()))}")
    async with trio.open_nursery() as background:
        background.start_soon(_load_data_index, repository)
        loader = Loader(repository, background, unread.note) if unread else Loader(repository, background)
        view = SnapshotView(repository, listed, options.shown, loader)
        view.freshness = Freshness(repository, listed, view.rearrange, background, options.refresh_s)
        # What is here now stays: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        await session.serve(view, loader, mountpoint, options.session, on_ready)
        background.cancel_scope.cancel()


def _load_trees(repository: Repository) -> SnapshotList:
    """Return the list of snapshots, with the index of trees up to date and the top of the newest snapshot in memory.

    Raises: StoreError.
    """
    listed = SnapshotList(repository)
    at_once(repository.store, repository.tree_index.refresh, listed.refresh)
    if listed.snapshots:
        with contextlib.suppress(BackupfsError):
            repository.trees.load(listed.snapshots[-1].root)
    return listed


async def _load_data_index(repository: Repository) -> None:
    """Load what only reading files needs; who reads one before that waits for it."""
    try:
        await workers.request(repository.data_index.refresh)
    except BackupfsError as error:
        log.warning("the index of data could not be read, it will be when a file is: %s", error)


def mount_in_background(
    serve: Callable[[Callable[[], None]], None], mountpoint: Path, options: MountOptions, log_file: Path
) -> int:
    """Run `serve(on_ready)` as a server; return its pid once the mount is ready.

    serve: opens the repository and runs `serve_mount`.
    Call it before any thread and event loop. Raises: what `serve` raises before it is ready; MountError.
    """
    check_mountpoint(mountpoint, options.session)
    return serve_in_background(serve, log_file)


def default_log_file(cache: Path | None) -> Path:
    """Return where a server logs unless told otherwise; the name holds the pid of the command that starts it."""
    name = f"mount-{os.getpid()}.log"
    if cache is not None:
        folder = cache / "logs"
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder / name
    # Others may write there, too, and must not know the name before it is taken.
    return Path(tempfile.gettempdir()) / f"backupfs-{secrets.token_hex(4)}-{name}"
