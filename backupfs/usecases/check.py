"""Check a repository: everything that snapshots need is there and is what was written.

Metadata are always read and authenticated: config, key slots, index, snapshots, notes, and every tree page once. Data
are compared with a listing of the packs; with `read_data` every pack is read whole and every chunk hashed. Nothing
that is damaged ends the run: what can be checked is checked, and the findings say what is hit. What is archived, or
refused, or not answered is no damage: it counts as unread, and a store that gives nothing any more ends the run.
Memory: one bit per chunk, the local form of the index on disk, a few packs in flight.
"""

import math
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from backupfs import workers
from backupfs.codec.keys import read_slot_info
from backupfs.codec.sealing import Kind
from backupfs.errors import ObjectMissing, RepositoryError, StoreError, UnknownVersion, UsageError, WrongPassword
from backupfs.ids import ChunkId, ObjectId, SnapshotId, short
from backupfs.repository import layout, local
from backupfs.repository.config import check_mac, encode_config, read_config
from backupfs.repository.index import Index
from backupfs.repository.objects import get_surely, load_object
from backupfs.repository.pack import PackRef
from backupfs.repository.repository import Repository
from backupfs.snapshots.listing import SnapshotList, load_snapshot
from backupfs.snapshots.notes import load_note
from backupfs.snapshots.snapshot import Snapshot
from backupfs.stores.requests import RequestCounts
from backupfs.usecases.check_copies import INDEX_KIND, NAMED_ANEW, Copies
from backupfs.usecases.check_trees import TreeCheck
from backupfs.usecases.events import Progress, Report
from backupfs.usecases.findings import Finding, Findings, Severity

# Packs in flight: each is read and unsealed by one thread that holds about 20 MiB.
_PACKS_AT_ONCE = min(8, workers.CPU_THREADS + 2)
_PROGRESS_SECONDS = 0.2
_OF_NOTE = (
    "what it said is not known, as that a snapshot was forgotten: forget again what shows again, then the object may "
    "be deleted"
)
_OF_SEGMENT = f"the packs are read instead; delete the object, and {NAMED_ANEW}"
_KINDS = (Kind.TREE_PACK, Kind.DATA_PACK)


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """What a user can say about a check."""

    read_data: bool = False  # read every pack whole
    subset: str | None = None  # read only a part of the packs: "5%" (another part each time) or "2/10"
    snapshots: frozenset[SnapshotId] = frozenset()  # look at these only, and read the packs that they need; empty: all


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check looked at and found."""

    findings: tuple[Finding, ...]  # the worst first
    findings_omitted: int  # beyond those that are listed
    damaged: bool
    unread: int  # objects, and prefixes, that could not be read and of which nothing is known, archived ones included
    archived: int
    snapshots_hit: tuple[SnapshotId, ...]  # those that need something that is damaged
    snapshots: int
    tree_chunks: int  # distinct ones that were read
    entries: int  # of distinct tree pages
    packs: int  # that the index names
    packs_read: int
    bytes_read: int  # of those
    unnamed_packs: int  # in no index
    unnamed_bytes: int
    noted_packs: int  # damaged ones that backups of this machine will take nothing from
    requests: RequestCounts
    duration_ns: int


async def check(repository: Repository, options: CheckOptions, report: Report) -> CheckResult:
    """Check a repository; damage is in the result, never raised.

    Needs no loaded indexes: it trusts no cache and reads the index from the store.
    Raises: UsageError if the subset cannot be understood; StoreError if the store gives no index, or nothing any more.
    """
    chosen = _subset(options.subset) if options.subset is not None else _everything
    run = _Check(
        repository, chosen if options.read_data or options.subset is not None else None, options.snapshots, report
    )
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.stop_when_cancelled)
            nursery.start_soon(run.tell_progress)
            result = await run.through()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        of_store, others = group.split((StoreError, trio.Cancelled))
        first = _first_of_store(of_store) if others is None and of_store is not None else None
        raise first or group from None
    return result


def _first_of_store(group: BaseExceptionGroup[BaseException]) -> StoreError | None:
    for error in group.exceptions:
        found = _first_of_store(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(found, StoreError):
            return found
    return None


def _everything(_pack_id: ObjectId) -> bool:
    return True


def _subset(text: str) -> Callable[[ObjectId], bool]:
    """Return the predicate of a part of the packs. Pack ids are hashes, so ranges of them are fair parts."""
    try:
        if text.endswith("%"):
            part = float(text[:-1]) / 100
            if not 0 < part <= 1 or not math.isfinite(part):
                raise ValueError
            start = random.randrange(1 << 64)
            return lambda pack_id: (int.from_bytes(pack_id[:8], "big") - start) % (1 << 64) < part * (1 << 64)
        which, of = map(int, text.split("/"))
        if not 1 <= which <= of:
            raise ValueError
    except ValueError:
        raise UsageError(f"{text} is no part of the packs: give a percentage like 5% or a slice like 2/10") from None
    return lambda pack_id: int.from_bytes(pack_id[:8], "big") * of >> 64 == which - 1


class _Check:
    """The phases of one check. Belongs to the event loop; each phase runs in one thread, packs are read in several."""

    def __init__(
        self,
        repository: Repository,
        chosen: Callable[[ObjectId], bool] | None,
        only: frozenset[SnapshotId],
        report: Report,
    ) -> None:
        self._repository = repository
        self._chosen = chosen
        self._only = only
        self._report = report
        self._findings = Findings()
        self._snapshots: list[Snapshot] = []
        self._hit: list[SnapshotId] = []
        self._left: list[Snapshot] = []  # as if they were snapshots: the directories that verifications left
        self._behind: list[Snapshot] = []  # images as they were before an index: it may turn out damaged
        self._copies: dict[Kind, Copies] = {}
        self._present: dict[Kind, list[tuple[PackRef, int]]] = {}
        self._trees: TreeCheck | None = None
        self._stop = threading.Event()
        self._packs_read = self._bytes_read = self._bytes_to_read = 0
        self._last_sequence = 0  # of this host's snapshots
        self._noted_packs = 0

    async def stop_when_cancelled(self) -> None:
        """Let the threads end when the check is cancelled."""
        try:
            await trio.sleep_forever()
        finally:
            self._stop.set()

    async def tell_progress(self) -> None:
        """Report how far it has come."""
        while True:
            await trio.sleep(_PROGRESS_SECONDS)
            entries = self._trees.counts.entries if self._trees is not None else 0
            self._report(Progress("check", entries, self._bytes_read, size_total=self._bytes_to_read))

    async def through(self) -> CheckResult:
        """Run all phases."""
        started = time.monotonic_ns()
        await workers.request(self._check_config_and_slots)
        # Snapshots before the index, the index before the packs: the reverse of the order in which they are put, so
        # that a backup which runs meanwhile is no damage.
        await workers.request(self._load_snapshots)
        folder = await workers.request(self._new_folder)
        try:
            for kind in _KINDS:
                await workers.request(self._load_index, kind, folder)
                self._present[kind] = await workers.request(self._copies[kind].compare_with_listing)
            if self._chosen is not None:
                if self._only:
                    self._chosen = await self._needed_packs()
                await self._read_packs(self._chosen)
            self._trees = self._new_tree_check()
            await workers.request(self._check_trees, self._trees)
            await workers.io(self._note_damaged_packs)
        finally:
            if folder is not None:
                with trio.CancelScope(shield=True):
                    await workers.io(_delete_folder, folder)
        return self._result(self._trees, time.monotonic_ns() - started)

    def _new_tree_check(self) -> TreeCheck:
        return TreeCheck(self._copies[Kind.TREE_PACK], self._copies[Kind.DATA_PACK], self._findings, self._stop)

    async def _needed_packs(self) -> Callable[[ObjectId], bool]:
        """Find out which packs the chosen snapshots need: a first walk, whose verdicts are forgotten."""
        await workers.request(self._check_trees, self._new_tree_check())
        needed: set[ObjectId] = set()
        for copies in self._copies.values():
            needed |= copies.needed
            copies.forget_verdicts()
        return needed.__contains__

    def _result(self, trees: TreeCheck, duration_ns: int) -> CheckResult:
        copies = self._copies.values()
        return CheckResult(
            findings=self._findings.listed(),
            findings_omitted=self._findings.omitted,
            damaged=self._findings.damaged,
            unread=self._findings.unread,
            archived=self._findings.archived,
            snapshots_hit=tuple(self._hit),
            snapshots=len(self._snapshots),
            tree_chunks=trees.counts.tree_chunks,
            entries=trees.counts.entries,
            packs=sum(item.named_packs for item in copies),
            packs_read=self._packs_read,
            bytes_read=self._bytes_read,
            unnamed_packs=sum(item.unnamed.packs for item in copies),
            unnamed_bytes=sum(item.unnamed.size for item in copies),
            noted_packs=self._noted_packs,
            requests=self._repository.store.requests,
            duration_ns=duration_ns,
        )

    # Phases, each in a thread.

    def _check_config_and_slots(self) -> None:
        repository, store = self._repository, self._repository.store
        try:
            data = get_surely(store, layout.CONFIG)
            if store.is_far and data != encode_config(repository.config, repository.keyring):
                # It may have been garbled on its way.
                data = store.get(layout.CONFIG)
            config, mac = read_config(data)
            if not check_mac(config, mac, repository.keyring) or data != encode_config(config, repository.keyring):
                self._findings.damage(layout.CONFIG, "it was not written with the keys of this repository")
            self._findings.succeeded()
        except (RepositoryError, StoreError) as error:
            self._findings.failed(layout.CONFIG, error)
        own_seen = False
        try:
            for info in store.list(layout.KEYS):
                identity = layout.id_in_key(info.key)
                if identity is None:
                    self._findings.add(Severity.INFORMATION, info.key, "it is no object of a repository")
                    continue
                own_seen |= identity == repository.slot_id
                self._check_slot(info.key)
            if not own_seen:
                # A listing may be stale.
                self._check_slot(layout.slot_key(repository.slot_id))
        except StoreError as error:
            self._findings.failed(layout.KEYS, error, f"the key slots cannot be listed: {error}")

    def _check_slot(self, key: str) -> None:
        try:
            read_slot_info(load_object(self._repository.store, key), f"the object {key}")
            self._findings.succeeded()
        except ObjectMissing:
            # Another one was removed since it was listed.
            if key == layout.slot_key(self._repository.slot_id):
                self._findings.damage(key, "the key slot of this password is missing")
        except (RepositoryError, StoreError) as error:
            self._findings.failed(key, error)

    def _load_snapshots(self) -> None:
        repository = self._repository
        listed = SnapshotList(repository, repository.store, is_quiet=True)
        try:
            listed.refresh()
        except StoreError:
            self._load_what_can_be_read()
            return
        for key, what in listed.damaged.items():
            identity = layout.id_in_key(key)
            if key in listed.newer:
                # Not damage, and no reason to forget it: what it needs was not looked at.
                self._findings.add(Severity.WARNING, key, what)
            elif identity is not None and key.startswith(layout.SNAPSHOTS):
                self._findings.damage(
                    key, f"{what}; `backupfs forget {short(identity)}` if no copy of it can be put back"
                )
                self._findings.hit(key, short(identity))
            else:
                self._findings.damage(key, f"{what}; {_OF_NOTE}")
        for key, what in listed.damaged_forgotten.items():
            self._findings.add(Severity.WARNING, key, f"{what}; the snapshot is forgotten, and stays so")
        self._snapshots = [
            snapshot for snapshot in listed.snapshots if not self._only or snapshot.snapshot_id in self._only
        ]
        self._left = [
            replace(snapshot, root=ChunkId(made.tree), root_xattrs=())
            for snapshot in self._snapshots
            for made in listed.verifications(snapshot.snapshot_id)
            if made.tree and not self._only
        ]
        stored = map(listed.as_stored, self._snapshots)
        self._behind = [own for own, shown in zip(stored, self._snapshots, strict=True) if own != shown]
        last = listed.last_of_host(local.host_id(repository.local.state))
        self._last_sequence = last.sequence if last is not None else 0
        for loss in listed.confirmed_losses():
            key = layout.key_of(Kind.SNAPSHOT, SnapshotId(loss.snapshot_id)) if loss.snapshot_id else layout.SNAPSHOTS
            self._findings.damage(key, f"{loss}; `backupfs forget {short(loss.name)}` once that is known")
        listed.note_seen()

    def _load_what_can_be_read(self) -> None:
        """Load snapshots one by one; without all notes nobody knows which are forgotten, so all are checked."""
        repository = self._repository
        for prefix in (layout.SNAPSHOTS, layout.NOTES):
            try:
                for info in repository.store.list(prefix):
                    try:
                        identity = layout.id_in_key(info.key)
                        if prefix == layout.NOTES:
                            load_note(repository, info.key, repository.store)
                        elif identity is not None:
                            self._snapshots.append(load_snapshot(repository, SnapshotId(identity), repository.store))
                    except WrongPassword:
                        continue  # a note that only the maintain key opens
                    except UnknownVersion as error:
                        self._findings.add(Severity.WARNING, info.key, str(error))
                    except (RepositoryError, StoreError) as error:
                        self._findings.failed(info.key, error)
                    else:
                        self._findings.succeeded()
            except StoreError as error:
                self._findings.failed(prefix, error, f"it cannot be listed: {error}")

    def _new_folder(self) -> Path | None:
        cache = self._repository.local.cache
        if cache is None:
            return None
        try:
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            return Path(tempfile.mkdtemp(prefix="check-", dir=cache))
        except OSError:
            return None

    def _load_index(self, kind: Kind, folder: Path | None) -> None:
        repository, index_kind = self._repository, INDEX_KIND[kind]
        own = folder / index_kind.name if folder is not None else None
        index = Index(repository.store, index_kind, repository.keyring, own)
        # Without it nothing can be said about anything.
        index.refresh()
        if index.damaged:
            # What a server missed once that it has, it may give now.
            index.refresh()
        self._findings.succeeded()
        for key, what in index.damaged.items():
            self._findings.damage(key, what if key in index.newer else f"{what}; {_OF_SEGMENT}")
        self._copies[kind] = Copies(repository, kind, index, self._findings)

    async def _read_packs(self, chosen: Callable[[ObjectId], bool]) -> None:
        wanted = {
            kind: [(ref, size) for ref, size in self._present.pop(kind) if chosen(ref.pack_id)] for kind in _KINDS
        }
        self._bytes_to_read = sum(size for packs in wanted.values() for _, size in packs)
        for kind, packs in wanted.items():
            pending = iter(packs)
            async with trio.open_nursery() as nursery:
                for _ in range(_PACKS_AT_ONCE):
                    nursery.start_soon(self._read_pending, self._copies[kind], pending)
            self._copies[kind].was_read = chosen

    async def _read_pending(self, copies: Copies, pending: Iterator[tuple[PackRef, int]]) -> None:
        for ref, size in pending:
            read = await workers.request(copies.read_pack, ref, size)
            copies.take(read)
            self._packs_read += read.failure is None
            self._bytes_read += read.size

    def _check_trees(self, trees: TreeCheck) -> None:
        tainted = [snapshot for snapshot in (*self._snapshots, *self._behind) if trees.is_tainted(snapshot)]
        self._hit = list(dict.fromkeys(snapshot.snapshot_id for snapshot in tainted))
        for snapshot in tainted:
            trees.tell_paths(snapshot)
        # What verifications left hits no snapshot, but is damage all the same.
        for left in self._left:
            trees.is_tainted(left)
        for copies in self._copies.values():
            copies.tell_unnamed()

    def _note_damaged_packs(self) -> None:
        """Let backups of this machine take nothing from packs whose bytes are wrong, until a check finds them sound."""
        repository = self._repository
        state, identity = repository.local.state, repository.config.repository_id
        known = local.damaged_packs(state, identity)
        findings = self._findings.listed()
        hitting = {finding.key for finding in findings if finding.snapshots}
        noted: dict[bytes, int] = {}
        for copies in self._copies.values():
            named = copies.index.packs()
            for pack_id in copies.garbled | {ObjectId(pack_id) for pack_id in known if pack_id in named}:
                was_read = self._chosen is not None and self._chosen(pack_id)
                if was_read and pack_id not in copies.unsound | copies.garbled | copies.unread:
                    continue  # it was put back from a copy
                # Snapshots made since it was noted hold nothing that lies in it alone, unless they are hit anyway.
                is_hitting = copies.key_of(pack_id) in hitting or self._findings.omitted > 0
                before = self._last_sequence if is_hitting else known.get(pack_id, self._last_sequence)
                noted[pack_id] = min(before, self._last_sequence)
        if (noted or known) and local.note_damaged_packs(state, identity, noted):
            self._noted_packs = len(noted)


def _delete_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
