"""Storing what scanning processes send, and committing it: what all runs share that make a snapshot."""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import trio

from backupfs import __version__, interrupts, workers
from backupfs.codec import compression
from backupfs.codec.sealing import Kind
from backupfs.errors import BackupfsError, shown
from backupfs.localfs import reading
from backupfs.repository import layout, local
from backupfs.repository.index import Index
from backupfs.repository.pack import Block
from backupfs.repository.repository import Repository
from backupfs.repository.slots import Slots
from backupfs.repository.writer import DEFAULT_SIZES, FilledBlock, NewChunks, PackWriter, WriteSizes, WriteTotals
from backupfs.snapshots.listing import SnapshotList, load_all, put_snapshot
from backupfs.snapshots.losses import lasts_of
from backupfs.snapshots.snapshot import HAS_XATTRS, ROOT_INCOMPLETE, Snapshot, Statistics
from backupfs.stores.requests import RequestCounts
from backupfs.usecases.archive_counts import Counts
from backupfs.usecases.events import Progress, Remark, Report
from backupfs.usecases.scanner import Root, Scanner
from backupfs.usecases.scanners import Scanners

# Blocks between scanning and compression; with those being filled and compressed they bound the bytes in flight.
_WAITING_BLOCKS = 4
# The largest chunk that repositories are made with; a larger one, or a tree page of that size, goes by another way.
_SLOT_SIZE = 4 << 20
_PROGRESS_SECONDS = 0.2
# How long an interrupted backup may still take to name what it has put.
_SAVING_SECONDS = 20.0
# How often packs are listed where each thousand of them costs a request.
_LISTING_AGE_S = 24 * 3600
# Packs that no index names and that are older than this are nobody's work under way.
_ORPHAN_AGE_NS = 24 * 3600 * 10**9


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """What a user can say about every snapshot that is made."""

    host: str = ""  # empty: this machine's name
    tags: tuple[str, ...] = ()
    time_ns: int | None = None  # None: now
    level: int = compression.DEFAULT_LEVEL
    dry_run: bool = False
    sizes: WriteSizes = DEFAULT_SIZES  # of blocks and packs


@dataclass(frozen=True, slots=True)
class BackupResult:
    """What a backup did."""

    snapshot: Snapshot | None  # None after a dry run
    parent: bytes
    counts: Counts
    data: WriteTotals
    trees: WriteTotals
    requests: RequestCounts  # of all processes
    duration_ns: int

    @property
    def plain_added(self) -> int:
        """Bytes of new chunks."""
        return self.data.plain_bytes + self.trees.plain_bytes

    @property
    def stored_added(self) -> int:
        """Bytes put into the store, but for the snapshot itself."""
        return self.data.stored_bytes + self.trees.stored_bytes


class StoringRun:
    """One run that makes a snapshot: what its stages share and what flows between them."""

    def __init__(
        self, repository: Repository, options: WriteOptions, report: Report, listed: SnapshotList | None = None
    ) -> None:
        """Begin. listed: from `load_all`, if that was called just now."""
        repository.require_writable()
        self._started = time.monotonic_ns()
        self._store_time_ns = 0  # known at the end
        self.counts = Counts()  # too: of all that is in the snapshot
        self._repository = repository
        self._options = options
        self._report = report
        self.taken_ns = options.time_ns if options.time_ns is not None else time.time_ns()
        self.host = options.host or os.uname().nodename
        self.listed = load_all(repository) if listed is None else listed
        level, sizes = options.level, options.sizes
        indexes = ((Kind.DATA_PACK, repository.data_index), (Kind.TREE_PACK, repository.tree_index))
        host_id = local.host_id(repository.local.state)
        self._writers = {
            kind: PackWriter(repository.hot, repository.keyring, index, kind, host_id, writer_level, sizes)
            for kind, index, writer_level in (
                (Kind.DATA_PACK, repository.data_index, level),
                # Pages are small and read often: a better level costs little and pays at each mount.
                (Kind.TREE_PACK, repository.tree_index, level if level == compression.OFF else max(level, 3)),
            )
        }
        self._new = {
            Kind.DATA_PACK: NewChunks(repository.data_index),
            Kind.TREE_PACK: NewChunks(repository.tree_index),
        }
        for kind, writer in self._writers.items():
            writer.on_indexed = self._new[kind].retire
        # An interrupted run that could not name its packs, or was killed.
        left = local.left_writing(repository.cache)
        whole = [self._compare_with_packs(kind, index, host_id, bool(left)) for kind, index in indexes]
        self._is_whole = all(whole)
        # Snapshots of this host up to this one may hold what lies in damaged packs alone; None: there are none.
        self._doubted: int | None = self._leave_out_damaged([index for _, index in indexes])
        if not options.dry_run:
            local.remove_files(left)

    def _compare_with_packs(self, kind: Kind, index: Index, host_id: bytes, must_list: bool) -> bool:
        """Trust no index blindly: store again what lies in packs that are gone, take what is in packs without an entry.

        Return whether all packs are there. Costs a listing, a request for each thousand packs on object storage, where
        it is done once a day, or when it must be.
        """
        store = self._repository.store
        mark = f"listed-{kind.name.lower()}s"
        if store.is_far and not must_list and not local.is_due(self._repository.cache, mark, _LISTING_AGE_S):
            return True
        compared = index.compare(store.list(layout.prefix_of(kind)))
        absent = index.still_absent(compared.absent)
        if absent:
            index.leave_out(absent)
            self._report(
                Remark(
                    f"{len(absent)} of the packs in {layout.prefix_of(kind)} that the index names are missing or cut "
                    "short; what they held is read and stored again as far as it is still in the sources"
                )
            )
        else:
            local.note_done(self._repository.cache, mark)
        if compared.unnamed and not self._options.dry_run:
            # Packs of this host are what an interrupted run left; those of others may be under way until they are old.
            old_ns = store.now() - _ORPHAN_AGE_NS
            segment = index.segment_of(
                compared.unnamed, lambda info, writer: writer == host_id or info.modified_ns < old_ns
            )
            if segment is not None:
                self._writers[kind].name_packs(segment)
        return not absent

    def _leave_out_damaged(self, indexes: list[Index]) -> int | None:
        """Take nothing from packs that a check of this machine found damaged, though they are there in their size."""
        repository = self._repository
        known = local.damaged_packs(repository.local.state, repository.config.repository_id)
        sequences: list[int] = []
        for index in indexes if known else ():
            found = [pack_id for pack_id in index.packs() if pack_id in known]
            index.leave_out(found)
            sequences += [known[pack_id] for pack_id in found]
        return max(sequences, default=None)

    def trusted(self, parent: Snapshot | None) -> Snapshot | None:
        """Return the snapshot to compare with, or None where what it holds may lie in packs gone or damaged."""
        if parent is None or not self._is_whole:
            return None
        if self._doubted is None:
            return parent
        own = local.host_id(self._repository.local.state)
        if parent.host_id == own and parent.sequence > self._doubted:
            return parent
        self._report(
            Remark(
                "a check found damaged packs; what was in them is read and stored again as far as it is still in the "
                "sources"
            )
        )
        return None

    def store(self, ordinals: dict[int, int], count: int, scan: Callable[[Scanner, Slots, bool], Root | None]) -> Root:
        """Scan in `count` processes and store what they send; return `/`.

        ordinals: the numbers of file systems that are known.
        scan: is one scanning process: (its line to here, slots, whether it begins) → `/`, from the one that begins.
        """
        repository, options = self._repository, self._options
        # Two are open in each scanner; the rest is on its way.
        slots = Slots(2 * count + workers.CPU_THREADS + _WAITING_BLOCKS, max(options.sizes.block, _SLOT_SIZE))
        scanners = Scanners(ordinals)
        self._new[Kind.TREE_PACK].distrusts = scanners.distrusts
        try:
            scanners.start(count, lambda scanner, begins: scan(scanner, slots, begins))
            root = interrupts.run(self._store_all, scanners, slots, stop=repository.store.stop)
        finally:
            scanners.end()
            slots.close()
        self.counts = scanners.counts
        return root

    async def _store_all(self, scanners: Scanners, slots: Slots) -> Root:
        """Store what scanners send, and return `/`; everything it needs is then in the store and indexed."""
        must_note = self._repository.store.is_far and not self._options.dry_run
        writing = local.note_writing(self._repository.cache) if must_note else []
        try:
            root = await self._stages(scanners, slots)
        except BaseException:
            # What was put so far is named, so that the next run finds it; nothing more is put.
            with trio.move_on_after(_SAVING_SECONDS, shield=True), contextlib.suppress(BackupfsError):
                for writer in self._writers.values():
                    await writer.checkpoint()
            # A put that was under way may yet come to its end, so the next run has to look.
            raise
        local.remove_files(writing)
        return root

    async def _stages(self, scanners: Scanners, slots: Slots) -> Root:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_progress, scanners)
            send, receive = trio.open_memory_channel[tuple[Kind, Block, int]](256)
            async with trio.open_nursery() as stages:
                # More than processors: a writer that waits for a put must not leave a processor idle.
                for _ in range(workers.CPU_THREADS + 2):
                    stages.start_soon(self._write_blocks, receive.clone(), slots)
                receive.close()

                async def take(filled: FilledBlock) -> None:
                    block = self._new[filled.kind].block_of(filled, slots)
                    if block is not None:
                        await send.send((filled.kind, block, filled.slot))
                    elif filled.slot >= 0:
                        slots.give_back(filled.slot)

                async with send:
                    root = await scanners.run(take, self._report)
            if not self._options.dry_run:
                await self._finish()
            nursery.cancel_scope.cancel()
        return root

    async def _finish(self) -> None:
        """Put what is left, and ask for what the snapshot needs."""

        async def ask_time() -> None:
            self._store_time_ns = await workers.request(self._repository.store.now)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_time)
            for writer in self._writers.values():
                nursery.start_soon(writer.flush)

    async def _write_blocks(self, blocks: "trio.MemoryReceiveChannel[tuple[Kind, Block, int]]", slots: Slots) -> None:
        async with blocks:
            async for kind, block, slot in blocks:

                def compressed(slot: int = slot) -> None:
                    if slot >= 0:
                        slots.give_back(slot)

                if self._options.dry_run:
                    self._writers[kind].totals.chunks += len(block.chunk_ids)
                    self._writers[kind].totals.plain_bytes += block.plain_length
                    compressed()
                else:
                    await self._writers[kind].add(block, compressed)

    async def _tell_progress(self, scanners: Scanners) -> None:
        while True:
            await trio.sleep(_PROGRESS_SECONDS)
            counts = scanners.counts
            self._report(Progress("backup", counts.files, counts.size, current=counts.current))

    def commit(
        self, kind: int, paths: list[bytes], parent: Snapshot | None, root: Root, traits: int = 0, **of_image: Any
    ) -> BackupResult:
        """Put the snapshot, which makes it one; after a dry run only say what would be in it.

        traits: those beside what the scanners counted. of_image: its name, disks and volumes, by the names of the
        snapshot's fields.
        """
        counts = self.counts
        traits |= (HAS_XATTRS if counts.has_xattrs else 0) | (ROOT_INCOMPLETE if counts.is_root_incomplete else 0)
        result = self.result(parent.snapshot_id if parent is not None else b"")
        if self._options.dry_run:
            return result
        host_id = local.host_id(self._repository.local.state)
        state, repository_id = self._repository.local.state, self._repository.config.repository_id
        listed, seen = (found.get(host_id, (0, ())) for found in self._lasts())
        if local.later_of(listed, seen) != listed:
            # Another backup of this host ended meanwhile, or the last one is lost: its number is not given again.
            self.listed.refresh()
        for loss in self.listed.confirmed_losses():
            self._report(Remark(f"{loss}: see `backupfs check`"))
        last, before = local.later_of(*(found.get(host_id, (0, ())) for found in self._lasts()))
        snapshot = Snapshot(
            kind=kind,
            host_id=host_id,
            host=self.host,
            sequence=last + 1,
            previous=before[-1] if before else b"",
            beside=before[:-1],
            time_ns=self.taken_ns,
            store_time_ns=self._store_time_ns,
            paths=tuple(sorted(set(paths))),
            tags=tuple(sorted(set(self._options.tags))),
            parent=result.parent,
            root=root.tree,
            root_row=root.row,
            root_owner=root.owner,
            root_group=root.group,
            root_xattrs=root.xattrs,
            statistics=Statistics(
                files=counts.files,
                directories=counts.directories,
                size=counts.size,
                files_new=counts.files_new,
                files_changed=counts.files_changed,
                files_skipped=counts.files_skipped,
                plain_added=result.plain_added,
                stored_added=result.stored_added,
                duration_ns=result.duration_ns,
            ),
            user=_user_name(),
            program=f"backupfs {__version__}",
            traits=traits,
            **of_image,
        )
        snapshot = put_snapshot(self._repository, snapshot)
        self.listed.note_seen()
        is_seen = local.note_seen(state, repository_id, {host_id: (snapshot.sequence, (snapshot.snapshot_id,))})
        self._tell_of_state(host_id, is_seen)
        return replace(result, snapshot=snapshot, requests=self._repository.store.requests)

    def _lasts(self) -> tuple[dict[bytes, local.Last], dict[bytes, local.Last]]:
        """Return the last snapshots of hosts: by what is listed, and by what this machine saw."""
        repository = self._repository
        seen = local.last_seen(repository.local.state, repository.config.repository_id)
        return lasts_of(self.listed.present), seen

    def _tell_of_state(self, host_id: bytes, is_seen: bool) -> None:
        """Say what it means where this machine keeps nothing of its own. is_seen: it remembers the snapshot."""
        state = self._repository.local.state
        if state is None:
            return
        means = ["a snapshot that is lost may go unnoticed"] if not is_seen else []
        if local.host_id(state) != host_id:
            means.insert(0, "each backup counts as one of another host")
        if means:
            self._report(Remark(f"the folder {shown(str(state))} cannot be written: {', and '.join(means)}"))

    def result(self, parent: bytes) -> BackupResult:
        """Return what was done so far. parent: id of the snapshot it was compared with, or empty."""
        return BackupResult(
            None,
            parent,
            self.counts,
            self._writers[Kind.DATA_PACK].totals,
            self._writers[Kind.TREE_PACK].totals,
            self._repository.store.requests,
            time.monotonic_ns() - self._started,
        )


def _user_name() -> str:
    return reading.owner_name(os.getuid()).decode("utf-8", "replace")
