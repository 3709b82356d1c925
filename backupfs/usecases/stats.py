"""How large a repository is and what it saves."""

from dataclasses import dataclass

from backupfs.codec.sealing import Kind
from backupfs.repository import layout
from backupfs.repository.pack import ROW
from backupfs.repository.repository import Repository
from backupfs.snapshots.listing import load_all


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts and bytes of a whole repository."""

    snapshots: int
    snapshot_bytes: int  # of all files of all snapshots, as if each were a copy
    chunks: int
    chunk_bytes: int  # plain, each chunk once
    data_packs: int
    data_bytes: int  # stored
    tree_packs: int
    tree_bytes: int
    index_segments: int
    index_bytes: int
    other_objects: int
    other_bytes: int

    @property
    def stored_bytes(self) -> int:
        """All that lies in the store."""
        return self.data_bytes + self.tree_bytes + self.index_bytes + self.other_bytes


def stats(repository: Repository) -> Stats:
    """Count; costs a listing of the store and a pass over the local index. Raises: StoreError."""
    listed = load_all(repository)
    sizes = dict.fromkeys((Kind.DATA_PACK, Kind.TREE_PACK, Kind.DATA_INDEX, Kind.TREE_INDEX), (0, 0))
    other = (0, 0)
    for info in repository.store.list(""):
        for kind, (count, size) in sizes.items():
            if info.key.startswith(layout.prefix_of(kind)):
                sizes[kind] = (count + 1, size + info.size)
                break
        else:
            other = (other[0] + 1, other[1] + info.size)
    chunks = chunk_bytes = 0
    for index in (repository.data_index, repository.tree_index):
        for _, window in index.windows():
            chunks += len(window) // ROW.size
            chunk_bytes += sum(row[5] for row in ROW.iter_unpack(window))
    data, tree = sizes[Kind.DATA_PACK], sizes[Kind.TREE_PACK]
    segments, tree_segments = sizes[Kind.DATA_INDEX], sizes[Kind.TREE_INDEX]
    return Stats(
        snapshots=len(listed.snapshots),
        snapshot_bytes=sum(snapshot.statistics.size for snapshot in listed.snapshots),
        chunks=chunks,
        chunk_bytes=chunk_bytes,
        data_packs=data[0],
        data_bytes=data[1],
        tree_packs=tree[0],
        tree_bytes=tree[1],
        index_segments=segments[0] + tree_segments[0],
        index_bytes=segments[1] + tree_segments[1],
        other_objects=other[0],
        other_bytes=other[1],
    )
