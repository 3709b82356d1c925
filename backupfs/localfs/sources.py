"""The paths a backup starts from: as given, from a list, as few as cover them all. Pure functions over byte paths."""

from collections.abc import Collection, Iterable, Sequence

from backupfs.errors import SourceError, UsageError, shown


def normalise(path: bytes, cwd: bytes) -> bytes:
    """Return the path as absolute, without `.`, `..`, doubled and trailing slashes.

    cwd: absolute; what a relative path starts from.
    Symlinks are left alone: what the user names is what is backed up, and `link/..` is where the link is.
    Raises: UsageError for an empty path and for one with a NUL byte.
    """
    if not path:
        raise UsageError("an empty path was given; write '.' for the current directory")
    if b"\0" in path:
        raise UsageError(f"'{shown(path)}': no path can hold a NUL byte")
    components: list[bytes] = []
    for component in (path if path.startswith(b"/") else cwd + b"/" + path).split(b"/"):
        if component == b"..":
            del components[-1:]
        elif component not in (b"", b"."):
            components.append(component)
    return b"/" + b"/".join(components)


def read_list(data: bytes) -> list[bytes]:
    """Return the paths of a --files-from file, in its order.

    With a NUL anywhere, NULs separate the paths (`find -print0`) and every byte between them counts. Otherwise each
    line is a path; blank lines and lines that start with `#` are passed over, all else on a line counts, spaces too.
    A file whose name is blank or starts with `#` can be listed as `./#name`.
    """
    if b"\0" in data:
        return [path for path in data.split(b"\0") if path]
    return [line for line in data.split(b"\n") if line.strip() and not line.startswith(b"#")]


def minimal_roots(paths: Iterable[bytes]) -> list[bytes]:
    """Return the paths in byte order, each once, without those below another of them.

    paths: absolute and normalised. `/ab` is not below `/a`.
    """
    unique = set(paths)
    return sorted(path for path in unique if not _has_ancestor_in(unique, path))


def existing_sources(sources: Sequence[bytes], missing: Collection[bytes]) -> list[bytes]:
    """Return the sources that are not missing, in order; the backup reports the others and goes on without.

    Raises: SourceError if there is none left, as a snapshot of nothing would look like a good backup.
    """
    existing = [source for source in sources if source not in missing]
    if existing:
        return existing
    if not sources:
        raise SourceError("there is nothing to back up: no path was given")
    names = ", ".join(f"'{shown(source)}'" for source in sources[:_NAMED_AT_MOST])
    more = f" and {len(sources) - _NAMED_AT_MOST} more" if len(sources) > _NAMED_AT_MOST else ""
    raise SourceError(f"there is nothing to back up: {names}{more} not found; check the spelling and what is mounted")


_NAMED_AT_MOST = 5


def _has_ancestor_in(paths: set[bytes], path: bytes) -> bool:
    if path != b"/" and b"/" in paths:
        return True
    end = path.rfind(b"/")
    while end > 0:
        if path[:end] in paths:
            return True
        end = path.rfind(b"/", 0, end)
    return False
