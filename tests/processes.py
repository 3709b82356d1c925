"""What tests ask of processes."""

import contextlib
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path


def children_of_this_process() -> list[str]:
    """Return the ids of the processes that this one forked and has not waited for."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def runs_below(pid: int, program: str) -> bool:
    """Tell whether a process has started a program whose name begins so, and that runs."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        # Any of them may end just now.
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                if Path(f"/proc/{child}/comm").read_text().startswith(program):
                    return True
    return False


def runs(pid: str) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_that_children_end_with_their_parent(script: str, count: int) -> None:
    """Run a script that forks, prints the ids of its children and sleeps; kill it, and wait for them to end, too."""
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = parent.stdout.readline().split()
    assert len(pids) == count
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while any(runs(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.01)
