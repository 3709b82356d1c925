"""Snapshots: one sealed record each, never rewritten.

Record: [1, kind, host id, host name, sequence, hash of the host's previous snapshot, claimed time_ns, store's time_ns,
paths, tags, parent, root, statistics, user name, program, traits, image, volumes, signature], where root is
[tree, stat row, owner, group, xattrs] of `/`, which is in no directory, and image is [] for files, else
[name, [[disk, volume, source, form], …]].
Source: docs/format.rst, "Snapshots".
"""

import stat
from dataclasses import dataclass, fields
from datetime import UTC, datetime

from backupfs.codec.records import Field, decode_record, encode_record
from backupfs.errors import DamagedObject, UnknownVersion
from backupfs.ids import ID_SIZE, ChunkId, SnapshotId, short
from backupfs.snapshots.node import STAT_ROW, Xattrs
from backupfs.snapshots.tree import decode_xattrs
from backupfs.snapshots.volumes import Volume, decode_volumes, encode_volume

FILES = 0
IMAGE = 1
FORMAT = 1

# Traits: facts about everything below the root that save readers from asking.
HAS_XATTRS = 1
FREE_LEFT_OUT = 2  # of an image: the free space of file systems is zeros in it, whatever the disk had there
ROOT_INCOMPLETE = 4  # `/` is a directory that has more than its tree says

_NO_ID = SnapshotId(b"")
_CLOCK_TOLERANCE_NS = 24 * 3600 * 10**9


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the run that made a snapshot saw and added."""

    files: int = 0  # nodes that are not directories
    directories: int = 0
    size: int = 0  # bytes of all files, holes included
    files_new: int = 0
    files_changed: int = 0
    files_skipped: int = 0  # could not be read
    plain_added: int = 0  # bytes of new chunks
    stored_added: int = 0  # bytes put
    duration_ns: int = 0


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk in an image, as it was captured."""

    name: str
    volume: int  # its number in the table of volumes
    source: bytes  # the path that it was read from
    form: str  # raw, qcow2, …


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment of some paths, or of some disks, of one host."""

    kind: int
    host_id: bytes
    host: str
    sequence: int  # counts this host's snapshots in this repository
    previous: bytes  # id of the host's snapshot before, or empty
    time_ns: int  # as the host claims it
    store_time_ns: int  # as the store's clock showed it
    paths: tuple[bytes, ...]
    tags: tuple[str, ...]
    parent: bytes  # id of the snapshot it was compared with, or empty
    root: ChunkId
    statistics: Statistics
    user: str = ""
    program: str = ""
    traits: int = 0
    root_row: bytes = b""  # stat row of `/`; empty: unknown
    root_owner: bytes = b""
    root_group: bytes = b""
    root_xattrs: Xattrs | bytes = ()  # pairs, or the id of a tree chunk of pairs
    image: str = ""  # the name of an image
    disks: tuple[Disk, ...] = ()
    volumes: tuple[Volume, ...] = ()
    snapshot_id: SnapshotId = _NO_ID
    beside: tuple[bytes, ...] = ()  # ids of others with the number of the one before, made at the same time

    @property
    def time_name(self) -> str:
        """The time as the mount names it, in UTC and without colons."""
        return time_name(self.time_ns)


def has_doubtful_time(snapshot: Snapshot) -> bool:
    """Tell whether the host's clock was more than a day off the store's, or somebody said another time."""
    return abs(snapshot.time_ns - snapshot.store_time_ns) > _CLOCK_TOLERANCE_NS


def time_name(time_ns: int) -> str:
    """Return a time to the second, in UTC, fit for a file name everywhere."""
    return datetime.fromtimestamp(time_ns // 10**9, UTC).strftime("%Y-%m-%dT%H-%M-%SZ")


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """Return the canonical bytes of a snapshot's record."""
    statistics = [getattr(snapshot.statistics, item.name) for item in fields(Statistics)]
    others: list[Field] = [list(snapshot.beside)] if snapshot.beside else []
    return encode_record(
        [
            FORMAT,
            snapshot.kind,
            snapshot.host_id,
            snapshot.host,
            snapshot.sequence,
            snapshot.previous,
            snapshot.time_ns,
            snapshot.store_time_ns,
            list(snapshot.paths),
            list(snapshot.tags),
            snapshot.parent,
            [
                snapshot.root,
                snapshot.root_row,
                snapshot.root_owner,
                snapshot.root_group,
                snapshot.root_xattrs,
            ],
            statistics,
            snapshot.user,
            snapshot.program,
            snapshot.traits,
            _encode_image(snapshot),
            [encode_volume(volume) for volume in snapshot.volumes],
            b"",
            *others,
        ]
    )


def decode_snapshot(data: bytes, snapshot_id: SnapshotId) -> Snapshot:
    """Return the snapshot of a record. Raises: DamagedObject; UnknownVersion."""
    what = f"the snapshot {short(snapshot_id)}"
    record = decode_record(data, what)
    if record and isinstance(record[0], int) and record[0] != FORMAT:
        raise UnknownVersion(f"{what} has format {record[0]}, this backupfs knows format {FORMAT}: upgrade backupfs")
    match record:
        case [
            int(),
            int(kind),
            bytes(host_id),
            str(host),
            int(sequence),
            bytes(previous),
            int(time_ns),
            int(store_time_ns),
            list(paths),
            list(tags),
            bytes(parent),
            [bytes(root), bytes(root_row), bytes(root_owner), bytes(root_group), root_xattrs, *_],
            list(numbers),
            str(user),
            str(program),
            int(traits),
            list(image),
            list(volumes),
            bytes(),
            *later,
        ] if len(root) == ID_SIZE and is_directory_row(root_row):
            return Snapshot(
                kind,
                host_id,
                host,
                sequence,
                previous,
                time_ns,
                store_time_ns,
                tuple(_all_of(paths, bytes, what)),
                tuple(_all_of(tags, str, what)),
                parent,
                ChunkId(root),
                Statistics(*_all_of(numbers, int, what)[: len(fields(Statistics))]),
                user,
                program,
                traits,
                root_row,
                root_owner,
                root_group,
                decode_xattrs(root_xattrs),
                *_decode_image(image, len(volumes), what),
                decode_volumes(volumes, what),
                snapshot_id,
                _decode_beside(later),
            )
    raise DamagedObject(f"{what} is damaged: its fields are not those of format 1")


def _encode_image(snapshot: Snapshot) -> list[Field]:
    if snapshot.kind != IMAGE:
        return []
    return [snapshot.image, [[disk.name, disk.volume, disk.source, disk.form] for disk in snapshot.disks]]


def _decode_image(fields: list[Field], volumes: int, what: str) -> tuple[str, tuple[Disk, ...]]:
    match fields:
        case []:
            return "", ()
        case [str(name), list(records), *_]:
            disks = []
            for record in records:
                match record:
                    case [str(disk), int(volume), bytes(source), str(form), *_] if 0 <= volume < volumes:
                        disks.append(Disk(disk, volume, source, form))
                    case _:
                        raise DamagedObject(f"{what} is damaged: a disk of it is no disk")
            return name, tuple(disks)
    raise DamagedObject(f"{what} is damaged: its disks are not those of format 1")


def _decode_beside(later: list[Field]) -> tuple[bytes, ...]:
    match later:
        case [list(ids), *_]:
            return tuple(one for one in ids if isinstance(one, bytes))
    return ()


def is_directory_row(row: bytes) -> bool:
    """Tell whether a stat row can be that of a root; an empty one can."""
    return not row or (len(row) == STAT_ROW.size and stat.S_ISDIR(STAT_ROW.unpack(row)[0]))


def _all_of(items: list[Field], kind: type, what: str) -> list:  # type: ignore[type-arg]
    if not all(isinstance(item, kind) for item in items):
        raise DamagedObject(f"{what} is damaged: a field has the wrong type")
    return items
