"""Watch a virtual machine boot: what its console shows says whether it came up, will not, or took too long."""

import re
import time
from dataclasses import dataclass

from backupfs.disks.machine import Machine
from backupfs.snapshots.verification import Result
from backupfs.usecases.events import Progress, Report

_POLL_S = 0.5
_ASK_EVERY = 4  # polls; what asks qemu or the guest
_ESCAPES = re.compile(rb"\x1b(\[[0-9;?=]*[A-Za-z]|[()][A-Z0-9]|[=>c78])")
_LOGIN = re.compile(r"^[^\n]{0,100}\blogin: *$", re.MULTILINE)
_FAILURES = (
    "Kernel panic - not syncing", "No bootable device", "grub rescue>", "Missing operating system",
    "Boot failed: not a bootable disk", "(initramfs)", "You are in emergency mode", "Entering emergency mode",
    "No bootable option or device was found", "Shell>", "An operating system wasn't found",
)  # fmt: skip
_LAST_LOOK_S = 2.0


@dataclass(frozen=True, slots=True)
class Watched:
    """How a boot ended."""

    result: Result
    words: str
    console: bytes  # what came out of the serial port
    screen: str  # the last text on the screen
    picture: bytes  # PNG
    seconds: float


def watch(machine: Machine, marker: str, timeout_s: float, report: Report) -> Watched:
    """Wait until a machine is up and return how that went.

    marker: text that says so; empty: a login prompt, or the guest's agent.
    """
    started = time.monotonic()
    screen, polls, result, words = "", 0, Result.FAILED, ""
    while not words:
        time.sleep(_POLL_S)
        polls += 1
        seconds = time.monotonic() - started
        console = _plain(machine.console())
        if polls % _ASK_EVERY == 0:
            screen = machine.screen_text() or screen
            report(Progress("boot", 0, 0, current=_last_line(console or screen)))
        for place, text in (("console", console), ("screen", screen)):
            if marker in text if marker else _LOGIN.search(text[-2000:]):
                what = "the marker" if marker else "a login prompt"
                result, words = Result.PASSED, f"{what} on the {place} after {seconds:.0f} s"
                break
            failure = next((one for one in _FAILURES if one in text[-4000:]), None)
            if failure is not None:
                words = f"`{failure}` on the {place} after {seconds:.0f} s"
        if words:
            break
        if not marker and polls % _ASK_EVERY == 0 and machine.agent_answers():
            result, words = Result.PASSED, f"the guest's agent answers after {seconds:.0f} s"
        elif machine.has_ended:
            words = f"the machine switched itself off after {seconds:.0f} s"
        elif seconds > timeout_s:
            wanted = "marker" if marker else "login prompt"
            words = f"no {wanted} within {seconds:.0f} s"
    # What fails once more is shown, too.
    if result == Result.FAILED and not machine.has_ended:
        time.sleep(_LAST_LOOK_S)
    picture = machine.screen_picture()
    screen = machine.screen_text() or screen
    return Watched(result, words, machine.console(), screen, picture, time.monotonic() - started)


def _plain(console: bytes) -> str:
    return _ESCAPES.sub(b"", console).replace(b"\r", b"").decode("utf-8", "replace")


def _last_line(text: str) -> bytes:
    lines = text.strip().splitlines()
    return lines[-1].strip().encode()[:100] if lines else b""
