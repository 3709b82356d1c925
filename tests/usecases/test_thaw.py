"""Finding and requesting what a path needs from an archive, in a store that has archive classes."""

import os
from pathlib import Path

import pytest

from backupfs.errors import ObjectArchived, PathNotFound, StoreError, UsageError
from backupfs.repository.pack import ROW
from backupfs.repository.repository import Repository
from backupfs.snapshots.snapshot import Snapshot
from backupfs.stores.memory import MemoryStore
from backupfs.stores.store import ArchiveState
from backupfs.usecases.thaw import ThawOptions, ThawResult, thaw
from tests.builders import Entry, File, back_up, build, folders_in, new_repository, reopened
from tests.faults import AroundStore


class ArchivingStore(AroundStore):
    """Data packs are archived until they were thawed and some time went by."""

    is_far = True  # type: ignore[assignment]

    def __init__(self, inner: MemoryStore, storage_class: str = "GLACIER") -> None:
        super().__init__(inner)
        self.storage_class = storage_class
        self.thawing: dict[str, tuple[int, str]] = {}
        self.ready: set[str] = set()

    def archive_state(self, key: str) -> ArchiveState:
        self.inner.size(key)
        if not key.startswith("packs/data/"):
            return ArchiveState()
        return ArchiveState(self.storage_class, key not in self.ready, key in self.thawing)

    def thaw(self, key: str, days: int, tier: str) -> None:
        assert self.archive_state(key).is_archived
        self.thawing[key] = (days, tier)

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        if self.archive_state(key).is_archived:
            raise ObjectArchived(f"object {key} is in {self.storage_class}")
        return super().get(key, start=start, length=length)

    def wait(self) -> None:
        self.ready |= self.thawing.keys()
        self.thawing.clear()


def stored(tmp_path: Path) -> tuple[MemoryStore, Snapshot, str]:
    """Two folders whose content lies in different packs."""
    tree: dict[str, Entry] = {
        name: {f"f{number}": File(os.urandom(400_000)) for number in range(6)} for name in ("a", "b")
    }
    inner = MemoryStore()
    repository = new_repository(inner)
    source = build(tree, tmp_path / "source")
    for name in ("a", "b"):
        back_up(repository, source / name if isinstance(source, Path) else Path(os.fsdecode(source)) / name)
    snapshot = back_up(repository, source)
    return inner, snapshot, os.fsdecode(source)


def opened(store: ArchivingStore) -> Repository:
    repository = reopened(store)
    repository.load_indexes()
    return repository


def run(repository: Repository, snapshot: Snapshot, path: str, **options: object) -> ThawResult:
    chosen = ThawOptions(**options)  # type: ignore[arg-type]
    return thaw(repository, snapshot, os.fsencode(path), chosen, lambda event: None)


def test_a_path_needs_its_own_packs_only_and_they_come_back(tmp_path: Path) -> None:
    inner, snapshot, source = stored(tmp_path)
    store = ArchivingStore(inner)
    repository = opened(store)
    everything = run(repository, snapshot, "/", dry_run=True)
    one = run(repository, snapshot, f"{source}/a", dry_run=True)
    assert 0 < one.packs < everything.packs == len(list(inner.list("packs/data/")))
    assert (one.ready, one.under_way, one.requested, one.missing) == (0, 0, one.packs, 0)
    assert (one.classes, one.hours) == ({"GLACIER": one.packs}, 5.0)
    assert one.requested_size == one.size > 6 * 400_000
    assert store.thawing == {}

    asked = run(repository, snapshot, f"{source}/a", tier="bulk", days=3)
    assert asked.requested == one.packs
    assert set(store.thawing.values()) == {(3, "bulk")}
    again = run(repository, snapshot, f"{source}/a", tier="bulk")
    assert (again.ready, again.under_way, again.requested, again.hours) == (0, one.packs, 0, 12.0)
    store.wait()
    after = run(repository, snapshot, f"{source}/a")
    assert (after.ready, after.under_way, after.requested, after.hours) == (one.packs, 0, 0, 0.0)
    assert 0 < run(repository, snapshot, f"{source}/a/f1").packs < one.packs


@pytest.mark.parametrize(("tier", "hours"), [("standard", 12.0), ("bulk", 48.0)])
def test_deep_archives_take_longer(tier: str, hours: float, tmp_path: Path) -> None:
    inner, snapshot, _ = stored(tmp_path)
    repository = opened(ArchivingStore(inner, "DEEP_ARCHIVE"))
    assert run(repository, snapshot, "/", tier=tier, dry_run=True).hours == hours
    with pytest.raises(UsageError, match="DEEP_ARCHIVE has no such tier"):
        run(repository, snapshot, "/", tier="expedited", dry_run=True)


def test_a_pack_that_is_missing_is_counted(tmp_path: Path) -> None:
    inner, snapshot, _ = stored(tmp_path)
    inner.delete(next(iter(inner.list("packs/data/"))).key)
    result = run(opened(ArchivingStore(inner)), snapshot, "/")
    assert (result.missing, result.requested) == (1, result.packs - 1)


@pytest.mark.expected_log("is damaged; it is made again")
@pytest.mark.parametrize("at", [8, 32, 36], ids=["chunk id", "ordinal of its pack", "offset of its block"])
def test_a_garbled_cache_file_leads_to_no_other_packs(at: int, tmp_path: Path) -> None:
    inner, snapshot, source = stored(tmp_path)
    folders = folders_in(tmp_path)
    packs = run(reopened(inner, folders), snapshot, f"{source}/a").packs
    for file in (tmp_path / "cache").rglob("index-data/*.run"):
        data = bytearray(file.read_bytes())
        rows = int.from_bytes(data[-64:-56], "little")
        for row in range(0, rows, ROW.size):
            data[row + at] ^= 1
        file.write_bytes(data)
    result = run(reopened(inner, folders), snapshot, f"{source}/a")
    assert (result.packs, result.lost, result.missing) == (packs, 0, 0)


def test_chunks_that_no_index_names_are_looked_for_and_counted(tmp_path: Path) -> None:
    inner, snapshot, _ = stored(tmp_path)
    packs = run(reopened(inner), snapshot, "/").packs
    for info in list(inner.list("index/data/")):
        inner.delete(info.key)
    found = run(reopened(inner), snapshot, "/")
    assert (found.packs, found.lost) == (packs, 0)
    inner.delete(next(iter(inner.list("packs/data/"))).key)
    result = run(reopened(inner), snapshot, "/")
    assert result.packs == packs - 1
    assert result.lost > 0


def test_a_store_without_archives_has_everything_ready(tmp_path: Path) -> None:
    inner, snapshot, _ = stored(tmp_path)
    repository = reopened(inner)
    repository.load_indexes()
    result = run(repository, snapshot, "/")
    assert (result.ready, result.requested, result.classes) == (result.packs, 0, {})
    with pytest.raises(StoreError, match="has to be thawed"):
        inner.thaw("config", 1, "bulk")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    inner, snapshot, _ = stored(tmp_path)
    repository = opened(ArchivingStore(inner))
    with pytest.raises(UsageError, match="choose one of expedited, standard, bulk"):
        run(repository, snapshot, "/", tier="soon")
    with pytest.raises(UsageError, match="at least one"):
        run(repository, snapshot, "/", days=0)
    with pytest.raises(PathNotFound):
        run(repository, snapshot, "/no/such")
