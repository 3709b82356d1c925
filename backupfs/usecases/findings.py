"""What a check finds: one finding per object, with the snapshots and paths that it hits; bounded."""

from dataclasses import dataclass, field
from enum import StrEnum

from backupfs.errors import BackupfsError, ObjectArchived, ObjectMissing, StoreError

MOST_FINDINGS = 1000
MOST_PATHS = 20  # named per object; the rest is counted
_MOST_SNAPSHOTS = 1000
_MOST_TEXTS = 3
# So many requests in a row that are refused or not answered: the rest would be, too.
MOST_FAILED = 3


class Severity(StrEnum):
    """How bad a finding is."""

    INFORMATION = "information"  # worth knowing, nothing is wrong
    WARNING = "warning"  # nothing is damaged that this check can see, but somebody should look
    UNREAD = "unread"  # archived, or refused, or not answered: nobody knows
    DAMAGE = "damage"  # bytes are not what was written, or not there


_ORDER = (Severity.DAMAGE, Severity.UNREAD, Severity.WARNING, Severity.INFORMATION)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about one object of the repository."""

    severity: Severity
    key: str  # of the object, or the prefix of several
    what: str
    snapshots: tuple[str, ...] = ()  # short ids of those that are hit
    paths: tuple[bytes, ...] = ()  # the first `MOST_PATHS` that are hit
    paths_total: int = 0  # the most that are hit in any one snapshot


@dataclass(slots=True)
class _Entry:
    severity: Severity
    texts: list[str] = field(default_factory=list)
    more_texts: int = 0
    snapshots: dict[str, None] = field(default_factory=dict)
    paths: dict[bytes, None] = field(default_factory=dict)
    current: tuple[str, int] = ("", 0)  # snapshot, paths hit in it so far
    paths_total: int = 0


class Findings:
    """Collects findings by object. Belongs to one thread at a time."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self.omitted = 0  # objects beyond `MOST_FINDINGS`
        self.damaged = False
        self._archived: dict[str, set[str]] = {}  # prefix → keys of objects
        self._unread: set[str] = set()  # keys of objects and prefixes of others that could not be read
        self._failed = 0  # requests in a row

    def add(self, severity: Severity, key: str, what: str) -> None:
        """Note something about an object; the same text twice is noted once."""
        if severity == Severity.DAMAGE:
            self.damaged = True
        entry = self._entries.get(key)
        if entry is None:
            if len(self._entries) >= MOST_FINDINGS:
                self.omitted += 1
                return
            entry = self._entries[key] = _Entry(severity)
        entry.severity = min(entry.severity, severity, key=_ORDER.index)
        if what in entry.texts:
            return
        if len(entry.texts) < _MOST_TEXTS:
            entry.texts.append(what)
        else:
            entry.more_texts += 1

    def damage(self, key: str, what: str) -> None:
        """Note damage."""
        self.add(Severity.DAMAGE, key, what)

    def failed(self, key: str, error: BackupfsError, what: str = "") -> None:
        """Note why an object, or what is below a prefix, could not be had: it is damaged, or nobody could look.

        what: words that are plainer than the error's own. Raises: StoreError, the error itself, where the store gives
        nothing any more.
        """
        if not isinstance(error, StoreError) or isinstance(error, ObjectMissing):
            self.damage(key, what or str(error))
        elif isinstance(error, ObjectArchived):
            self._archived.setdefault(key.rpartition("/")[0] + "/", set()).add(key)
        else:
            self._failed += 1
            if self._failed >= MOST_FAILED:
                raise error
            self._unread.add(key)
            self.add(Severity.UNREAD, key, what or f"it could not be read: {error}")

    def succeeded(self) -> None:
        """Note that the store gave what it was asked for."""
        self._failed = 0

    @property
    def archived(self) -> int:
        """The number of objects that are archived."""
        return sum(map(len, self._archived.values()))

    @property
    def unread(self) -> int:
        """The number of objects, and of prefixes, that could not be read, archived ones included."""
        return len(self._unread) + self.archived

    def hit(self, key: str, snapshot: str, path: bytes | None = None) -> None:
        """Note that an object's damage hits a snapshot, at a path; snapshots come one after another."""
        entry = self._entries.get(key)
        if entry is None:
            return
        if len(entry.snapshots) < _MOST_SNAPSHOTS:
            entry.snapshots[snapshot] = None
        if path is None:
            return
        if len(entry.paths) < MOST_PATHS:
            entry.paths[path] = None
        count = entry.current[1] + 1 if entry.current[0] == snapshot else 1
        entry.current = (snapshot, count)
        entry.paths_total = max(entry.paths_total, count)

    def listed(self) -> tuple[Finding, ...]:
        """Return all findings, the worst first, by key."""
        listed = [
            Finding(
                entry.severity,
                key,
                "; ".join(entry.texts) + (f"; and {entry.more_texts} more of this kind" if entry.more_texts else ""),
                tuple(entry.snapshots),
                tuple(entry.paths),
                entry.paths_total,
            )
            for key, entry in self._entries.items()
        ]
        for prefix, keys in self._archived.items():
            objects = (
                "1 object is archived and was" if len(keys) == 1 else f"{len(keys):,} objects are archived and were"
            )
            listed.append(Finding(Severity.UNREAD, prefix, f"{objects} not read"))
        return tuple(sorted(listed, key=lambda finding: (_ORDER.index(finding.severity), finding.key)))
