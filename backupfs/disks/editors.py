"""Changing single files in a file system that nobody mounts: by debugfs in ext2/3/4, by mtools in FAT.

They work on a scratch copy of a volume, a plain file. What they made is read back before it counts, and the file
system's own checker has the last word (checkers.py).
"""

import abc
import filecmp
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from backupfs.disks.checkers import form_of
from backupfs.errors import SourceError, UsageError, shown

_EXT, _FAT = "ext2/3/4", "FAT"


class Editor(abc.ABC):
    """Changes the files of one volume. Paths are absolute in it; what is above a path must be there."""

    def __init__(self, volume: Path) -> None:
        """Take the volume's file."""
        self._volume = volume

    @abc.abstractmethod
    def remove(self, path: bytes, kind: int) -> None:
        """Remove an entry; a directory must be empty. kind: its type, as in a mode. Raises: SourceError."""

    @abc.abstractmethod
    def put(self, path: bytes, local: bytes) -> None:
        """Make an entry that is not there, like a file, directory or link of this machine, but for what is in a
        directory.

        Raises: SourceError, also for a type that cannot be put.
        """


def open_editor(volume: Path, size: int) -> Editor:
    """Return what changes the files of a volume. Raises: UsageError where nothing can; SourceError."""
    form = form_of(volume, size)
    if form not in _EDITORS:
        raise UsageError(
            f"files in {form or 'this volume'} cannot be changed one by one: `backupfs edit` gives the whole volume to "
            "programs that know it, or to the kernel"
        )
    return _EDITORS[form](volume)


class _Ext(Editor):
    """By debugfs, whose commands fail without an exit code: what they say is looked at, and what they made read."""

    def __init__(self, volume: Path) -> None:
        super().__init__(volume)
        _require("debugfs", "e2fsprogs")
        # A journal that waits would be played over what is changed here.
        code, said = _run(["e2fsck", "-p", str(volume)])
        if code not in (0, 1):
            raise SourceError(f"the file system is not sound, mend it by `backupfs edit` first: {shown(said[-300:])}")

    def remove(self, path: bytes, kind: int) -> None:
        self._do([b"rmdir " if stat.S_ISDIR(kind) else b"rm "], path)

    def put(self, path: bytes, local: bytes) -> None:
        status = os.lstat(local)
        _, _, name = path.rpartition(b"/")
        if stat.S_ISREG(status.st_mode):
            # Local names could be anything; the commands take one that is plain.
            with tempfile.TemporaryDirectory(prefix="backupfs-put-") as folder:
                plain = os.path.join(folder, "file")
                os.symlink(os.path.abspath(local), os.fsencode(plain))
                self._in_directory(path, [b"write %s %s" % (os.fsencode(plain), _quoted(name))])
        elif stat.S_ISDIR(status.st_mode):
            self._in_directory(path, [b"mkdir " + _quoted(name)])
        elif stat.S_ISLNK(status.st_mode):
            self._in_directory(path, [b"symlink %s %s" % (_quoted(name), _quoted(os.readlink(local)))])
        else:
            raise SourceError(f"{shown(local)} is neither a file, a folder nor a link: it cannot be put into an image")
        self._set_metadata(path, local, status)
        if stat.S_ISREG(status.st_mode):
            self._compare(path, local)

    def _set_metadata(self, path: bytes, local: bytes, status: os.stat_result) -> None:
        name = _quoted(path)
        fields: list[tuple[bytes, int]] = [(b"uid", status.st_uid), (b"gid", status.st_gid)]
        if not stat.S_ISLNK(status.st_mode):
            fields.append((b"mode", status.st_mode))
        commands = [b"sif %s %s %d" % (name, field, value) for field, value in fields]
        for field, time_ns in ((b"mtime", status.st_mtime_ns), (b"ctime", status.st_ctime_ns)):
            seconds, part = divmod(time_ns, 10**9)
            commands.append(b"sif %s %s @%d" % (name, field, seconds & 0xFFFFFFFF))
            # Two bits more for the seconds, then nanoseconds; small inodes of old file systems have no room for it.
            commands.append(b"sif %s %s_extra %d" % (name, field, (((seconds + (1 << 31)) >> 32) & 3) | part << 2))
        with tempfile.TemporaryDirectory(prefix="backupfs-put-") as folder:
            for number, (xattr, value) in enumerate(_xattrs_of(local)):
                plain = os.path.join(folder, str(number))
                Path(plain).write_bytes(value)
                commands.append(b"ea_set -f %s %s %s" % (os.fsencode(plain), name, _quoted(xattr)))
            self._do(commands, may_say=b"_extra")

    def _in_directory(self, path: bytes, commands: Sequence[bytes]) -> None:
        above = path.rpartition(b"/")[0] or b"/"
        self._do([b"cd " + _quoted(above), *commands])

    def _do(self, commands: Sequence[bytes], path: bytes = b"", may_say: bytes = b"") -> None:
        """Run commands. path: of which the last one is about. may_say: words in lines that are no failure."""
        lines = [*commands[:-1], commands[-1] + (_quoted(path) if path else b"")]
        done = subprocess.run(
            ["debugfs", "-w", "-f", "-", str(self._volume)], input=b"\n".join(lines) + b"\n",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_ENVIRONMENT, check=False,
        )  # fmt: skip
        # It repeats each command; what else it says, but for its version and numbers of inodes, is a complaint.
        silent = (b"debugfs ", b"debugfs:", b"Allocated inode:")
        complaints = [
            line for line in done.stdout.splitlines()
            if line.strip() and not line.startswith(silent) and not (may_say and may_say in line)
        ]  # fmt: skip
        if done.returncode or complaints:
            raise SourceError(f"debugfs could not change the file system: {shown(b'; '.join(complaints)[:300])}")

    def _compare(self, path: bytes, local: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="backupfs-put-") as folder:
            plain = os.path.join(folder, "file")
            self._do([b"dump %s %s" % (_quoted(path), os.fsencode(plain))])
            if not os.path.exists(plain) or not filecmp.cmp(os.fsencode(plain), local, shallow=False):
                raise SourceError(f"{shown(path)} is not what was put there: is the file system full?")


class _Fat(Editor):
    """By mtools, which takes names for patterns, makes them fit, or asks what to do where nobody answers."""

    def __init__(self, volume: Path) -> None:
        super().__init__(volume)
        _require("mcopy", "mtools")

    def remove(self, path: bytes, kind: int) -> None:
        self._do("mrd" if stat.S_ISDIR(kind) else "mdel", _literal(path))

    def put(self, path: bytes, local: bytes) -> None:
        mode = os.lstat(local).st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise SourceError(f"{shown(local)} is no file and no folder: FAT has nothing else")
        above, _, name = path.rpartition(b"/")
        _require_fat_name(name)
        if self._run("mdir", "-b", _literal(path)).returncode == 0:
            raise SourceError(f"{shown(path)} is there with other capitals, which is the same name to FAT")
        # A name that is new is taken as it is; should it be a pattern of another one, it is not found by itself below.
        new = _literal(above) + b"/" + name
        if stat.S_ISDIR(mode):
            self._do("mmd", new)
            self._do("mdir", "-b", _literal(path))
            return
        self._do("mcopy", "-m", local, new)
        with tempfile.TemporaryDirectory(prefix="backupfs-put-") as folder:
            plain = os.path.join(folder, "file")
            self._do("mcopy", "-n", _literal(path), plain)
            if not filecmp.cmp(os.fsencode(plain), local, shallow=False):
                raise SourceError(f"{shown(path)} is not what was put there: is the file system full?")

    def _do(self, program: str, *words: str | bytes) -> None:
        done = self._run(program, *words)
        if done.returncode:
            said = shown(done.stderr.strip()[-300:]) or "it does not say why; names like con and com1 are of devices"
            raise SourceError(f"{program} could not change the file system: {said}")

    def _run(self, program: str, *words: str | bytes) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [program, "-i", str(self._volume), *words], stdin=subprocess.DEVNULL, capture_output=True,
            env={**_ENVIRONMENT, "MTOOLS_SKIP_CHECK": "1"}, check=False,
        )  # fmt: skip


def _literal(path: bytes) -> bytes:
    """Return a path as mtools finds it, by its letters and not as a pattern."""
    return b"::" + path.replace(b"\\", b"\\\\").replace(b"[", b"\\[")


def _require_fat_name(name: bytes) -> None:
    """Raises: SourceError for a name that FAT does not have, or that mtools would make another one of."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    fits = text and all(" " <= one <= "\uffff" and one not in '"*/:<>?\\|\x7f' for one in text)
    if not fits or text[-1] in " ." or len(text) > _MOST_FAT_NAME:
        raise SourceError(f"{shown(name)} is no name that FAT can have")


_MOST_FAT_NAME = 255
_ENVIRONMENT = {**os.environ, "LC_ALL": "C.UTF-8", "DEBUGFS_PAGER": "cat", "TZ": "UTC"}
_EDITORS: dict[str, type[Editor]] = {_EXT: _Ext, _FAT: _Fat}


def _require(program: str, package: str) -> None:
    if shutil.which(program) is None:
        raise SourceError(f"changing files of this file system takes {program}: install the package {package}")


def _run(command: list[str]) -> tuple[int, bytes]:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_ENVIRONMENT,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def _quoted(name: bytes) -> bytes:
    """Return a name as debugfs reads it. Raises: SourceError for one that it cannot read."""
    if b"\n" in name:
        raise SourceError(f"{shown(name)} has a line break in it, which debugfs cannot be told: use `backupfs edit`")
    return b'"' + name.replace(b'"', b'""') + b'"'


def _xattrs_of(local: bytes) -> list[tuple[bytes, bytes]]:
    try:
        names = os.listxattr(local, follow_symlinks=False)
        return [(os.fsencode(name), os.getxattr(local, name, follow_symlinks=False)) for name in names]
    except OSError:
        return []
