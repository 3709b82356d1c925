"""Answers that no server of object storage should give, and what follows from them. Nothing real is asked here."""

import contextlib
import gc
import hashlib
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from backupfs.errors import (
    DamagedObject,
    ObjectArchived,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreMissing,
    StoreUnavailable,
    UsageError,
)
from backupfs.stores import s3, s3_client
from backupfs.stores.pace import Pace
from backupfs.stores.retrying import RetryingStore
from backupfs.stores.s3 import S3Store
from backupfs.stores.s3_client import S3Options
from backupfs.stores.store import ObjectInfo

KEY = "packs/data/ab"
TAG = 'ETag: "x"'


class Endless(bytes):
    """An answer whose last bytes come again and again, for as long as anybody reads."""

    repeated = 0


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
        if here.recv(1, socket.MSG_PEEK) == b"\x16":  # TLS, which has no lines
            here.recv(1 << 16)
            here.sendall(self.answer("", ""))
            return
        with here.makefile("rb") as file:
            words = file.readline().split()
            method, path = (words[0].decode(), words[1].decode()) if len(words) > 1 else ("", "")
            length = 0
            while words and (line := file.readline().strip()):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            file.read(length)
        self.seen.append((method, path))
        here.sendall(said := self.answer(method, path))
        while isinstance(said, Endless):
            here.sendall(said[-said.repeated :])


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


def test_a_tag_that_is_no_md5_is_believed_once_an_object_was_read_back(store: S3Store, server: Answering) -> None:
    there = "other"
    # Encryption by the server gives such tags; so does a web server that stores nothing.
    server.answer = lambda method, _: answer("" if method == "PUT" else there, TAG)
    with pytest.raises(StoreUnavailable, match="other bytes than sent"):
        store.put(KEY, b"1")
    there = "1"
    store.put(KEY, b"1")
    store.put(KEY, b"2")
    assert [method for method, _ in server.seen] == ["PUT", "GET", "PUT", "GET", "PUT"]


def test_a_tag_may_be_written_in_other_ways(store: S3Store, server: Answering) -> None:
    digest = hashlib.md5(b"1", usedforsecurity=False).hexdigest()
    for tag in (digest, f'"{digest}"', f'"{digest.upper()}"', f'W/"{digest}"'):
        server.answer = lambda *_, tag=tag: answer("", f"ETag: {tag}")  # type: ignore[misc]
        store.put(KEY, b"1")
        with pytest.raises(StoreUnavailable, match="other bytes than sent"):
            store.put(KEY, b"2")


@pytest.mark.parametrize(
    ("body", "range_line"),
    [
        ("b", "bytes 1-1/6"),
        ("bcde", "bytes 1-4/6"),
        ("abc", "bytes 0-2/6"),
        ("bcd", "bytes 1-2/6"),
        ("bc", "bytes 1-2/*"),
        ("bcdef", "bytes 1-5/*"),
        ("bcd", f"bytes 1-3/{'6' * 5000}"),
        ("bcd", ""),
    ],
    ids=[
        "too short",
        "too long",
        "from elsewhere",
        "not what it says",
        "short, of unknown size",
        "of unknown size",
        "of no size",
        "unsaid",
    ],
)
@pytest.mark.parametrize("length", [3, None])
def test_a_range_that_is_another_is_asked_for_again(
    length: int | None, body: str, range_line: str, store: S3Store, server: Answering
) -> None:
    said = [f"Content-Range: {range_line}"] if range_line else []
    server.answer = lambda *_: answer(body, TAG, *said, status="206 Partial Content")
    with pytest.raises(StoreUnavailable, match=f"cannot read object {KEY} .*other bytes came than asked for"):
        store.get(KEY, start=1, length=length)
    whole = "bcd" if length else "bcdef"
    said = [TAG, f"Content-Range: bytes 1-{len(whole)}/6"]
    server.answer = lambda *_: answer(whole, *said, status="206 Partial Content")
    assert store.get(KEY, start=1, length=length) == whole.encode()
    if length:
        # What range it is is all that matters where the end was said.
        server.answer = lambda *_: answer(whole, TAG, "Content-Range: bytes 1-3/*", status="206 Partial Content")
        assert store.get(KEY, start=1, length=length) == whole.encode()
    # One that knows no ranges gives all.
    server.answer = lambda *_: answer("abcdef", TAG)
    assert store.get(KEY, start=1, length=length) == whole.encode()


def test_a_range_that_is_said_not_to_be_there_and_is_is_asked_for_again(store: S3Store, server: Answering) -> None:
    server.answer = lambda method, _: (
        answer("", TAG, length="6") if method == "HEAD" else answer("", status="416 Range Not Satisfiable")
    )
    with pytest.raises(StoreUnavailable, match=f"cannot read object {KEY} .*no such range"):
        store.get(KEY, start=1, length=3)
    assert store.get(KEY, start=6) == b""
    with pytest.raises(DamagedObject, match="cut short"):
        store.get(KEY, start=4, length=3)


@pytest.mark.parametrize("whole", [False, True])
def test_an_object_is_cut_short_only_where_two_answers_say_so(whole: bool, store: S3Store, server: Answering) -> None:
    there = 6

    def short(method: str, _: str) -> bytes:
        if method == "HEAD":
            return answer("", TAG, length=str(there))
        if whole:
            return answer("abcd", TAG)
        return answer("bcd", TAG, "Content-Range: bytes 1-3/4", status="206 Partial Content")

    server.answer = short
    with pytest.raises(StoreUnavailable, match=f"cannot read object {KEY} .*it has 4 bytes, and that it has 6"):
        store.get(KEY, start=1, length=5)
    there = 4
    with pytest.raises(DamagedObject, match="cut short"):
        store.get(KEY, start=1, length=5)


@pytest.mark.parametrize("body", ["", "<html><body>log in</body></html>"])
def test_what_lies_between_and_answers_anything_gives_no_objects(body: str, store: S3Store, server: Answering) -> None:
    server.answer = lambda method, _: answer("" if method == "HEAD" else body, length=str(len(body)))
    for call in (
        lambda: store.get(KEY), lambda: store.get(KEY, start=20), lambda: store.get(KEY, start=5, length=10),
        lambda: store.get(KEY, length=0), lambda: store.size(KEY), lambda: store.put(KEY, b"1", if_absent=True),
    ):  # fmt: skip
        with pytest.raises(StoreUnavailable, match=f"object {KEY} .*none of S3's.*see --endpoint-url"):
            call()
    server.answer = lambda *_: answer(body, "Content-Range: bytes 0-4/32", status="206 Partial Content")
    with pytest.raises(StoreUnavailable, match="none of S3's"):
        store.get(KEY, length=5)


def test_a_listing_that_lacks_something_is_asked_for_again(store: S3Store, server: Answering) -> None:
    whole = listing("a", "b", token="next")
    last = listing("a", "b").replace("<IsTruncated>", "<KeyCount>2</KeyCount><IsTruncated>")
    for page in (
        whole.replace("IsTruncated", "IsTruncbted"),
        whole.replace("true", "urue"),
        listing("a").replace("IsTruncated", "IsTruncbted"),
        last.replace("Contents", "Cootents"),
        last.replace("<Contents><Key>a", "<Cootents><Key>a").replace("</Contents>", "</Cootents>", 1),
    ):
        server.answer = lambda *_, page=page: answer(page)  # type: ignore[misc]
        with pytest.raises(StoreUnavailable, match=r"cannot list the objects .*no whole listing"):
            list(store.list(""))
    server.answer = lambda *_: answer(last)
    assert [info.key for info in store.list("")] == ["a", "b"]
    # What is of another folder is not taken for something of this one.
    below = S3Store("bucket", "mine", S3Options(f"http://127.0.0.1:{server.port}"))
    server.answer = lambda *_: answer(listing("mine/a", "tine/b"))
    with pytest.raises(StoreUnavailable, match="garbled"):
        list(below.list(""))
    below.close()


@pytest.mark.parametrize("body", ["", "<Error><Code>NoSuchKey</Code><Message>none</Message></Error>"])
def test_a_delete_of_what_is_not_there_is_fine_where_a_server_says_so(
    body: str, store: S3Store, server: Answering
) -> None:
    server.answer = lambda method, _: answer(body, status="404 Not Found") if method == "DELETE" else answer("")
    store.delete(KEY)
    server.answer = lambda *_: answer("", status="404 Not Found")
    with pytest.raises(StoreMissing, match="there is no bucket"):
        store.delete(KEY)


@pytest.mark.parametrize(
    ("status", "code"),
    [("408 Request Timeout", ""), ("425 Too Early", ""), ("409 Conflict", "OperationAborted")],
)
def test_what_a_server_would_rather_do_later_is_tried_again(
    status: str, code: str, store: S3Store, server: Answering
) -> None:
    body = f"<Error><Code>{code}</Code><Message>later</Message></Error>" if code else ""
    server.answer = lambda *_: answer(body, status=status)
    for call in (lambda: store.put(KEY, b"1"), lambda: store.delete(KEY)):
        with pytest.raises(StoreUnavailable, match=status[:3]):
            call()


def test_a_mistake_of_this_program_is_not_taken_for_a_garbled_answer(
    store: S3Store, server: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by calls without end: Python 3.13 does not count those of functions that take what comes.
    def endless(*_: object) -> None:
        raise RecursionError("maximum recursion depth exceeded")

    server.answer = lambda *_: answer(listing("a"))
    for mistake, error in ((None, TypeError), (endless, RecursionError)):
        monkeypatch.setattr(s3, "ObjectInfo", mistake)
        with pytest.raises(error):
            list(store.list(""))
    monkeypatch.setattr(Pace, "pass_on", None)
    with pytest.raises(TypeError):
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
    assert [info.key for info in store.list("")] == ["a", "b", "c"]


def test_pages_in_no_order_lose_nothing(store: S3Store, server: Answering) -> None:
    pages = [listing("f", "d", token="1"), listing("b", "a", token="2"), listing("c", "e", token="3"), listing("g")]
    server.answer = lambda *_: answer(pages[len(server.seen) - 1])
    assert {info.key for info in RetryingStore(store).list("")} == set("abcdefg")


@pytest.mark.parametrize("body", ["", "<Foo/>", "<html><body/></html>", "<ListBucketResult/>"])
def test_an_answer_that_is_no_listing_is_not_an_empty_one(body: str, store: S3Store, server: Answering) -> None:
    for status in ("200 OK", "204 No Content"):
        server.answer = lambda *_, status=status: answer(body if "200" in status else "", status=status)  # type: ignore[misc]
        with pytest.raises(StoreUnavailable, match="the answer is no whole listing"):
            list(store.list(""))
    server.answer = lambda *_: answer(listing())
    assert list(store.list("")) == []


def test_an_object_comes_with_and_without_a_length(store: S3Store, server: Answering) -> None:
    server.answer = lambda *_: answer("content", TAG, length=None)
    assert store.get(KEY) == b"content"
    server.answer = lambda *_: answer("3\r\nabc\r\n0\r\n\r\n", TAG, "Transfer-Encoding: chunked", length=None)
    assert store.get(KEY) == b"abc"
    server.answer = lambda *_: answer("3\r\nabc\r\n", TAG, "Transfer-Encoding: chunked", length=None)
    with pytest.raises(StoreUnavailable, match=KEY):
        store.get(KEY)
    server.answer = lambda *_: answer("abc", TAG, length="4")
    with pytest.raises(StoreUnavailable, match=f"cannot read object {KEY}"):
        store.get(KEY)


# The HTTP client of Python 3.13 leaves the connection of such an answer to the collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
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
    with pytest.raises(StoreUnavailable, match=r"cannot list .*no whole listing"):
        list(store.list(""))


@pytest.mark.parametrize("body", ["<html><body>hi<br></body></html>", '{"a": 1}', "<ListBucketResult><Name>bu"])
def test_what_is_no_answer_of_s3_is_told_as_that(body: str, store: S3Store, server: Answering) -> None:
    server.answer = lambda *_: answer(body)
    for call in (lambda: list(store.list("")), lambda: store.put(KEY, b"1")):
        with pytest.raises(StoreUnavailable, match=r"the answer is none of S3's.*see --endpoint-url") as caught:
            call()
        assert "500" not in str(caught.value)
    # An error in a 200 is one.
    server.answer = lambda *_: answer("<Error><Code>InternalError</Code><Message>busy</Message></Error>")
    with pytest.raises(StoreUnavailable, match="InternalError, busy"):
        list(store.list(""))


@pytest.mark.parametrize("status", ["409 Conflict", "412 Precondition Failed"])
def test_a_conflict_means_that_an_object_is_there_only_where_that_was_the_question(
    status: str, store: S3Store, server: Answering
) -> None:
    server.answer = lambda *_: answer("", status=status)
    for call in (
        lambda: store.put(KEY, b"1"), lambda: store.get(KEY), lambda: list(store.list("")), store.now,
    ):  # fmt: skip
        with pytest.raises(StoreError, match=status[:3]) as caught:
            call()
        assert not isinstance(caught.value, ObjectExists)

    def conditional(method: str, path: str) -> bytes:
        del path
        missing = method == "HEAD" and len(server.seen) == 5
        return answer("", TAG, status="404 Not Found" if missing else "200 OK" if method == "HEAD" else status)

    server.answer = conditional
    with pytest.raises(ObjectExists, match=f"object {KEY} is in s3://bucket already"):
        store.put(KEY, b"1", if_absent=True)


def test_a_put_beside_another_is_tried_again(store: S3Store, server: Answering) -> None:
    body = "<Error><Code>ConditionalRequestConflict</Code><Message>another is under way</Message></Error>"
    server.answer = lambda method, _: (
        answer("", status="404 Not Found")
        if method == "HEAD" and len(server.seen) % 3 == 1
        else answer("")
        if method == "HEAD"
        else answer(body, status="409 Conflict")
    )
    with pytest.raises(StoreUnavailable, match="409 ConditionalRequestConflict, another is under way"):
        store.put(KEY, b"1", if_absent=True)


def test_what_is_archived_and_cannot_be_thawed_does_not_send_to_thaw(store: S3Store, server: Answering) -> None:
    body = "<Error><Code>InvalidObjectState</Code><Message>no</Message><StorageClass>GLACIER</StorageClass></Error>"
    server.answer = lambda *_: answer(body, status="403 Forbidden")
    options = S3Options(f"http://127.0.0.1:{server.port}", thawable="packs/data/")
    below = S3Store("bucket", "mine", options)
    for one in (store, below):
        with pytest.raises(ObjectArchived, match="it is in GLACIER: `backupfs thaw SNAP:PATH`"):
            one.get(KEY)
    for key in ("config", "packs/tree/ab"):
        with pytest.raises(
            ObjectArchived, match=f"{key} .*GLACIER, where it must not be: .*only what begins with mine/packs/data/"
        ) as caught:
            below.get(key)
        assert "backupfs thaw" not in str(caught.value)
    below.close()


def test_a_thaw_for_which_there_is_no_room_says_what_to_take_instead(store: S3Store, server: Answering) -> None:
    body = "<Error><Code>GlacierExpeditedRetrievalNotAvailable</Code><Message>try later</Message></Error>"
    server.answer = lambda *_: answer(body, status="503 Service Unavailable")
    with pytest.raises(StoreError, match=f"cannot thaw object {KEY} .*take --tier standard") as caught:
        store.thaw(KEY, 1, "expedited")
    assert not isinstance(caught.value, StoreUnavailable)


@pytest.mark.parametrize(
    "date",
    [
        "",
        "Fri, 02 Jan",
        "x",
        "Fri, 02 Jan 99999999999999999999 03:04:05 GMT",
        "Fri, 99 Jan 2026 03:04:05 GMT",
        ",",
        "9" * 999,
    ],
)
def test_a_time_that_is_none_is_asked_for_again(date: str, store: S3Store, server: Answering) -> None:
    server.answer = lambda *_: answer("", *([f"Date: {date}"] if date else []))
    with pytest.raises(StoreUnavailable, match=r"does not tell the time: .*no Date line.*a proxy.*http://127"):
        store.now()
    server.answer = lambda *_: answer("", "Date: Fri, 02 Jan 2026 03:04:05 GMT")
    assert store.now() == 1767323045 * 10**9


@pytest.mark.parametrize("body", ["", "<html><body>not found</body></html>"])
def test_a_bucket_cannot_be_made_where_nothing_is_known(body: str, store: S3Store, server: Answering) -> None:
    server.answer = lambda method, _: answer("" if method == "HEAD" else body, status="404 Not Found")
    with pytest.raises(StoreError, match=r"the bucket bucket at http://127.*404.*see --endpoint-url$") as caught:
        store.create()
    assert not isinstance(caught.value, StoreUnavailable)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_server_that_sends_on_is_told_with_the_place(status: int, store: S3Store, server: Answering) -> None:
    server.answer = lambda *_: answer("", "Location: https://new.example/", status=f"{status} Moved")
    for call in (lambda: store.get(KEY), lambda: store.put(KEY, b"1"), store.now):
        with pytest.raises(StoreError, match=r"sends on to https://new\.example/: see --endpoint-url") as caught:
            call()
        assert not isinstance(caught.value, StoreUnavailable)


def test_a_303_which_urllib3_follows_unasked_is_told_at_once(store: S3Store, server: Answering) -> None:
    server.answer = lambda *_: answer("", "Location: https://new.example/", status="303 See Other")
    with warnings.catch_warnings():
        # It leaves its connection open.
        warnings.simplefilter("ignore", ResourceWarning)
        with pytest.raises(StoreError, match="sends on to another place: see --endpoint-url") as caught:
            store.get(KEY)
        assert not isinstance(caught.value, StoreUnavailable)
        del caught
        gc.collect()


def test_a_server_that_may_speak_another_protocol_is_doubted_until_it_answers(
    store: S3Store, server: Answering
) -> None:
    https = S3Store("bucket", "", S3Options(f"https://127.0.0.1:{server.port}"))
    for one in (https, store):
        for said in (b"", b"\x15\x03\x01\x00\x02\x02\x46", answer("a plain request", status="400 Bad Request")):
            server.answer = lambda *_, said=said: said  # type: ignore[misc]
            with pytest.raises(StoreError, match=r"does it speak https\? see --endpoint-url$"):
                one.get(KEY)
    server.answer = lambda *_: b""
    with pytest.raises(StoreUnavailable) as caught:
        store.get(KEY)
    assert "https" not in str(caught.value)
    https.close()


@pytest.mark.parametrize("endpoint", ["htp://x", "http://x:99999", "//x", "http://x?y=1", "foo"])
def test_an_endpoint_that_is_no_address_names_the_option(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials(monkeypatch)
    with pytest.raises(UsageError, match="see --endpoint-url"):
        S3Store("bucket", "", S3Options(endpoint)).get(KEY)


@pytest.mark.parametrize(
    "name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "--region", "--storage-class"]
)
def test_what_cannot_be_sent_is_refused_by_its_name_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials(monkeypatch)
    options = S3Options("http://127.0.0.1:1")
    if name == "--region":
        options = replace(options, region="secret\n")
    elif name == "--storage-class":
        options = replace(options, classes=(("packs/", "secret\n"),))
    else:
        monkeypatch.setenv(name, "secret\n")
    with pytest.raises(UsageError, match=f"{name} has a character") as caught:
        S3Store("bucket", "", options).put(KEY, b"1")
    assert "secret" not in str(caught.value)
    # The secret key is signed with, not sent.
    credentials(monkeypatch)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "pässword")
    S3Store("bucket", "", S3Options("http://127.0.0.1:1"))._client()


@pytest.mark.parametrize("proxy", ["http://[", "http://a b:1", "http://x:99999", "socks5://x:1", "://", "http://"])
def test_a_proxy_that_is_none_is_refused_where_it_would_be_used(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials(monkeypatch)
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(UsageError, match="HTTPS_PROXY is no address"):
        S3Store("bucket", "", S3Options("https://objects.example")).get(KEY)
    S3Store("bucket", "", S3Options("http://objects.example"))._client()
    for good in ("proxy:3128", "http://user:word@proxy:3128", "http://[::1]:3128"):
        monkeypatch.setenv("HTTPS_PROXY", good)
        S3Store("bucket", "", S3Options("https://objects.example"))._client()


def test_a_server_that_fails_where_it_should_encrypt_may_not_be_able_to(store: S3Store, server: Answering) -> None:
    server.answer = lambda *_: answer("", status="500 Internal Server Error")
    with pytest.raises(StoreUnavailable) as caught:
        store.put(KEY, b"1")
    assert "encryption" not in str(caught.value)
    encrypting = S3Store("bucket", "", S3Options(f"http://127.0.0.1:{server.port}", encryption="AES256"))
    with pytest.raises(StoreUnavailable, match=r"or it cannot do --encryption AES256: try without$"):
        encrypting.put(KEY, b"1")
    encrypting.close()


def test_a_deletion_that_only_something_between_confirmed_is_tried_again(store: S3Store, server: Answering) -> None:
    deleted: list[str] = []

    def portal(method: str, _: str) -> bytes:
        deleted.extend([method] if method == "DELETE" else [])
        return answer("", TAG, length="6") if method == "HEAD" else answer("")

    server.answer = portal
    with pytest.raises(StoreUnavailable, match=f"cannot delete object {KEY} .*it is there after that"):
        store.delete(KEY)
    # Some servers say 200 and did it.
    server.answer = lambda method, _: answer("", status="404 Not Found") if method == "HEAD" else answer("")
    with pytest.raises(StoreMissing):
        store.delete(KEY)
    assert deleted == ["DELETE"]


@pytest.mark.parametrize("body", ["404 page not found\n", "<html>none</html>", "<Error><Code></Code></Error>"])
def test_a_404_of_what_lies_between_says_nothing_of_an_object_or_the_bucket(
    body: str, store: S3Store, server: Answering
) -> None:
    """What passes requests on says that while it begins, or while the server does."""
    page = answer(body, status="404 Not Found")
    # Where nothing else ever came, the address is wrong.
    server.answer = lambda *_: page
    with pytest.raises(StoreMissing, match="there is no bucket"):
        store.get(KEY)
    for is_bucket_there in (True, False):
        server.answer = lambda *_: answer("abc", TAG)
        assert store.get(KEY) == b"abc"
        server.answer = lambda method, _, there=is_bucket_there: answer("") if method == "HEAD" and there else page  # type: ignore[misc]
        for call in (lambda: store.get(KEY), lambda: store.put(KEY, b"1"), lambda: list(store.list(""))):
            with pytest.raises(StoreUnavailable, match=r"none of S3's") as caught:
                call()
            assert not isinstance(caught.value, StoreMissing)
    # A server says what it lacks.
    server.answer = lambda *_: answer("<Error><Code>NoSuchKey</Code></Error>", status="404 Not Found")
    with pytest.raises(ObjectMissing):
        store.get(KEY)
    server.answer = lambda *_: answer("<Error><Code>NoSuchBucket</Code></Error>", status="404 Not Found")
    for call in (lambda: store.get(KEY), lambda: store.put(KEY, b"1"), lambda: list(store.list(""))):
        with pytest.raises(StoreMissing):
            call()


@pytest.mark.parametrize("status", ["200 OK", "206 Partial Content"])
@pytest.mark.parametrize("length", [None, 3])
def test_an_object_that_is_said_to_be_huge_is_not_read(
    length: int | None, status: str, store: S3Store, server: Answering
) -> None:
    for said in (1 << 40, 1 << 70):
        server.answer = lambda *_, said=said: answer(  # type: ignore[misc]
            "abc", TAG, f"Content-Range: bytes 1-{said}/{said + 1}", status=status, length=str(said)
        )
        with pytest.raises(StoreUnavailable, match=f"cannot read object {KEY} .*(garbled|other bytes)"):
            store.get(KEY, start=1, length=length)


def test_what_comes_without_end_is_read_no_further_than_an_object_may_be_long(
    store: S3Store, server: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_MOST_SIZE", 1 << 20)
    monkeypatch.setattr(s3_client, "_MOST_ANSWER", 1 << 20)
    chunk = f"{1 << 16:x}\r\n{'a' * (1 << 16)}\r\n"
    for said, endless in ((None, "a" * (1 << 16)), ("Transfer-Encoding: chunked", chunk)):
        for status in ("200 OK", "404 Not Found"):
            head = answer("", TAG, *([said] if said else []), status=status, length=None)
            said_on = Endless(head + endless.encode())
            said_on.repeated = len(endless)
            server.answer = lambda *_, said_on=said_on: said_on  # type: ignore[misc]
            for call in (lambda: store.get(KEY), lambda: list(store.list(""))):
                with pytest.raises(StoreUnavailable, match=r"cannot .*garbled.*too long"):
                    call()


def test_memory_that_is_not_there_for_an_answer_is_told_in_one_line(
    store: S3Store, server: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(S3Store, "_received", lacking)
    server.answer = lambda *_: answer("abc", TAG)
    with pytest.raises(StoreUnavailable, match=f"cannot read object {KEY} .*not enough memory"):
        store.get(KEY)
