"""An interrupt ends commands soon, whatever a server does; what was put stays known."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fault_proxy import FaultProxy
from tests.hosts import environment_of, runner, summary_of
from tests.servers import Server

# Far below what tries and bodies would take.
_SOON_S = 30


@pytest.fixture
def proxy(swift: Server) -> Iterator[FaultProxy]:
    host, _, port = swift.endpoint_url.removeprefix("http://").partition(":")
    proxy = FaultProxy(host, int(port))
    yield proxy
    proxy.close()


def interrupted(environment: dict[str, str], arguments: list[str], proxy: FaultProxy, method: str, path: str) -> str:
    """Run a command, interrupt it once the proxy has seen a request of a kind, and return what it said."""
    seen = len(proxy.seen)
    process = subprocess.Popen(
        [sys.executable, "-m", "backupfs", *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )
    while not any(verb == method and path in url for verb, url in proxy.seen[seen:]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=_SOON_S)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    return said


def source_of(folder: Path, mebibytes: int) -> Path:
    source = folder / "source"
    source.mkdir()
    for number in range(mebibytes):
        (source / f"f{number}").write_bytes(os.urandom(1 << 20))
    return source


@pytest.mark.parametrize("fault", ["status", "stall", "pace"])
def test_a_backup_whose_puts_do_not_end(fault: str, proxy: FaultProxy, swift: Server, tmp_path: Path) -> None:
    source = source_of(tmp_path, 40)
    bucket = f"interrupted-{fault}"
    runner(swift, tmp_path, bucket)("init")
    faulty = replace(swift, endpoint_url=proxy.endpoint_url)
    limit = ["--limit-upload", "100K"] if fault == "pace" else []
    if fault != "pace":
        proxy.rule(fault, method="PUT", path="/packs/", seconds=1000.0)
    arguments = ["backup", str(source), *limit]
    said = interrupted(environment_of(faulty, tmp_path, bucket), arguments, proxy, "PUT", "/packs/")
    assert "interrupted; what was stored so far is kept" in said
    run = runner(swift, tmp_path, bucket)
    run("backup", str(source))
    assert summary_of(run("--json", "check", "--read-data"))["damaged"] is False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_an_interrupted_backup_has_put_is_not_put_again(
    number: signal.Signals, proxy: FaultProxy, swift: Server, tmp_path: Path
) -> None:
    source = source_of(tmp_path, 80)
    bucket = f"reused-{number.name.lower()}"
    run = runner(swift, tmp_path, bucket)
    run("init")
    (source.parent / "other").touch()
    # What follows is not the first listing of the day.
    run("backup", str(source.parent / "other"))
    # Of the packs of the first run four are put, of 4 MiB at least.
    proxy.rule("stall", method="PUT", path="/packs/data/", skip=4, seconds=1000.0)
    faulty = replace(swift, endpoint_url=proxy.endpoint_url)
    stalled = environment_of(faulty, tmp_path, bucket)
    process = subprocess.Popen([sys.executable, "-m", "backupfs", "-q", "backup", str(source)], env=stalled)
    while sum(verb == "PUT" and "/packs/data/" in url for verb, url in proxy.seen) < 6:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(_SOON_S) == (130 if number == signal.SIGTERM else -number)
    put = [url for verb, url in proxy.seen if verb == "PUT"]
    assert sum("/index/data/" in url for url in put) == (number == signal.SIGTERM)
    assert sum("/packs/" in url for url in put) == 6
    added = summary_of(run("--json", "backup", str(source)))["stored_added"]
    assert 0 < added < (80 - 4 * 4) << 20


@pytest.mark.parametrize("verb", ["restore", "check", "snapshots", "dump"])
def test_a_command_that_reads_what_does_not_come(verb: str, proxy: FaultProxy, swift: Server, tmp_path: Path) -> None:
    source = source_of(tmp_path, 8)
    bucket = f"waiting-{verb}"
    run = runner(swift, tmp_path / "first", bucket)
    run("init")
    run("backup", str(source))
    path = {"snapshots": "/snapshots/"}.get(verb, "/packs/data/")
    proxy.rule("status", method="GET", path=path + ".*[0-9a-f]{64}")
    faulty = replace(swift, endpoint_url=proxy.endpoint_url)
    arguments = {
        "restore": ["restore", "latest", str(tmp_path / "out")],
        "check": ["check", "--read-data"],
        "snapshots": ["snapshots"],
        "dump": ["dump", f"latest:{source}/f1"],
    }[verb]
    said = interrupted(environment_of(faulty, tmp_path / "second", bucket), arguments, proxy, "GET", path)
    assert "interrupted" in said
    assert not [name for _, _, names in os.walk(tmp_path / "out") for name in names if name.startswith(".backupfs")]


@pytest.mark.fuse
def test_a_mount_ends_while_a_read_waits(proxy: FaultProxy, swift: Server, tmp_path: Path) -> None:
    source = source_of(tmp_path, 2)
    run = runner(swift, tmp_path / "first", "waiting-mount")
    run("init")
    run("backup", str(source))
    proxy.rule("status", method="GET", path="/packs/data/")
    faulty = replace(swift, endpoint_url=proxy.endpoint_url)
    run = runner(faulty, tmp_path / "second", "waiting-mount")
    mount = tmp_path / "mount"
    mount.mkdir()
    mounted = subprocess.Popen(
        [sys.executable, "-m", "backupfs", "mount", "-f", str(mount)],
        env=environment_of(faulty, tmp_path / "second", "waiting-mount"),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not os.path.ismount(mount):
        assert mounted.poll() is None, mounted.communicate()
        time.sleep(0.02)
    reading = subprocess.Popen(["cat", f"{mount}/latest{source}/f0"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not any(verb == "GET" and "/packs/data/" in url for verb, url in proxy.seen):
        assert reading.poll() is None
        time.sleep(0.02)
    mounted.send_signal(signal.SIGTERM)
    _, said = mounted.communicate(timeout=_SOON_S)
    assert mounted.returncode == 0, said
    assert "Traceback" not in said
    reading.communicate(timeout=_SOON_S)
    assert reading.returncode == 1
    assert not os.path.ismount(mount)
