"""One guard for all that the kernel asks.

The handlers are plain functions. The guard makes of each what pyfuse3 calls: it loads what a handler missed and runs
it again, and it maps every error to an errno, since a handler that raises anything else ends the mount.
All of it belongs to the trio thread.
"""

import errno
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import TypeVar

import pyfuse3
from pyfuse3 import FUSEError

from backupfs.errors import BackupfsError, shown
from backupfs.view.filesystem import NoSuchEntry
from backupfs.view.freshness import Stale
from backupfs.view.loading import Loader, NotCached

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_REPEAT_S = 600.0  # the same error of the same file is logged again after this time
_MOST_REMEMBERED = 1000


def guarded(handler: Callable[..., Result]) -> Callable[..., Coroutine[object, object, Result]]:
    """Make a plain function a handler of pyfuse3."""

    @wraps(handler)
    async def answer(self: "GuardedOperations", *arguments: object) -> Result:
        try:
            return handler(self, *arguments)
        except FUSEError:
            raise
        except Exception as error:
            return await self.recover(error, handler, arguments)

    return answer


class GuardedOperations(pyfuse3.Operations):
    """Handlers that the guard looks after."""

    def __init__(self, loader: Loader, find_path: Callable[[int], bytes]) -> None:
        """Take the parts.

        find_path: gives the path of an inode, for messages. Raises: NotCached.
        """
        super().__init__()
        self._loader = loader
        self._find_path = find_path
        self._logged: OrderedDict[tuple[str, object], float] = OrderedDict()

    async def refresh(self) -> None:
        """Bring up to date what a handler found to be stale."""

    async def recover(self, error: Exception, handler: Callable[..., Result], arguments: tuple[object, ...]) -> Result:
        """Provide what a handler lacked and run it again. Raises: FUSEError."""
        while True:
            try:
                if isinstance(error, NotCached):
                    return await self._loader.run(error, handler, self, *arguments)
                if isinstance(error, Stale):
                    await self.refresh()
                    return handler(self, *arguments)
            except FUSEError:
                raise
            except Exception as other:
                error = other
                continue
            raise FUSEError(await self._errno_of(error, arguments[0] if arguments else None))

    async def _errno_of(self, error: Exception, inode: object) -> int:
        if isinstance(error, NoSuchEntry):
            return errno.ENOENT
        if isinstance(error, NotADirectoryError):
            return errno.ENOTDIR
        if self._is_news(str(error), inode):
            path = shown(await self._path_of(inode))
            if isinstance(error, BackupfsError):
                log.error("%s cannot be read: %s", path, error)
            else:
                log.error("%s: a fault in backupfs, please report it", path, exc_info=error)
        return errno.EIO

    def _is_news(self, message: str, inode: object) -> bool:
        key, now = (message, inode), time.monotonic()
        if now - self._logged.get(key, -_REPEAT_S) < _REPEAT_S:
            return False
        self._logged[key] = now
        self._logged.move_to_end(key)
        if len(self._logged) > _MOST_REMEMBERED:
            self._logged.popitem(last=False)
        return True

    async def _path_of(self, inode: object) -> bytes:
        if not isinstance(inode, int):
            return b"/"
        try:
            return self._find_path(inode)
        except NotCached as missing:
            try:
                return await self._loader.run(missing, self._find_path, inode)
            except Exception:
                return b"(a file whose path cannot be read)"
        except Exception:
            return b"(a file whose path cannot be read)"
