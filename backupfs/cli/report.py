"""Events and results to text or JSON. Reports go to standard output, progress and troubles to standard error."""

import base64
import json
import os
import sys
import time
from collections import Counter
from datetime import datetime
from typing import TextIO

from backupfs.cli.settings import Settings
from backupfs.errors import shown
from backupfs.usecases.events import Deleted, Event, FileChanged, FileSkipped, FileVanished, LeftOut, Progress, Remark

Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_REDRAW_SECONDS = 0.2


def size_text(size: int) -> str:
    """Return bytes for people: 1536 → '1.5 KiB'."""
    value, unit = float(size), _UNITS[0]
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def time_text(time_ns: int) -> str:
    """Return a moment in the reader's own time zone, to the second."""
    try:
        return datetime.fromtimestamp(time_ns // 10**9).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return f"{time_ns // 10**9}s"


def duration_text(nanoseconds: int) -> str:
    """Return a length of time for people."""
    seconds = nanoseconds / 10**9
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def name_value(key: str, name: bytes) -> dict[str, Value]:
    """Return a name for JSON; one that is no UTF-8 comes as `KEY_base64` too."""
    try:
        return {key: name.decode("utf-8")}
    except UnicodeDecodeError:
        return {key: name.decode("utf-8", "replace"), f"{key}_base64": base64.b64encode(name).decode("ascii")}


def print_json(value: Value) -> None:
    """Print one JSON value on one line of standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=True) + "\n")
    sys.stdout.flush()


def _go_on_unheard(stream: TextIO) -> None:
    """Let what is said from now on go nowhere: that nobody listens any more must not end long work."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Reporter:
    """Takes events while a verb runs. Called from any thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._draws = sys.stderr.isatty() and not settings.json and not settings.quiet
        self._drawn_at = 0.0
        self._started = time.monotonic()
        self._width = 0
        self.skipped: list[FileSkipped] = []
        self.left_out: list[LeftOut] = []
        self.changed: list[FileChanged] = []

    def __call__(self, event: Event) -> None:
        """Show one event."""
        try:
            self._show(event)
        except BrokenPipeError:
            _go_on_unheard(sys.stdout if self._settings.json else sys.stderr)

    def _show(self, event: Event) -> None:
        match event:
            case Progress():
                self._show_progress(event)
            case FileSkipped(path, reason):
                self.skipped.append(event)
                self._say(
                    "file_skipped", f"skipped {shown(path)}: {reason}", {**name_value("path", path), "reason": reason}
                )
            case FileChanged(path):
                self.changed.append(event)
                text = f"{shown(path)} changed while it was read; what was read is kept"
                self._say("file_changed", text, name_value("path", path))
            case FileVanished(path):
                if self._settings.json:
                    print_json({"event": "file_vanished", **name_value("path", path)})
                elif self._settings.verbose:
                    self.line(f"{shown(path)} vanished before it was read")
            case LeftOut(path, reason):
                self.left_out.append(event)
                if self._settings.json:
                    print_json({"event": "left_out", **name_value("path", path), "reason": reason})
                elif self._settings.verbose:
                    self.line(f"left out {shown(path)}: {reason}")
            case Deleted(path, dry_run):
                if self._settings.json:
                    print_json({"event": "deleted", **name_value("path", path), "dry_run": dry_run})
                elif self._settings.verbose:
                    self.line(f"{'would delete' if dry_run else 'deleted'} {shown(path)}")
            case Remark(text):
                self._say("remark", text, {"text": text})

    def _say(self, kind: str, text: str, value: dict[str, Value]) -> None:
        if self._settings.json:
            print_json({"event": kind, **value})
        else:
            self.line(text)

    def line(self, text: str) -> None:
        """Print a line on standard error, not into the progress."""
        self.clear()
        sys.stderr.write(text + "\n")

    def clear(self) -> None:
        """Take the progress off the screen."""
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            self._width = 0

    def _show_progress(self, event: Progress) -> None:
        if self._settings.quiet:
            return
        now = time.monotonic()
        interval = 1.0 if self._settings.json else _REDRAW_SECONDS
        if now - self._drawn_at < interval:
            return
        self._drawn_at = now
        if self._settings.json:
            print_json(
                {
                    "event": "progress",
                    "verb": event.verb,
                    "files": event.files,
                    "size": event.size,
                    "files_total": event.files_total,
                    "size_total": event.size_total,
                    **name_value("current", event.current),
                }
            )
        elif self._draws:
            self._draw(event, now)

    def _draw(self, event: Progress, now: float) -> None:
        # Imported here: only a terminal needs it.
        import shutil

        seconds = max(now - self._started, 0.001)
        text = f"{event.verb}: {event.files:,} files, {size_text(event.size)}"
        if event.size_total:
            part = min(event.size / event.size_total, 1.0)
            left = f", {duration_text(int((1 / part - 1) * seconds * 10**9))} left" if 0.01 < part < 1 else ""
            text = f"{event.verb}: {part:4.0%} of {size_text(event.size_total)}, {event.files:,} files{left}"
        text += f", {size_text(int(event.size / seconds))}/s"
        room = shutil.get_terminal_size().columns - 1
        if event.current and len(text) + 10 < room:
            name = shown(event.current)
            text += "  " + (name if len(name) <= room - len(text) - 2 else "…" + name[-(room - len(text) - 3) :])
        text = text[:room]
        sys.stderr.write("\r" + text + " " * max(0, self._width - len(text)))
        sys.stderr.flush()
        self._width = len(text)

    def left_out_summary(self) -> list[str]:
        """Return what was left out on purpose, counted by reason, the few by name."""
        by_reason = Counter(event.reason for event in self.left_out)
        lines = []
        for reason, count in sorted(by_reason.items()):
            paths = [shown(event.path) for event in self.left_out if event.reason == reason][:3]
            more = f" and {count - 3} more" if count > 3 else ""
            lines.append(f"{', '.join(paths)}{more}: {reason}")
        return lines
