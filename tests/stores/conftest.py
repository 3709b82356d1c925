"""Real object storage servers: each is started when the first test asks for it, and stopped after the last test."""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers import OLD_SWIFT, SWIFT, Server, ServerFailed, start_seaweedfs, start_swift, start_tls


@contextlib.contextmanager
def _running(start: Callable[[Path], Server], folder: Path) -> Iterator[Server]:
    try:
        server = start(folder)
    except ServerFailed as error:
        pytest.fail(str(error), pytrace=False)
    try:
        yield server
    finally:
        server.stop()
        # Only the log is of interest to anybody from now on.
        shutil.rmtree(folder / "data", ignore_errors=True)


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """OpenStack Swift as of today."""
    with _running(functools.partial(start_swift, environment=SWIFT), tmp_path_factory.mktemp("swift")) as server:
        yield server


@pytest.fixture(scope="session")
def swift_old(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """OpenStack Swift as many providers still run it."""
    start = functools.partial(start_swift, environment=OLD_SWIFT)
    with _running(start, tmp_path_factory.mktemp("swift-old")) as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that behaves like Amazon's: conditional requests are atomic, checksums are checked and returned."""
    with _running(start_seaweedfs, tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def swift_tls(swift: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of `swift` at an https address."""
    with _running(functools.partial(start_tls, swift), tmp_path_factory.mktemp("swift-tls")) as server:
        yield server


@pytest.fixture(scope="session")
def swift_old_tls(swift_old: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of `swift_old` at an https address."""
    with _running(functools.partial(start_tls, swift_old), tmp_path_factory.mktemp("swift-old-tls")) as server:
        yield server
