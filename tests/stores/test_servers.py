"""The object storage servers of the tests are what they claim to be."""

import dataclasses
import itertools
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, SSLError

from tests.servers import Server, ServerFailed, start_seaweedfs, start_swift

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = ["swift", "swift_old", "seaweedfs"]
START_AND_SLEEP = """
import sys, time
from pathlib import Path
from tests.servers import Server, start_tls
server = start_tls(Server("none", Path(), "http://127.0.0.1:1", "", ""), Path(sys.argv[1]))
print(*server.pids, flush=True)
time.sleep(60)
"""

_buckets = itertools.count()


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Server:
    server = request.getfixturevalue(request.param)
    assert isinstance(server, Server)
    return server


def new_bucket(client: Any) -> str:
    name = f"servers-{next(_buckets)}"
    client.create_bucket(Bucket=name)
    return name


def refusal(call: Any, **arguments: object) -> tuple[int, str]:
    """Return the status and the code with which a server refuses a call."""
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    answer = caught.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


@pytest.mark.parametrize("server", [*NAMES, "swift_tls", "swift_old_tls"], indirect=True)
def test_a_server_keeps_lists_and_deletes_an_object(server: Server) -> None:
    client = server.client()
    bucket = new_bucket(client)
    client.put_object(Bucket=bucket, Key="packs/ab", Body=b"content")
    assert client.get_object(Bucket=bucket, Key="packs/ab")["Body"].read() == b"content"
    assert [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket)["Contents"]] == ["packs/ab"]
    client.delete_object(Bucket=bucket, Key="packs/ab")
    assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 0
    assert refusal(client.get_object, Bucket=bucket, Key="packs/ab") == (404, "NoSuchKey")
    client.delete_bucket(Bucket=bucket)
    assert refusal(client.list_objects_v2, Bucket=bucket) == (404, "NoSuchBucket")


@pytest.mark.parametrize("server", NAMES, indirect=True)
def test_a_server_refuses_a_wrong_secret_and_a_put_into_no_bucket(server: Server) -> None:
    stranger = dataclasses.replace(server, secret_key="guessed").client()
    assert refusal(stranger.list_buckets) == (403, "SignatureDoesNotMatch")
    assert refusal(server.client().put_object, Bucket="no-bucket", Key="a", Body=b"") == (404, "NoSuchBucket")


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ("swift", (412, "PreconditionFailed")),
        ("swift_old", (501, "NotImplemented")),
        ("seaweedfs", (412, "PreconditionFailed")),
    ],
    indirect=["server"],
)
def test_a_put_on_condition_is_what_tells_servers_apart(server: Server, expected: tuple[int, str]) -> None:
    client = server.client()
    bucket = new_bucket(client)
    client.put_object(Bucket=bucket, Key="a", Body=b"first")
    assert refusal(client.put_object, Bucket=bucket, Key="a", Body=b"second", IfNoneMatch="*") == expected
    assert client.get_object(Bucket=bucket, Key="a")["Body"].read() == b"first"


@pytest.mark.parametrize("server", NAMES, indirect=True)
def test_a_server_refuses_content_of_another_md5(server: Server) -> None:
    client = server.client()
    bucket = new_bucket(client)
    refused = refusal(client.put_object, Bucket=bucket, Key="a", Body=b"b", ContentMD5="1B2M2Y8AsgTpgAmY7PhCfg==")
    assert refused == (400, "BadDigest")
    assert refusal(client.get_object, Bucket=bucket, Key="a") == (404, "NoSuchKey")


def test_an_old_swift_knows_no_checksums_behind_the_content(swift_tls: Server, swift_old_tls: Server) -> None:
    for server, expected in ((swift_tls, None), (swift_old_tls, (501, "NotImplemented"))):
        client = server.client(request_checksum_calculation="when_supported")
        call = {"Bucket": new_bucket(client), "Key": "a", "Body": b"content"}
        if expected:
            assert refusal(client.put_object, **call) == expected
        else:
            client.put_object(**call)


@pytest.mark.parametrize("server", ["swift_tls", "swift_old_tls"], indirect=True)
def test_a_server_that_speaks_tls_is_not_to_be_trusted_without_its_certificate(server: Server) -> None:
    with pytest.raises(SSLError):
        dataclasses.replace(server, ca_bundle=None).client().list_buckets()


def test_a_large_object_passes_through_tls(swift_tls: Server) -> None:
    client = swift_tls.client()
    bucket = new_bucket(client)
    content = os.urandom(5_000_001)
    client.put_object(Bucket=bucket, Key="a", Body=content)
    assert client.get_object(Bucket=bucket, Key="a")["Body"].read() == content


@pytest.mark.slow
def test_a_server_started_again_in_its_folder_has_its_objects(tmp_path: Path) -> None:
    first = start_swift(tmp_path)
    try:
        first.client().create_bucket(Bucket="bucket")
        first.client().put_object(Bucket="bucket", Key="a", Body=b"content")
    finally:
        first.stop()
    second = start_swift(tmp_path)
    try:
        assert second.client().get_object(Bucket="bucket", Key="a")["Body"].read() == b"content"
    finally:
        second.stop()


def test_processes_end_with_the_one_that_started_them_however_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", START_AND_SLEEP, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        handle = os.pidfd_open(int(starter.stdout.readline()))
        try:
            starter.kill()
            assert select.select([handle], [], [], 20)[0]
        finally:
            os.close(handle)


@pytest.mark.parametrize("start", [start_swift, start_seaweedfs])
def test_a_server_that_is_not_installed_says_what_to_run(start: Any, tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="run scripts/prepare --servers"):
        start(tmp_path, tmp_path / "nothing")


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    weed = tmp_path / "bin/weed"
    weed.parent.mkdir()
    weed.write_text("#!/bin/sh\necho no room in here\nexit 3\n")
    weed.chmod(0o755)
    (tmp_path / "installed").touch()
    with pytest.raises(ServerFailed, match=r"process weed ended with status 3.*\n +no room in here"):
        start_seaweedfs(tmp_path / "folder", tmp_path)


@pytest.mark.parametrize("server", NAMES, indirect=True)
def test_a_server_gives_a_tag_with_whatever_it_gives_of_an_object(server: Server) -> None:
    """What has none is no answer of S3's: `S3Store.get` and `size` go by that."""
    client = server.client()
    bucket = new_bucket(client)
    for body in (b"", b"content"):
        client.put_object(Bucket=bucket, Key="packs/ab", Body=body)
        answers = [client.head_object(Bucket=bucket, Key="packs/ab"), client.get_object(Bucket=bucket, Key="packs/ab")]
        if body:
            answers += [
                client.get_object(Bucket=bucket, Key="packs/ab", Range=f"bytes={ends}") for ends in ("1-3", "2-")
            ]
        assert [answer["ResponseMetadata"]["HTTPStatusCode"] for answer in answers] == [200, 200, 206, 206][
            : len(answers)
        ]
        assert all(answer["ETag"] for answer in answers)
