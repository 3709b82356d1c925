"""The mounts of this machine, and which of them hold no files worth keeping.

Only Linux lists its mounts in /proc; elsewhere the answers are empty.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

MOUNTINFO = "/proc/self/mountinfo"

# Windows into the kernel or into another program: reading them gives no data, or gives it twice, or never ends.
# fmt: off
_PSEUDO = frozenset({
    "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs",
    "efivarfs", "fusectl", "hugetlbfs", "mqueue", "nfsd", "nsfs", "proc", "pstore", "resctrl", "rpc_pipefs",
    "securityfs", "selinuxfs", "smackfs", "sysfs", "tracefs",
    # Our own mounts show what is in the repository already.
    "fuse.backupfs", "fuse.gvfsd-fuse", "fuse.lxcfs", "fuse.portal",
})
# fmt: on
_MEMORY = frozenset({"ramfs", "tmpfs"})
_RUNTIME = (b"/dev", b"/proc", b"/run", b"/sys", b"/var/lock", b"/var/run")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    mount_id: int
    parent_id: int
    device: tuple[int, int]  # major, minor; what st_dev of the files says, except on btrfs
    mount_point: bytes
    fstype: str  # with a subtype, as in "fuse.sshfs"
    source: bytes  # the device or whatever the file system calls itself


def read_mounts() -> list[Mount]:
    """Return the mounts that this process sees, in the kernel's order; none on a host without /proc."""
    try:
        with open(MOUNTINFO, "rb") as file:
            return parse_mountinfo(file.read())
    except OSError:
        return []


def parse_mountinfo(data: bytes) -> list[Mount]:
    """Return the mounts of a mountinfo file; a line of another form is passed over.

    Source: proc_pid_mountinfo(5).
    """
    mounts = []
    for line in data.split(b"\n"):
        fields = line.split(b" ")
        try:
            # Fields before the dash vary in number.
            dash = fields.index(b"-", 6)
            major, minor = fields[2].split(b":")
            mount = Mount(
                mount_id=int(fields[0]),
                parent_id=int(fields[1]),
                device=(int(major), int(minor)),
                mount_point=_unescape(fields[4]),
                fstype=_unescape(fields[dash + 1]).decode("utf-8", "surrogateescape"),
                source=_unescape(fields[dash + 2]),
            )
        except (ValueError, IndexError):
            continue
        mounts.append(mount)
    return mounts


def pseudo_filesystem(fstype: str, mount_point: bytes) -> bool:
    """Tell whether a mount is left out of backups that do not name it.

    A tmpfs or ramfs is left out where the system keeps its runtime state: at or below /dev, /proc, /run, /sys,
    /var/lock and /var/run. Anywhere else, /tmp included, a user put files there, and they are kept.
    An overlay is the root of most containers and is kept as well.
    """
    if fstype in _MEMORY:
        return any(mount_point == top or mount_point.startswith(top + b"/") for top in _RUNTIME)
    return fstype in _PSEUDO


def pseudo_mount_points() -> dict[bytes, str]:
    """Return the mount points that a backup does not enter, each with its file system type."""
    return {
        mount.mount_point: mount.fstype
        for mount in visible_mounts(read_mounts())
        if pseudo_filesystem(mount.fstype, mount.mount_point)
    }


def unsized_devices() -> frozenset[int]:
    """Return the st_dev of file systems whose files may say a size of 0 and give bytes all the same."""
    return frozenset(os.makedev(*mount.device) for mount in read_mounts() if mount.fstype in _PSEUDO)


def visible_mounts(mounts: Sequence[Mount]) -> list[Mount]:
    """Return the mounts that no other mount hides: one per mount point.

    A disk mounted by autofs lies over the autofs mount, at the same path: only the disk counts.
    """
    by_id = {mount.mount_id: mount for mount in mounts}
    # The first root may be called its own parent, but it does not lie over itself.
    by_place = {(mount.parent_id, mount.mount_point): mount for mount in mounts if mount.parent_id != mount.mount_id}

    def can_be_reached(mount: Mount) -> bool:
        """Tell whether no mount lies over a directory on the way to this one."""
        for _ in by_id:
            if any((mount.parent_id, directory) in by_place for directory in _above(mount.mount_point)):
                return False
            mount = by_id.get(mount.parent_id, mount)
        return True

    return [
        mount
        for mount in mounts
        if by_place.get((mount.parent_id, mount.mount_point), mount) is mount
        and (mount.mount_id, mount.mount_point) not in by_place
        and can_be_reached(mount)
    ]


def _above(path: bytes) -> list[bytes]:
    """Return the directories that a path leads through, its own end left out."""
    components = path.split(b"/")
    return [b"/".join(components[:end]) or b"/" for end in range(1, len(components))] if path != b"/" else []


def _unescape(field: bytes) -> bytes:
    r"""Return a field with the kernel's `\040` and the like as the bytes they stand for."""
    return re.sub(rb"\\([0-3][0-7]{2})", lambda match: bytes([int(match[1], 8)]), field)
