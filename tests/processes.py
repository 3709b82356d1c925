"""What tests ask of processes."""

import os
from pathlib import Path


def children_of_this_process() -> list[str]:
    """Return the ids of the processes that this one forked and has not waited for."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def runs(pid: str) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
