"""Block devices as the kernel knows them: what is made of a disk, and what lies beneath a device."""

import os
from collections.abc import Iterator
from pathlib import Path

SYSFS = Path("/sys")


def made_of(device: int, sysfs: Path = SYSFS) -> set[int]:
    """Return the numbers of a device and of all that has bytes of it: partitions, and what holds any of these."""
    found: set[int] = set()
    waiting = [device]
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            folder = _folder(number, sysfs)
            waiting += _numbers_in(folder, "*/partition")
            waiting += _numbers_in(folder, "holders/*/dev")
    return found


def beneath(device: int, sysfs: Path = SYSFS) -> Iterator[bytes]:
    """Yield the files that a device is made of, by way of loop devices."""
    seen: set[int] = set()
    waiting = [device]
    while waiting:
        number = waiting.pop()
        if number in seen:
            continue
        seen.add(number)
        folder = _folder(number, sysfs)
        waiting += _numbers_in(folder, "slaves/*/dev")
        if (folder / "partition").exists():
            waiting += _numbers_in(folder.resolve().parent, "dev")
        try:
            yield (folder / "loop" / "backing_file").read_bytes().rstrip(b"\n")
        except OSError:
            continue  # it is no loop device


def _folder(device: int, sysfs: Path) -> Path:
    return sysfs / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}"


def _numbers_in(folder: Path, pattern: str) -> list[int]:
    found = []
    for path in folder.glob(pattern):
        try:
            major, minor = path.with_name("dev").read_text().split(":")
            found.append(os.makedev(int(major), int(minor)))
        except (OSError, ValueError):
            continue  # it went just now
    return found
