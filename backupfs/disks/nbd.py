"""Reading disks in formats of virtual machines: qemu-nbd serves the file on a socket, and this is its client.

Each process has a connection of its own. qemu reads what somebody hostile may have written: its processes have limits,
no network where the system lets us, and only the files that were opened before (chain.py).
Source: the NBD protocol of the NetworkBlockDevice project, doc/proto.md, as far as reading takes it; qemu-nbd(8),
qemu-img(1), sd_listen_fds(3).
"""

import ctypes
import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable

from backupfs.disks.chain import Chain
from backupfs.errors import SourceError, shown
from backupfs.forked import end_with_parent

_WAIT_S = 30.0
_INIT, _OPTION = 0x4E42444D41474943, 0x49484156454F5054
_FIXED_NEW_STYLE, _NO_ZEROES = 1, 2
_EXPORT_NAME = 1
_REQUEST, _REPLY = 0x25609513, 0x67446698
_READ = 0
_FIRST_PASSED_FD = 3  # by sd_listen_fds(3)
_MOST_READ = 4 << 20
_CHECK_DAMAGED = 2
_BEYOND = b"exceeding the end of the file"  # of a qcow2, whose clusters are compressed, too
_MOST_LINE = 1 << 16
DAMAGED = "is damaged by the word of `qemu-img check`"  # how a problem begins, behind the name
# Bytes of address space of a process of qemu, and more for each file: 64 threads, and caches of 32 MiB.
_MEMORY, _MEMORY_PER_FILE = 2 << 30, 64 << 20
_CPU_S = 3600  # of what only looks at tables; a server reads as long as there is something to read
_CLONE_NEWNET, _CLONE_NEWUSER = 0x40000000, 0x10000000
_MOST_RANGES = 1 << 20  # a few hundred bytes of memory each


class NbdServer:
    """A running qemu-nbd, and this process's connection to it."""

    def __init__(self, path: bytes, form: str, chain: Chain) -> None:
        """Start it.

        chain: what the disk is made of; it is closed with this, and if this fails.
        Raises: SourceError.
        """
        self._path = path
        self._chain = chain
        try:
            self._start(form)
        except BaseException:
            chain.close()
            raise
        self._connection: socket.socket | None = None
        self._pid = 0
        self.size = 0
        try:
            self.connection()
        except BaseException:
            self.close()
            raise

    def _start(self, form: str) -> None:
        for program in ("qemu-nbd", "qemu-img"):
            if shutil.which(program) is None:
                raise SourceError(
                    f"the disk {shown(self._path)} is in the format {form}, which takes {program} to read: "
                    "install the package qemu-utils"
                )
        listener, self._socket_fd = _nameless_listener()
        with listener:
            confine = _confine(self._chain)

            def prepare() -> None:
                confine()
                os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
                os.dup2(listener.fileno(), _FIRST_PASSED_FD)

            try:
                self._process = subprocess.Popen(
                    ["qemu-nbd", "--read-only", "--persistent", "--shared=64", self._chain.name],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                    start_new_session=True, close_fds=False, preexec_fn=prepare,
                )  # fmt: skip
            except BaseException:
                os.close(self._socket_fd)
                raise

    def connection(self) -> int:
        """Connect this process, if it is not; return the descriptor. Raises: SourceError."""
        if self._connection is None or self._pid != os.getpid():
            self._connection, self.size = self._connect()
            self._pid = os.getpid()
        return self._connection.fileno()

    def _connect(self) -> tuple[socket.socket, int]:
        deadline = time.monotonic() + _WAIT_S
        connection = socket.socket(socket.AF_UNIX)
        while True:
            try:
                connection.connect(f"/proc/self/fd/{self._socket_fd}")
                break
            except OSError:
                ended = self._pid == 0 and self._process.poll() is not None
                if ended or time.monotonic() > deadline:
                    connection.close()
                    why = self._last_words() if ended else "qemu-nbd does not answer"
                    raise SourceError(f"the disk {shown(self._path)} cannot be opened: {why}") from None
                time.sleep(0.01)
        try:
            # It connects as soon as there is a listener, which is before the server can say what is wrong.
            connection.settimeout(_WAIT_S)
            greeted = self._greet(connection)
            connection.settimeout(None)
            return greeted
        except OSError as error:
            connection.close()
            raise SourceError(f"the disk {shown(self._path)} cannot be opened: {self._last_words() or error}") from None

    def _last_words(self) -> str:
        """Return what the server said before it ended, if it did."""
        # Only the process that started it may ask for its end.
        if self._pid or self._process.stderr is None:
            return ""
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            return ""
        return self._chain.named(self._process.stderr.read().strip().rpartition(b"\n")[2])

    def _greet(self, connection: socket.socket) -> tuple[socket.socket, int]:
        magic, option, flags = struct.unpack(">QQH", _receive(connection, 18))
        if (magic, option) != (_INIT, _OPTION) or not flags & _FIXED_NEW_STYLE:
            raise SourceError(f"the disk {shown(self._path)} cannot be read: qemu-nbd speaks another protocol")
        no_zeroes = flags & _NO_ZEROES
        connection.sendall(struct.pack(">I", _FIXED_NEW_STYLE | no_zeroes))
        connection.sendall(struct.pack(">QII", _OPTION, _EXPORT_NAME, 0))
        size, _ = struct.unpack(">QH", _receive(connection, 10))
        if not no_zeroes:
            _receive(connection, 124)
        return connection, size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from an offset on. Raises: SourceError."""
        self.connection()
        assert self._connection is not None
        for start in range(0, len(buffer), _MOST_READ):
            part = buffer[start : start + _MOST_READ]
            try:
                self._connection.sendall(struct.pack(">IHHQQI", _REQUEST, 0, _READ, start, offset + start, len(part)))
                magic, error, cookie = struct.unpack(">IIQ", _receive(self._connection, 16))
                if error:
                    raise OSError(error, os.strerror(error))
                if (magic, cookie) != (_REPLY, start):
                    raise ConnectionError("the answer is to another question")
                while part:
                    count = self._connection.recv_into(part)
                    if not count:
                        raise ConnectionError("qemu-nbd ended")
                    part = part[count:]
            except OSError as error:
                reason = error.strerror or error
                raise SourceError(
                    f"the disk {shown(self._path)} cannot be read at byte {offset + start:,}: {reason}"
                ) from error

    @property
    def remarks(self) -> tuple[str, ...]:
        """What files it is made of."""
        return self._chain.remarks

    def problems(self) -> list[str]:
        """Return what the check of its format finds wrong in the files. Raises: SourceError for what is cut short."""
        return [problem for path, name in self._chain.layers if (problem := self._check(path, name))]

    def _check(self, path: bytes, name: str) -> str:
        first, is_cut = b"", False
        with self._asking("check", name=name, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            # Who wrote the disk decides how much there is to be said.
            while line := process.stderr.readline(_MOST_LINE):
                is_cut = is_cut or _BEYOND in line
                first = first or (line.strip() if line.startswith(b"ERROR") else b"")
        what = "it" if path == self._path else f"{shown(path)}, which it is made of,"
        if is_cut:
            raise SourceError(
                f"the disk {shown(self._path)} cannot be read: {what} is cut short, by the word of `qemu-img check`; "
                "copy it again"
            )
        # 3 is space that is lost, 63 a format without a check. With 1 it gives up, as it does on a VMDK's first error.
        if process.returncode != _CHECK_DAMAGED and not first:
            return ""
        return f"{what} {DAMAGED}: {self._chain.named(first) or 'what is lost reads as zeros'}"

    def data_ranges(self) -> list[tuple[int, int]]:
        """Return (start, end) of what is not zero by the word of the format, in order.

        Raises: SourceError, also where a file ends before what it holds.
        """
        found: list[tuple[int, int]] = []
        with tempfile.TemporaryFile() as words:
            with self._asking("map", "--output=json", stderr=words.fileno()) as process:
                assert process.stdout is not None
                try:
                    # One line for each range: who wrote the disk decides how many there are.
                    for line in process.stdout:
                        self._add_range(found, line)
                except SourceError:
                    process.kill()
                    raise
                except (ValueError, KeyError, TypeError) as error:
                    process.kill()
                    raise SourceError(
                        f"the disk {shown(self._path)} cannot be read: qemu-img speaks another language"
                    ) from error
            if process.returncode:
                words.seek(0)
                why = self._chain.named(words.read(1 << 16).strip().rpartition(b"\n")[2])
                raise SourceError(f"the disk {shown(self._path)} cannot be read: {why or 'qemu-img was ended'}")
        return found

    def _add_range(self, found: list[tuple[int, int]], line: bytes) -> None:
        """Add to the ranges what a line of `qemu-img map` says. Raises: SourceError for what a file does not hold."""
        text = line.strip(b"[], \n")
        if not text:
            return
        one = json.loads(text)
        start, end = one["start"], min(one["start"] + one["length"], self.size)
        # Behind its end a file reads as zeros, and is said to hold them.
        if one["data"] and "offset" in one:
            self._chain.require_whole(one["depth"], start, one["offset"], end - start)
        if one["zero"]:
            return
        # Zeros between ranges may be read, too.
        if found and (found[-1][1] == start or len(found) == _MOST_RANGES):
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))

    def _asking(
        self, *words: str, name: str = "", stdout: int = subprocess.PIPE, stderr: int = subprocess.DEVNULL
    ) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            ["qemu-img", *words, "--force-share", name or self._chain.name],
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, close_fds=False,
            preexec_fn=_confine(self._chain, _CPU_S),
        )  # fmt: skip

    def close(self) -> None:
        """End it."""
        if self._connection is not None:
            self._connection.close()
        self._process.kill()
        self._process.communicate()
        os.close(self._socket_fd)
        self._chain.close()


def _confine(chain: Chain, cpu_s: int = 0) -> Callable[[], None]:
    """Return what a process does before it becomes a program of qemu.

    cpu_s: of processor time; 0: without limit.
    """
    library = ctypes.CDLL(None)
    limits = [(resource.RLIMIT_AS, _MEMORY + len(chain.paths) * _MEMORY_PER_FILE), (resource.RLIMIT_CORE, 0)]
    limits += [(resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_CPU, cpu_s)] if cpu_s else []

    def confine() -> None:
        end_with_parent()
        # Each thread would have its own: 64 MiB of addresses.
        os.environ["MALLOC_ARENA_MAX"] = "2"
        for limit, most in limits:
            hard = resource.getrlimit(limit)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(limit, (most, most))
        # Where the kernel does not allow it, what qemu may open is named all the same. Root would lose rights over
        # files in a namespace of users.
        if library.unshare(_CLONE_NEWNET) and os.geteuid():
            library.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        chain.pass_on()

    return confine


def _nameless_listener() -> tuple[socket.socket, int]:
    """Return a listening socket, and a descriptor to connect to it by, which only this process and its children have.

    It has a name for a moment only, so that nothing stays behind, whatever happens, and nobody else finds it.
    """
    listener = socket.socket(socket.AF_UNIX)
    folder = tempfile.mkdtemp(prefix="backupfs-")
    try:
        folder_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        # The folder's own name may be longer than a socket's can be.
        name = f"/proc/self/fd/{folder_fd}/nbd"
        try:
            listener.bind(name)
            listener.listen()
            return listener, os.open(name, os.O_PATH | os.O_CLOEXEC)
        finally:
            os.close(folder_fd)
    except BaseException:
        listener.close()
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise ConnectionError("qemu-nbd ended")
        data += part
    return data
