"""Which files a backup leaves out: patterns in the manner of gitignore(5) over byte paths, and marker files.

What is as in git: comments, blank lines, trailing spaces, backslash escapes, `!`, `*`, `?`, `[…]`, `**`, a trailing `/`
for directories only, the last matching pattern decides, and nothing below an excluded directory can be taken back in,
because the scanner does not enter it. Case matters; names are bytes, and `?` is one byte.

What differs on purpose:

- A leading `/` means the root of the file system (`/home/*/.cache`), not the directory of a pattern file.
- A pattern with an inner `/` but no leading one matches at any depth, as restic does: `a/b` is `**/a/b`.
- A pattern that could never match is a UsageError, where git says nothing: an unclosed class, an unknown `[:name:]`,
  a range that runs backwards, a backslash at the end, and the components ``, `.` and `..`.

How it is fast: a pattern is split into its directory part and its last component. The directory parts are judged once
per directory; the names in it are then judged together by set, prefix, suffix and at most one regular expression.
No expression backtracks further than over one name, so a hostile name costs linear time per star at most.

An Excluder may be used from several threads at once: its caches are replaced whole and hold the same answer for all.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from backupfs.errors import UsageError, shown

CACHE_MARKER = b"CACHEDIR.TAG"
CACHE_SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55"  # bford.info/cachedir

_Byte = frozenset[int]  # the values that one byte of a name may have
_Glob = tuple[tuple[_Byte, ...], ...]  # one path component: runs of bytes with a star between each two

_SLASH = ord("/")
_NOT_SLASH: _Byte = frozenset(range(256)) - {_SLASH}
_CACHED_RULES = 256  # combinations of directory parts; real pattern lists make a handful


@dataclass(frozen=True, slots=True)
class Pattern:
    """One pattern, ready to match; made by `parse_pattern` and `parse_patterns`."""

    text: bytes  # as the user wrote it
    origin: str  # "FILE, line N", or empty for one given on the command line
    negated: bool
    directories_only: bool
    directory: bytes | None  # regular expression of the directories it applies in ("" is the root); None: in all
    name: _Glob  # the last component


def parse_patterns(lines: Iterable[bytes], base: bytes = b"/", source: bytes = b"") -> list[Pattern]:
    """Return the patterns of a file of patterns, in order; blank lines and comments give none.

    lines: with or without their line ends.
    base: the directory that a leading `/` stands for.
    source: name of the file, for messages.
    Raises: UsageError naming pattern, file and line.
    """
    patterns = []
    for number, line in enumerate(lines, 1):
        # An editor may have left a byte order mark; git overlooks it, too.
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        text = _without_trailing_spaces(text.removesuffix(b"\n").removesuffix(b"\r"))
        if text and not text.startswith(b"#"):
            origin = f"{shown(source)}, line {number}" if source else f"line {number}"
            patterns.append(parse_pattern(text, base, origin))
    return patterns


def parse_pattern(text: bytes, base: bytes = b"/", origin: str = "") -> Pattern:
    """Return one pattern as given on the command line: `#…` is no comment here and a trailing space counts.

    base: the directory that a leading `/` stands for.
    Raises: UsageError.
    """
    negated = text.startswith(b"!")
    try:
        components = _parse_components(text[1:] if negated else text)
        anchored = _literal(components[0]) == b""
        directories_only = len(components) > 1 and _literal(components[-1]) == b""
        components = components[1 if anchored else 0 : -1 if directories_only else None]
        if not components:
            raise _BadPatternError("it names nothing")
        for component in components:
            if _literal(component) in (b"", b".", b".."):
                raise _BadPatternError(
                    "it can never match, paths have no empty, '.' or '..' components; leave them out"
                )
    except _BadPatternError as error:
        place = f" ({origin})" if origin else ""
        raise UsageError(f"pattern '{shown(text)}'{place}: {error}") from None
    path: list[_Glob | None] = [None if _is_double_star(component) else component for component in components]
    if anchored:
        path[:0] = [_literal_glob(name) for name in base.split(b"/") if name]
    else:
        path.insert(0, None)
    name = path.pop()
    if name is None:
        # "a/**" is everything below a: any name in a or in a directory below it.
        path.append(None)
        name = ((), ())
    directory = None if path and not any(path) else _directory_regex(path)
    return Pattern(text, origin, negated, directories_only, directory, name)


class Excluder:
    """Decides for paths; the patterns are compiled once.

    Paths are absolute and normalised. Each path is judged by itself: the caller does not ask about what is below an
    excluded directory, as it does not enter it.
    """

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        self._rules: list[_Rule] = [(pattern, _matcher(_glob_regex(pattern.name))) for pattern in patterns]
        heads = {pattern.directory for pattern, _ in self._rules if pattern.directory is not None}
        self._heads = {head: _matcher(head) for head in heads}
        # Most directories are meant by no pattern with a directory part: one expression finds that out.
        self._any_head = _matcher(b"|".join(self._heads)) if self._heads else None
        self._everywhere = self._rules_under(frozenset({None}))
        self._cached: dict[frozenset[bytes | None], _DirectoryRules] = {}
        self._last = (b"", self._rules_in(b""))

    def excluded_names(self, directory: bytes, directories: Sequence[bytes], others: Sequence[bytes]) -> set[bytes]:
        """Return those of the names in one directory that are left out.

        directory: absolute path. directories, others: the names in it that are and are not directories; a symlink
        is never a directory. One call per directory is several times faster than `excluded` for each name.
        """
        rules = self._rules_in(directory)
        found = rules.others.excluded(others) if others else set()
        if directories:
            found |= rules.directories.excluded(directories)
        return found

    def excluded(self, path: bytes, is_dir: bool) -> Pattern | None:
        """Return the pattern that leaves this path out, or None if it is kept. The root itself is always kept."""
        directory, _, name = path.rpartition(b"/")
        if not name:
            return None
        last, rules = self._last
        if last != directory:
            rules = self._rules_in(directory)
            self._last = (directory, rules)
        return (rules.directories if is_dir else rules.others).deciding(name)

    def _rules_in(self, directory: bytes) -> "_DirectoryRules":
        if directory == b"/":
            directory = b""
        if self._any_head is None or not self._any_head(directory):
            return self._everywhere
        active = frozenset({None, *(head for head, matches in self._heads.items() if matches(directory))})
        rules = self._cached.get(active)
        if rules is None:
            rules = self._rules_under(active)
            if len(self._cached) >= _CACHED_RULES:
                self._cached = {}
            self._cached[active] = rules
        return rules

    def _rules_under(self, heads: frozenset[bytes | None]) -> "_DirectoryRules":
        active = [rule for rule in self._rules if rule[0].directory in heads]
        return _DirectoryRules(
            directories=_NameRules(active),
            others=_NameRules([rule for rule in active if not rule[0].directories_only]),
        )


def is_cache_directory(dir_fd: int) -> bool:
    """Tell whether the open directory is tagged as a cache (CACHEDIR.TAG with its signature)."""
    return _has_file(dir_fd, CACHE_MARKER, CACHE_SIGNATURE)


def has_marker(dir_fd: int, marker: bytes) -> bool:
    """Tell whether the open directory has an entry NAME or, for the form NAME:HEADER, a file that starts so.

    marker: one that `check_marker` accepts; NAME ends at the first colon.
    """
    name, _, header = marker.partition(b":")
    return _has_file(dir_fd, name, header)


def check_marker(marker: bytes) -> None:
    """Raise UsageError unless this can be the name of a marker file, or NAME:HEADER."""
    name = marker.partition(b":")[0]
    if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
        raise UsageError(f"'{shown(marker)}' is no name of a marker file: give NAME or NAME:HEADER, NAME without '/'")


def _has_file(dir_fd: int, name: bytes, header: bytes) -> bool:
    """Tell whether there is an entry of that name; with a header, a regular file that starts with it."""
    try:
        # A look first: opening a device or a fifo may do more than open it.
        mode = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode
        if not header:
            return True
        if not stat.S_ISREG(mode):
            return False
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError:
        return False
    try:
        return os.read(file, len(header)) == header
    except OSError:
        return False
    finally:
        os.close(file)


_Matches = Callable[[bytes], object]  # something true if the whole of the bytes match
_Rule = tuple[Pattern, _Matches]


class _NameSet:
    """The names that at least one of some globs matches."""

    def __init__(self, globs: Iterable[_Glob]) -> None:
        literals, prefixes, suffixes, expressions = set(), set(), set(), set()
        for glob in globs:
            literal, prefix, suffix = _literal(glob), _prefix(glob), _suffix(glob)
            if literal is not None:
                literals.add(literal)
            elif suffix is not None:
                suffixes.add(suffix)
            elif prefix is not None:
                prefixes.add(prefix)
            else:
                expressions.add(_glob_regex(glob))
        self._literals = frozenset(literals)
        self._prefixes = tuple(prefixes)
        self._suffixes = tuple(suffixes)
        self._expression = _matcher(b"|".join(sorted(expressions))) if expressions else None

    def among(self, names: Iterable[bytes]) -> set[bytes]:
        """Return those of the names that are in the set."""
        found = set(self._literals.intersection(names))
        if self._suffixes:
            suffixes = self._suffixes
            found.update([name for name in names if name.endswith(suffixes)])
        if self._prefixes:
            prefixes = self._prefixes
            found.update([name for name in names if name.startswith(prefixes)])
        if self._expression:
            found.update(filter(self._expression, names))
        return found


class _NameRules:
    """What decides over the names of one kind (directories or not) in one directory."""

    def __init__(self, rules: Sequence[_Rule]) -> None:
        self._last_first = list(reversed(rules))
        self._left_out = _NameSet(pattern.name for pattern, _ in rules if not pattern.negated)
        taken_in = [pattern.name for pattern, _ in rules if pattern.negated]
        self._taken_in = _NameSet(taken_in) if taken_in else None

    def excluded(self, names: Sequence[bytes]) -> set[bytes]:
        """Return the names that are left out."""
        found = self._left_out.among(names)
        if found and self._taken_in:
            # Only for names that both kinds of pattern match does the order of the patterns count.
            found -= {name for name in self._taken_in.among(found) if not self._decided(name)}
        return found

    def deciding(self, name: bytes) -> Pattern | None:
        """Return the last pattern that matches, if it is one that leaves out."""
        return self._decided(name) if self._left_out.among((name,)) else None

    def _decided(self, name: bytes) -> Pattern | None:
        for pattern, matches in self._last_first:
            if matches(name):
                return None if pattern.negated else pattern
        return None


@dataclass(frozen=True, slots=True)
class _DirectoryRules:
    directories: _NameRules
    others: _NameRules


class _BadPatternError(Exception):
    """The pattern is malformed; the message says how, the caller adds which one and where."""


def _without_trailing_spaces(line: bytes) -> bytes:
    """Return the line without the spaces at its end, but keep one that a backslash precedes."""
    kept = line.rstrip(b" ")
    backslashes = len(kept) - len(kept.rstrip(b"\\"))
    return kept + b" " if backslashes % 2 and len(kept) < len(line) else kept


def _parse_components(text: bytes) -> list[_Glob]:
    """Return the globs between the slashes; a slash at either end leaves an empty one, `((),)`, there."""
    components: list[_Glob] = []
    runs: list[tuple[_Byte, ...]] = []
    run: list[_Byte] = []
    position = 0
    while position < len(text):
        character = text[position : position + 1]
        position += 1
        if character == b"\\":
            character = text[position : position + 1]
            position += 1
            if not character:
                raise _BadPatternError("it ends in a backslash; write \\\\ for one in a name")
            if character != b"/":
                run.append(frozenset(character))
                continue
        if character == b"/":
            components.append((*runs, tuple(run)))
            runs, run = [], []
        elif character == b"*":
            runs.append(tuple(run))
            run = []
        elif character == b"?":
            run.append(_NOT_SLASH)
        elif character == b"[":
            values, position = _parse_class(text, position)
            run.append(values)
        else:
            run.append(frozenset(character))
    return [*components, (*runs, tuple(run))]


def _parse_class(text: bytes, position: int) -> tuple[_Byte, int]:
    """Return the values a bracket expression stands for and where it ends; position: behind its `[`.

    Source: wildmatch.c of git; POSIX.1-2017, "RE Bracket Expression", in the C locale.
    """
    negated = text[position : position + 1] in (b"!", b"^")
    position += negated
    values: set[int] = set()
    first: int | None = None  # what a following "-" would make the start of a range
    start = position
    while position == start or text[position : position + 1] != b"]":
        if text[position : position + 1] == b"-" and first is not None and text[position + 1 : position + 2] != b"]":
            last, position = _class_member(text, position + 1)
            if last < first:
                raise _BadPatternError("a range in [ ] runs backwards")
            values.update(range(first, last + 1))
            first = None
        elif named := re.compile(rb"\[:([^]]*):\]").match(text, position):
            if named[1] not in _NAMED_CLASSES:
                raise _BadPatternError(f"there is no class [:{shown(named[1])}:]")
            values.update(_NAMED_CLASSES[named[1]])
            first, position = None, named.end()
        else:
            first, position = _class_member(text, position)
            values.add(first)
    return (_NOT_SLASH - values if negated else _NOT_SLASH & values), position + 1


def _class_member(text: bytes, position: int) -> tuple[int, int]:
    if text[position : position + 1] == b"\\":
        position += 1
    if position >= len(text):
        raise _BadPatternError("the class is not closed; write \\[ for a bracket in a name")
    if text[position] == _SLASH:
        raise _BadPatternError("a class cannot hold '/'; if none was meant, write \\[ for the bracket")
    return text[position], position + 1


def _ascii(matches: Callable[[bytes], bool]) -> _Byte:
    return frozenset(value for value in range(128) if matches(bytes([value])))


_NAMED_CLASSES: dict[bytes, _Byte] = {
    b"alnum": _ascii(bytes.isalnum),
    b"alpha": _ascii(bytes.isalpha),
    b"blank": frozenset(b" \t"),
    b"cntrl": frozenset({*range(32), 127}),
    b"digit": _ascii(bytes.isdigit),
    b"graph": frozenset(range(33, 127)),
    b"lower": _ascii(bytes.islower),
    b"print": frozenset(range(32, 127)),
    b"punct": frozenset(range(33, 127)) - _ascii(bytes.isalnum),
    b"space": _ascii(bytes.isspace),
    b"upper": _ascii(bytes.isupper),
    b"xdigit": frozenset(b"0123456789abcdefABCDEF"),
}


def _is_double_star(glob: _Glob) -> bool:
    return len(glob) > 2 and not any(glob)


def _literal_glob(name: bytes) -> _Glob:
    return (tuple(frozenset({value}) for value in name),)


def _fixed(run: tuple[_Byte, ...]) -> bytes | None:
    """Return the only bytes that a run matches, if there are such."""
    if any(len(values) != 1 for values in run):
        return None
    return bytes(value for values in run for value in values)


def _literal(glob: _Glob) -> bytes | None:
    return _fixed(glob[0]) if len(glob) == 1 else None


def _prefix(glob: _Glob) -> bytes | None:
    return _fixed(glob[0]) if len(glob) > 1 and not any(glob[1:]) else None


def _suffix(glob: _Glob) -> bytes | None:
    return _fixed(glob[-1]) if len(glob) > 1 and not any(glob[:-1]) else None


def _run_regex(run: tuple[_Byte, ...]) -> bytes:
    return b"".join(_byte_regex(values) for values in run)


def _byte_regex(values: _Byte) -> bytes:
    if len(values) == 1:
        return re.escape(bytes(values))
    if values == _NOT_SLASH:
        return b"[^/]"
    if not values:
        return b"(?!)"
    ranges: list[list[int]] = []
    for value in sorted(values):
        if ranges and ranges[-1][1] == value - 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    return b"[%s]" % b"".join(b"\\x%02x-\\x%02x" % (low, high) for low, high in ranges)


def _glob_regex(glob: _Glob) -> bytes:
    """Return the expression of one component; it holds where the component must end behind it.

    Behind a star, the first place where the next run fits is as good as any later one if another star follows it,
    so the expression never goes back there (atomic groups).
    """
    first, *rest = glob
    if not rest:
        return _run_regex(first)
    inner = b"".join(b"(?>[^/]*?%s)" % _run_regex(run) for run in rest[:-1] if run)
    return _run_regex(first) + inner + b"[^/]*" + _run_regex(rest[-1])


def _directory_regex(path: Sequence[_Glob | None]) -> bytes:
    """Return the expression of a directory, "" being the root; None stands for `**`.

    Between two `**`, the first place that fits is as good as any later one, as in `_glob_regex`.
    """
    groups = [b""]
    for component in path:
        if component is None:
            groups.append(b"")
        else:
            groups[-1] += b"/" + _glob_regex(component)
    first, *rest = groups
    if not rest:
        return first
    inner = b"".join(b"(?>(?:/[^/]*+)*?%s(?=/|\\Z))" % group for group in rest[:-1] if group)
    return first + inner + b"(?:/[^/]*+)*" + rest[-1]


def _matcher(expression: bytes) -> _Matches:
    return re.compile(expression).fullmatch
