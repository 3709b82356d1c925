"""What was written over bytes: by a model."""

import random

from backupfs.view.overlay import BLOCK, Overlay


def test_reads_and_runs_are_those_of_a_model() -> None:
    chooser = random.Random(5)
    size = 9000 * BLOCK + 100  # more than two groups of blocks, and a short block at the end
    overlay = Overlay()
    model: dict[int, bytes] = {}
    for _ in range(300):
        block = chooser.choice([chooser.randrange(9001), chooser.randrange(4090, 4100), 9000])
        count = min(chooser.randrange(1, 5), 9001 - block)
        data = chooser.randbytes(min(count * BLOCK, size - block * BLOCK))
        overlay.write(block * BLOCK, data)
        for number in range(count):
            model[block + number] = data[number * BLOCK : (number + 1) * BLOCK]
    assert overlay.blocks == len(model)
    for _ in range(300):
        start = chooser.randrange(size)
        end = min(size, start + chooser.randrange(1, 20 * BLOCK))
        position = start
        for low, high, written in overlay.runs(start, end):
            assert (low, high > low) == (position, True)
            for block in range(low // BLOCK, (high - 1) // BLOCK + 1):
                assert (block in model) == written
            if written:
                first = low // BLOCK
                plain = b"".join(model[block] for block in range(first, (high - 1) // BLOCK + 1))
                assert overlay.read(low, high - low) == plain[low - first * BLOCK :][: high - low]
            position = high
        assert position == end
    found = {block for low, high in overlay.written() for block in range(low // BLOCK, high // BLOCK)}
    assert found == set(model)
    overlay.close()


def test_nothing_written_is_one_run_a_group() -> None:
    overlay = Overlay()
    assert list(overlay.runs(5, 70)) == [(5, 70, False)]
    assert list(overlay.runs(5, 5)) == []
    assert list(overlay.written()) == []
    overlay.close()
