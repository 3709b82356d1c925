"""Restore files: packs are read in order, and forked processes decode ranges of them and write the files in them.

This process walks, fetches and finishes what is whole. Threading: the walk and the ends of things belong to one thread
at a time.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

import trio

from backupfs import workers
from backupfs.errors import UsageError
from backupfs.forked import Line, encoded
from backupfs.localfs.abandoned import RunLock
from backupfs.localfs.writing import Target
from backupfs.repository import fetch
from backupfs.repository.fetch import PackRange, fetch_range
from backupfs.repository.repository import Repository
from backupfs.snapshots.node import Node
from backupfs.snapshots.snapshot import Snapshot
from backupfs.snapshots.volumes import Volume, extents_of
from backupfs.snapshots.walk import find_path, tree_of
from backupfs.stores.requests import RequestCounts
from backupfs.stores.spool import Spool
from backupfs.usecases.events import Progress, Remark, Report
from backupfs.usecases.own_folders import require_elsewhere
from backupfs.usecases.restore_files import Restorer
from backupfs.usecases.restore_items import BY_NUMBER, OVERWRITE, RestoreOptions, Use
from backupfs.usecases.restore_outcome import Outcome
from backupfs.usecases.restore_range import RangeWriter, SharedRanges, Written, work_of
from backupfs.usecases.restore_verify import Verifier
from backupfs.usecases.restore_walk import Traversal
from backupfs.usecases.restore_writers import RANGES_EACH, Ready, Writers, writer_count

__all__ = ["RestoreOptions", "RestoreResult", "restore"]

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

# Requests under way; each holds up to 8 MiB until it is written. Over 100 Mbit/s and 50 ms three fill 92 % of the line.
_FETCHERS = 4
# Of blocks that came over a network and may be wanted once more.
_SPOOL_SIZE = 4 << 30
_PROGRESS_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What a restore did, or would have done."""

    files: int  # written, linked or made: whatever is no directory
    directories: int  # made
    size: int  # bytes of the files written, holes included
    unchanged: int  # files that were left as they were
    deleted: int
    verified: int  # files and directories that were read back and are as in the snapshot
    errors: int  # paths that are not, or not wholly, as in the snapshot: exit code 3
    damaged: int  # of those, the ones for which the repository has no good bytes: exit code 1
    requests: RequestCounts
    duration_ns: int


async def restore(
    repository: Repository, snapshot: Snapshot, path: bytes, target: bytes, options: RestoreOptions, report: Report
) -> RestoreResult:
    """Put the content of a directory of a snapshot, or one file of it under its own name, into a target directory.

    The target is made where it is missing, and gets the directory's own metadata then. Nothing outside it is ever
    touched. Interrupted anywhere, every file under its own name is whole, and no temporary file is left.
    It forks: call it while this process has one thread.
    Raises: PathNotFound; SourceError if the target cannot be used or is full; UsageError; StoreError.
    """
    if options.overwrite not in OVERWRITE:
        raise UsageError(f"--overwrite {options.overwrite}: choose one of {', '.join(OVERWRITE)}")
    require_elsewhere(target, options.own_folders)
    started = time.monotonic_ns()
    repository.load_indexes()
    node = find_path(snapshot, path, repository.trees.load)
    run = _Run(repository, node, snapshot.volumes, target, options, report)
    totals = (snapshot.statistics.files, snapshot.statistics.size) if _is_whole(snapshot, path, options) else (0, 0)
    try:
        run.start()
        await run.through(totals)
    except BaseExceptionGroup as group:
        raise _single(group) from None
    finally:
        with trio.CancelScope(shield=True):
            await workers.io(run.clean_up)
    for remark in run.outcome.remarks():
        report(remark)
    counts = run.outcome.counts
    return RestoreResult(
        counts.files, counts.directories, counts.size, counts.unchanged, counts.deleted, counts.verified,
        counts.errors, counts.damaged, repository.store.requests, time.monotonic_ns() - started,
    )  # fmt: skip


class _Run:
    """The stages of one restore and what flows between them."""

    def __init__(
        self,
        repository: Repository,
        node: Node,
        volumes: Sequence[Volume],
        target: bytes,
        options: RestoreOptions,
        report: Report,
    ) -> None:
        self._reader = repository.data
        # Files that are equal lie in one block, and are restored far from each other.
        self._spool = Spool(repository.cache, _SPOOL_SIZE) if repository.store.is_far else None
        if self._spool is not None:
            self._reader.keep_on_disk(self._spool)
        self._load = repository.trees.load
        self._node = node
        self._options = options
        self._report = report
        opened = Target(target, lambda path, reason: self.outcome.problem(path, reason), make=not options.dry_run)
        self.outcome = Outcome(opened, report)
        self._lock: RunLock | None = None
        traversal = self._traversal()
        self._extents = extents_of(volumes, self._load)
        self.restorer = Restorer(
            self.outcome, traversal, self._load, self._extents, repository.data, options, report
        )  # fmt: skip
        start = traversal.start(node)
        if node.is_directory:
            self.restorer.begin(start, traversal.metadata_of(node))
            self._walk: Iterator[None] = traversal.walk(self.restorer, start, tree_of(node))
        else:
            self.restorer.begin(start, None)
            self._walk = traversal.one(self.restorer, start, node)
        # The restorer belongs to one thread at a time: the walk and the settling take turns.
        self._turn = trio.Lock()
        # Ranges that are to be fetched and are not settled, and what tells that there are none.
        self._open_ranges = 0
        self._all_settled = trio.Event()
        count = 0 if options.dry_run else writer_count()
        self._count = count
        # With no more than these somebody will soon have nothing to do.
        self._busy_ranges = RANGES_EACH * count + _FETCHERS
        self._shared = SharedRanges(self._busy_ranges, fetch.MOST_RANGE)
        self._writers = Writers(self._shared)

    def start(self) -> None:
        """Fork the processes that write."""
        if not self._options.dry_run:
            self._lock = RunLock(self.outcome.target)
        sparse = self._options.sparse

        def run(number: int, line: Line) -> None:
            RangeWriter(self._reader, self.outcome.target, number, self._shared, sparse).run(line)

        self._writers.start(self._count, run)

    def clean_up(self) -> None:
        """End all processes, then remove what is not whole, and close everything."""
        self._writers.end()
        if self._spool is not None:
            self._spool.close()
        if self._lock is not None and self._writers.lost_one:
            self._lock.remove_own()
        self.outcome.clean_up()
        if self._lock is not None:
            self._lock.release()

    def _traversal(self) -> Traversal:
        return Traversal(
            self._load, self._options.include, self._options.exclude, by_number=self._options.owner == BY_NUMBER
        )

    async def _at_target(self, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        async with self._turn:
            return await workers.io(function, *arguments)

    async def through(self, totals: tuple[int, int]) -> None:
        """Run everything to the end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_when_cancelled)
            nursery.start_soon(self._tell_progress, totals)
            if self._lock is not None and (count := await self._at_target(self._lock.remove_abandoned)):
                self._report(Remark(f"removed {count} temporary files of a restore that was killed"))
            await self._read_and_write()
            if self._options.verify and not self._options.dry_run:
                await self._verify()
            nursery.cancel_scope.cancel()

    async def _read_and_write(self) -> None:
        # The walk is a window ahead: it works while ranges of the one before wait to be fetched.
        send_window, windows = trio.open_memory_channel[list[PackRange[Use]]](0)
        send_range, ranges = trio.open_memory_channel[PackRange[Use]](0)
        send_ready, ready = trio.open_memory_channel[Ready](0)
        async with trio.open_nursery() as stages:
            stages.start_soon(self._plan, send_window)
            stages.start_soon(self._hand_out, windows, send_range)
            for _ in range(_FETCHERS):
                stages.start_soon(self._fetch, ranges.clone(), send_ready.clone())
            self._writers.run_in(stages, ready, self._settle)
            ranges.close()
            send_ready.close()

    async def _plan(self, send: "trio.MemorySendChannel[list[PackRange[Use]]]") -> None:
        async with send:
            more = True
            while more:
                more = await self._at_target(self.restorer.advance, self._walk)
                would_wait = self._open_ranges <= self._busy_ranges and self.restorer.is_enough
                if self.restorer.is_full or would_wait or not more:
                    await self._send_window(await self._at_target(self.restorer.take_window), send)
            # What could not be read from its first place is read from others, as long as there are any.
            while ranges := await self._retries():
                await self._send_window(ranges, send)

    async def _send_window(
        self, ranges: list[PackRange[Use]], send: "trio.MemorySendChannel[list[PackRange[Use]]]"
    ) -> None:
        self._open_ranges += len(ranges)
        await send.send(ranges)

    async def _hand_out(
        self,
        windows: "trio.MemoryReceiveChannel[list[PackRange[Use]]]",
        send: "trio.MemorySendChannel[PackRange[Use]]",
    ) -> None:
        async with windows, send:
            async for ranges in windows:
                for wanted in ranges:
                    await send.send(wanted)

    async def _retries(self) -> list[PackRange[Use]]:
        while self._open_ranges:
            self._all_settled = trio.Event()
            await self._all_settled.wait()
        return await self._at_target(self.restorer.take_retries)

    def _close_range(self) -> None:
        self._open_ranges -= 1
        if not self._open_ranges:
            self._all_settled.set()

    async def _fetch(
        self, ranges: "trio.MemoryReceiveChannel[PackRange[Use]]", send: "trio.MemorySendChannel[Ready]"
    ) -> None:
        async with ranges, send:
            async for wanted in ranges:
                got, lost = await workers.request(fetch_range, self._reader, wanted)
                for part, stored in got:
                    slot = await self._writers.free.receive()
                    message = await workers.io(self._message, part, slot, stored)
                    self._open_ranges += 1
                    await send.send((part, slot, message))
                if lost:
                    await self._at_target(self.restorer.give_up_chunks, lost)
                self._close_range()

    def _message(self, wanted: PackRange[Use], slot: int, stored: bytes) -> bytes:
        return encoded(work_of(wanted, self._shared.put(slot, stored)))

    async def _settle(self, wanted: PackRange[Use], written: Written) -> None:
        await self._at_target(self.restorer.settle, wanted, written)
        self._close_range()

    async def _verify(self) -> None:
        verifier = Verifier(self.restorer, self._traversal(), self._load, self._extents, self._reader, self._report)
        await self._at_target(verifier.sync)
        walk = verifier.start(self._node)
        while await self._at_target(self.restorer.advance, walk):
            pass
        verifier.finish()

    async def _stop_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.restorer.stop.set()

    async def _tell_progress(self, totals: tuple[int, int]) -> None:
        while True:
            await trio.sleep(_PROGRESS_SECONDS)
            counts = self.outcome.counts
            self._report(
                Progress(
                    "restore", counts.files + counts.unchanged, counts.size + counts.unchanged_size, *totals,
                    current=counts.current,
                )
            )  # fmt: skip


def _is_whole(snapshot: Snapshot, path: bytes, options: RestoreOptions) -> bool:
    if options.include or options.exclude:
        return False
    normal = b"/" + b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))
    return normal == b"/" or snapshot.paths == (normal,)


def _single(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return what went wrong first, without the groups of the stages around it; a bug keeps its group."""
    leaves = list(_leaves(group))
    told = [error for error in leaves if not isinstance(error, trio.Cancelled)]
    return told[0] if len(told) == 1 or (told and len({type(error) for error in told}) == 1) else group


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
