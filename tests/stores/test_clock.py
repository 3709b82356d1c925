"""A machine whose clock is wrong: real servers refuse what it signs, and the user is told which clock to set."""

import datetime as dt
import subprocess
import sys
import time
from pathlib import Path

import botocore.auth
import pytest

from backupfs.errors import AccessDenied
from backupfs.stores import s3_answers
from backupfs.stores.retrying import RetryingStore
from tests.buckets import bucket_of
from tests.hosts import environment_of, runner
from tests.servers import Server

HOUR_S = 3600
# Runs a command with another clock: the one of signatures and Python's.
SHIFTED = """
import datetime, sys, time
import botocore.auth
shift, real = float(sys.argv.pop(1)), time.time
time.time = lambda: real() + shift
botocore.auth.get_current_datetime = lambda: datetime.datetime.utcfromtimestamp(time.time())
from backupfs.cli.main import main
main()
"""


class Shifted:
    """Python's clock, off."""

    def __init__(self, shift_s: float) -> None:
        self._shift_s = shift_s

    def time(self) -> float:
        return time.time() + self._shift_s

    def now(self) -> dt.datetime:
        return dt.datetime.fromtimestamp(self.time(), dt.UTC).replace(tzinfo=None)


@pytest.fixture(params=["swift", "swift_old", "seaweedfs"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize(
    ("shift_s", "says"), [(HOUR_S, "60 minutes ahead of that of the server"), (-HOUR_S, "60 minutes behind that")]
)
def test_a_clock_an_hour_off_is_named_at_once(
    shift_s: int, says: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = RetryingStore(bucket_of(server, "clock"))
    right.create()
    right.put("config", b"x")
    clock = Shifted(shift_s)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", clock.now)
    monkeypatch.setattr(s3_answers, "time", clock)

    def must_not_try_again(pause_s: float) -> None:
        raise AssertionError(f"it tries again in {pause_s} s")

    store = RetryingStore(bucket_of(server, "clock"), sleep=must_not_try_again)
    for call in (
        lambda: store.get("config"),
        lambda: store.put("a", b"x"),
        lambda: list(store.list("")),
        # The answers to these have no body.
        lambda: store.size("config"),
        store.now,
        store.create,
    ):
        with pytest.raises(AccessDenied, match=f"{says}.*set the clock") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_backup_with_a_wrong_clock_ends_with_one_line(swift: Server, tmp_path: Path) -> None:
    runner(swift, tmp_path, "clock")("init")
    (tmp_path / "source").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHIFTED, str(HOUR_S), "backup", str(tmp_path / "source")],
        env=environment_of(swift, tmp_path, "clock"), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("backupfs: failed: cannot ")
    assert "the clock of this machine is 60 minutes ahead" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_clock_that_is_off_a_little_does_no_harm(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Shifted(5 * 60)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", clock.now)
    store = bucket_of(server, "clock")
    store.create()
    store.put("b", b"x")
    assert store.get("b") == b"x"
