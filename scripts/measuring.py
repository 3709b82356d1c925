"""What a command costs: wall and CPU time, and the memory of all its processes."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# Left free by `fill_memory`, so that no command starts with reclaiming.
_FREE_BYTES = 512 << 20
_READ_SIZE = 8 << 20


@dataclass(frozen=True)
class Measure:
    """What one command cost."""

    wall_s: float
    cpu_s: float
    peak_mib: float
    stored: int = 0  # bytes of the repository, or that it grew by


def family_of(pid: int) -> list[int]:
    """Return a process and all below it."""
    family = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            family += family_of(int(child))
    return family


def memory_of(pid: int) -> float:
    """Return the MiB that a process and all below it take now; what they share counts once."""
    total = 0
    try:
        for member in family_of(pid):
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0.0  # one of them ended meanwhile
    return total / 1024


class Watch(threading.Thread):
    """Looks at the memory of a running command now and then."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_mib = 0.0
        self._pid = pid
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.1):
            self.peak_mib = max(self.peak_mib, memory_of(self._pid))

    def end(self) -> float:
        self._ended.set()
        self.join()
        return self.peak_mib


def measure(command: list[str], environment: dict[str, str]) -> Measure:
    """Run a command to its end; a failure ends the benchmark."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        watch = Watch(child.pid)
        watch.start()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - started
        peak = max(watch.end(), usage.ru_maxrss / 1024)
        if child.returncode not in (0, 3):
            errors.seek(0)
            sys.exit(f"{' '.join(command)} failed with {child.returncode}:\n{errors.read().decode(errors='replace')}")
    return Measure(wall, usage.ru_utime + usage.ru_stime, peak)


def fill_memory(folder: Path) -> IO[bytes] | None:
    """Fill free memory with cached pages of a file of holes, as memory of a machine at work is full of cached files.

    The host of a virtual machine takes free pages back, and gives them again at up to seconds a GiB, at random: whoever
    is measured first pays for everybody. Pages of the cache are recycled and cost the same each time.
    Returns the file, which has no name and whose pages are free again when it is closed; None if memory was full.
    """
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in meminfo if line.startswith("MemFree:"))
    if free <= 2 * _FREE_BYTES:
        return None
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    file.truncate(free - _FREE_BYTES)
    while file.read(_READ_SIZE):
        pass
    return file


def usage_of(pid: int) -> tuple[float, float]:
    """Return (CPU seconds, peak MiB) so far of a running process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return ticks / os.sysconf("SC_CLK_TCK"), int(peak.split()[1]) / 1024
