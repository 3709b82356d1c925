"""Reading large files from chunks in memory: what is looked at beyond what was asked for."""

import pytest

from backupfs.codec.records import encode_record
from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId
from backupfs.snapshots.content import CHUNK, LIST, Segment
from backupfs.view.content import WINDOW_SIZE, FileReader

MIB = 1 << 20
PAGE, BROKEN, DATA = (ChunkId(bytes([number]) * 32) for number in (1, 2, 3))


class Memory:
    """Gives list pages and chunks as a loader does that has them all."""

    far_ahead = 3 * MIB

    def __init__(self) -> None:
        self.wanted: set[ChunkId] = set()

    def tree(self, chunk_id: ChunkId) -> bytes:
        pages = {PAGE: encode_record([[MIB, CHUNK, DATA]] * (WINDOW_SIZE // MIB)), BROKEN: b"\xc1 no record"}
        return pages[chunk_id]

    def all_data(self, chunk_ids: list[ChunkId]) -> list[memoryview]:
        return [memoryview(bytes(MIB)) for _ in chunk_ids]

    def prefetch(self, chunk_ids: list[ChunkId]) -> None:
        self.wanted.update(chunk_ids)


def test_damage_ahead_of_a_read_is_no_error_of_it() -> None:
    loader = Memory()
    reader = FileReader(loader)  # type: ignore[arg-type]
    content: list[Segment] = [[WINDOW_SIZE, LIST, PAGE], [WINDOW_SIZE, LIST, BROKEN]]
    for offset in range(0, WINDOW_SIZE, 128 << 10):
        assert len(reader.read(1, content, 2 * WINDOW_SIZE, offset, 128 << 10, ())) == 128 << 10
    assert loader.wanted == {DATA}
    with pytest.raises(DamagedObject):
        reader.read(1, content, 2 * WINDOW_SIZE, WINDOW_SIZE, 128 << 10, ())
