"""Answers that no server of object storage should give, and what follows from them. Nothing real is asked here."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from backupfs.errors import StoreError, StoreUnavailable
from backupfs.stores.s3 import S3Store
from backupfs.stores.s3_client import S3Options
from backupfs.stores.store import ObjectInfo

KEY = "packs/data/ab"
TAG = 'ETag: "x"'


class Answering:
    """Gives an answer to each request of the loopback, byte by byte what the test says, and ends the connection."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []  # (method, path)
        self.answer: Callable[[str, str], bytes] = lambda method, path: answer("")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                with here, contextlib.suppress(OSError):
                    self._serve(here)

    def _serve(self, here: socket.socket) -> None:
        with here.makefile("rb") as file:
            words = file.readline().split()
            method, path = (words[0].decode(), words[1].decode()) if len(words) > 1 else ("", "")
            length = 0
            while words and (line := file.readline().strip()):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            file.read(length)
        self.seen.append((method, path))
        here.sendall(self.answer(method, path))


def answer(body: str, *headers: str, status: str = "200 OK", length: str | None = "") -> bytes:
    """Return an answer; `length` instead of the body's, None: no such line."""
    lines = [f"HTTP/1.1 {status}", *headers, "Connection: close"]
    if length is not None:
        lines.append(f"Content-Length: {length or len(body)}")
    return "\r\n".join([*lines, "", body]).encode()


def listing(*keys: str, token: str = "", **others: str) -> str:
    """Return a page of a listing; `others` are fields of its entries in place of what is right."""
    fields = {"LastModified": "2026-01-02T03:04:05.000Z", "Size": "1"} | others
    entries = "".join(
        "<Contents>"
        + "".join(f"<{name}>{text}</{name}>" for name, text in ({"Key": key} | fields).items() if text)
        + "</Contents>"
        for key in keys
    )
    more = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    return (
        f"<ListBucketResult><Name>bucket</Name><IsTruncated>{'true' if token else 'false'}</IsTruncated>"
        f"{more}{entries}</ListBucketResult>"
    )


@pytest.fixture
def server() -> Iterator[Answering]:
    server = Answering()
    yield server
    server.close()


@pytest.fixture
def store(server: Answering, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    """One try of everything."""
    credentials(monkeypatch)
    store = S3Store("bucket", "", S3Options(f"http://127.0.0.1:{server.port}"))
    yield store
    store.close()


def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "one")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "two")


def test_a_put_whose_answer_has_no_etag_did_not_happen(store: S3Store, server: Answering) -> None:
    with pytest.raises(StoreUnavailable, match=f"cannot store object {KEY} .*no ETag"):
        store.put(KEY, b"1")
    server.answer = lambda *_: answer("", status="204 No Content")
    with pytest.raises(StoreUnavailable, match="no ETag"):
        store.put(KEY, b"1")
    # One that is no MD5 is what encryption by the server gives.
    server.answer = lambda *_: answer("", TAG)
    store.put(KEY, b"1")


@pytest.mark.parametrize(
    "pages",
    [
        lambda number: listing("a", token="same"),
        lambda number: listing("a" if number % 2 else "b", token=str(number % 2)),
        lambda number: listing("a", "b", token=str(number)),
        lambda number: listing(token=str(number)),
    ],
    ids=["the same page", "in a circle", "new tokens", "empty pages"],
)
def test_a_listing_without_end_is_an_error_at_once(
    pages: Callable[[int], str], store: S3Store, server: Answering
) -> None:
    server.answer = lambda *_: answer(pages(len(server.seen)))
    with pytest.raises(StoreError, match="listing of the server has no end") as caught:
        list(store.list(""))
    assert not isinstance(caught.value, StoreUnavailable)
    assert len(server.seen) <= 101


def test_pages_that_are_empty_or_twice_there_do_not_end_a_listing(store: S3Store, server: Answering) -> None:
    pages = [listing("b", "a", "a", token="1"), listing(token="2"), listing("b", token="3"), listing("c")]
    server.answer = lambda *_: answer(pages[len(server.seen) - 1])
    assert [info.key for info in store.list("")] == ["a", "a", "b", "b", "c"]


@pytest.mark.parametrize("body", ["", "<Foo/>", "<html><body/></html>", "<ListBucketResult/>"])
def test_an_answer_that_is_no_listing_is_not_an_empty_one(body: str, store: S3Store, server: Answering) -> None:
    for status in ("200 OK", "204 No Content"):
        server.answer = lambda *_, status=status: answer(body if "200" in status else "", status=status)  # type: ignore[misc]
        with pytest.raises(StoreUnavailable, match="the answer is no listing"):
            list(store.list(""))
    server.answer = lambda *_: answer(listing())
    assert list(store.list("")) == []


def test_an_object_comes_with_and_without_a_length(store: S3Store, server: Answering) -> None:
    server.answer = lambda *_: answer("content", length=None)
    assert store.get(KEY) == b"content"
    server.answer = lambda *_: answer("3\r\nabc\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=None)
    assert store.get(KEY) == b"abc"
    server.answer = lambda *_: answer("3\r\nabc\r\n", "Transfer-Encoding: chunked", length=None)
    with pytest.raises(StoreUnavailable, match=KEY):
        store.get(KEY)
    server.answer = lambda *_: answer("abc", length="4")
    with pytest.raises(StoreUnavailable, match=f"cannot read object {KEY}"):
        store.get(KEY)


@pytest.mark.parametrize("length", [None, "abc", "-1"])
def test_a_length_that_is_none_is_asked_for_again(length: str | None, store: S3Store, server: Answering) -> None:
    server.answer = lambda *_: answer("", length=length)
    with pytest.raises(StoreUnavailable, match=f"cannot look at object {KEY}.*garbled"):
        store.size(KEY)
    if length is not None:
        with pytest.raises(StoreUnavailable, match=f"cannot read object {KEY}"):
            store.get(KEY)


@pytest.mark.parametrize(
    "field",
    [
        {"Key": ""}, {"LastModified": ""}, {"LastModified": "x"}, {"LastModified": "9" * 20}, {"Size": ""},
        {"Size": "x"}, {"Size": "-1"},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_of_a_listing_that_is_garbled_is_asked_for_again(
    field: dict[str, str], store: S3Store, server: Answering
) -> None:
    server.answer = lambda *_: answer(listing("a", **field))
    with pytest.raises(StoreUnavailable, match=r"cannot list .*garbled"):
        list(store.list(""))
    server.answer = lambda *_: answer(listing("a"))
    assert list(store.list("")) == [ObjectInfo("a", 1, 1767323045 * 10**9)]


def test_a_page_that_is_not_the_last_and_names_no_next_one_is_asked_for_again(
    store: S3Store, server: Answering
) -> None:
    server.answer = lambda *_: answer(listing("a").replace("false", "true"))
    with pytest.raises(StoreUnavailable, match=r"cannot list .*garbled"):
        list(store.list(""))
