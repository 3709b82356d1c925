"""What a volume holds that is known and is not read here: so that a user hears of it instead of finding no files.

Source: the headers of Linux (md_p.h, f2fs_fs.h, bcachefs_format.h) and blkid's probes for what Windows has.
"""

import struct

from backupfs.disks.filesystem import Read

_START = 8192  # bytes in which all of these say what they are
_MD_MAGIC = b"\xfc\x4e\x2b\xa9"
_MD_PLACES = (0, 4096)  # where it lies at the end, the volume begins with its file system, and that is read
_MD_LEVEL = 72
_MAGICS = (
    (3, b"-FVE-FS-", "it is encrypted with BitLocker"), (3, b"ReFS\0", "it holds ReFS"),
    (1024, b"\x10\x20\xf5\xf2", "it holds F2FS"),
    (4096 + 24, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"), "it is a device of bcache"),
    (4096 + 24, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef"), "it holds bcachefs"),
)  # fmt: skip


def unread_form(read: Read) -> str:
    """Return what a volume holds and why its files are not shown; empty if it is none of these."""
    start = read(0, _START)
    start += bytes(_START - len(start))
    for place in _MD_PLACES:
        magic, version, _ = struct.unpack_from("<4sII", start, place)
        if magic == _MD_MAGIC and version == 1:
            (level,) = struct.unpack_from("<i", start, place + _MD_LEVEL)
            return f"it is a member of a software RAID of level {level} (md), which is not read"
    for place, magic, form in _MAGICS:
        if start[place : place + len(magic)] == magic:
            return f"{form}, which is not read"
    return ""
