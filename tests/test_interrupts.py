"""An interrupt ends what runs, a second one the process."""

import signal
import subprocess
import sys
import textwrap

import pytest

_WAITING = """
    import threading, trio
    from backupfs import interrupts, workers

    async def waits(how):
        print("waits", flush=True)
        try:
            if how == "thread":
                await workers.request(threading.Event().wait)
            await trio.sleep_forever()
        finally:
            if how == "saving":
                with trio.CancelScope(shield=True):
                    await trio.sleep_forever()

    def stop():
        print("stopped", flush=True)

    try:
        interrupts.run(waits, {how!r}, stop=stop)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        import os
        os._exit(130)
"""


def waiting(how: str) -> "subprocess.Popen[str]":
    script = textwrap.dedent(_WAITING).format(how=how)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    return process


@pytest.mark.parametrize("how", ["loop", "thread"])
def test_an_interrupt_ends_what_waits(how: str) -> None:
    process = waiting(how)
    process.send_signal(signal.SIGINT)
    said, warned = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "stopped\ninterrupted\n"), warned


def test_what_takes_long_to_end_says_so_and_a_second_interrupt_ends_it() -> None:
    process = waiting("saving")
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "once more ends at once" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "stopped\n")


def test_a_result_and_an_error_come_through() -> None:
    from backupfs import interrupts

    async def gives(value: int) -> int:
        if value < 0:
            raise ValueError(value)
        return value

    assert interrupts.run(gives, 3) == 3
    with pytest.raises(ValueError, match="-1"):
        interrupts.run(gives, -1)
