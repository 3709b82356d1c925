"""From the words of a user to a store: a path, or a URL."""

import os
import re
from urllib.parse import unquote_to_bytes

from backupfs.errors import UsageError, shown
from backupfs.stores.directory import DirectoryStore
from backupfs.stores.store import Store

# A word and a colon before any slash, as rsync and ssh tell a host from a path.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")

_POSSIBLE = "a path (/srv/backup) or file:///srv/backup"


def open_store(url: str) -> Store:
    """Return the store at a path or URL; nothing is read or made yet.

    A path is made absolute; `~` is the shell's business. A file URL may use %20 and the like.
    Raises: UsageError for what is neither a path nor a URL that this version knows.
    """
    scheme = _SCHEME.match(url)
    if scheme is None:
        path = url
    elif scheme[1].lower() == "file":
        path = _path_of_file_url(url)
    elif scheme[1].lower() == "s3":
        raise UsageError(
            f"{shown(url)}: object storage is not built in yet in this version of backupfs; possible is {_POSSIBLE}"
        )
    else:
        raise UsageError(
            f"{shown(url)}: there is no store for {scheme[1]} URLs; possible is {_POSSIBLE}; "
            f"a folder of that name is ./{shown(url)}"
        )
    if not path or "\0" in path:
        raise UsageError(f"{shown(url) or 'an empty text'} names no store; possible is {_POSSIBLE}")
    return DirectoryStore(path)


def _path_of_file_url(url: str) -> str:
    if not url[len("file:") :].startswith("///"):
        raise UsageError(f"{shown(url)}: a file URL has three slashes and an absolute path, as in file:///srv/backup")
    encoded = url[len("file://") :]
    return os.fsdecode(unquote_to_bytes(os.fsencode(encoded)))
