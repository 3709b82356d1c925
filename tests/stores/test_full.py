"""Stores without room: a backup ends with one line, loses nothing, and is gone on with when there is room again."""

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backupfs.errors import StoreError
from backupfs.repository.repository import Repository
from backupfs.stores.retrying import RetryingStore
from tests.buckets import bucket_of
from tests.builders import File, build, folders_in, new_repository, reopened, run_backup, run_check, snapshot_of
from tests.hosts import runner, summary_of
from tests.servers import Server, start_seaweedfs, start_swift

MIB = 1 << 20
# What tries and pauses may take together.
_SOON_S = 30


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; mounting it takes root."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs takes root")
    path = tmp_path / "server" / "data"
    path.mkdir(parents=True)
    # SeaweedFS does not start with less.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500m", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def fill(disk: Path, left: int) -> Path:
    """Take what there is of room but for some bytes; return the file that holds it."""
    status = os.statvfs(disk)
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - left)
    return ballast


def source_of(folder: Path, mebibytes: int) -> Path:
    return Path(os.fsdecode(build({f"f{n}": File(os.urandom(MIB)) for n in range(mebibytes)}, folder / "source")))


def test_a_full_folder(disk: Path, tmp_path: Path) -> None:
    source = source_of(tmp_path, 60)
    environment = {
        **os.environ,
        "BACKUPFS_PASSWORD": "a password",
        "BACKUPFS_REPOSITORY": str(disk / "repository"),
    }

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "backupfs", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, done.stderr
        return done

    run("init")
    ballast = fill(disk, 40 * MIB)
    said = run("-q", "backup", str(source), code=1).stderr
    assert said.startswith("backupfs: failed: cannot store object packs/data/")
    assert "free some room" in said
    assert said.count("\n") == 1
    run("check", "--read-data")
    ballast.unlink()
    assert summary_of(run("--json", "backup", str(source)))["stored_added"] < 40 * MIB
    run("check", "--read-data")


def set_quota(server: Server, bucket: str, limit: int) -> None:
    """Let a bucket of Swift take so many bytes at most."""
    user = {"X-Storage-User": server.access_key, "X-Storage-Pass": server.secret_key}
    with urllib.request.urlopen(urllib.request.Request(f"{server.endpoint_url}/auth/v1.0", headers=user)) as answer:
        token, url = answer.headers["X-Auth-Token"], answer.headers["X-Storage-Url"]
    quota = {"X-Auth-Token": token, "X-Container-Meta-Quota-Bytes": str(limit)}
    urllib.request.urlopen(urllib.request.Request(f"{url}/{bucket}", headers=quota, method="POST")).close()


@pytest.mark.parametrize("name", ["swift", "swift_old"])
def test_a_bucket_of_swift_at_its_quota(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    server = request.getfixturevalue(name)
    source = source_of(tmp_path, 40)
    bucket = f"quota-{name.replace('_', '-')}"
    run = runner(server, tmp_path, bucket)
    run("init")
    # The first pack is 4 MiB, the next twice as large.
    set_quota(server, bucket, 7 * MIB)
    started = time.monotonic()
    said = run("-q", "backup", str(source), code=1).stderr
    assert time.monotonic() - started < _SOON_S
    assert "there is no room left: 400 EntityTooLarge" in said
    assert said.count("\n") == 1
    run("check", "--read-data")
    set_quota(server, bucket, 1000 * MIB)
    assert summary_of(run("--json", "backup", str(source)))["stored_added"] < 37 * MIB
    run("restore", f"latest:{source}", str(tmp_path / "restored"), "--verify")
    assert snapshot_of(tmp_path / "restored") == snapshot_of(source)


def failed_for(repository: Repository, source: Path) -> list[str]:
    """Return what a backup that fails says of the store."""
    with pytest.raises(BaseExceptionGroup) as caught:
        run_backup(repository, source)
    errors = caught.value.subgroup(StoreError)
    assert errors is not None

    def told(group: BaseExceptionGroup[BaseException]) -> list[str]:
        return [
            text
            for error in group.exceptions
            for text in (told(error) if isinstance(error, BaseExceptionGroup) else [str(error)])
        ]

    return told(errors)


@pytest.mark.slow
@pytest.mark.expected_log("cannot store object .* a server that has no room left may say that")
@pytest.mark.parametrize(
    ("start", "says"),
    [(start_swift, "503 ServiceUnavailable.* no room"), (start_seaweedfs, "500 InternalError.* no room")],
)
def test_a_server_whose_disk_is_full(start: Callable[[Path], Server], says: str, disk: Path, tmp_path: Path) -> None:
    """What has no room is not told from what is busy by these servers: it is tried again, and then said."""
    source = source_of(tmp_path, 12)
    folders = folders_in(tmp_path)
    server = start(disk.parent)
    try:
        repository = new_repository(without_pauses(server), folders)
        ballast = fill(disk, 4 * MIB)
        for text in failed_for(repository, source):
            assert re.search(f"^cannot store object .*{says}", text), text
        assert not run_check(reopened(without_pauses(server), folders), read_data=True).damaged
    finally:
        server.stop()
    ballast.unlink()
    # SeaweedFS looks at the room that it has once a minute, or when it starts.
    server = start(disk.parent)
    try:
        result = run_backup(reopened(without_pauses(server), folders), source)
        assert result.stored_added < 11 * MIB
        assert not run_check(reopened(without_pauses(server), folders), read_data=True).damaged
    finally:
        server.stop()


def without_pauses(server: Server) -> RetryingStore:
    store = RetryingStore(bucket_of(server, "full"), sleep=lambda _: None)
    store.create()
    return store
