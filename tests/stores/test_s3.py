"""Object storage over a network that fails, and what the user is told. A proxy before a real Swift makes the faults."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest

from backupfs.errors import (
    AccessDenied,
    ObjectArchived,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreUnavailable,
    UsageError,
)
from backupfs.stores import s3_client
from backupfs.stores.opening import open_store
from backupfs.stores.retrying import RetryingStore
from backupfs.stores.s3 import S3Store
from backupfs.stores.s3_client import S3Options
from backupfs.stores.store import ArchiveState, Store
from tests.buckets import BUCKET, bucket_of, options_of
from tests.builders import noise
from tests.fault_proxy import FaultProxy
from tests.faulty_line import FaultyLine
from tests.servers import Server

DATA = os.urandom(100_000)
# Methods as they go over the network.
VERBS: dict[str, tuple[str, Callable[[Store], object]]] = {
    "put": ("PUT", lambda store: store.put("packs/data/new", DATA)),
    "get": ("GET", lambda store: store.get("packs/data/old")),
    "range": ("GET", lambda store: store.get("packs/data/old", start=50_000, length=1000)),
    "size": ("HEAD", lambda store: store.size("packs/data/old")),
    "list": ("GET", lambda store: [info.key for info in store.list("packs/data/o")]),
    "now": ("HEAD", lambda store: store.now() > 0),
    "delete": ("DELETE", lambda store: store.delete("packs/data/gone")),
}


@pytest.fixture
def proxy(swift: Server) -> Iterator[FaultProxy]:
    host, _, port = swift.endpoint_url.removeprefix("http://").partition(":")
    proxy = FaultProxy(host, int(port))
    yield proxy
    proxy.close()


@pytest.fixture
def behind(swift: Server, request: pytest.FixtureRequest) -> Iterator[S3Store]:
    """The bucket as it is, without the proxy."""
    store = bucket_of(swift, f"s3-{abs(hash(request.node.name)) % 10**12}")
    store.create()
    store.put("packs/data/old", DATA)
    store.put("packs/data/gone", b"x")
    yield store
    store.close()


@pytest.fixture
def once(swift: Server, behind: S3Store, proxy: FaultProxy) -> Iterator[S3Store]:
    """The same bucket through the proxy; one try of everything."""
    store = bucket_of(swift, behind._prefix, proxy.endpoint_url)
    yield store
    store.close()


@pytest.fixture
def store(once: S3Store) -> RetryingStore:
    return RetryingStore(once, sleep=lambda _: None)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("status", {"status": 503, "code": "SlowDown"}),
        ("status", {"status": 503, "code": "ServiceUnavailable"}),
        ("status", {"status": 500, "code": "InternalError"}),
        ("status", {"status": 429, "code": "TooManyRequests"}),
        ("status", {"status": 502, "code": "BadGateway"}),
        ("refuse", {}),
        ("lose_answer", {}),
        ("cut_download", {}),
        ("twice", {}),
    ],
    ids=["slow down", "unavailable", "internal", "too many", "bad gateway", "refuse", "lose", "cut", "twice"],
)
def test_what_fails_on_the_way_is_tried_again_and_right(
    kind: str, arguments: dict[str, object], verb: str, store: RetryingStore, behind: S3Store, proxy: FaultProxy
) -> None:
    method, call = VERBS[verb]
    rule = proxy.rule(kind, method=method, times=3, **arguments)
    found = call(store)
    assert rule.done > 0
    proxy.rules.clear()
    assert found == call(behind)
    assert behind.get("packs/data/old") == DATA
    if verb == "put":
        assert behind.get("packs/data/new") == DATA
    if verb == "delete":
        with pytest.raises(ObjectMissing):
            behind.size("packs/data/gone")


@pytest.mark.parametrize("kind", ["cut_upload", "flip_upload"])
def test_an_upload_that_is_cut_or_garbled_leaves_nothing_and_is_tried_again(
    kind: str, store: RetryingStore, once: S3Store, behind: S3Store, proxy: FaultProxy
) -> None:
    rule = proxy.rule(kind, method="PUT", times=1)
    with pytest.raises(StoreUnavailable, match="packs/data/new"):
        once.put("packs/data/new", DATA)
    with pytest.raises(ObjectMissing):
        behind.get("packs/data/new")
    rule.done = 0
    rule.times = 2
    store.put("packs/data/new", DATA)
    assert behind.get("packs/data/new") == DATA


def test_a_server_that_says_it_has_other_bytes_is_not_believed(
    store: RetryingStore, once: S3Store, behind: S3Store, proxy: FaultProxy
) -> None:
    once.put("a", b"1")
    proxy.rule("headers", method="PUT", headers={"ETag": '"' + "0" * 32 + '"'}, times=1)
    with pytest.raises(StoreUnavailable, match="other bytes than sent"):
        once.put("packs/data/new", DATA)
    proxy.rules.clear()
    store.put("packs/data/new", DATA)


def test_a_server_whose_etags_are_no_md5_is_found_out_by_reading_back_once(
    once: S3Store, behind: S3Store, proxy: FaultProxy
) -> None:
    proxy.rule("headers", method="PUT", headers={"ETag": '"' + "0" * 32 + '"'})
    once.put("packs/data/new", DATA)
    once.put("packs/data/more", DATA)
    assert [method for method, path in proxy.seen] == ["PUT", "GET", "PUT"]
    assert behind.get("packs/data/more") == DATA


def test_a_condition_that_a_server_does_not_know_is_left_out(once: S3Store, behind: S3Store, proxy: FaultProxy) -> None:
    proxy.rule("status", method="PUT", status=501, code="NotImplemented", times=1)
    once.put("config", b"mine", if_absent=True)
    assert behind.get("config") == b"mine"
    with pytest.raises(ObjectExists):
        once.put("config", b"other", if_absent=True)
    assert behind.get("config") == b"mine"


def test_a_put_if_absent_whose_answer_was_lost_is_ones_own(
    store: RetryingStore, behind: S3Store, proxy: FaultProxy
) -> None:
    proxy.rule("lose_answer", method="PUT", times=1)
    store.put("config", b"mine", if_absent=True)
    assert behind.get("config") == b"mine"


def test_a_stalled_connection_is_given_up_and_tried_again(
    store: RetryingStore, once: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "_READ_S", 1)
    proxy.rule("stall", method="GET", seconds=2.5, times=1)
    assert store.get("packs/data/old") == DATA
    assert len(proxy.seen) == 2


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("count", [1, 4])
def test_a_line_may_be_slow_as_long_as_it_moves(
    count: int, kind: Callable[[bytes], bytes], swift: Server, behind: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "_CONNECT_S", 1)
    monkeypatch.setattr(s3_client, "_READ_S", 1)
    host, _, port = swift.endpoint_url.removeprefix("http://").partition(":")
    proxy = FaultProxy(host, int(port), rate=1e6, buffer=32 << 10)
    slow = bucket_of(swift, behind._prefix, proxy.endpoint_url)
    data = noise(1, 3 << 20)
    keys = [f"packs/data/slow{number}" for number in range(count)]
    try:
        with ThreadPoolExecutor(count) as pool:
            # Each takes longer than either timeout.
            for putting in [pool.submit(slow.put, key, kind(data[: len(data) // count])) for key in keys]:
                putting.result()
    finally:
        slow.close()
        proxy.close()
    assert [behind.get(key) for key in keys] == [data[: len(data) // count]] * count


def test_a_server_that_is_away_is_an_error_that_names_it(swift: Server, proxy: FaultProxy) -> None:
    gone = bucket_of(swift, "x", proxy.endpoint_url)
    proxy.close()
    with pytest.raises(StoreUnavailable, match=proxy.endpoint_url):
        gone.get("config")


@pytest.mark.parametrize(
    ("status", "code", "error", "says"),
    [
        (403, "AccessDenied", AccessDenied, "refuses it to these credentials"),
        (403, "SignatureDoesNotMatch", AccessDenied, "refuses it to these credentials"),
        (403, "RequestTimeTooSkewed", AccessDenied, "clock of this machine"),
        (400, "ExpiredToken", AccessDenied, "credentials have expired: get new ones"),
        (403, "InvalidObjectState", ObjectArchived, "an archive class.*`backupfs thaw"),
        (507, "InsufficientStorage", StoreFull, "no room left"),
        (403, "QuotaExceeded", StoreFull, "no room left"),
        (404, "NoSuchBucket", StoreMissing, "no bucket backups at .*backupfs init"),
        (418, "Teapot", StoreError, "418 Teapot"),
    ],
)
def test_what_a_server_refuses_is_told_at_once_and_in_one_line(
    status: int, code: str, error: type[Exception], says: str, store: RetryingStore, proxy: FaultProxy
) -> None:
    rule = proxy.rule("status", status=status, code=code)
    with pytest.raises(error, match=says) as caught:
        store.get("packs/data/old")
    assert rule.done == 1
    assert "\n" not in str(caught.value)


def test_a_bucket_that_is_missing_is_not_an_object_that_is_missing(swift: Server) -> None:
    store = S3Store("no-such-bucket", "x", options_of(swift))
    for call in (
        lambda: store.get("config"),
        lambda: store.size("config"),
        lambda: store.put("config", b""),
        lambda: list(store.list("")),
        store.now,
    ):
        with pytest.raises(StoreMissing, match="there is no bucket no-such-bucket at http"):
            call()


def test_wrong_credentials_are_told(swift: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "credentials"
    path.write_text("[wrong]\naws_access_key_id = test:tester\naws_secret_access_key = wrong\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    store = S3Store(BUCKET, "x", replace(options_of(swift), profile="wrong"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    with pytest.raises(AccessDenied, match="SignatureDoesNotMatch"):
        store.get("config")


def test_no_credentials_at_all_say_where_they_come_from(
    swift: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID"):
        S3Store(BUCKET, "x", S3Options(swift.endpoint_url)).get("config")
    with pytest.raises(UsageError, match=r"could not be found: name one of ~/\.aws/config"):
        S3Store(BUCKET, "x", S3Options(swift.endpoint_url, profile="nobody")).get("config")


def test_a_certificate_that_nobody_signed_is_refused_with_the_remedy(swift_tls: Server) -> None:
    options = replace(options_of(swift_tls), ca_bundle="")
    with pytest.raises(StoreError, match=r"not to be trusted.*--ca-bundle FILE") as caught:
        S3Store(BUCKET, "x", options).get("config")
    assert not isinstance(caught.value, StoreUnavailable)


def test_a_certificate_for_another_host_is_told_at_once_and_in_one_line(swift_tls: Server) -> None:
    port = swift_tls.endpoint_url.rpartition(":")[2]
    options = replace(options_of(swift_tls), endpoint_url=f"https://localhost:{port}")
    with pytest.raises(StoreError, match=r"not to be trusted.*localhost.*127\.0\.0\.1") as caught:
        S3Store(BUCKET, "x", options).get("config")
    assert not isinstance(caught.value, StoreUnavailable)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("fault", ["cut", "flip"])
@pytest.mark.parametrize(("way", "at"), [("down", 20), ("down", 700), ("up", 300), ("up", 50_000), ("down", 50_000)])
def test_a_line_that_is_cut_or_garbled_below_tls_is_tried_again(
    fault: Literal["cut", "flip"], way: Literal["up", "down"], at: int, swift_tls: Server, swift: Server
) -> None:
    assert swift_tls.ca_bundle is not None
    behind = bucket_of(swift, f"line-{fault}-{way}-{at}")
    behind.create()
    behind.put("packs/data/old", DATA)
    line = FaultyLine(int(swift_tls.endpoint_url.rpartition(":")[2]), fault, way, at)
    try:
        options = replace(options_of(swift_tls), endpoint_url=f"https://127.0.0.1:{line.port}")
        store = RetryingStore(S3Store(BUCKET, f"line-{fault}-{way}-{at}", options))
        store.put("packs/data/new", DATA)
        assert store.get("packs/data/old") == DATA
        assert line.met >= 1
        assert behind.get("packs/data/new") == DATA
        store.close()
    finally:
        line.close()
        behind.close()


@pytest.mark.parametrize("name", ["--ca-bundle", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "ca_bundle of the profile,"])
@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), (b"no certificate", "it holds no certificates"), (b"folder", "it is a folder")],
    ids=["missing", "empty", "folder"],
)
def test_a_file_of_certificates_that_cannot_be_used_is_named(
    content: bytes | None, says: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ca.pem"
    if content == b"folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    options = S3Options("https://127.0.0.1:1")
    if name.startswith("--"):
        options = replace(options, ca_bundle=str(path))
    elif name.startswith("ca_bundle"):
        (tmp_path / "config").write_text(f"[default]\nca_bundle = {path}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    else:
        monkeypatch.setenv(name, str(path))
    with pytest.raises(UsageError, match=rf"{name} .*ca\.pem: {says}"):
        S3Store(BUCKET, "x", options).get("config")
    if not name.startswith("--"):
        # Nothing is to be trusted where there is no TLS.
        S3Store(BUCKET, "x", replace(options, endpoint_url="http://127.0.0.1:1"))._client()


def test_an_empty_variable_of_certificates_does_not_mean_any(
    swift_tls: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, "")
    with pytest.raises(StoreError, match="not to be trusted"):
        S3Store(BUCKET, "x", replace(options_of(swift_tls), ca_bundle="")).get("config")


def test_a_server_that_sends_on_in_circles_is_left_at_once(swift: Server) -> None:
    asked: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.command)
            self.send_response(301)
            self.send_header("Location", "https://elsewhere.example/")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 (a name of the library's)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = replace(options_of(swift), endpoint_url=f"http://127.0.0.1:{server.server_address[1]}")
        store = S3Store(BUCKET, "x", options)
        for call in (lambda: list(store.list("")), lambda: store.get("config"), store.now):
            with pytest.raises(
                StoreError, match=r"sends on to https://elsewhere\.example/: see --endpoint-url .*--region"
            ) as caught:
                call()
            assert not isinstance(caught.value, StoreUnavailable)
        store.close()
        server.shutdown()
    assert len(asked) < 40


def test_what_a_server_cannot_do_is_said_at_once_with_the_option(swift: Server) -> None:
    store = S3Store(BUCKET, "x", replace(options_of(swift), encryption="AES256"))
    with pytest.raises(StoreError, match=r"the server cannot do that, see --encryption \(501") as caught:
        store.put("packs/data/ab", b"1")
    assert not isinstance(caught.value, StoreUnavailable)
    store = S3Store("other-region", "x", replace(options_of(swift), region="eu-west-9"))
    with pytest.raises(StoreError, match="see --region"):
        store.create()


def test_classes_and_encryption_go_with_the_objects_they_are_for(
    swift: Server, once: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []
    options = replace(
        options_of(swift, proxy.endpoint_url), classes=(("packs/data/", "STANDARD_IA"),), encryption="aws:kms:KEY"
    )
    store = S3Store(BUCKET, "x", options)
    client = store._client()
    monkeypatch.setattr(client, "put_object", lambda **arguments: seen.append(arguments) or {"ETag": "x"})
    monkeypatch.setattr(store, "get", lambda key: b"1")
    store.put("packs/data/ab", b"1")
    store.put("packs/tree/ab", b"1")
    assert [arguments.get("StorageClass") for arguments in seen] == ["STANDARD_IA", None]
    assert {arguments["ServerSideEncryption"] for arguments in seen} == {"aws:kms"}
    assert {arguments["SSEKMSKeyId"] for arguments in seen} == {"KEY"}


def test_requests_are_counted_as_they_go_over_the_network(once: S3Store, proxy: FaultProxy) -> None:
    for _, call in VERBS.values():
        call(once)
    counts = once.requests
    assert (counts.put, counts.get, counts.list, counts.delete) == (1, 4, 1, 1)
    assert counts.sent == len(DATA)
    assert counts.received == len(DATA) + 1000
    assert len(proxy.seen) == 7


def test_requests_of_a_forked_process_count_even_if_it_is_killed(once: S3Store, proxy: FaultProxy) -> None:
    before = once.requests.get
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            once.get("packs/data/old")
            os.write(done, b"x")
            signal.pause()
        finally:
            os._exit(1)
    once.size("packs/data/old")
    assert os.read(ready, 1) == b"x"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ready)
    os.close(done)
    assert once.requests.get == before + 2
    assert once.requests.received == len(DATA)
    assert len(proxy.seen) == 2


def test_a_listing_of_many_pages_is_whole(once: S3Store, proxy: FaultProxy, behind: S3Store) -> None:
    for number in range(25):
        behind.put(f"many/{number:03}", b"")
    client = once._client()
    real = client.list_objects_v2
    client.list_objects_v2 = lambda **arguments: real(MaxKeys=10, **arguments)
    assert [info.key for info in once.list("many/")] == [f"many/{number:03}" for number in range(25)]
    assert len(proxy.seen) == 3


def test_a_listing_that_breaks_off_goes_on_with_the_page_that_failed(
    once: S3Store, store: RetryingStore, proxy: FaultProxy, behind: S3Store
) -> None:
    for number in range(25):
        behind.put(f"many/{number:03}", b"")
    client = once._client()
    real = client.list_objects_v2
    client.list_objects_v2 = lambda **arguments: real(MaxKeys=5, **arguments)
    proxy.rule("status", method="GET", skip=3, times=2)
    assert [info.key for info in store.list("many/")] == [f"many/{number:03}" for number in range(25)]
    # Five pages, and twice the fourth again.
    assert len(proxy.seen) == 7


def test_a_forked_process_uses_connections_of_its_own(behind: S3Store) -> None:
    assert behind.get("packs/data/old") == DATA
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for _ in range(20):
                    assert behind.get("packs/data/old") == DATA
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    for _ in range(20):
        assert behind.get("packs/data/old") == DATA
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3:", "s3://BUCKET"),
        ("s3:bucket", "s3://BUCKET"),
        ("s3://", "s3://BUCKET"),
        ("s3:///prefix", "s3://BUCKET"),
        ("s3://b", "s3://BUCKET"),
        ("s3://bucket/a b", "the prefix is"),
        ("s3://bucket/../x", "the prefix is"),
        ("s3://bucket/a//b", "the prefix is"),
        ("s3://bucket/" + "a" * 101, "the prefix is"),
    ],
)
def test_a_url_that_names_no_bucket_is_refused(url: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        open_store(url)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (S3Options(addressing="x"), "choose one of auto, path, virtual"),
        (S3Options(connections=0), "at least one"),
        (S3Options(encryption="foo"), "--encryption foo: choose one of AES256, aws:kms, aws:kms:KEY"),
        (S3Options(encryption="aes256"), "choose one of"),
        (S3Options(encryption="aws:kms:"), "choose one of"),
    ],
)
def test_an_option_that_means_nothing_is_refused(options: S3Options, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        open_store("s3://bucket/prefix", options)


@pytest.mark.parametrize("encryption", ["", "AES256", "aws:kms", "aws:kms:arn:aws:kms:eu-west-1:1:key/2"])
def test_the_kinds_of_encryption_that_are_known_pass(encryption: str) -> None:
    open_store("s3://bucket/prefix", S3Options(encryption=encryption)).close()


def test_opening_a_bucket_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("s3://bucket/a/prefix/", S3Options("http://127.0.0.1:1"))
    assert store.url == "s3://bucket/a/prefix"
    store.close()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({}, ArchiveState()),
        ({"StorageClass": "STANDARD_IA"}, ArchiveState("STANDARD_IA")),
        ({"StorageClass": "GLACIER"}, ArchiveState("GLACIER", True)),
        ({"StorageClass": "GLACIER", "Restore": 'ongoing-request="true"'}, ArchiveState("GLACIER", True, True)),
        (
            {"StorageClass": "DEEP_ARCHIVE", "Restore": 'ongoing-request="false", expiry-date="Fri, 1 Jan 2027"'},
            ArchiveState("DEEP_ARCHIVE"),
        ),
        (
            {"StorageClass": "INTELLIGENT_TIERING", "ArchiveStatus": "ARCHIVE_ACCESS"},
            ArchiveState("INTELLIGENT_TIERING", True),
        ),
    ],
)
def test_what_a_server_says_of_archives_is_understood(
    answer: dict[str, str], expected: ArchiveState, behind: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behind._client(), "head_object", lambda **_: answer)
    assert behind.archive_state("packs/data/old") == expected


def test_a_thaw_is_requested_once(behind: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    client = behind._client()
    asked: list[dict[str, object]] = []

    def restore_object(**arguments: object) -> None:
        asked.append(arguments)
        if len(asked) > 1:
            raise client.exceptions.ClientError({"Error": {"Code": "RestoreAlreadyInProgress"}}, "RestoreObject")

    monkeypatch.setattr(client, "restore_object", restore_object)
    for _ in range(2):
        behind.thaw("packs/data/old", 3, "bulk")
    assert asked[0]["RestoreRequest"] == {"Days": 3, "GlacierJobParameters": {"Tier": "Bulk"}}


def test_a_server_without_archives_says_so(behind: S3Store) -> None:
    assert not behind.archive_state("packs/data/old").is_archived
    with pytest.raises(StoreError, match="cannot thaw object packs/data/old"):
        behind.thaw("packs/data/old", 1, "standard")
    with pytest.raises(ObjectMissing):
        behind.archive_state("packs/data/none")


@pytest.mark.parametrize("connections", [1, 3])
def test_no_more_connections_are_used_than_allowed(swift: Server, proxy: FaultProxy, connections: int) -> None:
    store = S3Store(BUCKET, "counted", replace(options_of(swift, proxy.endpoint_url), connections=connections))
    store.create()
    real, lock, now, most = store._client().head_object, threading.Lock(), 0, 0

    def counted(**arguments: object) -> object:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        try:
            return real(**arguments)
        finally:
            with lock:
                now -= 1

    store._client().head_object = counted
    proxy.latency_s = 0.02

    def look(number: int) -> None:
        with pytest.raises(ObjectMissing):
            store.size(f"none/{number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look, range(24)))
    assert most == connections
    store.close()
