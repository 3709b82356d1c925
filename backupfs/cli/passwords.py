"""Where passwords come from: options, the environment, or a person at the terminal."""

import getpass
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

from backupfs.cli.settings import is_interactive
from backupfs.errors import UsageError, shown

# As cryptsetup reads.
_MOST_KEY_FILE = 8 << 20
_LOST = """\
Everything is encrypted on this machine with this password. If it is lost, nobody
can ever read the backups again: keep a copy where it survives this machine.
"""


def read_password(file: str | None, command: str | None) -> bytes:
    """Return the repository's password. Raises: UsageError."""
    given = _given_password(file, command)
    if given is not None:
        return given
    if not is_interactive():
        raise UsageError(
            "a password is needed: set BACKUPFS_PASSWORD, BACKUPFS_PASSWORD_FILE or BACKUPFS_PASSWORD_COMMAND,"
            " or run this in a terminal"
        )
    return _not_empty(getpass.getpass("password of the repository: "))


def read_first_password(file: str | None, command: str | None) -> bytes:
    """Return the password of a new repository, asked for twice at a terminal. Raises: UsageError."""
    given = _given_password(file, command)
    if given is not None:
        return given
    if not is_interactive():
        return read_password(None, None)
    sys.stderr.write(_LOST)
    return ask_twice("password for the new repository: ")


def read_new_password(file: str | None) -> bytes:
    """Return another password for a repository that is open: from a file, or asked for twice. Raises: UsageError."""
    if file is not None:
        return _from_file(file)
    variable = os.environ.get("BACKUPFS_NEW_PASSWORD")
    if variable:
        return variable.encode("utf-8", "surrogateescape")
    if not is_interactive():
        raise UsageError(
            "a new password is needed: give --new-password-file FILE, set BACKUPFS_NEW_PASSWORD, or use a terminal"
        )
    return ask_twice("new password: ")


def ask_twice(prompt: str) -> bytes:
    """Ask until the same password came twice. Raises: UsageError for an empty one."""
    while True:
        first = _not_empty(getpass.getpass(prompt))
        if first == getpass.getpass("once more: ").encode("utf-8", "surrogateescape"):
            return first
        sys.stderr.write("these were two different passwords; again\n")


def read_luks_passphrases(files: Sequence[bytes], key_files: Sequence[bytes], ask: bool) -> tuple[bytes, ...]:
    """Return what may open encrypted disks: from files, the environment and the terminal.

    files: their first lines count. key_files: all their bytes do. Raises: UsageError.
    """
    found = [_from_file(os.fsdecode(path)) for path in files]
    for path in key_files:
        try:
            with open(path, "rb") as file:
                found.append(_not_empty(file.read(_MOST_KEY_FILE), f"the key file {shown(path)}"))
        except OSError as error:
            raise UsageError(f"the key file {shown(path)} cannot be read: {error.strerror}") from error
    if os.environ.get("BACKUPFS_LUKS_PASSPHRASE"):
        found.append(os.environ["BACKUPFS_LUKS_PASSPHRASE"].encode("utf-8", "surrogateescape"))
    if ask:
        if not is_interactive():
            raise UsageError("--luks-ask needs a terminal: give --luks-passphrase-file FILE instead")
        found.append(_not_empty(getpass.getpass("passphrase of the encrypted volumes: "), "the passphrase"))
    return tuple(found)


def _given_password(file: str | None, command: str | None) -> bytes | None:
    if file:
        return _from_file(file)
    if command:
        return _from_command(command)
    environment = os.environ
    if environment.get("BACKUPFS_PASSWORD"):
        return environment["BACKUPFS_PASSWORD"].encode("utf-8", "surrogateescape")
    if environment.get("BACKUPFS_PASSWORD_FILE"):
        return _from_file(environment["BACKUPFS_PASSWORD_FILE"])
    if environment.get("BACKUPFS_PASSWORD_COMMAND"):
        return _from_command(environment["BACKUPFS_PASSWORD_COMMAND"])
    return None


def _from_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return _not_empty(file.readline().rstrip(b"\r\n"), f"the password file {shown(path)}")
    except OSError as error:
        raise UsageError(f"the password file {shown(path)} cannot be read: {error.strerror}") from error


def _from_command(command: str) -> bytes:
    try:
        # Its messages go to the terminal; only its output is the password.
        done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, check=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"the password command {shown(command)} cannot be run: {error}") from error
    if done.returncode != 0:
        raise UsageError(f"the password command {shown(command)} failed with exit code {done.returncode}")
    return _not_empty(done.stdout.partition(b"\n")[0].rstrip(b"\r"), "the password command's output")


def _not_empty(password: str | bytes, where: str = "the password") -> bytes:
    data = password.encode("utf-8", "surrogateescape") if isinstance(password, str) else password
    if not data:
        raise UsageError(f"{where} is empty: an empty password protects nothing")
    return data
