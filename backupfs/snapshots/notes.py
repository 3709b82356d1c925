"""Notes: append-only sealed records about a snapshot, which is itself never rewritten.

Key: notes/SNAPSHOT/HASH. Record: [1, snapshot id, kind, time_ns, host, arguments]. What changes what there is to see of
a snapshot is valid only when sealed under the maintain key. Source: docs/format.rst, "Notes".
"""

import os
import time
from dataclasses import dataclass

from backupfs.codec.keys import MAINTAIN
from backupfs.codec.records import Field, decode_record, encode_record
from backupfs.codec.sealing import HEADER, Kind, hash_object, seal_record, unseal_record
from backupfs.errors import DamagedObject, UnknownVersion
from backupfs.ids import SnapshotId
from backupfs.repository import layout
from backupfs.repository.objects import load_object
from backupfs.repository.repository import Repository
from backupfs.stores.store import Store

FORMAT = 1
FORGET = "forget"
UNDELETE = "undelete"
INDEX = "index"

_MAINTENANCE = frozenset({FORGET, UNDELETE, INDEX})


@dataclass(frozen=True, slots=True)
class Note:
    """One remark about a snapshot."""

    snapshot_id: SnapshotId
    kind: str
    time_ns: int
    host: str
    arguments: tuple[Field, ...] = ()


def put_note(repository: Repository, note: Note) -> None:
    """Store a note. Raises: WrongPassword if it needs a key that this slot does not give; StoreError."""
    repository.require_writable()
    kind = Kind.MAINTENANCE_NOTE if note.kind in _MAINTENANCE else Kind.NOTE
    data = seal_record(
        kind,
        repository.keyring,
        encode_record([FORMAT, note.snapshot_id, note.kind, note.time_ns, note.host, list(note.arguments)]),
    )
    repository.store.put(layout.note_prefix(note.snapshot_id) + hash_object(data).hex(), data)


def require_right(repository: Repository, kind: str) -> None:
    """Raise WrongPassword if a note of a kind needs a key that this slot does not give, before long work."""
    if kind in _MAINTENANCE:
        repository.keyring.key(MAINTAIN, repository.keyring.epoch(MAINTAIN))


def new_note(snapshot_id: SnapshotId, kind: str, *arguments: Field) -> Note:
    """Return a note of this host and this moment."""
    return Note(snapshot_id, kind, time.time_ns(), os.uname().nodename, arguments)


def load_note(repository: Repository, key: str, store: Store | None = None) -> Note:
    """Return the note under a key; `store` is where to look, the repository's own by default.

    Raises: DamagedObject, also for a note that needs the maintain key and is not under it; WrongPassword where this key
    slot lacks the key; UnknownVersion; StoreError.
    """
    what = f"the object {key}"
    data = load_object(store or repository.store, key)
    header = data[: HEADER.size]
    sealed_as = Kind.MAINTENANCE_NOTE if len(header) > 5 and header[5] == Kind.MAINTENANCE_NOTE else Kind.NOTE
    record = decode_record(unseal_record(data, sealed_as, repository.keyring, what), what)
    if record and isinstance(record[0], int) and record[0] != FORMAT:
        raise UnknownVersion(f"{what} has format {record[0]}, this backupfs knows format {FORMAT}: upgrade backupfs")
    match record:
        case [int(), bytes(snapshot_id), str(kind), int(time_ns), str(host), list(arguments), *_]:
            if kind in _MAINTENANCE and sealed_as != Kind.MAINTENANCE_NOTE:
                raise DamagedObject(f"{what} is not valid: {kind} needs the maintain key")
            if layout.note_prefix(snapshot_id) != key[: len(layout.note_prefix(snapshot_id))]:
                raise DamagedObject(f"{what} is about another snapshot than its place says")
            return Note(SnapshotId(snapshot_id), kind, time_ns, host, tuple(arguments))
    raise DamagedObject(f"{what} is damaged: it is no note of format 1")
