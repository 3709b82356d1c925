"""The entry point: finds the command, runs it, and turns what goes wrong into one line and an exit code."""

import contextlib
import gc
import importlib
import logging
import os
import signal
import sys
from functools import partial

import click

from backupfs import __version__
from backupfs.cli.settings import Settings, common_options
from backupfs.errors import EXIT_INTERRUPTED, BackupfsError, SourceError, StoreFull, UsageError, shown

EXIT_FAILED = 1
EXIT_INCOMPLETE = 3

# Verb → module and function that define it. Only the module of the verb in use is loaded, and it loads what is heavy
# (trio, the codecs, pyfuse3) only when it runs.
_COMMANDS = {
    "init": "repositories",
    "backup": "backups",
    "image": "images",
    "index": "images",
    "export": "images",
    "verify": "verifying",
    "boot": "verifying",
    "snapshots": "backups",
    "forget": "backups",
    "ls": "contents",
    "dump": "contents",
    "restore": "contents",
    "put": "edits",
    "rm": "edits",
    "edit": "edits",
    "thaw": "contents",
    "mount": "mounts",
    "umount": "mounts",
    "check": "repositories",
    "key": "keys",
    "stats": "repositories",
}


class _LazyGroup(click.Group):
    def list_commands(self, _context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(f"backupfs.cli.commands.{_COMMANDS[name]}")
        return getattr(module, f"{name}_command")  # type: ignore[no-any-return]

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = arguments[0] if arguments else ""
        if name and not name.startswith("-") and name not in _COMMANDS:
            import difflib

            close = difflib.get_close_matches(name, _COMMANDS, 1)
            hint = f" Did you mean {close[0]}?" if close else " `backupfs --help` lists the commands."
            raise click.UsageError(f"there is no command {shown(name)}.{hint}")
        return super().resolve_command(context, arguments)


_EXIT_CODES = """\b
Exit codes:
  0    done
  1    failed, or something is damaged; the last line says what
  3    done, but some files, or objects that `check` wanted, could not be read or written
  10   there is no repository at this place
  11   another process is making or maintaining the repository
  12   wrong password
  130  interrupted
"""

_ENVIRONMENT = """\b
Environment:
  BACKUPFS_REPOSITORY        used where -r is not given
  BACKUPFS_PASSWORD          the password itself, or
  BACKUPFS_PASSWORD_FILE     a file whose first line it is, or
  BACKUPFS_PASSWORD_COMMAND  a command that prints it
  BACKUPFS_CACHE_DIR         the cache (default: ~/.cache/backupfs)
"""


@click.group(
    cls=_LazyGroup, epilog=_ENVIRONMENT + "\n" + _EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, message="backupfs %(version)s")
@partial(common_options, shows_all=True)
@click.pass_context
def cli(context: click.Context, /, **arguments: object) -> None:
    """Incremental, encrypted backups that mount as a read-only filesystem.

    \b
    backupfs -r /mnt/usb/backups init           make a repository, once
    backupfs -r /mnt/usb/backups backup /home   back up; only changes are stored
    backupfs -r /mnt/usb/backups mount /mnt/b   look into every snapshot, copy files back
    backupfs umount /mnt/b
    """
    context.obj = Settings(**arguments)  # type: ignore[arg-type]


def main() -> None:
    """Run the command line and exit with the documented code."""
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # Not sys.exit: threads that wait for a store which does not answer would be waited for.
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; every error is one line on standard error."""
    _open_missing_streams()
    _prepare(arguments)
    try:
        outcome = cli.main(arguments, prog_name="backupfs", standalone_mode=False)
        code = outcome if isinstance(outcome, int) else 0
        sys.stdout.flush()
    except click.exceptions.Abort:
        return _interrupted(arguments)
    except click.ClickException as error:
        error.show()
        return EXIT_FAILED
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except BrokenPipeError:
        # The reader of the output went away, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except BaseExceptionGroup as group:
        return _of_group(group, arguments)
    except BackupfsError as error:
        return _told(error)
    except OSError as error:
        return _told(BackupfsError(_os_error_text(error)))
    return code


def _of_group(group: "BaseExceptionGroup[BaseException]", arguments: list[str]) -> int:
    leaves = list(_leaves(group))
    if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
        return _interrupted(arguments)
    for kind in (StoreFull, SourceError, BackupfsError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return _told(leaf)
    for leaf in leaves:
        if isinstance(leaf, OSError):
            return _told(BackupfsError(_os_error_text(leaf)))
    raise group


def _leaves(group: "BaseExceptionGroup[BaseException]") -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def _told(error: BackupfsError) -> int:
    if isinstance(error, UsageError):
        sys.stderr.write(f"backupfs: {error}\n")
    else:
        sys.stderr.write(f"backupfs: failed: {error}\n")
    return error.exit_code


def _os_error_text(error: OSError) -> str:
    name = error.filename
    where = f"{shown(name)}: " if isinstance(name, str | bytes) else ""
    return f"{where}{error.strerror or error}"


def _interrupted(arguments: list[str]) -> int:
    verb = next((word for word in arguments if word in _COMMANDS), "")
    kept = "; what was stored so far is kept and reused by the next run" if verb == "backup" else ""
    sys.stderr.write(f"\nbackupfs: interrupted{kept}\n")
    return EXIT_INTERRUPTED


def _prepare(arguments: list[str]) -> None:
    verbose = sum(
        argument.count("v") for argument in arguments if argument.startswith("-v") and set(argument[1:]) == {"v"}
    )
    logging.basicConfig(
        level=logging.DEBUG if verbose > 1 else logging.INFO if verbose else logging.WARNING,
        format="backupfs: %(message)s",
    )
    # What they say of each request holds signatures and tokens.
    for library in ("botocore", "boto3", "urllib3", "s3transfer"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # Nearly nothing here makes cycles; looking for them as often as Python does costs a fifth of an unchanged backup.
    gc.set_threshold(50_000, 50, 1000)
    # SIGTERM ends a command as Ctrl-C does: temporary files go, stored chunks stay. What a script puts in the
    # background is made to ignore SIGINT by its shell; then nothing would come of either.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    # The terminal is gone; `nohup` has it ignored.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _interrupt)
    _allow_many_files()


def _open_missing_streams() -> None:
    """Let words that nobody wants go nowhere, where the command was started with a closed stream."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _interrupt(_number: int, _frame: object) -> None:
    # As Ctrl-C, whose handler knows whether an event loop runs (interrupts.py); raising here would break it anywhere.
    signal.raise_signal(signal.SIGINT)


def _allow_many_files() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1 << 16
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, 1 << 16), hard))
