"""Files on this machine's disk with bytes that can be had elsewhere, too.

All of them may be deleted at any time, and any number of processes may share a folder: files are written beside and
renamed. What lies in a file is compared with a checksum; a file that is garbled is as good as none. Nobody is protected
here from who may write the folder: who reads objects checks their seals.
A folder that cannot be written is passed over: then everything comes from elsewhere.

FOLDER/NAME          BLAKE3 of the rest, content
"""

import contextlib
import logging
import os
import threading
import time
from pathlib import Path

from blake3 import blake3

from backupfs.errors import shown

_log = logging.getLogger(__name__)

_CHECK_SIZE = 32
# Bytes written between two looks at how much there is, at most; of a small limit an eighth.
_LOOK_EVERY = 64 << 20
# A file is marked as used when that was longer ago than this.
_MARK_AGE_S = 3600


class KeptFiles:
    """A folder of such files, with a limit. Safe in threads."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Take the parts; nothing is read or made yet.

        limit: bytes in the folder; what was not used longest goes first.
        """
        self._folder = folder
        self._limit = limit
        self._look_every = min(_LOOK_EVERY, limit // 8)
        self._unlooked = self._look_every  # bytes written since the last look

    def read(self, name: str) -> bytes | None:
        """Return the content that is kept under a name, or None."""
        path = self._folder / name
        try:
            with open(path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                data = file.read(status.st_size)
        except OSError:
            return None
        content = data[_CHECK_SIZE:]
        if blake3(content).digest() != data[:_CHECK_SIZE]:
            _log.warning("the cache file %s is damaged; it is fetched again", shown(str(path)))
            return None
        if status.st_mtime < time.time() - _MARK_AGE_S:
            with contextlib.suppress(OSError):
                os.utime(path)
        return content

    def keep(self, name: str, content: bytes | memoryview) -> None:
        """Keep content under a name, if the disk allows."""
        temporary = self._folder / f".{name}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                temporary.write_bytes(blake3(content).digest() + content)
                os.rename(temporary, self._folder / name)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            _log.info("the cache %s cannot be written: %s", shown(str(self._folder)), error.strerror)
            return
        self._unlooked += len(content)
        if self._unlooked >= self._look_every:
            self._unlooked = 0
            self._make_room()

    def forget(self, *patterns: str) -> None:
        """Remove what is kept under names, or under all that fit a pattern."""
        for pattern in patterns:
            for path in self._folder.glob(pattern):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _make_room(self) -> None:
        """Remove what was not used longest until the rest is below the limit, and what dead processes left."""
        found: list[tuple[float, int, str]] = []
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if not entry.name.startswith("."):
                        found.append((status.st_mtime, status.st_size, entry.path))
                    elif status.st_mtime < time.time() - 24 * 3600:
                        os.unlink(entry.path)
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            # Room for what is written until the next look.
            if total <= self._limit - self._look_every:
                return
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size
