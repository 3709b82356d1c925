"""Asking a store for many things at once, where each takes a network's time."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from backupfs.stores.store import Store

Item = TypeVar("Item")
Result = TypeVar("Result")

# Under way at once; their results are held until they are taken.
_AT_ONCE = 16


@contextlib.contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Give threads for calls that may take long; when an interrupt ends it, they are left to themselves."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    except Exception:
        pool.shutdown(cancel_futures=True)
        raise
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def each(store: Store, ask: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield ask(item) for each item, in their order; one after the other for a store at hand.

    ask: may be called in other threads, which are gone when the iterator has come to its end.
    """
    if not store.is_far or len(items) < 2:
        yield from map(ask, items)
        return
    with threads(_AT_ONCE) as pool:
        for start in range(0, len(items), _AT_ONCE):
            yield from pool.map(ask, items[start : start + _AT_ONCE])


def at_once(store: Store, *calls: Callable[[], object]) -> None:
    """Make calls that ask a store for things, at once where it is far. Raises: what the first of them raised."""
    for _ in each(store, lambda call: call(), calls):
        pass
