"""What is known of a disk, put to use: chunks of an earlier image stand for parts of it, and some are looked at.

A map of changes may be wrong: made for another disk, begun after the image that it names, or written by a program with
a fault. So it is distrusted: of the chunks that would not be read some are, chosen by chance each time.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from blake3 import blake3

from backupfs.disks.hints import Claim, Hints, Span, read_hints
from backupfs.disks.source import DiskSource
from backupfs.errors import DamagedObject, ObjectMissing, UnknownSnapshot, UsageError, shown
from backupfs.ids import ChunkId, short
from backupfs.repository.index import Index
from backupfs.snapshots.content import CHUNK, HOLE, pieces
from backupfs.snapshots.listing import SnapshotList
from backupfs.snapshots.snapshot import FREE_LEFT_OUT, IMAGE, Snapshot
from backupfs.snapshots.volumes import Volume

# Of the chunks that are not read, how many are looked at all the same.
_PART = 100
_LEAST, _MOST = 64, 4096

# (start, end, what stands for it): a chunk's id, nothing for a hole, or None for what must be read.
Taken = tuple[int, int, ChunkId | bytes | None]


def load_hints(maps: Sequence[tuple[str, bytes]], since: str, disks: Sequence[DiskSource]) -> dict[str, Hints]:
    """Read the maps of disks.

    maps: (disk's name or nothing, path). since: the image that they count from, where the user names it.
    Raises: UsageError.
    """
    found: dict[str, Hints] = {}
    for name, path in maps:
        fitting = [source for source in disks if not name or source.name == name]
        if len(fitting) != 1:
            which = f"there is no disk {shown(name)}" if name else "there are several disks"
            names = ", ".join(shown(source.name) for source in disks)
            raise UsageError(f"which disk is the map {shown(path)} of? {which}: give one of {names}, as in DISK=FILE")
        [source] = fitting
        if source.name in found:
            raise UsageError(f"the disk {shown(source.name)} has two maps: give one")
        found[source.name] = read_hints(path, source.size, since)
    return found


def image_of_hints(hints: Mapping[str, Hints], listed: SnapshotList) -> Snapshot | None:
    """Return the image that hints count from; None if they speak of none. Raises: UsageError."""
    named = {hint.since for hint in hints.values() if hint.since}
    if not named:
        return None
    found: dict[bytes, Snapshot] = {}
    for name in named:
        try:
            snapshot = listed.find(name)
        except UnknownSnapshot as error:
            raise UsageError(f"what a map of changes counts from is not there: {error}") from error
        found[snapshot.snapshot_id] = snapshot
    snapshot, *others = found.values()
    if others:
        raise UsageError(
            f"the maps count from different images, {short(snapshot.snapshot_id)} and "
            f"{short(others[0].snapshot_id)}: one image has one before it"
        )
    if snapshot.kind != IMAGE:
        raise UsageError(f"{short(snapshot.snapshot_id)}, which a map of changes counts from, is no image of disks")
    for name, hint in hints.items():
        if hint.since and volume_before(snapshot, name) is None:
            raise UsageError(
                f"the image {short(snapshot.snapshot_id)}, which the map {hint.source} counts from, has no disk "
                f"{shown(name)}: call the disk as it was called there, as in NAME=DISK"
            )
    return snapshot


def volume_before(snapshot: Snapshot, disk: str) -> Volume | None:
    """Return a disk of an image by its name, if it has one."""
    return next((snapshot.volumes[one.volume] for one in snapshot.disks if one.name == disk), None)


class DiskBefore:
    """A disk in an earlier image, as chunks that another image can take."""

    def __init__(
        self,
        snapshot: Snapshot,
        volume: Volume,
        load: Callable[[ChunkId], bytes | memoryview],
        index: Index,
        chunk: int,
        tell_damage: Callable[[], None],
    ) -> None:
        """Take the parts.

        load: gives list pages. index: of data chunks. chunk: into how many bytes disks are cut.
        tell_damage: called when a list page is damaged.
        """
        self._volume = volume
        self._load = load
        self._index = index
        self._chunk = chunk
        self._tell_damage = tell_damage
        # What was left out there is zeros in the image and was something else on the disk.
        self.has_left_out = bool(snapshot.traits & FREE_LEFT_OUT)

    def taken(self, start: int, end: int, takes_holes: bool) -> Iterator[Taken]:
        """Yield what stands for each part of a range of whole chunks, in order.

        A chunk that is there in another cut, that the index lacks, or whose list page is damaged must be read.
        Raises: StoreError.
        """
        found: list[tuple[int, int, bytes]] = []
        try:
            found += self._found(start, end, takes_holes)
        except (DamagedObject, ObjectMissing):
            self._tell_damage()
        wanted = {source for _, _, source in found if source}
        lengths = {row[0]: row[5] for row in self._index.find_first(ChunkId(source) for source in wanted)}
        at = start
        for low, high, source in found:
            if not source or lengths.get(ChunkId(source)) == high - low:
                if at < low:
                    yield at, low, None
                yield low, high, source
                at = high
        if at < end:
            yield at, end, None

    def _found(self, start: int, end: int, takes_holes: bool) -> Iterator[tuple[int, int, bytes]]:
        """Yield what there is of whole chunks, in order; of a hole, all that it has of them."""
        volume, chunk, at = self._volume, self._chunk, start
        for piece in pieces(volume.content, volume.size, start, end - start, self._load):
            low, at = at, at + piece.length
            first, last = -(-low // chunk) * chunk, at if at == end else at - at % chunk
            if piece.kind == HOLE and takes_holes and first < last:
                yield first, last, b""
            elif piece.kind == CHUNK and (first, last) == (low, at) and at - low <= chunk and not piece.offset:
                yield low, at, piece.source


@dataclass(frozen=True, slots=True)
class DiskHints:
    """What is said of a disk in whole chunks, and what SAME means."""

    hints: Hints
    before: DiskBefore | None

    def taken(self, start: int, end: int, claim: Claim) -> Iterator[Taken]:
        """Yield what stands for each part of a range of which something is said."""
        if claim in (Claim.ZERO, Claim.FREE):
            yield start, end, b""
        elif claim == Claim.SAME and self.before is not None:
            # Who is trusted speaks of the image itself, and not of the disk that it was made of.
            yield from self.before.taken(start, end, self.hints.is_trusted or not self.before.has_left_out)
        else:
            yield start, end, None

    def all_taken(self, spans: Sequence[Span]) -> Iterator[Taken]:
        """Yield what stands for each part of some spans that follow each other; the image is asked once."""
        same = [(start, end) for start, end, claim in spans if claim == Claim.SAME]
        found = list(self.taken(same[0][0], same[-1][1], Claim.SAME)) if same else []
        number = 0
        for start, end, claim in spans:
            if claim != Claim.SAME:
                yield from self.taken(start, end, claim)
                continue
            while number < len(found) and found[number][0] < end:
                low, high, stands = found[number]
                if high > start:
                    # Chunks and spans are both whole: only holes and what must be read are cut.
                    yield max(low, start), min(high, end), stands
                if high > end:
                    break
                number += 1


@dataclass(frozen=True, slots=True)
class Looked:
    """What looking at some chunks of a disk found."""

    count: int
    wrong_at: int | None  # the first byte of one that is not as it is said


def look(disk: DiskHints, source: DiskSource, chunk: int, id_key: bytes) -> Looked:
    """Read some chunks, chosen by chance, of which it is said that they need not be read.

    Raises: SourceError; StoreError.
    """
    spans = [span for span in disk.hints.spans if span[2] in (Claim.ZERO, Claim.SAME)]
    total = sum(-(-(end - start) // chunk) for start, end, _ in spans)
    wanted = min(total, max(_LEAST, min(_MOST, total // _PART)))
    # Of the system's own chance: nobody can know which ones, not even who made the map.
    chosen = sorted(random.SystemRandom().sample(range(total), wanted))
    for at, end, claim in _chunks(spans, chosen, chunk):
        data = source.read(at, end - at)
        for low, high, stands in disk.taken(at, end, claim):
            part = data[low - at : high - at]
            if stands is not None and not _is(part, stands, id_key):
                return Looked(wanted, at)
    return Looked(wanted, None)


def _is(data: bytes, stands: bytes, id_key: bytes) -> bool:
    return blake3(data, key=id_key).digest() == stands if stands else not any(memoryview(data))


def _chunks(spans: list[Span], numbers: list[int], chunk: int) -> Iterator[Span]:
    """Yield the chunks with some numbers, in order, counted over all spans."""
    first, place = 0, iter(spans)
    start, end, claim = next(place, (0, 0, Claim.READ))
    for number in numbers:
        while start + (number - first) * chunk >= end:
            first += -(-(end - start) // chunk)
            start, end, claim = next(place)
        at = start + (number - first) * chunk
        yield at, min(end, at + chunk), claim
