"""What holds for every test: an environment of its own, no unexpected warning in the log, no mount left behind."""

import itertools
import logging
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Deadlines measure the machine, not the code; failures print what to paste to repeat them.
settings.register_profile("backupfs", deadline=None, database=None, max_examples=60, print_blob=True)
settings.load_profile("backupfs")

_homes = itertools.count()


# A shell that runs tests in the background has them ignore interrupts, and so would every program that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "expected_log(*patterns): log lines of WARNING or above that fit a pattern are fine; none given: all"
    )


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Point everything that a user's settings could reach to an empty home; return it."""
    for name in list(os.environ):
        if name.startswith(("BACKUPFS_", "XDG_", "AWS_")):
            monkeypatch.delenv(name)
    home = tmp_path_factory.getbasetemp() / f"home-{next(_homes)}"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / ".local" / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / ".config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / ".run"))
    return home


@pytest.fixture
def expected_log() -> list[str]:
    """Patterns of log lines that the test expects; it appends its own."""
    return []


@pytest.fixture(autouse=True)
def _no_unexpected_log(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, expected_log: list[str]
) -> Iterator[None]:
    yield
    patterns = list(expected_log)
    for marker in request.node.iter_markers("expected_log"):
        patterns += marker.args or (".*",)
    lines = [
        f"{record.levelname} {record.name}: {record.getMessage()}"
        for phase in ("setup", "call")
        for record in caplog.get_records(phase)
        if record.levelno >= logging.WARNING
    ]
    unexpected = [line for line in lines if not any(re.search(pattern, line) for pattern in patterns)]
    assert not unexpected, "unexpected log lines; declare them with the marker or the fixture expected_log"


@pytest.fixture(scope="session", autouse=True)
def _no_mount_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield
    for mounted in _mounts_below(tmp_path_factory.getbasetemp().resolve()):
        subprocess.run(["umount", "--lazy", mounted], check=False, timeout=10)


def _mounts_below(folder: Path) -> list[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        points = [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in lines]
    return sorted((point for point in points if Path(point).is_relative_to(folder)), reverse=True)
