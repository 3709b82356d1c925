"""Options that every command has, before or after the verb, and what follows from them.

Imports nothing heavy at the top: `--help` and completion load this file.
"""

import gc
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

import click

from backupfs.errors import UsageError, shown

if TYPE_CHECKING:
    from backupfs.repository.local import LocalFolders
    from backupfs.repository.repository import Repository
    from backupfs.stores.store import Store

# Looked at by the verb itself, which has better words for what is wrong.
PATH = click.Path(readable=False, path_type=bytes)

Command = TypeVar("Command", bound=Callable[..., object])
Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


def as_text(_context: click.Context, _parameter: click.Parameter, value: Result) -> Result:
    """Refuse names that are no text, before anything is done: they are stored. Raises: click.BadParameter."""
    for name in (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise click.BadParameter(f"{shown(name)} is no UTF-8") from None
    return value


def as_host(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Refuse what HOST:latest:/PATH could not name, too. Raises: click.BadParameter."""
    if ":" in value:
        raise click.BadParameter(f"{shown(value)}: a host that is to be named in HOST:latest has no ':' in its name")
    return as_text(context, parameter, value)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the common options say; None where neither the option nor the environment was given."""

    repository: str | None = None
    json: bool = False
    quiet: bool = False
    verbose: int = 0
    password_file: str | None = None
    password_command: str | None = None
    cache_dir: str | None = None
    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    addressing: str | None = None
    ca_bundle: str | None = None
    connections: int | None = None
    storage_class: str | None = None
    encryption: str | None = None
    limit_upload: str | None = None
    limit_download: str | None = None

    def merged(self, later: "Settings") -> "Settings":
        """Return these settings with those that were given after the verb on top."""
        given = {
            item.name: getattr(later, item.name)
            for item in fields(later)
            if getattr(later, item.name) not in (None, False, 0)
        }
        return replace(self, **given)

    def url(self) -> str:
        """Return the repository's URL. Raises: UsageError."""
        if self.repository == "":
            raise UsageError("-r was given an empty word: where is the repository?")
        url = self.repository or os.environ.get("BACKUPFS_REPOSITORY")
        if not url:
            raise UsageError("which repository? give -r REPO, or set BACKUPFS_REPOSITORY")
        return url

    def store(self) -> "Store":
        """Return the repository's store. Raises: UsageError."""
        from backupfs.cli.values import rate
        from backupfs.codec.sealing import Kind
        from backupfs.repository import layout
        from backupfs.stores.opening import open_store
        from backupfs.stores.s3_client import DEFAULT_CONNECTIONS, S3Options

        # Only data may be in a class that is slow or dear to read: everything else is read all the time.
        data = layout.prefix_of(Kind.DATA_PACK)
        classes = ((data, self.storage_class),) if self.storage_class else ()
        options = S3Options(
            self.endpoint_url or "", self.region or "", self.profile or "", self.addressing or "auto",
            self.ca_bundle or "", DEFAULT_CONNECTIONS if self.connections is None else self.connections,
            classes, data, self.encryption or "", rate("--limit-upload", self.limit_upload or "0"),
            rate("--limit-download", self.limit_download or "0"),
        )  # fmt: skip
        return open_store(self.url(), options)

    def folders(self) -> "LocalFolders":
        """Return where this client keeps its cache and state."""
        from pathlib import Path

        from backupfs.repository.local import LocalFolders, default_folders

        folders = default_folders()
        return LocalFolders(Path(self.cache_dir), folders.state) if self.cache_dir else folders

    def open_repository(self, module: str, snapshots: bool = True, files: bool = True) -> "Repository":
        """Ask for the password and open the repository.

        module: what will work on it; loaded while the password is stretched, which takes as long.
        snapshots, files: what it will look at. (`check` asks for itself, in an order of its own.)

        Raises: NotARepository before asking; WrongPassword; UnknownVersion; DamagedObject; StoreError.
        """
        from importlib import import_module

        from backupfs.cli.passwords import read_password
        from backupfs.memory import keep_freed_memory
        from backupfs.repository import repository
        from backupfs.stores.together import threads

        keep_freed_memory()
        store = self.store()
        found = repository.find_repository(store, self.folders())
        password = read_password(self.password_file, self.password_command)
        ahead = repository.LISTED_FOR_FILES if files else repository.LISTED_FOR_SNAPSHOTS if snapshots else ()
        with threads(1) as pool:
            opening = pool.submit(repository.open_repository, store, password, self.folders(), found, ahead)
            import_module(module)
            gc.freeze()  # what is loaded stays: no need to look through it ever again
            # Little here is in cycles, and to look for them after each 700 new objects took a twentieth of a backup.
            gc.set_threshold(50_000, 20, 20)
            return opening.result()


_OPTIONS = (
    click.option(
        "-r", "--repository", metavar="REPO", help="Where the repository is: a folder, or s3://BUCKET/PREFIX."
    ),
    click.option("--json", is_flag=True, help="Print JSON: one object, or one a line, on standard output."),
    click.option("-q", "--quiet", is_flag=True, help="No progress and no report, only errors."),
    click.option("-v", "--verbose", count=True, help="Say more; twice: what the store does, too."),
    click.option("--password-file", metavar="FILE", help="Read the password from the first line of FILE."),
    click.option("--password-command", metavar="COMMAND", help="Run COMMAND; the password is what it prints."),
    click.option("--cache-dir", metavar="FOLDER", help="Where the cache is; it can be deleted at any time."),
)

# Of object storage. Given before or after the verb like the others, but told of in `backupfs --help` only.
_S3_OPTIONS = (
    ("--endpoint-url", {"metavar": "URL", "help": "Where object storage is, if not at AWS."}),
    ("--region", {"metavar": "NAME", "help": "Its region."}),
    ("--profile", {"metavar": "NAME", "help": "The profile of ~/.aws/config and credentials to use."}),
    ("--addressing", {"metavar": "HOW", "help": "Where the bucket's name stands: path, virtual (host) or auto."}),
    ("--ca-bundle", {"metavar": "FILE", "help": "Trust the certificates in FILE instead of the system's."}),
    ("--connections", {"type": int, "metavar": "N", "help": "At most N connections at once (default: 16)."}),
    ("--storage-class", {"metavar": "CLASS", "help": "Put file content into CLASS; what is read often stays hot."}),
    ("--limit-upload", {"metavar": "RATE", "help": "At most so many bytes a second: 500K, 2M; not below 1K."}),
    ("--limit-download", {"metavar": "RATE", "help": "The same for what is read."}),
    ("--encryption", {"metavar": "KIND", "help": "Encryption by the server, too: AES256, aws:kms or aws:kms:KEY."}),
)


def common_options(function: Command, shows_all: bool = False) -> Command:
    """Add the common options to a command or group."""
    for name, arguments in reversed(_S3_OPTIONS):
        function = click.option(name, hidden=not shows_all, **arguments)(function)
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def with_settings(function: Callable[..., object]) -> Callable[..., object]:
    """Give a command its options merged with those before the verb, as `settings`."""
    from functools import wraps

    @wraps(function)
    @click.pass_context
    def wrapper(context: click.Context, /, **arguments: object) -> object:
        later = Settings(**{item.name: arguments.pop(item.name) for item in fields(Settings)})  # type: ignore[arg-type]
        settings = context.find_object(Settings) or Settings()
        return function(settings=settings.merged(later), **arguments)

    return common_options(wrapper)


def run_case(
    function: "Callable[[Repository, *Arguments], Awaitable[Result]]", repository: "Repository", *arguments: *Arguments
) -> Result:
    """Run an asynchronous use case over a repository; an interrupt ends it soon, whatever the store does."""
    from backupfs import interrupts

    return interrupts.run(function, repository, *arguments, stop=repository.store.stop)


def is_interactive() -> bool:
    """Tell whether a person can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()
