"""From the words of a user to a store: a path, or a URL."""

import os
import re
from urllib.parse import unquote_to_bytes

from backupfs.errors import UsageError, shown
from backupfs.stores.directory import DirectoryStore
from backupfs.stores.retrying import RetryingStore
from backupfs.stores.s3 import S3Store
from backupfs.stores.s3_client import ADDRESSING, ENCRYPTION, S3Options
from backupfs.stores.store import Store, is_key

# A word and a colon before any slash, as rsync and ssh tell a host from a path.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")

_POSSIBLE = "a path (/srv/backup), file:///srv/backup or s3://BUCKET/PREFIX"
# What servers take for a bucket, roughly: they have the last word.
_MOST_PREFIX = 100
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}")


def open_store(url: str, s3: S3Options | None = None) -> Store:
    """Return the store at a path or URL; nothing is read or made yet.

    s3: what the user said about object storage.
    A path is made absolute; `~` is the shell's business. A file URL may use %20 and the like.
    Raises: UsageError for what is neither a path nor a URL that this version knows.
    """
    scheme = _SCHEME.match(url)
    if scheme is None:
        path = url
    elif scheme[1].lower() == "file":
        path = _path_of_file_url(url)
    elif scheme[1].lower() == "s3":
        return RetryingStore(_open_bucket(url, s3 or S3Options()))
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


def _open_bucket(url: str, options: S3Options) -> S3Store:
    bucket, _, prefix = url[len("s3:") :].removeprefix("//").partition("/")
    prefix = prefix.strip("/")
    if not url[len("s3:") :].startswith("//") or not _BUCKET.fullmatch(bucket):
        raise UsageError(
            f"{shown(url)}: object storage is s3://BUCKET or s3://BUCKET/PREFIX; a bucket's name has three "
            "characters or more"
        )
    if prefix and not (is_key(prefix) and len(prefix) <= _MOST_PREFIX):
        raise UsageError(
            f"{shown(url)}: the prefix is at most {_MOST_PREFIX} letters, digits, '.', '_' and '-' in segments joined "
            "by '/', none starting with a dot"
        )
    if options.addressing not in ADDRESSING:
        raise UsageError(f"--addressing {shown(options.addressing)}: choose one of {', '.join(ADDRESSING)}")
    if options.encryption not in ("", *ENCRYPTION[:2]) and not re.fullmatch(r"aws:kms:\S+", options.encryption):
        raise UsageError(f"--encryption {shown(options.encryption)}: choose one of {', '.join(ENCRYPTION)}")
    if options.connections < 1:
        raise UsageError(f"--connections {options.connections}: at least one is needed")
    if options.limit_upload < 0 or options.limit_download < 0:
        raise UsageError("a limit is a number of bytes a second, 0 is none")
    return S3Store(bucket, prefix, options)
