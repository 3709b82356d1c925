"""A proxy in front of an HTTP server that does what networks and servers do on bad days, by rule.

It keeps the Host header, so signatures stay valid. It holds each body in memory, and models the time of requests and
the width of a line, not loss or slow start.
"""

import http.client
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_STEP = 64 << 10


@dataclass
class Rule:
    """What happens to some requests. Kinds:

    status        the server is not asked, `status` and `code` are the answer
    refuse        the connection ends before the request is passed on
    cut_upload    the server gets half of the body, then the connection ends
    lose_answer   the server does it, the answer is lost
    cut_download  half of the answer's body comes, then the connection ends
    flip          one bit of the answer's body is another
    flip_upload   one bit of the request's body is another
    stall         nothing comes for `seconds`
    twice         the server gets the request twice
    headers       the answer has the header lines `headers`, too, instead of its own
    """

    kind: str
    method: str = ".*"
    path: str = ".*"
    times: int = 1 << 30
    skip: int = 0
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    done: int = 0

    def fits(self, method: str, path: str) -> bool:
        """Tell whether this rule is for a request, and count it."""
        if not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.done >= self.times:
            return False
        self.done += 1
        return True


class FaultProxy:
    """Listens on a free port of the loopback until it is closed."""

    def __init__(self, host: str, port: int, latency_s: float = 0.0, rate: float = 0.0, buffer: int = 0) -> None:
        """Start.

        host, port: of the server.
        latency_s: a request, and a connection, takes this long more.
        rate: bytes a second each way, of all connections together; 0: no bound.
        buffer: bytes that a connection takes before it passes them on; 0: as many as the kernel likes.
        """
        self.upstream = (host, port)
        self.latency_s = latency_s
        self.rules: list[Rule] = []
        self.seen: list[tuple[str, str]] = []  # (method, path) of each request
        self.headers: list[dict[str, str]] = []  # of each of them, names in small letters
        self.passed = {"up": 0, "down": 0}  # bytes of bodies
        self._lock = threading.Lock()
        self._lines = {"up": _Line(rate), "down": _Line(rate)}
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                time.sleep(proxy.latency_s)
                _Connection(proxy, self.request).serve()

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 128

            def server_bind(self) -> None:
                if buffer:
                    self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
                super().server_bind()

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def rule(self, kind: str, **arguments: object) -> Rule:
        """Add a rule, and return it: it counts what it did."""
        rule = Rule(kind, **arguments)  # type: ignore[arg-type]
        self.rules.append(rule)
        return rule

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def rules_for(self, method: str, path: str, headers: dict[str, str]) -> dict[str, Rule]:
        """Note a request, and return the rules that fit it, by kind."""
        with self._lock:
            self.seen.append((method, path))
            self.headers.append(headers)
            return {rule.kind: rule for rule in self.rules if rule.fits(method, path)}

    def passes(self, way: str) -> Callable[[int], None]:
        """Return what takes a number of bytes and returns when the line has taken them."""

        def take(size: int) -> None:
            self._lines[way].take(size)
            with self._lock:
                self.passed[way] += size

        return take


class _Line:
    """A line of a width, shared."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, size: int) -> None:
        if not self._rate:
            return
        with self._lock:
            start = max(time.monotonic(), self._free_at)
            self._free_at = start + size / self._rate
            wait = self._free_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)


class _Over(Exception):
    """The connection ends here."""


class _Connection:
    """One connection of a client, and one to the server for it."""

    def __init__(self, proxy: FaultProxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = client.makefile("rb")
        self._server: http.client.HTTPConnection | None = None

    def serve(self) -> None:
        try:
            while self._request():
                pass
        except (_Over, OSError, http.client.HTTPException):
            pass
        finally:
            if self._server is not None:
                self._server.close()
            self._file.close()
            self._client.close()

    def _request(self) -> bool:
        line = self._file.readline()
        if not line.strip():
            return False
        method, path, _ = line.decode("latin-1").split(" ", 2)
        headers: list[tuple[str, str]] = []
        while (header := self._file.readline()) not in (b"\r\n", b"\n", b""):
            name, _, value = header.decode("latin-1").partition(":")
            headers.append((name.strip(), value.strip()))
        by_name = {name.lower(): value for name, value in headers}
        if by_name.get("expect", "").lower() == "100-continue":
            self._client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        rules = self._proxy.rules_for(method, path, by_name)
        body = self._receive(int(by_name.get("content-length", "0")))
        time.sleep(self._proxy.latency_s)
        if "stall" in rules:
            time.sleep(rules["stall"].seconds)
        if "refuse" in rules:
            raise _Over
        if "status" in rules:
            rule = rules["status"]
            text = f"<?xml version='1.0'?><Error><Code>{rule.code}</Code><Message>by rule</Message></Error>".encode()
            self._answer(method, rule.status, [("Content-Type", "application/xml")], b"" if method == "HEAD" else text)
            return True
        if "flip_upload" in rules and body:
            body = _flipped(body)
        if "cut_upload" in rules:
            self._cut_upload(method, path, headers, body)
            raise _Over
        status, answer_headers, answer = self._ask(method, path, headers, body)
        if "twice" in rules:
            status, answer_headers, answer = self._ask(method, path, headers, body)
        if "lose_answer" in rules:
            raise _Over
        if "headers" in rules:
            new = rules["headers"].headers
            names = {name.lower() for name in new}
            answer_headers = [pair for pair in answer_headers if pair[0].lower() not in names] + list(new.items())
        if "flip" in rules and answer:
            answer = _flipped(answer)
        self._answer(method, status, answer_headers, answer, cut="cut_download" in rules)
        return True

    def _receive(self, length: int) -> bytes:
        parts = []
        passes = self._proxy.passes("up")
        while length:
            part = self._file.read(min(length, _STEP))
            if not part:
                raise _Over
            passes(len(part))
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _ask(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        if self._server is None:
            self._server = http.client.HTTPConnection(*self._proxy.upstream, timeout=60)
            self._server.connect()
            self._server.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._send_head(self._server, method, path, headers)
        if body:
            self._server.send(body)
        response = self._server.getresponse()
        answer = response.read()
        if response.will_close:
            self._server.close()
            self._server = None
        dropped = {"connection", "transfer-encoding", "keep-alive"}
        return response.status, [pair for pair in response.getheaders() if pair[0].lower() not in dropped], answer

    def _cut_upload(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> None:
        server = http.client.HTTPConnection(*self._proxy.upstream, timeout=60)
        self._send_head(server, method, path, headers)
        server.send(body[: len(body) // 2])
        server.close()

    @staticmethod
    def _send_head(server: http.client.HTTPConnection, method: str, path: str, headers: list[tuple[str, str]]) -> None:
        server.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            if name.lower() not in ("expect", "connection"):
                server.putheader(name, value)
        server.endheaders()

    def _answer(self, method: str, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
        names = {name.lower() for name, _ in headers}
        if "content-length" not in names:
            headers = [*headers, ("Content-Length", str(len(body)))]
        reason = http.client.responses.get(status, "")
        head = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers), "", ""]
        self._client.sendall("\r\n".join(head).encode("latin-1"))
        passes = self._proxy.passes("down")
        if method == "HEAD":
            return
        view = memoryview(body)[: len(body) // 2] if cut else memoryview(body)
        for at in range(0, len(view), _STEP):
            part = view[at : at + _STEP]
            passes(len(part))
            self._client.sendall(part)
        if cut:
            raise _Over


def _flipped(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)
