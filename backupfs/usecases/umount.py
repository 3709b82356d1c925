"""End a mount, and return when its server has ended. Needs no repository."""

import ctypes
import os
import shutil
import subprocess
import time
from pathlib import Path

from backupfs.errors import MountError, shown
from backupfs.fuse import mounted

# A server ends when the reads that are under way have ended.
WAIT_S = 60.0
# One that goes on is held by another namespace of mounts (a container, a service with mounts of its own), which has a
# copy of the mount: nobody has ended that.
_HELD_S = 4.0
_POLL_S = 0.02
_TIMEOUT_S = 60.0

_MNT_DETACH = 2


def umount(mountpoint: Path, lazy: bool = False, wait_s: float = WAIT_S) -> None:
    """Unmount a backupfs and wait for its server's end. Blocks; it never looks into the mount.

    lazy: take it out of the tree of names now, and let it end when nobody uses it any more.
    Raises: MountError if it is no mount of ours, is busy, or its server does not end.
    """
    name = shown(str(mountpoint))
    mount = mounted.find_mount(mountpoint)
    if mount is None:
        raise MountError(f"no backupfs is mounted at {name}")
    server = mounted.server_of(mount)
    if os.geteuid() == 0:
        _unmount_as_root(mount.mountpoint, name, lazy)
    else:
        _unmount_as_user(mount.mountpoint, name, lazy)
    if server is None or lazy:
        return
    begun = time.monotonic()
    end, is_told = begun + wait_s, False
    while server.is_alive():
        if not is_told and time.monotonic() > begun + _HELD_S:
            is_told = True
            server.terminate()
        if time.monotonic() > end:
            raise MountError(f"{name} is unmounted, but its server (process {server.pid}) has not ended yet")
        time.sleep(_POLL_S)


def _busy(name: str) -> MountError:
    return MountError(
        f"{name} is in use, by an open file or a shell that stands in it: close it and try again, "
        f"or `backupfs umount --lazy {name}`"
    )


def _unmount_as_root(mountpoint: str, name: str, lazy: bool) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.umount2(os.fsencode(mountpoint), _MNT_DETACH if lazy else 0) == 0:
        return
    number = ctypes.get_errno()
    if number == 16:
        raise _busy(name)
    raise MountError(f"{name} could not be unmounted: {os.strerror(number)}")


def _unmount_as_user(mountpoint: str, name: str, lazy: bool) -> None:
    program = shutil.which("fusermount3") or shutil.which("fusermount")
    if program is None:
        raise MountError("there is no fusermount3, which users need to unmount: install the package fuse3")
    command = [program, "-u", *(["-z"] if lazy else []), "--", mountpoint]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, env={**os.environ, "LC_ALL": "C"})
    except subprocess.TimeoutExpired as error:
        raise MountError(f"{name} could not be unmounted: {program} does not end; try `--lazy`") from error
    if done.returncode == 0:
        return
    said = done.stderr.decode("utf-8", "replace").strip()
    if "busy" in said:
        raise _busy(name)
    raise MountError(f"{name} could not be unmounted: {shown(said)}")
