"""Not faster than allowed, by a clock of the test's own; and the bytes stay what they are."""

import io
import os
import time

import pytest

from backupfs.errors import StoreUnavailable
from backupfs.stores.pace import Pace, PacedBody
from tests.buckets import options_of
from tests.servers import Server


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.longest = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.longest = max(self.longest, seconds)


def paced(rate: int) -> tuple[Pace, Clock]:
    clock = Clock()
    return Pace(rate, lambda: clock.now, clock.sleep), clock


@pytest.mark.parametrize("rate", [20_000, 1_000_000, 50_000_000])
def test_bytes_pass_at_the_rate_and_in_small_steps(rate: int) -> None:
    pace, clock = paced(rate)
    data = os.urandom(3_000_000)
    body = PacedBody(data, pace)
    parts = []
    while part := body.read(1_000_000):
        parts.append(part)
    assert b"".join(parts) == data
    assert clock.now - 100 == pytest.approx(len(data) / rate, rel=0.01)
    assert clock.longest <= 0.21


def test_a_pause_is_not_saved_up() -> None:
    pace, clock = paced(1000)
    pace.pass_on(1000, 0)
    clock.now += 60
    before = clock.now
    pace.pass_on(1000, 0)
    pace.pass_on(1000, 0)
    assert clock.now - before == pytest.approx(2)


def test_no_rate_is_no_bound() -> None:
    pace, clock = paced(0)
    assert PacedBody(bytes(10 << 20), pace).read() == bytes(10 << 20)
    assert clock.now == 100


def test_a_body_is_a_file_that_can_be_sent_twice() -> None:
    body = PacedBody(bytearray(b"0123456789"), paced(0)[0])
    assert (len(body), body.readable(), body.seekable()) == (10, True, True)
    assert (body.seek(0, io.SEEK_END), body.tell()) == (10, 10)
    assert (body.seek(4), body.read(3), body.seek(-1, io.SEEK_CUR), body.read()) == (4, b"456", 6, b"6789")
    assert body.read() == b""


def test_what_has_begun_ends_at_a_stop_and_what_begins_later_passes() -> None:
    pace, _ = paced(1000)
    body = PacedBody(bytes(3000), pace)
    assert len(body.read(1000)) == 1000
    pace.stop()
    with pytest.raises(StoreUnavailable):
        body.read(1000)
    assert len(PacedBody(bytes(3000), pace).read()) == 3000


def test_limits_hold_with_a_real_server(swift: Server) -> None:
    from dataclasses import replace

    from backupfs.stores.s3 import S3Store

    options = replace(options_of(swift), limit_upload=1_000_000, limit_download=2_000_000)
    store = S3Store("backups", "paced", options)
    store.create()
    data = os.urandom(600_000)
    started = time.monotonic()
    store.put("a", data)
    assert time.monotonic() - started > 0.55
    started = time.monotonic()
    assert store.get("a") == data
    assert time.monotonic() - started > 0.28
