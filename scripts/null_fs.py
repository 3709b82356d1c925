#!/usr/bin/env python3
"""Mount a real tree from memory, read-only: what a mount through pyfuse3 could at best be, to compare ours with.

Names, attributes, link targets and contents (up to --keep-mib; beyond, zeros of the right length) are read before the
mount appears, so that nothing but the event loop, pyfuse3 and the kernel is measured. Stays in the foreground until
SIGTERM, SIGINT or umount. --plain leaves pyfuse3's event loop as it is.

Usage: null_fs.py TREE MOUNTPOINT [--plain] [--keep-mib N]
"""

# ruff: noqa: ARG002 (the handlers have the arguments that pyfuse3 gives them)

import argparse
import contextlib
import errno
import os
import signal
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pyfuse3
import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from backupfs.fuse.polling import polled_event_loop

FOREVER_S = 10**8
_ATTRIBUTES = ("mode", "nlink", "uid", "gid", "rdev", "size", "blksize", "blocks", "atime_ns", "mtime_ns", "ctime_ns")


@dataclass(slots=True)
class Entry:
    attributes: pyfuse3.EntryAttributes
    data: bytes | None = None  # content or link target; None: zeros of the right length
    names: list[bytes] = field(default_factory=list)
    children: dict[bytes, "Entry"] = field(default_factory=dict)
    listing: list["Entry"] = field(default_factory=list)


class NullOperations(pyfuse3.Operations):
    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, tree: bytes, keep: int) -> None:
        super().__init__()
        self._keep = keep
        self._entries: list[Entry] = []
        self._load(tree)

    def _load(self, path: bytes) -> Entry:
        status = os.lstat(path)
        attributes = pyfuse3.EntryAttributes()
        for name in _ATTRIBUTES:
            setattr(attributes, f"st_{name}", getattr(status, f"st_{name}"))
        attributes.st_ino = pyfuse3.InodeT(len(self._entries) + 1)
        attributes.entry_timeout = attributes.attr_timeout = FOREVER_S
        entry = Entry(attributes)
        self._entries.append(entry)
        if stat.S_ISDIR(status.st_mode):
            entry.children = {name: self._load(os.path.join(path, name)) for name in sorted(os.listdir(path))}
            entry.names, entry.listing = list(entry.children), list(entry.children.values())
        elif stat.S_ISLNK(status.st_mode):
            entry.data = os.readlink(path)
        elif stat.S_ISREG(status.st_mode) and status.st_size <= self._keep:
            entry.data = Path(os.fsdecode(path)).read_bytes()
            self._keep -= len(entry.data)
        return entry

    async def lookup(self, parent_inode, name, ctx):
        entry = self._entries[parent_inode - 1].children.get(name)
        if entry is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return entry.attributes

    async def getattr(self, inode, ctx):
        return self._entries[inode - 1].attributes

    async def opendir(self, inode, ctx):
        return pyfuse3.FileHandleT(inode)

    async def readdir(self, fh, start_id, token):
        entry = self._entries[fh - 1]
        reply = pyfuse3.readdir_reply
        for position in range(start_id, len(entry.names)):
            if not reply(token, entry.names[position], entry.listing[position].attributes, position + 1):
                break

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    async def read(self, fh, off, size):
        entry = self._entries[fh - 1]
        if entry.data is not None:
            return entry.data[off : off + size]
        return bytes(max(0, min(size, entry.attributes.st_size - off)))

    async def readlink(self, inode, ctx):
        return self._entries[inode - 1].data

    async def flush(self, fh):
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh):
        pass

    async def releasedir(self, fh):
        pass

    async def forget(self, inode_list):
        pass

    async def statfs(self, ctx):
        return pyfuse3.StatvfsData()

    async def listxattr(self, inode, ctx):
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def getxattr(self, inode, name, ctx):
        raise pyfuse3.FUSEError(errno.ENOSYS)


async def serve(plain: bool) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(terminate_on_signal)
        with contextlib.nullcontext() if plain else polled_event_loop():
            await pyfuse3.main()
        nursery.cancel_scope.cancel()


async def terminate_on_signal() -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            pyfuse3.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description="Mount a tree from memory, as a limit to compare a mount with.")
    parser.add_argument("tree", type=os.fsencode)
    parser.add_argument("mountpoint")
    parser.add_argument("--plain", action="store_true", help="pyfuse3's event loop as it is")
    parser.add_argument("--keep-mib", type=int, default=256, help="bytes of content to keep in memory")
    arguments = parser.parse_args()
    operations = NullOperations(arguments.tree, arguments.keep_mib << 20)
    pyfuse3.init(operations, arguments.mountpoint, {*pyfuse3.default_options, "fsname=null_fs", "ro"})
    try:
        trio.run(serve, arguments.plain)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
