"""Which files this process has open, for tests that a piece of work leaves none behind."""

import gc
import os


def open_files() -> set[tuple[str, str]]:
    """Each open descriptor with what it is open on, apart from what is garbage already.

    What a later look has more than an earlier one was left open between them. Fewer say nothing: other tests'
    leftovers may end at any time.
    """
    gc.collect()
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
        except FileNotFoundError:
            continue  # the one that lists them
    return found
