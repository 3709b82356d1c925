"""Asking a store for many things at once, where each takes a network's time."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from backupfs.stores.store import Store

Item = TypeVar("Item")
Result = TypeVar("Result")

# Under way at once; their results are held until they are taken.
_AT_ONCE = 16


def each(store: Store, ask: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield ask(item) for each item, in their order; one after the other for a store at hand.

    ask: may be called in other threads, which are gone when the iterator has ended.
    """
    if not store.is_far or len(items) < 2:
        yield from map(ask, items)
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, len(items), _AT_ONCE):
            yield from pool.map(ask, items[start : start + _AT_ONCE])
