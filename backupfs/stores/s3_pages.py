"""A listing that comes in pages, one request each."""

from collections import deque
from collections.abc import Callable

from backupfs.errors import StoreError
from backupfs.stores.store import LastingListing, ObjectInfo, is_key

# Pages in a row without a key that comes after all before; real servers give one or two.
_MOST_IDLE_PAGES = 100

Page = tuple[list[ObjectInfo], str | None]  # entries, and what to ask for the next page with


class Pages(LastingListing):
    """Yields the objects of all pages; a page that could not be had is asked for again by the next call."""

    def __init__(self, ask: Callable[[str | None], Page], about: str) -> None:
        """Take the parts.

        ask: (None for the first page, or what came with the page before) → page. about: what cannot be done, for
        messages.
        """
        self._ask = ask
        self._about = about
        self._waiting: deque[ObjectInfo] = deque()
        self._token: str | None = None
        self._tokens: set[str] = set()
        self._before: set[str] = set()  # keys of the last page that had any
        self._newest = ""
        self._idle_pages = 0
        self._is_done = False

    def __next__(self) -> ObjectInfo:
        """Return the next object. Raises: StopIteration; StoreError."""
        while not self._waiting:
            if self._is_done:
                raise StopIteration
            self._read_page()
        return self._waiting.popleft()

    def _read_page(self) -> None:
        entries, token = self._ask(self._token)
        # SeaweedFS goes folder by folder; that differs for names with '-' or '.', of which a repository has none.
        entries.sort(key=lambda info: info.key)
        newest = max(self._newest, entries[-1].key) if entries else self._newest
        self._idle_pages = self._idle_pages + 1 if newest == self._newest else 0
        if token is not None and (token in self._tokens or self._idle_pages >= _MOST_IDLE_PAGES):
            raise StoreError(
                f"{self._about}: the listing of the server has no end, the same page comes again and again: its "
                "operator must look into that"
            )
        if token is not None:
            self._tokens.add(token)
        self._newest, self._token, self._is_done = newest, token, token is None
        # Some begin a page with what the one before had.
        entries = [info for info in entries if is_key(info.key) and info.key not in self._before]
        self._before = {info.key for info in entries} or self._before
        self._waiting.extend(entries)
