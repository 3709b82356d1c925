"""Reading disks in formats of virtual machines: qemu-nbd serves the file on a socket, and this is its client.

Each process has a connection of its own. Source: the NBD protocol of the NetworkBlockDevice project, doc/proto.md,
as far as reading takes it; qemu-nbd(8), qemu-img(1), sd_listen_fds(3).
"""

import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time

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


class NbdServer:
    """A running qemu-nbd, and this process's connection to it."""

    def __init__(self, path: bytes, form: str) -> None:
        """Start it. Raises: SourceError."""
        self._path = path
        self._form = form
        for program in ("qemu-nbd", "qemu-img"):
            if shutil.which(program) is None:
                raise SourceError(
                    f"the disk {shown(path)} is in the format {form}, which takes {program} to read: "
                    "install the package qemu-utils"
                )
        listener, self._socket_fd = _nameless_listener()
        with listener:

            def pass_listener() -> None:
                end_with_parent()
                os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
                os.dup2(listener.fileno(), _FIRST_PASSED_FD)

            self._process = subprocess.Popen(
                ["qemu-nbd", "--read-only", "--persistent", "--shared=64", f"--format={form}", path],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                close_fds=False, preexec_fn=pass_listener,
            )  # fmt: skip
        self._connection: socket.socket | None = None
        self._pid = 0
        self.size = 0
        try:
            self.connection()
        except BaseException:
            self.close()
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
        return shown(self._process.stderr.read().strip().rpartition(b"\n")[2])

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

    def remarks(self) -> tuple[str, ...]:
        """Return what the format's own check finds wrong."""
        done = subprocess.run(
            ["qemu-img", "check", "--force-share", "-f", self._form, self._path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        # 2 is damage; 3 is space that is lost, 63 a format without a check.
        if done.returncode != _CHECK_DAMAGED:
            return ()
        return (
            f"the disk {shown(self._path)} is damaged by the word of `qemu-img check`: what is lost reads as zeros",
        )

    def data_ranges(self) -> list[tuple[int, int]]:
        """Return (start, end) of what is not zero by the word of the format, in order. Raises: SourceError."""
        done = subprocess.run(
            ["qemu-img", "map", "--output=json", "--force-share", "-f", self._form, self._path],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            why = done.stderr.strip().rpartition(b"\n")[2]
            raise SourceError(f"the disk {shown(self._path)} cannot be read: {shown(why)}")
        found: list[tuple[int, int]] = []
        for one in json.loads(done.stdout):
            start, end = one["start"], one["start"] + one["length"]
            if one["zero"]:
                continue
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
        return found

    def close(self) -> None:
        """End it."""
        if self._connection is not None:
            self._connection.close()
        self._process.kill()
        self._process.communicate()
        os.close(self._socket_fd)


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
