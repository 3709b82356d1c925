"""Which snapshots a repository has, and which one a name means."""

import logging
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from backupfs.codec.sealing import Kind, hash_object, seal_record, unseal_record
from backupfs.errors import (
    DamagedObject,
    ObjectMissing,
    RepositoryError,
    UnknownSnapshot,
    UnknownVersion,
    WrongPassword,
    shown,
)
from backupfs.ids import SnapshotId, short
from backupfs.repository import layout, local
from backupfs.repository.objects import load_object
from backupfs.repository.repository import Repository
from backupfs.snapshots import notes
from backupfs.snapshots.indexing import indexed
from backupfs.snapshots.losses import Doubt, Doubts, LetGo, Loss, find_absent, find_losses, lasts_of
from backupfs.snapshots.snapshot import FILES, IMAGE, Snapshot, decode_snapshot, encode_snapshot
from backupfs.snapshots.verification import VERIFY, Verification, decode_verification
from backupfs.stores.store import Store
from backupfs.stores.together import at_once, each

log = logging.getLogger(__name__)


@dataclass(slots=True)
class SnapshotList:
    """The snapshots of a repository, oldest first; `refresh` reads only what is new."""

    repository: Repository
    store: Store | None = None  # to look into; None: what is kept on this machine is as good as the store's
    snapshots: list[Snapshot] = field(default_factory=list)  # without the forgotten ones
    damaged: dict[str, str] = field(default_factory=dict)  # key → what is wrong
    newer: set[str] = field(default_factory=set)  # keys of those among the damaged that a newer program can read
    is_quiet: bool = False  # whoever asked tells of damage
    damaged_forgotten: dict[str, str] = field(default_factory=dict)  # the same, of snapshots that were forgotten
    forgotten: set[SnapshotId] = field(default_factory=set)  # whatever is left of them
    _let_go: list[LetGo] = field(default_factory=list)
    _gone: set[SnapshotId] = field(default_factory=set)  # ids that were asked for and are not there
    _loaded: dict[SnapshotId, Snapshot] = field(default_factory=dict)
    _notes: dict[str, notes.Note | None] = field(default_factory=dict)
    _damaged_notes: dict[str, str] = field(default_factory=dict)
    _verifications: dict[SnapshotId, list[Verification]] = field(default_factory=dict)
    _indexed: dict[str, Snapshot | None] = field(default_factory=dict)  # key of a note → the image as it shows it
    _newest_index: dict[SnapshotId, tuple[int, str]] = field(default_factory=dict)  # (time, key) of the one in use

    def refresh(self) -> bool:
        """Read what is new in the store; return whether anything changed. Raises: StoreError."""
        before = list(self.snapshots), len(self._notes), dict(self.damaged)
        store = self.repository.store
        damaged: dict[str, str] = {}
        prefixes = (layout.SNAPSHOTS, layout.NOTES)
        objects, note_objects = each(store, lambda prefix: list(store.list(prefix)), prefixes)
        note_keys = [info.key for info in note_objects]
        self._load_notes(note_keys)
        self.forgotten = self._forgotten(note_keys)
        identities = (layout.id_in_key(info.key) for info in objects)
        wanted = [SnapshotId(identity) for identity in identities if identity is not None]
        known: set[SnapshotId] = set()
        present: dict[SnapshotId, Snapshot] = {}
        while True:
            fresh = [snapshot_id for snapshot_id in wanted if snapshot_id not in self._loaded]
            found = each(store, lambda snapshot_id: self._load(snapshot_id, damaged), fresh)
            loaded = dict(zip(fresh, found, strict=True))
            for snapshot_id in wanted:
                snapshot = self._loaded.get(snapshot_id) or loaded.get(snapshot_id)
                if snapshot is not None:
                    present[snapshot_id] = snapshot
            known.update(wanted)
            # Each of these may name others.
            wanted = self._unlisted(known, present.values())
            if not wanted:
                break
        self._loaded = present
        as_shown = present | self._with_indexes(note_keys)
        self.damaged = damaged | self._damaged_notes
        self.snapshots = sorted(
            (snapshot for snapshot_id, snapshot in as_shown.items() if snapshot_id not in self.forgotten),
            key=lambda snapshot: (snapshot.time_ns, snapshot.sequence, snapshot.snapshot_id),
        )
        return (self.snapshots, len(self._notes), self.damaged) != before

    def _unlisted(self, known: set[SnapshotId], present: Collection[Snapshot]) -> list[SnapshotId]:
        """Return what is there though a listing does not show it, which may be stale.

        Asked for is what this machine has seen last, and what others name. known: what was looked for already.
        """
        repository = self.repository
        seen = local.last_seen(repository.local.state, repository.config.repository_id)
        missed = set(map(SnapshotId, find_absent(present, seen))) - known - self.forgotten - self._gone
        found: list[SnapshotId] = []
        for snapshot_id in missed:
            try:
                repository.store.size(layout.key_of(Kind.SNAPSHOT, snapshot_id))
                found.append(snapshot_id)
            except ObjectMissing:
                self._gone.add(snapshot_id)
        return found

    def _load(self, snapshot_id: SnapshotId, damaged: dict[str, str]) -> Snapshot | None:
        key = layout.key_of(Kind.SNAPSHOT, snapshot_id)
        try:
            return load_snapshot(self.repository, snapshot_id, self.store or self.repository.hot)
        except (RepositoryError, ObjectMissing) as error:
            if snapshot_id in self.forgotten:
                self.damaged_forgotten[key] = str(error)
                return None
            # A live mount asks again and again; one line is enough.
            if self.damaged.get(key) != str(error) and not self.is_quiet:
                log.warning("%s", error)
            damaged[key] = str(error)
            if isinstance(error, UnknownVersion):
                self.newer.add(key)
            return None

    @property
    def present(self) -> Collection[Snapshot]:
        """All that can be read, forgotten ones too."""
        return self._loaded.values()

    def as_stored(self, snapshot: Snapshot) -> Snapshot:
        """Return a snapshot as its own object has it, whatever notes say."""
        return self._loaded[snapshot.snapshot_id]

    def _load_notes(self, listed: list[str]) -> None:
        fresh = [key for key in listed if key not in self._notes]
        self._notes.update(zip(fresh, each(self.repository.store, self._load_note, fresh), strict=True))
        for key in fresh:
            self._take_verification(key, self._notes[key])

    def next_index_ns(self, snapshot: Snapshot) -> int:
        """Return the time for another index of an image, which is to be the newest whatever the clocks were."""
        age, _ = self._newest_index.get(snapshot.snapshot_id, (0, ""))
        return max(time.time_ns(), age + 1)

    def _with_indexes(self, listed: list[str]) -> dict[SnapshotId, Snapshot]:
        """Return the images that have an index, as the newest one that is valid shows them."""
        found: dict[SnapshotId, Snapshot] = {}
        newest: dict[SnapshotId, tuple[int, str]] = {}
        self._newest_index = newest
        for key in listed:
            note = self._notes[key]
            if note is None or note.kind != notes.INDEX or note.snapshot_id not in self._loaded:
                continue
            if key not in self._indexed:
                self._indexed[key] = self._read_index(key, note)
            shown_as, age = self._indexed[key], (note.time_ns, key)
            if shown_as is not None and age > newest.get(note.snapshot_id, (-1, "")):
                found[note.snapshot_id], newest[note.snapshot_id] = shown_as, age
        return found

    def _read_index(self, key: str, note: notes.Note) -> Snapshot | None:
        try:
            return indexed(self._loaded[note.snapshot_id], note.arguments, f"the object {key}")
        except DamagedObject as error:
            log.warning("%s; it is ignored", error)
            self._damaged_notes[key] = str(error)
            return None

    def _forgotten(self, listed: list[str]) -> set[SnapshotId]:
        self._let_go = []
        forgets: dict[SnapshotId, set[bytes]] = {}
        undone: dict[SnapshotId, set[bytes]] = {}
        for key in listed:
            note = self._notes[key]
            if note is None or note.kind not in (notes.FORGET, notes.UNDELETE):
                continue
            # No clock decides: an undelete names the notes that it takes back.
            if note.kind == notes.FORGET:
                forgets.setdefault(note.snapshot_id, set()).add(layout.id_in_key(key) or b"")
            else:
                undone.setdefault(note.snapshot_id, set()).update(
                    argument for argument in note.arguments if isinstance(argument, bytes)
                )
        valid = {snapshot_id: ids - undone.get(snapshot_id, set()) for snapshot_id, ids in forgets.items()}
        for key in listed:
            note = self._notes[key]
            if note is not None and note.kind == notes.FORGET and layout.id_in_key(key) in valid[note.snapshot_id]:
                match note.arguments:
                    case (bytes(host_id), int(first), int(last)):
                        self._let_go.append(LetGo(host_id, first, last, note.snapshot_id))
        return {snapshot_id for snapshot_id, note_ids in valid.items() if note_ids}

    def _take_verification(self, key: str, note: notes.Note | None) -> None:
        if note is not None and note.kind == VERIFY:
            try:
                self._verifications.setdefault(note.snapshot_id, []).append(decode_verification(note))
            except DamagedObject as error:
                log.warning("the object %s: %s; it is ignored", key, error)
                self._damaged_notes[key] = str(error)

    def _load_note(self, key: str) -> notes.Note | None:
        try:
            return notes.load_note(self.repository, key, self.store or self.repository.hot)
        except WrongPassword as error:
            # A slot that may not destroy cannot read what only the maintain key may have written.
            log.debug("%s; it is ignored", error)
        except (RepositoryError, ObjectMissing) as error:
            log.warning("%s; it is ignored", error)
            self._damaged_notes[key] = str(error)
            if isinstance(error, UnknownVersion):
                self.newer.add(key)
        return None

    def verifications(self, snapshot_id: SnapshotId) -> list[Verification]:
        """Return what is known of a snapshot's soundness, oldest first."""
        return sorted(self._verifications.get(snapshot_id, ()), key=lambda made: made.time_ns)

    def images(self, name: str | None) -> list[Snapshot]:
        """Return the images of a name, oldest first."""
        return [snapshot for snapshot in self.snapshots if snapshot.kind == IMAGE and snapshot.image == name]

    def find(self, name: str) -> Snapshot:
        """Return the snapshot that a user's name means: an id, its prefix, `latest`, `HOST:latest` or `IMAGE:latest`.

        Raises: UnknownSnapshot; DamagedObject if a snapshot that may be later than the latest cannot be read.
        """
        if name == "latest" or name.endswith(":latest"):
            host = None if name == "latest" else name.removesuffix(":latest")
            fitting = [
                snapshot
                for snapshot in self.snapshots
                if snapshot.kind == FILES and (host is None or snapshot.host == host)
            ] or self.images(host)
            if not fitting:
                self._require_none_lost(name, host)
                if host is None:
                    raise UnknownSnapshot("the repository has no file snapshot yet; of images give IMAGE:latest")
                raise UnknownSnapshot(
                    f"the repository has no file snapshot of a host {shown(host)}, and no image {shown(host)}; "
                    "`backupfs snapshots` lists what there is"
                )
            self.confirmed_losses()
            doubt = self.doubts().about(fitting, of_any_machine=host is None)
            if doubt:
                raise DamagedObject(
                    f"{shown(name)} may be another snapshot: {doubt}; the last one that can be read is "
                    f"{short(fitting[-1].snapshot_id)} of {fitting[-1].time_name}: name it to use it"
                )
            return fitting[-1]
        snapshots = {snapshot.snapshot_id: snapshot for snapshot in self.snapshots}
        return snapshots[_that_fits(name, snapshots)]

    def _require_none_lost(self, name: str, host: str | None) -> None:
        """Raise DamagedObject if a name may mean what is gone or cannot be read: what names that had nobody knows."""
        losses = sorted(self.confirmed_losses(), key=lambda loss: loss.host != host)
        if missed := [*map(str, losses), *self._unreadable().values()]:
            raise DamagedObject(
                f"nothing that can be read fits {shown(name)}, which may mean what is gone or damaged: "
                f"{'; '.join(missed[:3])}; `backupfs check` says more"
            )

    def find_any(self, name: str) -> SnapshotId:
        """Return the id that a user's name means, which may be that of a snapshot that is damaged or lost, too.

        Raises: UnknownSnapshot; UnknownVersion for one that is not damaged, but of a newer format; DamagedObject.
        """
        if name == "latest" or name.endswith(":latest"):
            return self.find(name).snapshot_id
        unreadable = self._unreadable()
        lost = [SnapshotId(loss.name) for loss in self.losses()]
        found = _that_fits(name, [*(snapshot.snapshot_id for snapshot in self.snapshots), *unreadable, *lost])
        if layout.key_of(Kind.SNAPSHOT, found) in self.newer and found in unreadable:
            raise UnknownVersion(f"{unreadable[found]}; it is not damaged, so it is not forgotten unseen")
        return found

    def doubts(self) -> Doubts:
        """Return what was made and cannot be read, so that it may be later than what is there."""
        repository, present = self.repository, self._loaded.values()
        absent = find_absent(present, local.last_seen(repository.local.state, repository.config.repository_id))
        found = [Doubt(loss.host_id, loss.last, str(loss)) for loss in self.losses()]
        for snapshot_id, what in self._unreadable().items():
            known = absent.get(snapshot_id)
            found.append(Doubt(known.host, known.number, what) if known else Doubt(b"", 0, what))
        return Doubts(tuple(found), present)

    def _unreadable(self) -> dict[SnapshotId, str]:
        keys = [(key, what) for key, what in self.damaged.items() if key.startswith(layout.SNAPSHOTS)]
        return {SnapshotId(layout.id_in_key(key) or b""): what for key, what in keys}

    def losses(self) -> list[Loss]:
        """Return which snapshots are gone, by what is there and by what this machine has seen."""
        repository = self.repository
        return self._losses_if(local.last_seen(repository.local.state, repository.config.repository_id))

    def _losses_if(self, seen: Mapping[bytes, local.Last]) -> list[Loss]:
        broken = {*self._unreadable(), *(layout.id_in_key(key) or b"" for key in self.damaged_forgotten)}
        return find_losses(self._loaded.values(), seen, self.forgotten, broken, self._let_go)

    def confirmed_losses(self) -> list[Loss]:
        """Return the same, of a list that is not older than what this machine has seen. Raises: StoreError."""
        if self.losses():
            self.refresh()
        return self.losses()

    def note_seen(self) -> None:
        """Let this machine remember what is there, forgotten snapshots included.

        Where only what it saw before tells that one is lost, it goes on to remember that, until it is forgotten.
        """
        repository = self.repository
        state, repository_id = repository.local.state, repository.config.repository_id
        lasts = lasts_of(self._loaded.values())
        told_by_lasts = set(self._losses_if(lasts))
        kept = {loss.host_id for loss in self.losses() if loss not in told_by_lasts}
        local.note_seen(state, repository_id, {host: last for host, last in lasts.items() if host not in kept})

    def selected(self, hosts: Iterable[str], tags: Iterable[str], paths: Iterable[bytes]) -> list[Snapshot]:
        """Return the snapshots of any of the hosts that have all the tags and all the paths; none given: all."""
        hosts, tags, paths = set(hosts), set(tags), set(paths)
        return [
            snapshot
            for snapshot in self.snapshots
            if (not hosts or snapshot.host in hosts) and tags <= set(snapshot.tags) and paths <= set(snapshot.paths)
        ]

    def last_of_host(self, host_id: bytes) -> Snapshot | None:
        """Return the host's snapshot of the highest sequence, forgotten or not."""
        own = [snapshot for snapshot in self._loaded.values() if snapshot.host_id == host_id]
        return max(own, key=lambda snapshot: snapshot.sequence, default=None)


def _that_fits(name: str, snapshot_ids: Iterable[SnapshotId]) -> SnapshotId:
    """Return the one id that begins with a name. Raises: UnknownSnapshot."""
    if not name:
        raise UnknownSnapshot(
            "a snapshot needs a name: its id or the first digits, latest, HOST:latest or IMAGE:latest"
        )
    fitting = [snapshot_id for snapshot_id in snapshot_ids if snapshot_id.hex().startswith(name.lower())]
    if len(fitting) > 1:
        several = ", ".join(map(short, fitting[:5]))
        raise UnknownSnapshot(f"{shown(name)} fits several snapshots ({several} …): give more digits")
    if not fitting or len(name) < 2:
        raise UnknownSnapshot(f"there is no snapshot {shown(name)}; `backupfs snapshots` lists what there is")
    return fitting[0]


def load_all(repository: Repository) -> SnapshotList:
    """Bring the indexes up to date and return the snapshots; a store that is far is asked for both at once.

    Raises: StoreError.
    """
    listed = SnapshotList(repository)
    at_once(repository.store, repository.load_indexes, listed.refresh)
    return listed


def load_snapshots(repository: Repository) -> SnapshotList:
    """Return the list of a repository's snapshots, read now. Raises: StoreError."""
    listed = SnapshotList(repository)
    listed.refresh()
    return listed


def load_snapshot(repository: Repository, snapshot_id: SnapshotId, store: Store | None = None) -> Snapshot:
    """Return one snapshot; `store` is where to look, the repository's own by default.

    Raises: DamagedObject; ObjectMissing; StoreError.
    """
    key = layout.key_of(Kind.SNAPSHOT, snapshot_id)
    data = load_object(store or repository.store, key)
    return decode_snapshot(unseal_record(data, Kind.SNAPSHOT, repository.keyring, f"the object {key}"), snapshot_id)


def put_snapshot(repository: Repository, snapshot: Snapshot) -> Snapshot:
    """Store a snapshot, which commits it, and return it with its id. Raises: StoreError."""
    data = seal_record(Kind.SNAPSHOT, repository.keyring, encode_snapshot(snapshot))
    snapshot_id = SnapshotId(hash_object(data))
    repository.hot.put(layout.key_of(Kind.SNAPSHOT, snapshot_id), data)
    return replace(snapshot, snapshot_id=snapshot_id)
