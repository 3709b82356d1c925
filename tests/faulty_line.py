"""A line that cuts or garbles one connection at one byte, below TLS: what routers and load balancers do."""

import contextlib
import socket
import threading
from typing import Literal


class FaultyLine:
    """Forwards connections to a port of this machine, with one fault.

    way: of the bytes that meet it: "up" to the server, "down" from it. at: how many bytes of a connection come before.
    """

    def __init__(self, port: int, fault: Literal["cut", "flip"], way: Literal["up", "down"], at: int) -> None:
        self._target, self._fault, self._way, self._at = port, fault, way, at
        self._lock = threading.Lock()
        self.met = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        # Closing alone does not wake who waits in `accept`.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(here,), daemon=True).start()

    def _serve(self, here: socket.socket) -> None:
        with here, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as there:
            up = threading.Thread(target=self._pump, args=("up", here, there), daemon=True)
            up.start()
            self._pump("down", there, here)
            up.join()

    def _pump(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                if way == self._way and passed <= self._at < passed + len(data) and self._meets():
                    if self._fault == "cut":
                        sink.sendall(data[: self._at - passed])
                        break
                    data[self._at - passed] ^= 1
                passed += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _meets(self) -> bool:
        with self._lock:
            self.met += 1
            return self.met == 1
