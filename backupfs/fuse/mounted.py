"""Which mounts of backupfs there are, and which process serves each.

The kernel does not tell who serves a mount, and to ask the mount itself would hang with a server that hangs. So the
server notes itself in a small file: RUNTIME/backupfs/mount-MAJOR:MINOR holds its pid, the time it started (a pid is
used again, the pair is not) and the mountpoint. RUNTIME is /run for root, else what the session gives the user.
"""

import contextlib
import os
import re
import signal
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_SYSTEM_TYPE = "fuse.backupfs"


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo."""

    device: str  # MAJOR:MINOR
    mountpoint: str
    user_id: int  # who mounted it


@dataclass(frozen=True, slots=True)
class Server:
    """A process that serves a mount."""

    pid: int
    started: str  # as /proc/PID/stat has it

    def is_alive(self) -> bool:
        """Tell whether it still runs; one that has ended but was not waited for does not."""
        found = _status_of(self.pid)
        return found is not None and found == self.started

    def terminate(self) -> None:
        """Ask it to end, if it still runs and this user may."""
        if self.is_alive():
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGTERM)


def mounts() -> Iterator[Mount]:
    """Yield the mounts of backupfs that this process sees, in the order they were made."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.rstrip("\n").partition(" - ")
            fields, kind = before.split(" "), after.split(" ")
            if kind[0] == FILE_SYSTEM_TYPE:
                found = re.search(r"\buser_id=(\d+)", kind[-1])
                yield Mount(fields[2], _unescaped(fields[4]), int(found[1]) if found else 0)


def find_mount(mountpoint: Path) -> Mount | None:
    """Return the uppermost mount of backupfs at a path, which is never looked into."""
    # The directory above is resolved and not the mountpoint itself: that would ask its server. Only where nothing is
    # mounted may the last name be looked at: it can be a symbolic link.
    above, name = os.path.split(os.path.abspath(mountpoint))
    path = os.path.join(os.path.realpath(above), name)
    found = {mount.mountpoint: mount for mount in mounts()}
    return found[path] if path in found else found.get(os.path.realpath(path))


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def users_of(mount: Mount) -> Iterator[str]:
    """Yield what uses a mount, as far as this user may see it: loop devices, and processes but for this one."""
    inside = (mount.mountpoint, mount.mountpoint.rstrip("/") + "/")
    for backing in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        with contextlib.suppress(OSError):
            if backing.read_text("utf-8", "surrogateescape").startswith(inside[1]):
                yield f"/dev/{backing.parts[3]}"
    for process in sorted(Path("/proc").glob("[0-9]*")):
        if process.name == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):
            links = [process / "cwd", process / "root", *(process / "fd").iterdir()]
            if any(_is_in(link, inside) for link in links):
                yield f"process {process.name} ({(process / 'comm').read_text('utf-8', 'replace').strip()})"


def _is_in(link: Path, inside: tuple[str, str]) -> bool:
    with contextlib.suppress(OSError):
        target = os.readlink(link)
        return target == inside[0] or target.startswith(inside[1])
    return False


def note_server(mount: Mount) -> None:
    """Note this process as the server of a mount; where that cannot be written, `umount` will just not wait."""
    with contextlib.suppress(OSError):
        path = _note_path(_own_folder(), mount)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(
            f"{os.getpid()} {_status_of(os.getpid())}\n{mount.mountpoint}\n", "utf-8", "surrogateescape"
        )
        os.rename(temporary, path)


def forget_server(mount: Mount) -> None:
    """Remove the note."""
    with contextlib.suppress(OSError):
        _note_path(_own_folder(), mount).unlink()


def server_of(mount: Mount) -> Server | None:
    """Return the process that serves a mount, if it noted itself and still runs."""
    for folder in _folders_of(mount.user_id):
        path = _note_path(folder, mount)
        try:
            status = os.stat(path)
            if status.st_uid not in (mount.user_id, 0) or not stat.S_ISREG(status.st_mode):
                continue
            pid, started, *_ = path.read_text("utf-8", "surrogateescape").split()
            server = Server(int(pid), started)
        except (OSError, ValueError):
            continue
        if server.is_alive():
            return server
    return None


def _note_path(folder: Path, mount: Mount) -> Path:
    return folder / f"mount-{mount.device}"


def _own_folder() -> Path:
    if os.geteuid() == 0:
        return Path("/run/backupfs")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "backupfs" if runtime else Path(f"/tmp/backupfs-{os.getuid()}")


def _folders_of(user_id: int) -> list[Path]:
    folders = [_own_folder()]
    folders += (
        [Path("/run/backupfs")]
        if user_id == 0
        else [Path(f"/run/user/{user_id}/backupfs"), Path(f"/tmp/backupfs-{user_id}")]
    )
    return folders


def _status_of(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    # The name of the program, in parentheses, may hold anything.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
