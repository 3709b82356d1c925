"""The programs that check file systems: which one a volume needs, and what it says.

They are run on a scratch copy of a volume, a plain file that may be written: a journal is replayed first, as the next
mount would, and then the judge only looks.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from backupfs.disks import superblocks
from backupfs.disks.filesystem import Read
from backupfs.disks.superblocks import BTRFS, EXFAT, EXT, FAT, NTFS, XFS

CHECK_S = 6 * 3600.0  # for one program; a large file system takes hours
_MOST_WORDS = 64 << 10  # half of them from the beginning, as the first complaint is there
# What the programs say of a sound file system, too, and sums at the end.
_ROUTINE = re.compile(
    rb"(e2fsck|fsck\.\w+|exfatprogs|xfs_repair)( version)?:? v?\d|(Pass|Phase) \d|- |\[\d+/\d+\]|"
    rb"(Open|Check)ing filesystem|UUID: |Cannot get host filesystem geometry|Repair may fail if there is a sector|"
    rb"the image and the host filesystem|.*: recovering journal|.*check forced|Mounting volume\.\.\. OK|"
    rb".*WARNING: Filesystem still has errors|Leaving filesystem unchanged|No modify flag set|"
    rb"Inode \d+ extent tree \(at level \d+\) could be |"
    rb".*: \d+/\d+ (files|clusters)|.*: \d+ files, \d+/\d+ clusters"
)
_QUESTION = re.compile(rb"\s*\b[A-Z][a-z ]*\?( (yes|no))?$")  # that nobody answers


@dataclass(frozen=True, slots=True)
class Checker:
    """How a kind of file system is checked."""

    form: str
    program: str
    package: str
    arguments: tuple[str, ...]
    replay: tuple[str, ...] = ()  # a command before, which may write
    replay_codes: tuple[int, ...] = (0,)  # with which it has done its work
    unclear: bytes = b""  # words with which the judge cannot judge, wherever it breaks their line


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of a check."""

    form: str
    sound: bool | None  # None: nothing can be said
    words: str  # one line
    output: bytes  # of the programs


_CHECKERS = {checker.form: checker for checker in (
    Checker(EXT, "e2fsck", "e2fsprogs", ("-fn",), ("e2fsck", "-p"), (0, 1)),
    Checker(XFS, "xfs_repair", "xfsprogs", ("-n", "-f"), unclear=b"metadata changes in a log which is being ignored"),
    Checker(BTRFS, "btrfs", "btrfs-progs", ("check", "--readonly", "--check-data-csum")),
    Checker(NTFS, "ntfsfix", "ntfs-3g", ("-n",)),
    Checker(FAT, "fsck.fat", "dosfstools", ("-n",)),
    Checker(EXFAT, "fsck.exfat", "exfatprogs", ("-n",)),
)}  # fmt: skip
# What is no file system that could be checked: a place and a mark.
_OTHERS = (
    ("LUKS", 0, b"LUKS\xba\xbe"), ("a physical volume of LVM", 536, b"LVM2 001"),
    ("squashfs", 0, b"hsqs"), ("ISO 9660", 0x8001, b"CD001"),
)  # fmt: skip


def form_of(path: Path, size: int) -> str:
    """Return what a volume is called that has a checker; empty for others. Raises: OSError."""
    with open(path, "rb") as file:
        return superblocks.form_of(_reader(file.fileno(), size))


def check_volume(path: Path, size: int, is_writable: bool = True, timeout_s: float = CHECK_S) -> Checked:
    """Check the file system in a scratch copy of a volume. Raises: OSError where it cannot be read.

    is_writable: a journal may be replayed. timeout_s: for each program that is run.
    """
    with open(path, "rb") as file:
        read = _reader(file.fileno(), size)
        form = superblocks.form_of(read)
        if form:
            checker = _CHECKERS[form]
            return _run(checker if is_writable else replace(checker, replay=()), path, timeout_s)
        for form, place, mark in _OTHERS:
            if read(place, len(mark)) == mark:
                return Checked(form, None, f"{form}: there is no program that checks it", b"")
        if superblocks.is_swap(read):
            return Checked("swap", None, "swap: there is nothing in it to be checked", b"")
        copy = superblocks.copy_in(read, size)
        if copy is not None:
            return Checked(copy.form, False, f"{copy.form}: {copy.words}", b"")
    return Checked("", None, "no file system that is known", b"")


def _reader(fd: int, size: int) -> Read:
    return lambda offset, length: os.pread(fd, max(0, min(length, size - offset)), offset)


def _run(checker: Checker, path: Path, timeout_s: float) -> Checked:
    if shutil.which(checker.program) is None:
        return Checked(
            checker.form, None, f"{checker.form}: {checker.program} is missing: install {checker.package}", b""
        )
    output, replayed = b"", ""
    if checker.replay:
        code, output = _said_by([*checker.replay, str(path)], timeout_s)
        if code not in checker.replay_codes:
            return Checked(checker.form, False, f"{checker.form}: {_complaint(output, path)}", output)
        replayed = ", after its journal was replayed" if b"recovering journal" in output else ""
    code, words = _said_by([checker.program, *checker.arguments, str(path)], timeout_s)
    output += words
    if checker.unclear and checker.unclear in b" ".join(words.split()):
        return Checked(
            checker.form, None, f"{checker.form}: its log is not empty, as of a running system: "
            "only a mount can say what it looks like then", output
        )  # fmt: skip
    if code == 0:
        return Checked(checker.form, True, f"{checker.form}: {checker.program} finds nothing wrong{replayed}", output)
    return Checked(checker.form, False, f"{checker.form}: {_complaint(words, path)}", output)


def _said_by(command: list[str], timeout_s: float) -> tuple[int, bytes]:
    environment = {**os.environ, "LC_ALL": "C"}
    heard = b"$ " + os.fsencode(" ".join(command[:-1])) + b"\n"
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
            timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1, heard + b"it took more than %d s\n" % timeout_s
    said = done.stdout
    if len(said) > _MOST_WORDS:
        said = said[: _MOST_WORDS // 2] + b"\n...\n" + said[-_MOST_WORDS // 2 :]
    return done.returncode, heard + said


def _complaint(output: bytes, path: Path) -> str:
    """Return the first line of what a program said that complains of something; the last one if none does."""
    lines = [re.sub(rb"[^\x20-\x7e]", b"?", line).strip() for line in output.replace(b"\r", b"\n").splitlines()]
    worth = [line for line in lines[1:] if line]
    first = next((line for line in worth if not _ROUTINE.match(line)), worth[-1] if worth else b"it says nothing")
    # A question can stand alone on a line.
    return (_QUESTION.sub(b"", first) or first).decode().replace(f"{path}:", "").strip()
