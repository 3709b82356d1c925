"""A mount from beginning to end: checked, made, served, ended."""

import errno
import logging
import os
import shutil
import signal
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from backupfs import workers
from backupfs.errors import MountError, shown
from backupfs.fuse import mounted
from backupfs.view.filesystem import SnapshotView
from backupfs.view.loading import Loader
from backupfs.view.scratch import ScratchDisks

if TYPE_CHECKING:
    import pyfuse3

log = logging.getLogger(__name__)

_LAST_ANSWERS_S = 2.0  # for what is under way when the mount is asked to end


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How a mount is made."""

    allow_other: bool = False  # others than its owner may use it; then permissions are enforced
    allow_nonempty: bool = False  # hide what is in the mountpoint
    is_writable: bool = False


def check_mountpoint(mountpoint: Path, options: SessionOptions) -> Path:
    """Say why a mount cannot be made, before anything is made; return the mountpoint by the name the kernel gives it.

    Raises: MountError.
    """
    name = shown(str(mountpoint))
    try:
        if mounted.find_mount(mountpoint) is not None:
            raise MountError(f"a backupfs is mounted at {name} already: `backupfs umount {name}` ends it")
        status = os.stat(mountpoint)
        if not stat.S_ISDIR(status.st_mode):
            raise MountError(f"{name} is no directory, so nothing can be mounted there")
        if not options.allow_nonempty and any(os.scandir(mountpoint)):
            raise MountError(f"{name} is not empty, and a mount would hide what is in it: use an empty directory")
    except FileNotFoundError as error:
        raise MountError(f"there is no directory {name}: make it first") from error
    except OSError as error:
        gone = error.errno == errno.ENOTCONN
        hint = f": the server of another mount there is gone; `fusermount3 -u {name}` removes it" if gone else ""
        raise MountError(f"{name} cannot be used: {error.strerror}{hint}") from error
    if not os.path.exists("/dev/fuse"):
        raise MountError("there is no /dev/fuse: load the kernel module (`modprobe fuse`), or give it to the container")
    if os.geteuid() != 0:
        _check_for_user(status, options, name)
    # A symbolic link can be followed now; once something is mounted, that would wait for an answer of its server.
    return Path(os.path.realpath(mountpoint))


def _check_for_user(status: os.stat_result, options: SessionOptions, name: str) -> None:
    if shutil.which("fusermount3") is None:
        raise MountError("there is no fusermount3, which users need to mount: install the package fuse3")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MountError("/dev/fuse cannot be opened by this user: ask for access to it")
    if status.st_uid != os.getuid() and not os.access(name, os.W_OK):
        raise MountError(f"{name} is not this user's and cannot be written, so this user cannot mount there")
    if options.allow_other and not _others_are_allowed():
        raise MountError("/etc/fuse.conf does not permit --allow-other to users: add the line user_allow_other to it")


def _others_are_allowed() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text("utf-8", "replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


async def serve(
    view: SnapshotView, loader: Loader, mountpoint: Path, options: SessionOptions, on_ready: Callable[[], None]
) -> None:
    """Mount a view and answer the kernel until the mount ends: by umount, SIGTERM, SIGINT or SIGHUP.

    on_ready: called once the mount answers.
    Raises: MountError.
    """

    def operations() -> "pyfuse3.Operations":
        from backupfs.fuse.operations import SnapshotOperations

        return SnapshotOperations(view, loader, options.allow_other)

    await _serve(operations, mountpoint, options, on_ready)


async def serve_scratch(
    disks: ScratchDisks, loader: Loader, mountpoint: Path, options: SessionOptions, on_ready: Callable[[], None]
) -> None:
    """Mount a scratch copy of an image, as `serve` does. Raises: MountError."""

    def operations() -> "pyfuse3.Operations":
        from backupfs.fuse.scratch import ScratchOperations

        return ScratchOperations(disks, loader)

    await _serve(operations, mountpoint, options, on_ready)


async def _serve(
    operations: "Callable[[], pyfuse3.Operations]",
    mountpoint: Path,
    options: SessionOptions,
    on_ready: Callable[[], None],
) -> None:
    try:
        import pyfuse3

        from backupfs.fuse.polling import polled_event_loop

        handlers = operations()
    except ImportError as error:
        raise MountError(
            f"mounting needs pyfuse3, which cannot be loaded ({error}): `pip install pyfuse3`; to build it takes the "
            "packages libfuse3-dev, pkg-config and a C compiler"
        ) from error

    wanted = {"nosuid", "nodev", "fsname=backupfs", "subtype=backupfs"}
    if not options.is_writable:
        wanted.add("ro")
    if options.allow_other:
        wanted |= {"allow_other", "default_permissions"}
    try:
        pyfuse3.init(handlers, str(mountpoint), wanted)
    except RuntimeError as error:
        raise MountError(
            f"{shown(str(mountpoint))} could not be mounted ({error}): what libfuse said stands in the log"
        ) from error
    # What libfuse did to signals is its own; the mount must end cleanly on all of these.
    noted: mounted.Mount | None = None
    failed = True
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(_end_on_signal, nursery.cancel_scope)
            noted = await workers.io(_after_mount, mountpoint)
            nursery.start_soon(_call_when_ready, on_ready)
            with polled_event_loop():
                await pyfuse3.main()
            nursery.cancel_scope.cancel()
        failed = False
    finally:
        log.info("the mount at %s ends%s", shown(str(mountpoint)), " with an error" if failed else "")
        pyfuse3.close(unmount=True)
        if noted is not None:
            mounted.forget_server(noted)


async def _end_on_signal(
    scope: trio.CancelScope, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED
) -> None:
    import pyfuse3

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            log.info("asked to end by %s", signal.Signals(number).name)
            pyfuse3.terminate()
            # Answers that a store does not give are not waited for.
            scope.deadline = min(scope.deadline, trio.current_time() + _LAST_ANSWERS_S)


async def _call_when_ready(on_ready: Callable[[], None]) -> None:
    on_ready()


def _after_mount(mountpoint: Path) -> "mounted.Mount | None":
    """Note who serves the mount; in a thread, and never by a look into it."""
    mount = mounted.find_mount(mountpoint)
    if mount is None:
        log.warning("the mount does not show in /proc/self/mountinfo: `umount` will not know its server")
        return None
    mounted.note_server(mount)
    return mount
