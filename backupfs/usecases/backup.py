"""Back up files: the walk in one thread, compression and puts beside it, the snapshot last, which commits."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import trio

from backupfs import __version__, workers
from backupfs.codec import compression
from backupfs.codec.sealing import Kind
from backupfs.ids import short
from backupfs.localfs import reading, sources
from backupfs.localfs.selection import Selection, SelectionRules
from backupfs.repository import local
from backupfs.repository.pack import Block
from backupfs.repository.repository import Repository
from backupfs.repository.writer import DEFAULT_SIZES, ChunkSaver, PackWriter, WriteSizes, WriteTotals
from backupfs.snapshots.listing import SnapshotList, load_snapshots, put_snapshot
from backupfs.snapshots.snapshot import FILES, HAS_XATTRS, Snapshot, Statistics
from backupfs.usecases.archive_context import ArchiveContext, Counts
from backupfs.usecases.archive_files import FileStorer
from backupfs.usecases.archive_parent import ParentTrees
from backupfs.usecases.archiver import Archiver, Root
from backupfs.usecases.events import FileSkipped, Progress, Remark, Report

# Blocks between the walk and compression; with those being compressed they bound the bytes in flight.
_WAITING_BLOCKS = 4
_PROGRESS_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """What a user can say about a backup."""

    host: str = ""  # empty: this machine's name
    tags: tuple[str, ...] = ()
    time_ns: int | None = None  # None: now
    parent: str | None = None  # a snapshot's name; None: the newest that fits
    force: bool = False  # compare with nothing, read everything
    level: int = compression.DEFAULT_LEVEL
    dry_run: bool = False
    rules: SelectionRules = field(default_factory=SelectionRules)
    own_folders: tuple[bytes, ...] = ()  # paths of the repository and the cache, never backed up
    sizes: WriteSizes = DEFAULT_SIZES  # of blocks and packs


@dataclass(frozen=True, slots=True)
class BackupResult:
    """What a backup did."""

    snapshot: Snapshot | None  # None after a dry run
    parent: bytes
    counts: Counts
    data: WriteTotals
    trees: WriteTotals
    duration_ns: int

    @property
    def plain_added(self) -> int:
        """Bytes of new chunks."""
        return self.data.plain_bytes + self.trees.plain_bytes

    @property
    def stored_added(self) -> int:
        """Bytes put into the store, but for the snapshot itself."""
        return self.data.stored_bytes + self.trees.stored_bytes


async def backup(repository: Repository, paths: list[bytes], options: BackupOptions, report: Report) -> BackupResult:
    """Make a snapshot of some paths of this machine.

    Interrupted anywhere, the repository stays valid, and the next run finds what was stored.
    Raises: SourceError if none of the paths exists; UnknownSnapshot; StoreError.
    """
    started = time.monotonic_ns()
    taken_ns = options.time_ns if options.time_ns is not None else time.time_ns()
    await workers.io(repository.load_indexes)
    listed = await workers.io(load_snapshots, repository)
    paths = _existing(paths, report)
    host = options.host or os.uname().nodename
    parent = _parent_of(listed, options, host, paths)

    def scan(run: "_Run") -> Root:
        selection = Selection(options.rules, _identities(options.own_folders), frozenset(paths))
        archiver = run.archiver(selection, report)
        return archiver.archive(sources.minimal_roots(paths), None if parent is None or options.force else parent.root)

    run = _Run(repository, options, report)
    root = await run.through(scan)
    result = run.result(parent, started)
    if options.dry_run:
        return result
    return await _commit(repository, listed, options, host, paths, root, taken_ns, result, report)


async def backup_stream(
    repository: Repository, name: bytes, read_into: Callable[[memoryview], int], options: BackupOptions, report: Report
) -> BackupResult:
    """Make a snapshot of one file, whose bytes come from a stream.

    name: absolute path of the file in the snapshot.
    """
    started = time.monotonic_ns()
    taken_ns = options.time_ns if options.time_ns is not None else time.time_ns()
    await workers.io(repository.load_indexes)
    listed = await workers.io(load_snapshots, repository)
    host = options.host or os.uname().nodename

    def scan(run: "_Run") -> Root:
        archiver = run.archiver(Selection(SelectionRules(), frozenset(), frozenset()), report)
        return archiver.archive_stream(name, read_into, taken_ns)

    run = _Run(repository, options, report)
    root = await run.through(scan)
    result = run.result(None, started)
    if options.dry_run:
        return result
    return await _commit(repository, listed, options, host, [name], root, taken_ns, result, report)


class _Run:
    """The stages of one backup and what flows between them."""

    def __init__(self, repository: Repository, options: BackupOptions, report: Report) -> None:
        level, sizes = options.level, options.sizes
        repository.require_writable()
        self._repository = repository
        self._dry_run = options.dry_run
        self._report = report
        self._host_id = local.host_id(repository.local.state)
        self._writers = {
            kind: PackWriter(repository.store, repository.keyring, index, kind, self._host_id, writer_level, sizes)
            for kind, index, writer_level in (
                (Kind.DATA_PACK, repository.data_index, level),
                # Pages are small and read often: a better level costs little and pays at each mount.
                (Kind.TREE_PACK, repository.tree_index, level if level == compression.OFF else max(level, 3)),
            )
        }
        self._send, self._receive = trio.open_memory_channel[tuple[Kind, Block]](_WAITING_BLOCKS)
        self._savers = {
            kind: ChunkSaver(index, partial(self._emit, kind), sizes.block)
            for kind, index in ((Kind.DATA_PACK, repository.data_index), (Kind.TREE_PACK, repository.tree_index))
        }
        for kind, writer in self._writers.items():
            writer.on_indexed = self._savers[kind].retire
        self._archiver: Archiver | None = None

    def archiver(self, selection: Selection, report: Report) -> Archiver:
        """Make the walk's half; called in its thread."""
        keyring = self._repository.keyring
        data, trees = self._savers[Kind.DATA_PACK], self._savers[Kind.TREE_PACK]

        def flush() -> None:
            data.flush()
            trees.flush()

        context = ArchiveContext(keyring.chunk_id_key(tree=True), keyring.page_cut_key(), trees, selection, report)
        files = FileStorer(
            keyring.chunk_id_key(tree=False),
            keyring.file_cut_seed(),
            self._repository.config.cut_sizes,
            data,
            context.save_tree,
            report,
        )
        self._archiver = Archiver(context, files, ParentTrees(self._repository.trees.load, report), flush)
        return self._archiver

    def _emit(self, kind: Kind, block: Block) -> None:
        trio.from_thread.run(self._send.send, (kind, block))

    async def through(self, scan: "Callable[[_Run], Root]") -> Root:
        """Run all stages to the end and return `/`; everything it needs is then in the store and indexed."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_when_cancelled)
            nursery.start_soon(self._tell_progress)
            async with trio.open_nursery() as stages:
                # More than processors: a writer that waits for a put must not leave a processor idle.
                for _ in range(workers.CPU_THREADS + 2):
                    stages.start_soon(self._write_blocks, self._receive.clone())
                self._receive.close()
                async with self._send:
                    root = await trio.to_thread.run_sync(scan, self)
            for kind in () if self._dry_run else (Kind.DATA_PACK, Kind.TREE_PACK):
                await self._writers[kind].flush()
            nursery.cancel_scope.cancel()
        return root

    async def _write_blocks(self, blocks: "trio.MemoryReceiveChannel[tuple[Kind, Block]]") -> None:
        async with blocks:
            async for kind, block in blocks:
                if self._dry_run:
                    self._writers[kind].totals.chunks += len(block.chunk_ids)
                    self._writers[kind].totals.plain_bytes += block.plain_length
                else:
                    await self._writers[kind].add(block)

    async def _stop_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            if self._archiver is not None:
                self._archiver.stop()

    async def _tell_progress(self) -> None:
        while True:
            await trio.sleep(_PROGRESS_SECONDS)
            if self._archiver is not None:
                counts = self._archiver.counts
                self._report(Progress("backup", counts.files, counts.size, current=counts.current))

    def result(self, parent: Snapshot | None, started: int) -> BackupResult:
        """Return what was done."""
        assert self._archiver is not None
        return BackupResult(
            None,
            parent.snapshot_id if parent is not None else b"",
            self._archiver.counts,
            self._writers[Kind.DATA_PACK].totals,
            self._writers[Kind.TREE_PACK].totals,
            time.monotonic_ns() - started,
        )


async def _commit(
    repository: Repository,
    listed: SnapshotList,
    options: BackupOptions,
    host: str,
    paths: list[bytes],
    root: Root,
    taken_ns: int,
    result: BackupResult,
    report: Report,
) -> BackupResult:
    host_id = local.host_id(repository.local.state)
    store_now = await workers.io(repository.store.now)
    last = listed.last_of_host(host_id)
    counts = result.counts
    snapshot = Snapshot(
        kind=FILES,
        host_id=host_id,
        host=host,
        sequence=last.sequence + 1 if last is not None else 1,
        previous=last.snapshot_id if last is not None else b"",
        time_ns=taken_ns,
        store_time_ns=store_now,
        paths=tuple(sorted(set(paths))),
        tags=tuple(sorted(set(options.tags))),
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
        traits=HAS_XATTRS if counts.has_xattrs else 0,
    )
    snapshot = await workers.io(put_snapshot, repository, snapshot)
    highest = listed.highest_sequences()
    back = local.note_sequences(
        repository.local.state, repository.config.repository_id, {**highest, host_id: snapshot.sequence}
    )
    for other in back:
        report(Remark(f"snapshots of the host with the id {short(other)} that were here before are gone"))
    return replace(result, snapshot=snapshot)


def _existing(paths: list[bytes], report: Report) -> list[bytes]:
    missing = [path for path in paths if not os.path.lexists(path)]
    existing = sources.existing_sources(paths, missing)
    for path in missing:
        report(FileSkipped(path, "it does not exist"))
    return existing


def _parent_of(listed: SnapshotList, options: BackupOptions, host: str, paths: list[bytes]) -> Snapshot | None:
    if options.parent is not None:
        return listed.find(options.parent)
    own = [snapshot for snapshot in listed.snapshots if snapshot.kind == FILES and snapshot.host == host]
    same = [snapshot for snapshot in own if set(snapshot.paths) == set(paths)]
    return next(reversed(same or own), None)


def _identities(folders: tuple[bytes, ...]) -> frozenset[tuple[int, int]]:
    found = set()
    for folder in folders:
        try:
            status = os.stat(folder)
        except OSError:
            continue
        found.add((status.st_dev, status.st_ino))
    return frozenset(found)


def _user_name() -> str:
    return reading.owner_name(os.getuid()).decode("utf-8", "replace")
