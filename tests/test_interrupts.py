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


_INTERRUPTED_AT_A_LINE = """
    import os, signal, sys, trio
    from backupfs import interrupts

    async def works():
        await trio.lowlevel.checkpoint()

    def interrupted_at(moment):
        lines = 0

        def trace(frame, event, _argument):
            nonlocal lines
            if "trio" not in frame.f_code.co_filename and not frame.f_code.co_filename.endswith("interrupts.py"):
                return None
            if event == "line":
                lines += 1
                if lines == moment:
                    signal.raise_signal(signal.SIGINT)
            return trace

        sys.settrace(trace)
        try:
            interrupts.run(works)
        except KeyboardInterrupt:
            return None
        finally:
            sys.settrace(None)
        return lines

    lines = interrupted_at(0)
    for moment in range(1, lines + 1):
        if interrupted_at(moment) is not None:
            print(f"an interrupt at line {moment} of {lines} was lost")
    print(lines > 300)
"""


def test_an_interrupt_while_the_event_loop_begins_or_ends_is_no_fault_and_not_lost() -> None:
    script = textwrap.dedent(_INTERRUPTED_AT_A_LINE)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
