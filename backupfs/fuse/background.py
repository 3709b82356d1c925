"""Running a server in the background: the command returns when it is ready, or tells why it is not.

The fork comes first, before trio and before any thread. The child tells its parent through a pipe, and then has
nothing of the terminal any more: its words go to a log file.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from backupfs import errors
from backupfs.errors import BackupfsError, MountError, shown

# Stands in a message for the log, whose name the server does not know.
THE_LOG = "the log"

log = logging.getLogger(__name__)


def serve_in_background(serve: Callable[[Callable[[], None]], None], log_file: Path) -> int:
    """Run `serve(on_ready)` in a process of its own; return its pid once it has called `on_ready`.

    Call it while this process has one thread and no event loop. `serve` ends by returning, or by raising.
    log_file: gets what the server logs, and what libraries write to standard error.
    Raises: what `serve` raised before it was ready, as far as it is a BackupfsError; MountError.
    """
    log_fd = _open_log(log_file)
    receiving, sending = os.pipe2(os.O_CLOEXEC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pid = os.fork()
    if pid == 0:
        os.close(receiving)
        _be_server(serve, log_fd, sending)
    os.close(sending)
    os.close(log_fd)
    with os.fdopen(receiving, "rb") as pipe:
        told = pipe.read()
    if told == b"ready":
        return pid
    os.waitpid(pid, 0)
    if not told:
        raise MountError(f"the server ended before the mount was ready; {shown(str(log_file))} may say why")
    name, message = json.loads(told)
    kind = getattr(errors, name, MountError)
    raise kind(message.replace(THE_LOG, f"the log {shown(str(log_file))}"))


def _open_log(path: Path) -> int:
    try:
        # Private: it names files.
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError as error:
        raise MountError(f"the log file {shown(str(path))} cannot be made: its folder is missing") from error
    except OSError as error:
        raise MountError(f"the log file {shown(str(path))} cannot be written: {error.strerror}") from error


def _be_server(serve: Callable[[Callable[[], None]], None], log_fd: int, pipe: int) -> None:
    """Be the child, to its end; never returns."""
    code = 1
    told = False

    def tell(words: bytes) -> None:
        nonlocal told
        if not told:
            told = True
            os.write(pipe, words)
            os.close(pipe)

    try:
        os.setsid()
        os.chdir("/")
        os.umask(0o077)
        null = os.open(os.devnull, os.O_RDWR)
        for target, source in ((0, null), (1, log_fd), (2, log_fd)):
            os.dup2(source, target)
        _log_to_stderr()
        serve(lambda: tell(b"ready"))
        code = 0
    except BackupfsError as error:
        log.error("%s", error)
        tell(json.dumps([type(error).__name__, str(error)]).encode())
        code = error.exit_code
    except BaseExceptionGroup as group:
        told_one = _told_error(group)
        if told_one is None:
            log.critical("a fault in backupfs, please report it", exc_info=group)
            told_one = MountError(f"a fault in backupfs: {group!r}")
        else:
            log.error("%s", told_one)
        tell(json.dumps([type(told_one).__name__, str(told_one)]).encode())
        code = told_one.exit_code
    except BaseException as error:
        log.critical("a fault in backupfs, please report it", exc_info=error)
        tell(json.dumps(["MountError", f"a fault in backupfs: {error!r}"]).encode())
    finally:
        logging.shutdown()
        # Not sys.exit: what the parent registered for its own end is not the child's to run.
        os._exit(code)


def _told_error(group: BaseExceptionGroup[BaseException]) -> BackupfsError | None:
    """Return the error in a group that the user can be told, if all that is in it is one."""
    matched, rest = group.split(BackupfsError)
    leaf: BaseException | None = matched
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return leaf if rest is None and isinstance(leaf, BackupfsError) else None


def _log_to_stderr() -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(handler)
    if root.level in (logging.NOTSET, logging.WARNING):
        root.setLevel(logging.INFO)
