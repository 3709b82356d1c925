"""From chunks to blocks: what a scanning process leaves out, and what its leader still finds to be known."""

import threading

import pytest
import trio

from backupfs.codec.sealing import Kind
from backupfs.ids import ChunkId
from backupfs.repository.pack import Block, compress_block
from backupfs.repository.repository import Repository
from backupfs.repository.slots import Slots
from backupfs.repository.writer import ChunkSaver, FilledBlock, NewChunks, PackWriter
from tests.builders import new_repository, noise

SIZE = 4096


class Line:
    """A saver, its slots, and the blocks that it handed out."""

    def __init__(self, repository: Repository, slots: Slots | None = None) -> None:
        self.slots = slots or Slots(8, SIZE)
        self.blocks: list[FilledBlock] = []
        self.saver = ChunkSaver(Kind.DATA_PACK, repository.data_index, self.slots, self.blocks.append, SIZE)

    def save(self, *chunks: bytes) -> None:
        for chunk in chunks:
            self.saver.save(id_of(chunk), chunk)
        self.saver.flush()


def id_of(chunk: bytes) -> ChunkId:
    return ChunkId(noise(int.from_bytes(chunk[:4], "little"), 32))


def chunks_of(block: Block | None) -> list[bytes]:
    assert block is not None
    plain = b"".join(block.parts)
    found = []
    for length in block.lengths:
        found.append(plain[:length])
        plain = plain[length:]
    assert not plain
    assert [id_of(chunk) for chunk in found] == list(block.chunk_ids)
    return found


def stored(repository: Repository, new: NewChunks, blocks: list[Block]) -> None:
    async def store() -> None:
        writer = PackWriter(repository.store, repository.keyring, repository.data_index, Kind.DATA_PACK, bytes(16), 1)
        writer.on_indexed = new.retire
        for block in blocks:
            await writer.add(block)
        await writer.flush()

    trio.run(store)


def test_a_block_is_the_chunks_in_order_and_each_once() -> None:
    line = Line(repository := new_repository())
    chunks = [noise(number, 1000) for number in range(10)]
    line.save(*chunks, *chunks)
    new = NewChunks(repository.data_index)
    blocks = [new.block_of(filled, line.slots) for filled in line.blocks]
    assert [chunk for block in blocks for chunk in chunks_of(block)] == chunks
    assert all(block is not None and block.plain_length <= SIZE for block in blocks)


def test_a_chunk_that_was_read_into_its_room_is_kept_only_if_it_is_new() -> None:
    line = Line(repository := new_repository())
    one, two = noise(1, 700), noise(2, 900)
    for chunk in (one, one, two, one, two):
        line.saver.room(len(chunk))[:] = chunk
        line.saver.keep(id_of(chunk), len(chunk))
    line.saver.flush()
    [filled] = line.blocks
    assert chunks_of(NewChunks(repository.data_index).block_of(filled, line.slots)) == [one, two]


def test_what_two_scanners_send_is_stored_once() -> None:
    repository = new_repository()
    one, two = Line(repository), Line(repository)
    a, b, c = (noise(number, 500) for number in range(3))
    one.save(a, b)
    two.save(b, c)
    two.save(a)
    new = NewChunks(repository.data_index)
    assert chunks_of(new.block_of(one.blocks[0], one.slots)) == [a, b]
    assert chunks_of(new.block_of(two.blocks[0], two.slots)) == [c]
    # `two` did not meet it before, so it was sent; nothing of that block is left.
    assert new.block_of(two.blocks[1], two.slots) is None


def test_chunks_that_were_indexed_meanwhile_are_still_known_to_the_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    repository = new_repository()
    line, late = Line(repository), Line(new_repository())
    a, b = noise(1, 500), noise(2, 500)
    line.save(a)
    new = NewChunks(repository.data_index)
    first = new.block_of(line.blocks[0], line.slots)
    assert first is not None
    stored(repository, new, [first])
    assert not new._unindexed
    late.save(a, b)
    assert chunks_of(new.block_of(late.blocks[0], late.slots)) == [b]


def test_a_chunk_larger_than_a_slot_goes_without_one() -> None:
    line = Line(repository := new_repository())
    large = noise(7, SIZE + 1)
    line.save(large)
    [filled] = line.blocks
    assert filled.slot < 0
    assert chunks_of(NewChunks(repository.data_index).block_of(filled, line.slots)) == [large]


def test_a_compressed_block_does_not_need_its_slot_any_more() -> None:
    line = Line(repository := new_repository())
    chunk = noise(3, 3000)  # nothing compresses it, so it is kept as it is
    line.save(chunk)
    block = NewChunks(repository.data_index).block_of(line.blocks[0], line.slots)
    assert block is not None
    packed = compress_block(block, 1)
    line.slots.view(line.blocks[0].slot)[:] = bytes(SIZE)
    assert bytes(packed.unit.body) == chunk


def test_ids_that_were_forgotten_are_sent_again_and_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backupfs.repository.writer._MOST_RECENT", 3)
    line = Line(repository := new_repository())
    chunks = [noise(number, 300) for number in range(8)]
    line.save(*chunks, *chunks)
    new = NewChunks(repository.data_index)
    kept = [
        chunk for filled in line.blocks for chunk in chunks_of(new.block_of(filled, line.slots) or Block((), (), ()))
    ]
    assert sum(len(filled.lengths) for filled in line.blocks) > len(chunks)
    assert kept == chunks


def test_whoever_wants_a_slot_waits_for_one() -> None:
    slots = Slots(2, 10)
    assert {slots.take(), slots.take()} == {0, 1}
    taken: list[int] = []
    waiting = threading.Thread(target=lambda: taken.append(slots.take()))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    slots.give_back(1)
    waiting.join(5)
    assert taken == [1]
    slots.close()


def test_slots_do_not_touch_each_other() -> None:
    slots = Slots(3, 8)
    for number in range(3):
        slots.view(number)[:] = bytes([number]) * 8
    assert [bytes(slots.view(number)) for number in range(3)] == [bytes([number]) * 8 for number in range(3)]
    slots.close()
