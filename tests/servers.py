"""Real object storage servers on loopback, each in a folder of its own.

OpenStack Swift is four processes, and memcached for speed; SeaweedFS is one. `scripts/prepare --servers` installs them.
A server's processes end with the thread that started it, also when that is killed.
"""

import asyncio
import contextlib
import datetime as dt
import functools
import http.client
import ipaddress
import json
import os
import pwd
import random
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENVIRONMENTS = Path(__file__).resolve().parent.parent / ".servers"
SWIFT = ENVIRONMENTS / "swift"
OLD_SWIFT = ENVIRONMENTS / "swift-old"
SEAWEEDFS = ENVIRONMENTS / "seaweedfs"

HOST = "127.0.0.1"
REGION = "us-east-1"

_START_S = 60
_STOP_S = 2
_POLL_S = 0.02
_LOG_LINES = 40
_FORWARD_SIZE = 1 << 18
# Below the ports that Linux gives to connections, so that none is taken between being found free and being used.
_PORTS = range(20_000, 32_000)
_BACKENDS = ("account", "container", "object")

# Becomes a command that is killed when its parent ends. The user is changed first: that takes the tie off again.
_TIED = """
import ctypes, os, pwd, signal, sys
parent, user, *command = sys.argv[1:]
if user:
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""

# Swift 2.30 reads its main settings from /etc whatever swift_dir says; messages go to standard error, not to the
# machine's log.
_SWIFT_SERVER = """
import logging.handlers, sys
logging.handlers.SysLogHandler.emit = lambda self, record: None
from swift.common import utils, wsgi
part, folder = sys.argv[1:]
utils.SWIFT_CONF_FILE = f"{folder}/swift.conf"
sys.exit(wsgi.run_wsgi(f"{folder}/{part}-server.conf", f"{part}-server", verbose=True))
"""

# Rings tell where things are kept: here on one device of one server each.
_SWIFT_RINGS = """
import sys
from swift.common.ring import RingBuilder
folder, *parts = sys.argv[1:]
for part in parts:
    name, host, port = part.split(":")
    builder = RingBuilder(2, 1, 1)
    place = {"ip": host, "port": int(port), "device": "device", "region": 1, "zone": 1, "weight": 1.0}
    builder.add_dev(place)
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{name}.ring.gz")
"""

# Nobody else keeps a copy, so a device that failed once is asked again at once; the timeouts are for a busy machine.
_SWIFT_DEFAULTS = """
[DEFAULT]
swift_dir = {folder}
devices = {data}
mount_check = false
fallocate_reserve = 0
bind_ip = {host}
bind_port = {port}
workers = 0
user = {user}
log_level = WARNING
conn_timeout = 10
node_timeout = 60
container_update_timeout = 30
"""
_SWIFT_BACKEND = """
[pipeline:main]
pipeline = {part}-server

[app:{part}-server]
use = egg:swift#{part}
"""
_SWIFT_PROXY = """
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck {cache} listing_formats bulk s3api tempauth copy
    container_quotas slo dlo versioned_writes symlink proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
error_suppression_interval = 0

[filter:cache]
use = egg:swift#memcache
memcache_servers = {host}:{memcached}
memcache_max_connections = 32

[filter:s3api]
use = egg:swift#s3api
location = us-east-1
min_segment_size = {min_segment}

[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin

[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_versioned_writes = true
allow_object_versioning = true
"""
_SWIFT_FILTERS = (
    "catch_errors",
    "gatekeeper",
    "healthcheck",
    "listing_formats",
    "bulk",
    "copy",
    "container_quotas",
    "slo",
    "dlo",
    "symlink",
)


class ServerFailed(Exception):
    """A server is not installed, or does not start."""


@dataclass
class Server:
    """An object storage server that runs, or did: its files stay in its folder."""

    name: str
    folder: Path
    endpoint_url: str
    access_key: str
    secret_key: str
    ca_bundle: Path | None = None  # what to trust, of an endpoint that speaks TLS
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)  # by what they do
    litter: list[Path] = field(default_factory=list)  # files that the processes leave outside the folder

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes.values()]

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def client(self, **config: Any) -> Any:
        """Return a boto3 client that looks at nobody's settings and does not try again.

        config: arguments of botocore's Config.
        """
        import boto3
        from botocore.config import Config

        plain = {
            "s3": {"addressing_style": "path"},
            "signature_version": "s3v4",
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "proxies": {},
        }
        return boto3.session.Session(self.access_key, self.secret_key, region_name=REGION).client(
            "s3",
            endpoint_url=self.endpoint_url,
            verify=str(self.ca_bundle) if self.ca_bundle else None,
            config=Config(**(plain | config)),
        )

    def stop(self) -> None:
        """End the processes. May be called again."""
        for process in self.processes.values():
            process.terminate()
        deadline = time.monotonic() + _STOP_S
        for process in self.processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for path in self.litter:
            path.unlink(missing_ok=True)

    def _run(self, part: str, *command: str | Path, user: str = "", settings: Mapping[str, str] | None = None) -> None:
        tied = [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), user]
        with self.log.open("ab") as log:
            self.processes[part] = subprocess.Popen(
                [*tied, *command],
                # Servers may keep sockets beside their data, and the path of a socket has to be short.
                cwd="/" if user else self.folder,
                env={**os.environ, **(settings or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the tests; they stop their servers.
                start_new_session=True,
            )

    def _wait(self, *checks: Callable[[], bool]) -> None:
        """Wait until one check after the other holds. Raises: ServerFailed."""
        deadline = time.monotonic() + _START_S
        for holds in checks:
            while not holds():
                for part, process in self.processes.items():
                    if process.poll() is not None:
                        raise self._failed(f"its process {part} ended with status {process.returncode}")
                if time.monotonic() > deadline:
                    raise self._failed(f"it does not answer after {_START_S} s")
                time.sleep(_POLL_S)

    def _failed(self, why: str) -> ServerFailed:
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return ServerFailed("\n  ".join([f"{self.name} did not start: {why}; the end of its log:", *lines]))

    def _stores(self) -> bool:
        """Tell whether an object can be put and is gone again with its bucket."""
        calls = [("PUT", "/is-it-there"), ("PUT", "/is-it-there/yet"), ("DELETE", "/is-it-there/yet")]
        statuses = [self._status(method, path) for method, path in [*calls, ("DELETE", "/is-it-there")]]
        return all(200 <= status < 300 for status in statuses)

    def _status(self, method: str, path: str) -> int:
        """Return the status of a signed request, 0 if there was no answer."""
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        request = AWSRequest(method, self.endpoint_url + path, data=b"")
        S3SigV4Auth(Credentials(self.access_key, self.secret_key), "s3", REGION).add_auth(request)
        return _status(self.endpoint_url, method, path, dict(request.headers.items()))


def start_swift(
    folder: Path, environment: Path = SWIFT, *, memcached: bool = True, min_segment: int = 5 << 20
) -> Server:
    """Start OpenStack Swift with its S3 interface.

    folder: made if it is not there; what an earlier server stored in it is there again.
    environment: SWIFT or OLD_SWIFT.
    memcached: whether Swift remembers accounts and buckets, which halves what a request costs; taken where installed.
    min_segment: the size that each part of a multipart upload but the last must have.
    Raises: ServerFailed.
    """
    python = _installed(environment, "python")
    cache = shutil.which("memcached", path=f"{os.environ.get('PATH', '')}:/usr/bin") if memcached else None
    proxy_port, cache_port, *backend_ports = _free_ports(2 + len(_BACKENDS))
    backends = dict(zip(_BACKENDS, backend_ports, strict=True))
    server = _new_server("Swift", folder, proxy_port, "test:tester", "testing")
    settings = server.folder / "settings"
    data = server.folder / "data"
    settings.mkdir(exist_ok=True)
    (data / "device").mkdir(parents=True, exist_ok=True)
    _require_extended_attributes(data)

    def write(part: str, port: int, text: str, **values: object) -> None:
        user = pwd.getpwuid(os.getuid()).pw_name
        values |= {"folder": settings, "data": data, "host": HOST, "port": port, "user": user, "part": part}
        (settings / f"{part}-server.conf").write_text((_SWIFT_DEFAULTS + text).format(**values))

    (settings / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = backupfs\n")
    filters = "".join(f"\n[filter:{name}]\nuse = egg:swift#{name}\n" for name in _SWIFT_FILTERS)
    write(
        "proxy",
        proxy_port,
        _SWIFT_PROXY + filters,
        cache="cache" if cache else "",
        memcached=cache_port,
        min_segment=min_segment,
    )
    for part, port in backends.items():
        write(part, port, _SWIFT_BACKEND)
    places = [f"{part}:{HOST}:{port}" for part, port in backends.items()]
    rings = subprocess.run(
        [python, "-I", "-c", _SWIFT_RINGS, settings, *places], capture_output=True, text=True, timeout=_START_S
    )
    if rings.returncode:
        raise ServerFailed(f"Swift's rings cannot be built:\n{rings.stdout}{rings.stderr}")
    with _stopped_if_it_fails(server):
        ports = [*backends.values(), proxy_port]
        if cache:
            root = os.geteuid() == 0
            server._run("cache", cache, "-l", HOST, "-p", str(cache_port), "-U", "0", user="nobody" if root else "")
            ports.append(cache_port)
        for part in (*backends, "proxy"):
            server._run(part, python, "-I", "-c", _SWIFT_SERVER, part, settings)
        server._wait(*(functools.partial(_listens, port) for port in ports), server._stores)
    return server


def start_seaweedfs(folder: Path, environment: Path = SEAWEEDFS) -> Server:
    """Start SeaweedFS with its S3 interface.

    folder: made if it is not there; what an earlier server stored in it is there again.
    Raises: ServerFailed.
    """
    weed = _installed(environment, "weed")
    names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    server = _new_server("SeaweedFS", folder, ports["s3.port"], "tester", "testing")
    server.litter += [
        Path(f"/tmp/seaweedfs-{name.partition('.')[0]}-grpc-{port}.sock")
        for name, port in ports.items()
        if name.endswith(".grpc")
    ]
    (server.folder / "data").mkdir(exist_ok=True)
    credentials = {"accessKey": server.access_key, "secretKey": server.secret_key}
    tester = {"name": "tester", "credentials": [credentials], "actions": ["Admin"]}
    (server.folder / "s3.json").write_text(json.dumps({"identities": [tester]}))
    options = {
        "ip": HOST,
        "ip.bind": HOST,
        "dir": "data",
        "filer.localSocket": "filer.socket",
        "s3.localSocket": "s3.socket",
        "s3.config": "s3.json",
        # A bucket that is missing is missing, and one that is full stays.
        "s3.autoCreateBucket": "false",
        "s3.allowDeleteBucketNotEmpty": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "volume.max": 500,
        "volume.minFreeSpace": "100MiB",
        "volume.preStopSeconds": 0,
        "master.volumeSizeLimitMB": 256,
        "master.telemetry": "false",
        **ports,
    }
    arguments = [f"-{name}={value}" for name, value in options.items()]
    # Each bucket has volumes of its own: one to begin with rather than seven.
    settings = {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
    with _stopped_if_it_fails(server):
        server._run("weed", weed, "-logtostderr=true", "server", "-filer", "-s3", *arguments, settings=settings)
        master = f"http://{HOST}:{ports['master.port']}"
        server._wait(
            # The ports are open long before anything can be stored.
            lambda: _status(master, "GET", "/dir/assign", {}) == 200,
            functools.partial(_listens, ports["s3.port"]),
            server._stores,
        )
    return server


def start_tls(server: Server, folder: Path) -> Server:
    """Start what makes a server speak TLS, with a certificate that only its `ca_bundle` vouches for.

    Only what this starts is stopped by `stop` of the result; its keys and buckets are those of the server.
    Raises: ServerFailed.
    """
    (port,) = _free_ports(1)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    _write_certificate(certificate, key)
    secure = Server(
        f"{server.name} over TLS",
        folder,
        f"https://{HOST}:{port}",
        server.access_key,
        server.secret_key,
        ca_bundle=certificate,
    )
    target = server.endpoint_url.rpartition(":")[2]
    with _stopped_if_it_fails(secure):
        secure._run("forwarder", sys.executable, "-I", __file__, certificate, key, str(port), target)
        secure._wait(functools.partial(_listens, port))
    return secure


def _new_server(name: str, folder: Path, port: int, access_key: str, secret_key: str) -> Server:
    folder.mkdir(parents=True, exist_ok=True)
    return Server(name, folder.resolve(), f"http://{HOST}:{port}", access_key, secret_key)


@contextlib.contextmanager
def _stopped_if_it_fails(server: Server) -> Iterator[None]:
    try:
        yield
    except BaseException:
        server.stop()
        raise


def _installed(environment: Path, command: str) -> Path:
    path = environment.absolute() / "bin" / command
    # The last that is written: without it an installation was cut short.
    if not (environment / "installed").exists() or not path.exists():
        raise ServerFailed(f"{environment.name} is not installed: run scripts/prepare --servers")
    return path


def _require_extended_attributes(folder: Path) -> None:
    try:
        os.setxattr(folder, "user.backupfs", b"")
    except OSError as error:
        raise ServerFailed(f"Swift needs a file system with extended attributes for {folder}: {error}") from error


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((HOST, port))
            found.append(port)
        if len(found) == count:
            return found
    raise ServerFailed("there are no free ports")


def _listens(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=5).close()
    except OSError:
        return False
    return True


def _status(url: str, method: str, path: str, headers: Mapping[str, str]) -> int:
    """Return the status that an HTTP server answers with, 0 if there was no answer."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=_START_S)
    try:
        connection.request(method, path, headers=dict(headers))
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def _write_certificate(certificate: Path, key: Path) -> None:
    """Write a certificate for HOST that signs itself, for a day."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = dt.datetime.now(dt.UTC)
    usage = dict.fromkeys(
        ("content_commitment", "data_encipherment", "key_agreement", "key_encipherment", "encipher_only"), False
    )
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=False, decipher_only=False, **usage),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(private.public_key()), critical=False)
        .sign(private, hashes.SHA256())
    )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


async def _forward(certificate: str, key: str, port: int, target: int) -> None:
    """Take TLS connections at a port and pass what they say to another port, and back."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # An end that breaks off is an end; TLS has none for one direction only.
        with contextlib.suppress(OSError), contextlib.closing(writer):
            while data := await reader.read(_FORWARD_SIZE):
                writer.write(data)
                await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection(HOST, target, limit=_FORWARD_SIZE)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

    async with await asyncio.start_server(serve, HOST, port, ssl=context, limit=_FORWARD_SIZE, backlog=1000) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_forward(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
