"""Have what a path needs brought back from an archive class, so that it can be read."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from backupfs.codec.sealing import Kind
from backupfs.errors import ObjectMissing, UsageError
from backupfs.ids import ChunkId
from backupfs.repository import layout
from backupfs.repository.fetch import WantedChunk, plan_ranges
from backupfs.repository.pack import PackRef
from backupfs.repository.repository import Repository
from backupfs.snapshots.content import CHUNK, pieces
from backupfs.snapshots.node import Node
from backupfs.snapshots.snapshot import Snapshot
from backupfs.snapshots.volumes import Volume, extents_of
from backupfs.snapshots.walk import find_path, walk
from backupfs.stores.store import ArchiveState
from backupfs.stores.together import each
from backupfs.usecases.events import Progress, Report

# How fast it shall be, and what the provider says that takes at most, in hours, by class. Source: the documentation of
# S3's restore tiers.
HOURS = {
    "expedited": {"": 0.1},
    "standard": {"": 5.0, "DEEP_ARCHIVE": 12.0},
    "bulk": {"": 12.0, "DEEP_ARCHIVE": 48.0},
}
_CHUNKS_AT_ONCE = 100_000


@dataclass(frozen=True, slots=True)
class ThawOptions:
    """What a user can say about it."""

    tier: str = "standard"
    days: int = 7  # that the thawed copies stay
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class ThawResult:
    """What a path needs, and what was asked for."""

    packs: int  # that hold what is below the path
    size: int  # bytes of those
    ready: int  # packs that can be read now
    under_way: int  # that are being thawed since before
    requested: int  # that are archived, and were asked for now, or would be
    requested_size: int
    missing: int
    lost: int  # chunks of which nobody knows in which pack they are
    classes: dict[str, int]  # archived packs by class
    hours: float  # until all can be read, at most


def thaw(repository: Repository, snapshot: Snapshot, path: bytes, options: ThawOptions, report: Report) -> ThawResult:
    """Find the packs of everything below a path, and request those that are archived.

    Indexes must be loaded. Raises: PathNotFound; UsageError; DamagedObject; StoreError.
    """
    if options.tier not in HOURS:
        raise UsageError(f"--tier {options.tier}: choose one of {', '.join(HOURS)}")
    if options.days < 1:
        raise UsageError(f"--days {options.days}: at least one")
    store = repository.store
    # No byte of a chunk shows here that the cache leads to a wrong pack.
    repository.data_index.drop_garbled_runs()
    packs, lost = _packs_below(repository, find_path(snapshot, path, repository.trees.load), snapshot.volumes)
    keys = [layout.key_of(Kind.DATA_PACK, pack.pack_id) for pack in packs]
    done = 0

    def look(key: str) -> ArchiveState | None:
        try:
            return store.archive_state(key)
        except ObjectMissing:
            return None

    states: list[ArchiveState | None] = []
    for state in each(store, look, keys):
        states.append(state)
        report(Progress("thaw", len(states), 0, len(keys)))
    cold = [at for at, state in enumerate(states) if state is not None and state.is_archived and not state.is_thawing]
    under_way = [state for state in states if state is not None and state.is_thawing]
    classes = Counter(state.storage_class for state in states if state is not None and state.is_archived)
    if options.tier == "expedited" and "DEEP_ARCHIVE" in classes:
        raise UsageError("--tier expedited: DEEP_ARCHIVE has no such tier; choose standard or bulk")
    if not options.dry_run:
        for _ in each(store, lambda at: store.thaw(keys[at], options.days, options.tier), cold):
            done += 1
            report(Progress("thaw", done, 0, len(cold)))
    hours = HOURS[options.tier]
    return ThawResult(
        packs=len(packs),
        size=sum(pack.size for pack in packs),
        ready=sum(state is not None and not state.is_archived for state in states),
        under_way=len(under_way),
        requested=len(cold),
        requested_size=sum(packs[at].size for at in cold),
        missing=states.count(None),
        lost=lost,
        classes=dict(classes),
        hours=max((hours.get(name, hours[""]) for name in classes), default=0.0),
    )


def _packs_below(repository: Repository, top: Node, volumes: Sequence[Volume]) -> tuple[list[PackRef], int]:
    """Return (packs that hold what is below a node; how many chunks are in none that is known)."""
    found: dict[bytes, PackRef] = {}
    wanted: set[ChunkId] = set()
    nowhere: set[ChunkId] = set()

    def look_up() -> None:
        ranges, lost = plan_ranges(repository.data, [WantedChunk[None](chunk_id) for chunk_id in wanted - nowhere])
        for planned in ranges:
            found[planned.pack.pack_id] = planned.pack
        nowhere.update(chunk.chunk_id for chunk in lost)
        wanted.clear()

    for node in _files_below(repository, top):
        load = repository.trees.load
        for piece in pieces(node.content, node.size, 0, node.size, load, extents_of(volumes, load)):
            if piece.kind == CHUNK:
                wanted.add(ChunkId(piece.source))
        if len(wanted) >= _CHUNKS_AT_ONCE:
            look_up()
    look_up()
    return [found[pack_id] for pack_id in sorted(found)], len(nowhere)


def _files_below(repository: Repository, top: Node) -> Iterator[Node]:
    if top.is_file:
        yield top
    elif top.is_directory:
        for _, node in walk(top, b"", repository.trees.load):
            if node.is_file:
                yield node
