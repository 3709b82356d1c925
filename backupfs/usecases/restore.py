"""Restore files: packs are read in order, and whichever thread decodes a range of one writes the files in it.

Threading: the walk and the ends of things belong to one thread at a time. A writing thread takes a whole range, so that
neighbouring files, and mostly a directory, stay with one thread, and hops are few.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, TypeVarTuple

import trio

from backupfs import workers
from backupfs.errors import UsageError
from backupfs.localfs.writing import Target
from backupfs.repository.fetch import PackRange, fetch_range
from backupfs.repository.repository import Repository
from backupfs.snapshots.node import Node
from backupfs.snapshots.snapshot import Snapshot
from backupfs.snapshots.walk import find_path, tree_of
from backupfs.usecases.events import Progress, Report
from backupfs.usecases.restore_files import Restorer, Written
from backupfs.usecases.restore_items import BY_NUMBER, OVERWRITE, RestoreOptions, Use
from backupfs.usecases.restore_verify import Verifier
from backupfs.usecases.restore_walk import Traversal

__all__ = ["RestoreOptions", "RestoreResult", "restore"]

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

# Requests under way; each holds up to 8 MiB until it is written.
_FETCHERS = 3
# More would only wait for Python's lock. On few processors one waits for a thread, so that the next range is at hand.
_WRITERS = min(workers.CPU_THREADS, 4) + 1
# A thread that comes back from a system call asks for Python's lock after this time; by default that is 5 ms, in which
# a hundred small files could have been written.
_SWITCH_S = 0.0002
# Ranges that are written and wait for the target.
_WAITING_RANGES = 8
_PROGRESS_SECONDS = 0.2

Stored = tuple[PackRange[Use], memoryview]
Done = tuple[PackRange[Use], Written]


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
    duration_ns: int


async def restore(
    repository: Repository, snapshot: Snapshot, path: bytes, target: bytes, options: RestoreOptions, report: Report
) -> RestoreResult:
    """Put the content of a directory of a snapshot, or one file of it under its own name, into a target directory.

    The target is made where it is missing, and gets the directory's own metadata then. Nothing outside it is ever
    touched. Interrupted anywhere, every file under its own name is whole, and no temporary file is left.
    Raises: PathNotFound; SourceError if the target cannot be used or is full; UsageError; StoreError.
    """
    if options.overwrite not in OVERWRITE:
        raise UsageError(f"--overwrite {options.overwrite}: choose one of {', '.join(OVERWRITE)}")
    started = time.monotonic_ns()
    await workers.io(repository.load_indexes)
    node = await workers.io(find_path, snapshot, path, repository.trees.load)
    run = await workers.io(partial(_Run, repository, node, target, options, report))
    totals = (snapshot.statistics.files, snapshot.statistics.size) if _is_whole(snapshot, path, options) else (0, 0)
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        await run.through(totals)
    except BaseExceptionGroup as group:
        raise _single(group) from None
    finally:
        sys.setswitchinterval(switch_s)
        with trio.CancelScope(shield=True):
            await workers.io(run.restorer.clean_up)
    for remark in run.restorer.remarks():
        report(remark)
    counts = run.restorer.counts
    return RestoreResult(
        counts.files, counts.directories, counts.size, counts.unchanged, counts.deleted, counts.verified,
        counts.errors, counts.damaged, time.monotonic_ns() - started,
    )  # fmt: skip


class _Run:
    """The stages of one restore and what flows between them."""

    def __init__(
        self, repository: Repository, node: Node, target: bytes, options: RestoreOptions, report: Report
    ) -> None:
        self._reader = repository.data
        self._load = repository.trees.load
        self._node = node
        self._options = options
        self._report = report
        opened = Target(target, lambda path, reason: self.restorer.problem(path, reason), make=not options.dry_run)
        traversal = self._traversal()
        self.restorer = Restorer(opened, traversal, self._load, repository.data, options, report)
        start = traversal.start()
        if node.is_directory:
            self.restorer.begin(start, traversal.metadata_of(node))
            self._walk: Iterator[None] = traversal.walk(self.restorer, start, tree_of(node))
        else:
            self.restorer.begin(start, None)
            self._walk = traversal.one(self.restorer, start, node)
        # The restorer belongs to one thread at a time: the walk and the settling take turns.
        self._turn = trio.Lock()

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
            await self._read_and_write(self._windows)
            # What could not be read from its first place is read from others, as long as there are any.
            while ranges := await self._at_target(self.restorer.take_retries):
                await self._read_and_write(partial(self._send_all, ranges))
            if self._options.verify and not self._options.dry_run:
                await self._verify()
            nursery.cancel_scope.cancel()

    async def _read_and_write(self, plan: "Callable[[trio.MemorySendChannel[PackRange[Use]]], object]") -> None:
        send_range, ranges = trio.open_memory_channel[PackRange[Use]](0)
        send_stored, stored = trio.open_memory_channel[Stored](0)
        send_done, done = trio.open_memory_channel[Done](_WAITING_RANGES)
        async with trio.open_nursery() as stages:
            stages.start_soon(plan, send_range)  # type: ignore[arg-type]
            for _ in range(_FETCHERS):
                stages.start_soon(self._fetch, ranges.clone(), send_stored.clone(), send_done.clone())
            for _ in range(_WRITERS):
                stages.start_soon(self._write, stored.clone(), send_done.clone())
            stages.start_soon(self._settle, done)
            for channel in (ranges, stored, send_stored, send_done):
                channel.close()

    async def _windows(self, send: "trio.MemorySendChannel[PackRange[Use]]") -> None:
        more = True
        async with send:
            while more:
                more = await self._at_target(self.restorer.advance, self._walk)
                if self.restorer.is_full or not more:
                    for wanted in await self._at_target(self.restorer.take_window):
                        await send.send(wanted)

    async def _send_all(self, ranges: list[PackRange[Use]], send: "trio.MemorySendChannel[PackRange[Use]]") -> None:
        async with send:
            for wanted in ranges:
                await send.send(wanted)

    async def _fetch(
        self,
        ranges: "trio.MemoryReceiveChannel[PackRange[Use]]",
        send: "trio.MemorySendChannel[Stored]",
        failed: "trio.MemorySendChannel[Done]",
    ) -> None:
        async with ranges, send, failed:
            async for wanted in ranges:
                stored = await workers.io(fetch_range, self._reader, wanted)
                if stored is None:
                    await failed.send((wanted, []))
                else:
                    await send.send((wanted, stored))

    async def _write(self, stored: "trio.MemoryReceiveChannel[Stored]", send: "trio.MemorySendChannel[Done]") -> None:
        target = self.restorer.target.for_another_thread()
        try:
            async with stored, send:
                async for wanted, data in stored:
                    written = await workers.cpu(self.restorer.write, target, wanted, data)
                    await send.send((wanted, written))
        finally:
            self.restorer.owners_kept |= target.owners_kept
            target.close_directories()

    async def _settle(self, done: "trio.MemoryReceiveChannel[Done]") -> None:
        async with done:
            async for wanted, written in done:
                await self._at_target(self.restorer.settle, wanted, written)

    async def _verify(self) -> None:
        verifier = Verifier(self.restorer, self._traversal(), self._load, self._reader, self._report)
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
            counts = self.restorer.counts
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
