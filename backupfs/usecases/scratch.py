"""A scratch copy of an image as a mount that can be written: for checking, booting and editing what is in it."""

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from backupfs import interrupts, memory, workers
from backupfs.errors import BackupfsError, MountError, PathNotFound
from backupfs.forked import end_with_parent
from backupfs.fuse import session
from backupfs.fuse.background import serve_in_background
from backupfs.fuse.session import SessionOptions, check_mountpoint
from backupfs.repository.repository import Repository
from backupfs.snapshots.snapshot import IMAGE, Snapshot
from backupfs.snapshots.volumes import shared_volumes
from backupfs.snapshots.walk import shown_volumes
from backupfs.usecases.mount import DATA_CACHE_SIZE, KEPT_BYTES, TREE_CACHE_SIZE, Unread
from backupfs.usecases.umount import umount
from backupfs.view.loading import Loader
from backupfs.view.scratch import ScratchDisks

_OPTIONS = SessionOptions(is_writable=True)
_REMOVING_TRIES, _REMOVING_PAUSE_S = 50, 0.1


@dataclass(frozen=True, slots=True)
class ScratchMount:
    """Where a scratch copy is."""

    mountpoint: Path
    log_file: Path

    def disk(self, name: str) -> Path:
        """Return the file of a disk."""
        return self.mountpoint / "disks" / f"{name}.raw"

    def volume(self, name: str) -> Path:
        """Return the file of a volume, or of a disk that is not divided."""
        path = self.mountpoint / "volumes" / f"{name}.raw"
        return path if path.exists() else self.disk(name)

    def changes(self, name: str) -> Path:
        """Return the map of what was written to a disk."""
        return self.mountpoint / "changes" / f"{name}.map"

    @property
    def unread(self) -> Unread:
        """What the store did not give to its server. Not for one made for `umount` to end."""
        return Unread(self.log_file.parent / "unread")

    def beside(self, name: str) -> Path:
        """Make an empty folder next to the mount, which goes when that goes. Not for one made for `umount` to end."""
        folder = self.log_file.parent / name
        folder.mkdir()
        return folder

    def last_words(self) -> str:
        """Return what the server logged last."""
        with contextlib.suppress(OSError):
            lines = self.log_file.read_text("utf-8", "replace").strip().splitlines()
            return lines[-1] if lines else ""
        return ""


def require_image(snapshot: Snapshot) -> None:
    """Raises: PathNotFound for a snapshot of files."""
    if snapshot.kind != IMAGE:
        raise PathNotFound("the snapshot has no disks: it is one of files")


async def serve_scratch(
    repository: Repository,
    snapshot: Snapshot,
    mountpoint: Path,
    is_edit: bool,
    on_ready: Callable[[], None],
    unread: Unread | None = None,
) -> None:
    """Mount a scratch copy, call `on_ready` once it answers, and return when the mount has ended.

    is_edit: something is to be made of it, so what cannot be changed alone cannot be written.
    unread: where to note what the store does not give.
    What was written is gone then. Indexes must be loaded. Raises: MountError.
    """
    memory.keep_freed_memory(KEPT_BYTES)
    repository.trees.keep_at_most(TREE_CACHE_SIZE)
    repository.data.keep_at_most(DATA_CACHE_SIZE)
    shown = await workers.request(shown_volumes, snapshot, repository.trees.load)
    async with trio.open_nursery() as background:
        loader = Loader(repository, background, unread.note) if unread else Loader(repository, background)
        protected = shared_volumes(snapshot.volumes) if is_edit else ()
        disks = ScratchDisks(snapshot, shown, protected, loader)
        try:
            await session.serve_scratch(disks, loader, mountpoint, _OPTIONS, on_ready)
        finally:
            disks.close()
        background.cancel_scope.cancel()


def scratch_in_background(repository: Repository, snapshot: Snapshot, mountpoint: Path, log_file: Path) -> int:
    """Mount a scratch copy to edit, which stays until `umount`; return the pid of its server once it is ready.

    Call it before any thread and event loop; indexes must be loaded. Raises: MountError.
    """
    require_image(snapshot)
    mountpoint = check_mountpoint(mountpoint, _OPTIONS)

    def serve(on_ready: Callable[[], None]) -> None:
        interrupts.run(serve_scratch, repository, snapshot, mountpoint, True, on_ready, stop=repository.store.stop)

    return serve_in_background(serve, log_file)


@contextlib.contextmanager
def scratch_mount(repository: Repository, snapshot: Snapshot, is_edit: bool = False) -> Iterator[ScratchMount]:
    """Have a scratch copy for a while; it ends with this process, too, however that ends.

    is_edit: as for `serve_scratch`. Conditions as for `scratch_in_background`.
    """
    require_image(snapshot)
    folder = Path(tempfile.mkdtemp(prefix="backupfs-scratch-"))
    found = ScratchMount(folder / "mnt", folder / "log")
    leader = os.getpid()

    def serve(on_ready: Callable[[], None]) -> None:
        end_with_parent(signal.SIGTERM)
        try:
            if os.getppid() == leader:
                interrupts.run(
                    serve_scratch,
                    repository,
                    snapshot,
                    found.mountpoint,
                    is_edit,
                    on_ready,
                    found.unread,
                    stop=repository.store.stop,
                )
        finally:
            if os.getppid() != leader:
                _remove(folder)

    try:
        found.mountpoint.mkdir()
        check_mountpoint(found.mountpoint, _OPTIONS)
        pid = serve_in_background(serve, found.log_file)
        try:
            yield found
        finally:
            _end(found.mountpoint, pid)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a folder although a machine that is ending may still make files in it."""
    for _ in range(_REMOVING_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(_REMOVING_PAUSE_S)


def _end(mountpoint: Path, pid: int) -> None:
    try:
        umount(mountpoint)
    except MountError:
        # Somebody else looks into it; who made it need not wait for that.
        with contextlib.suppress(BackupfsError):
            umount(mountpoint, lazy=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
