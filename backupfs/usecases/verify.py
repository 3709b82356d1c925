"""Verify a snapshot: prove, level by level, that what is stored would be of use, and keep a record of it.

0  all metadata is read and authenticated, every pack it needs is there
1  every stored byte it needs is read again and hashed
2  image: its file systems are checked by their own programs; files: each is read through the mount
3  image: it boots in a virtual machine without a network
An image is checked and booted from scratch copies: nothing that is done to them touches it.
"""

import contextlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from backupfs import __version__, forked, interrupts
from backupfs.disks.checkers import CHECK_S, check_volume
from backupfs.disks.machine import Machine, MachineDisk, MachineOptions, bus_of, require_qemu
from backupfs.errors import ObjectArchived, StoreError, UsageError, shown
from backupfs.ids import short
from backupfs.repository.repository import Repository
from backupfs.snapshots import notes
from backupfs.snapshots.notes import put_note
from backupfs.snapshots.snapshot import IMAGE, Snapshot
from backupfs.snapshots.verification import (
    BOOT,
    CONTENT,
    DATA,
    METADATA,
    VERIFY,
    Outcome,
    Result,
    Verification,
    encode_verification,
)
from backupfs.snapshots.volumes import bases_of
from backupfs.snapshots.walk import shown_volumes
from backupfs.usecases.boot_watch import Watched, watch
from backupfs.usecases.check import CheckOptions, CheckResult, check
from backupfs.usecases.events import Progress, Report
from backupfs.usecases.findings import Severity
from backupfs.usecases.kept_directory import store_directory
from backupfs.usecases.mount import MountFilter, MountOptions, Unread, mount_in_background, serve_mount
from backupfs.usecases.scratch import scratch_mount
from backupfs.usecases.umount import umount

BOOT_S = 900.0
_LEAST_BOOT_S = 5.0  # in which it is worth to try once more
_READ = 1 << 20
_MOST_NAMED = 20
_MOST_CONSOLE = 1 << 20
_PROGRESS_S = 0.2
_NOT_NOW = "this cannot be verified now, and nothing was recorded"


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What a user can say about a verification."""

    level: int = CONTENT
    marker: str = ""  # text on the console that says that the machine is up; empty: a login prompt
    timeout_s: float = BOOT_S  # for booting
    check_s: float = CHECK_S  # for each program that checks a file system
    machine: MachineOptions = field(default_factory=MachineOptions)


@dataclass(frozen=True, slots=True)
class Verified:
    """What came of a verification, before it is recorded."""

    made: Verification
    left: dict[bytes, bytes]  # files for the record


def verify(repository: Repository, snapshot: Snapshot, options: VerifyOptions, report: Report) -> Verified:
    """Run all levels up to the one wanted. What is wrong is in the result, never raised; what nobody can look at is.

    It forks: call it before any thread and event loop; indexes must be loaded.
    Raises: UsageError for a level that there is not; SourceError where a level cannot be tried here; StoreError.
    """
    highest = BOOT if snapshot.kind == IMAGE else CONTENT
    if not METADATA <= options.level <= highest:
        raise UsageError(f"--level {options.level}: a snapshot of this kind has levels 0 to {highest}")
    if options.level >= BOOT:
        require_qemu()
    run = _Run(repository, snapshot, options, report)
    started, time_ns = time.monotonic_ns(), time.time_ns()
    run.through()
    made = Verification(
        snapshot.snapshot_id, time_ns, os.uname().nodename, options.level, time.monotonic_ns() - started,
        f"backupfs {__version__}", tuple(run.outcomes),
    )  # fmt: skip
    return Verified(made, {**run.left, b"report.txt": _report_of(made).encode()})


def record(repository: Repository, verified: Verified) -> None:
    """Store the record of a verification. Raises: StoreError."""
    made = verified.made
    tree = store_directory(repository, verified.left, made.time_ns)
    made = replace(made, tree=tree)
    put_note(repository, notes.Note(made.snapshot_id, VERIFY, made.time_ns, made.host, encode_verification(made)))


def _unread(found: CheckResult) -> StoreError:
    """Return the error that something could not be read, of which nobody knows what it is worth."""
    first = next(finding for finding in found.findings if finding.severity == Severity.UNREAD)
    more = f"; {found.unread:,} objects in all could not be read" if found.unread > max(1, found.archived) else ""
    kind = ObjectArchived if found.unread == found.archived else StoreError
    return kind(f"{_NOT_NOW}: {first.key}: {first.what}{more}")


def _require_read(unread: Unread) -> None:
    """Raise StoreError where what failed in a mount may have failed as the store did not give it."""
    if words := unread.words:
        raise StoreError(f"{_NOT_NOW}: {words}")


class _UnreadableDisk(Exception):
    """A disk of an image cannot be read; with the reason."""


class _Run:
    """One verification."""

    def __init__(self, repository: Repository, snapshot: Snapshot, options: VerifyOptions, report: Report) -> None:
        self._repository = repository
        self._snapshot = snapshot
        self._options = options
        self._report = report
        self.outcomes: list[Outcome] = []
        self.left: dict[bytes, bytes] = {}  # files for the record

    def through(self) -> None:
        """Run the levels; all of them, as each says something of its own."""
        self._check(METADATA, CheckOptions(snapshots=frozenset({self._snapshot.snapshot_id})))
        if self._options.level >= DATA:
            self._check(DATA, CheckOptions(read_data=True, snapshots=frozenset({self._snapshot.snapshot_id})))
        if self._options.level >= CONTENT:
            if self._snapshot.kind == IMAGE:
                self._check_file_systems()
            else:
                self._read_files()
        if self._options.level >= BOOT:
            self._boot()

    def _add(self, level: int, subject: str, result: Result, words: str) -> None:
        self.outcomes.append(Outcome(level, subject, result, words))

    # Levels 0 and 1.

    def _check(self, level: int, options: CheckOptions) -> None:
        repository = self._repository

        def run(take: Callable[[object], None]) -> CheckResult:
            return interrupts.run(check, repository, options, take, stop=repository.store.stop)

        # In a process of its own, as its threads would be in the way of what is forked later.
        found = forked.call(run, self._report)  # type: ignore[arg-type]
        if self._snapshot.snapshot_id in found.snapshots_hit:
            worst = [finding for finding in found.findings if finding.severity == Severity.DAMAGE]
            words = f"{worst[0].key}: {worst[0].what}" if worst else "something that it needs is damaged"
            more = f", and {len(worst) - 1} more objects" if len(worst) > 1 else ""
            paths = worst[0].paths_total if worst else 0
            hit = f"; {paths:,} paths are hit" if paths else ""
            self._add(level, "", Result.FAILED, f"{words}{more}{hit}: `backupfs check` names all")
        elif found.unread:
            raise _unread(found)
        elif level == METADATA:
            self._add(
                level, "", Result.PASSED,
                f"{found.tree_chunks:,} pages with {found.entries:,} entries are right, their packs are there",
            )  # fmt: skip
        else:
            packs = "pack" if found.packs_read == 1 else "packs"
            self._add(
                level, "", Result.PASSED, f"{found.packs_read:,} {packs}, {found.bytes_read:,} bytes, read and hashed"
            )

    # Level 2.

    def _check_file_systems(self) -> None:
        volumes = self._snapshot.volumes
        under = {base for volume in volumes for base in bases_of(volume)}
        shown = shown_volumes(self._snapshot, self._repository.trees.load).values()
        with scratch_mount(self._repository, self._snapshot) as scratch:
            for number in sorted({disk.volume for disk in self._snapshot.disks}.union(shown) - under):
                volume = volumes[number]
                self._report(Progress("check", 0, 0, current=volume.name.encode()))
                try:
                    checked = check_volume(scratch.volume(volume.name), volume.size, timeout_s=self._options.check_s)
                except OSError as error:
                    _require_read(scratch.unread)
                    words = f"it cannot be read: {error.strerror}; {scratch.last_words()}"
                    self._add(CONTENT, volume.name, Result.FAILED, words)
                    continue
                if not checked.sound:
                    _require_read(scratch.unread)
                result = {True: Result.PASSED, False: Result.FAILED, None: Result.SKIPPED}[checked.sound]
                self._add(CONTENT, volume.name, result, checked.words)
                if checked.output:
                    self.left[f"check-{volume.name}.log".encode()] = checked.output

    def _read_files(self) -> None:
        with _mounted(self._repository, self._snapshot) as (top, unread):
            files, size, problems = forked.call(lambda take: _read_all(top, take), self._report)  # type: ignore[arg-type]
            if problems:
                _require_read(unread)
        if problems:
            self.left[b"problems.txt"] = "".join(f"{problem}\n" for problem in problems).encode()
            more = f", and {len(problems) - 1:,} more" if len(problems) > 1 else ""
            self._add(CONTENT, "", Result.FAILED, f"{problems[0]}{more}")
        else:
            self._add(CONTENT, "", Result.PASSED, f"{files:,} files, {size:,} bytes, read through the mount")

    # Level 3.

    def _boot(self) -> None:
        """Boot; if it does not come up with a bus that is a guess by the names of disks, with another one, too."""
        name = self._snapshot.disks[0].name
        options = self._options
        started = time.monotonic()
        try:
            first, bus, words = self._boot_once(options.machine, options.timeout_s)
            kept = first
            if first.result == Result.FAILED and options.machine.bus == "auto":
                other = "sata" if bus == "virtio" else "virtio"
                left_s = options.timeout_s - (time.monotonic() - started)
                if left_s < _LEAST_BOOT_S:
                    words += f"; its disks were on {bus}, which is a guess: try --bus {other}"
                else:
                    second, _, again = self._boot_once(replace(options.machine, bus=other), left_s)
                    kept = second if second.result == Result.PASSED else first
                    if kept is second:
                        words = f"{again}; its disks are on {other} then (--bus {other}): on {bus}, {words}"
                    else:
                        words += f"; its disks were on {bus}, and on {other}, {again}"
        except _UnreadableDisk as error:
            self._add(BOOT, name, Result.FAILED, str(error))
            return
        self._add(BOOT, name, kept.result, words)
        self.left[b"console.log"] = kept.console[-_MOST_CONSOLE:]
        if kept.screen:
            self.left[b"screen.txt"] = kept.screen.encode() + b"\n"
        if kept.picture:
            self.left[b"screen.png"] = kept.picture

    def _boot_once(self, options: MachineOptions, timeout_s: float) -> tuple[Watched, str, str]:
        """Boot on copies of the disks; return how that went, the bus of the first one, and all in words.

        Raises: _UnreadableDisk.
        """
        with scratch_mount(self._repository, self._snapshot) as scratch:
            disks = [MachineDisk(disk.name, scratch.disk(disk.name)) for disk in self._snapshot.disks]
            try:
                bus = bus_of(disks[0]) if options.bus == "auto" else options.bus
                machine = Machine(disks, options, scratch.beside("machine"))
            except OSError as error:
                _require_read(scratch.unread)
                raise _UnreadableDisk(f"it cannot be read: {error.strerror}; {scratch.last_words()}") from error
            try:
                watched = watch(machine, self._options.marker, timeout_s, self._report)
            finally:
                machine.end()
            if watched.result != Result.PASSED:
                _require_read(scratch.unread)
        return watched, bus, f"{watched.words} ({machine.firmware}, {machine.accelerator})"


@contextlib.contextmanager
def _mounted(repository: Repository, snapshot: Snapshot) -> Iterator[tuple[Path, Unread]]:
    """Mount one snapshot for a while; gives its root, and what the store does not give."""
    folder = Path(tempfile.mkdtemp(prefix="backupfs-verify-"))
    mountpoint = folder / "mnt"
    options = MountOptions(shown=MountFilter(snapshots=frozenset({snapshot.snapshot_id})))
    unread = Unread(folder / "unread")

    def serve(on_ready: Callable[[], None]) -> None:
        interrupts.run(
            serve_mount, repository, mountpoint, options, on_ready, _no_words, unread, stop=repository.store.stop
        )  # fmt: skip

    try:
        mountpoint.mkdir()
        pid = mount_in_background(serve, mountpoint, options, folder / "log")
        try:
            yield mountpoint / "ids" / short(snapshot.snapshot_id), unread
        finally:
            umount(mountpoint)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _no_words(_event: object) -> None:
    return


def _read_all(top: Path, take: Callable[[object], None]) -> tuple[int, int, list[str]]:
    """Read all files below a directory; return (files, bytes, what is wrong, one line each)."""
    buffer = memoryview(bytearray(_READ))
    files = size = 0
    problems: list[str] = []
    seen: set[int] = set()
    told = time.monotonic()
    pending = [os.fsencode(top)]
    start = len(pending[0])
    while pending:
        path = pending.pop()
        try:
            status = os.stat(path) if path == os.fsencode(top) else os.lstat(path)
            if stat.S_ISDIR(status.st_mode):
                pending += (os.path.join(path, name) for name in sorted(os.listdir(path), reverse=True))
                continue
            files += 1
            if stat.S_ISREG(status.st_mode) and status.st_ino not in seen:
                if status.st_nlink > 1:
                    seen.add(status.st_ino)
                with open(path, "rb", buffering=0) as file:
                    count = 0
                    while part := file.readinto(buffer):
                        count += part
                if count != status.st_size:
                    raise OSError(0, f"it has {status.st_size:,} bytes and gives {count:,}")
                size += count
        except OSError as error:
            if len(problems) < _MOST_NAMED * 50:
                problems.append(f"{shown(path[start:] or b'/')}: {error.strerror}")
        now = time.monotonic()
        if now - told > _PROGRESS_S:
            told = now
            take(Progress("verify", files, size, current=path[start:]))
    return files, size, problems


def _report_of(made: Verification) -> str:
    lines = [f"{made.program} on {made.host}, asked for level {made.level}, {made.duration_ns / 10**9:.1f} s"]
    lines += [
        f"level {one.level}  {one.result.name.lower():7}  {one.subject + ': ' if one.subject else ''}{one.words}"
        for one in made.outcomes
    ]
    return "\n".join(lines) + "\n"
