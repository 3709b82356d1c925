"""Words of the command line that mean sizes, times, patterns and paths."""

import os
import sys
from collections.abc import Iterable
from datetime import datetime

from backupfs.codec import compression
from backupfs.errors import UsageError, shown
from backupfs.localfs.exclude import Pattern, parse_pattern, parse_patterns
from backupfs.localfs.sources import normalise, read_list
from backupfs.repository.local import LocalFolders
from backupfs.stores.store import Store

_LEAST_RATE = 1 << 10
_SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def read_input(name: str) -> bytes:
    """Return the bytes of a file, or of standard input for `-`. Raises: UsageError."""
    try:
        if name == "-":
            require_input()
            return sys.stdin.buffer.read()
        with open(name, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"{shown(name)} cannot be read: {error.strerror}") from error


_LONGEST_NAME = 255


def absolute_paths(given: Iterable[bytes], files_from: Iterable[str]) -> list[bytes]:
    """Return paths as absolute ones, those listed in files too. Raises: UsageError.

    One that ends in a slash and is a link to a folder means the folder, as for the system itself.
    """
    found = list(given)
    for name in files_from:
        found += read_list(read_input(name))
    here = os.getcwdb()
    return [_followed(path, normalise(path, here)) for path in found]


def _followed(text: bytes, path: bytes) -> bytes:
    is_followed = text.endswith((b"/", b"/.")) and os.path.islink(path) and os.path.isdir(path)
    return os.path.realpath(path) if is_followed else path


def bare_links(paths: Iterable[bytes]) -> list[bytes]:
    """Return those paths that are links to folders outside of all of them."""
    paths = list(paths)
    tops = tuple(path.rstrip(b"/") + b"/" for path in paths)
    return [
        path
        for path in paths
        if os.path.islink(path) and os.path.isdir(path) and not (os.path.realpath(path) + b"/").startswith(tops)
    ]


def patterns(texts: Iterable[str], files: Iterable[str] = ()) -> tuple[Pattern, ...]:
    """Return the patterns of options and of files, in their order. Raises: UsageError."""
    found = [parse_pattern(os.fsencode(text)) for text in texts]
    for name in files:
        found += parse_patterns(read_input(name).split(b"\n"), source=os.fsencode(name))
    return tuple(found)


def size(text: str) -> int:
    """Return the bytes of a size as people write it. Raises: UsageError."""
    number, unit = text.lower().removesuffix("b").removesuffix("i"), ""
    if number and number[-1] in _SIZE_UNITS:
        number, unit = number[:-1], number[-1]
    try:
        found = int(float(number) * _SIZE_UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        found = -1
    if found < 0:
        raise UsageError(f"{shown(text)} is no size: write bytes, or 500K, 20M, 1.5G, 2T")
    return found


def rate(option: str, text: str) -> int:
    """Return the bytes a second of a limit; 0: there is none. Raises: UsageError for what lets next to nothing pass."""
    found = size(text)
    # What is a part of a byte is not the same as none.
    if found < _LEAST_RATE and any("1" <= letter <= "9" for letter in text):
        raise UsageError(f"{option} {shown(text)}: at least 1K, which is 1024 bytes a second; 0 is no limit")
    return found


def moment_ns(text: str) -> int:
    """Return a time in nanoseconds since 1970; without a zone it is local. Raises: UsageError."""
    try:
        moment = datetime.fromisoformat(text)
        found = int(moment.replace(microsecond=0).timestamp()) * 10**9 + moment.microsecond * 1000
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"{shown(text)} is no time: write 2026-11-22T08:13:11, with Z or +01:00 if not local"
        ) from None
    if not 0 <= found < 1 << 63:
        raise UsageError(f"{shown(text)} is out of reach: a snapshot's time is between 1970 and 2262")
    return found


def require_input() -> None:
    """Raise UsageError if this process was started with its standard input closed."""
    if sys.stdin is None:
        raise UsageError("standard input is closed, so nothing can be read from it: give it a pipe or a file")


def file_path(text: bytes) -> bytes:
    """Return the path of a file that is to be made up, absolute. Raises: UsageError."""
    path = normalise(text, b"/")
    if path == b"/" or text.endswith(b"/"):
        raise UsageError(f"{shown(text)} cannot be the name of a file: give one like /dumps/postgres.sql")
    if any(len(part) > _LONGEST_NAME for part in path.split(b"/")):
        raise UsageError(f"{shown(text)} has a part of more than {_LONGEST_NAME} bytes: no file system could hold it")
    return path


def level(text: str) -> int:
    """Return the compression level that a word means. Raises: UsageError."""
    if text == "off":
        return compression.OFF
    if text == "auto":
        return compression.DEFAULT_LEVEL
    levels = {str(number): number for number in range(1, compression.MAX_LEVEL + 1)}
    if text in levels:
        return levels[text]
    raise UsageError(f"{shown(text)} is no compression: write off, auto, or a level from 1 to {compression.MAX_LEVEL}")


def own_folders(folders: LocalFolders, store: Store) -> tuple[bytes, ...]:
    """Return the folders that are backupfs's own: never backed up, never deleted by a restore."""
    found = [folder for folder in (folders.cache, folders.state, store.folder) if folder is not None]
    return tuple(os.fsencode(folder) for folder in found)


def split_disk(text: bytes) -> tuple[str, str]:
    """Return the snapshot and the disk of SNAP[:DISK]; the disk may be written as its path in the image."""
    words = os.fsdecode(text).split(":")
    # NAME:latest is one word to a user.
    count = 2 if words[1:2] == ["latest"] else 1
    disk = ":".join(words[count:])
    return ":".join(words[:count]), disk.removeprefix("/disks/").removesuffix(".raw")
