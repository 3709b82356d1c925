"""What a user says of object storage, and the boto3 client that follows from it: one attempt of everything."""

import functools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backupfs.errors import UsageError, shown
from backupfs.stores.requests import Requests
from backupfs.stores.s3_answers import text_of

DEFAULT_CONNECTIONS = 16
ADDRESSING = ("auto", "path", "virtual")
ENCRYPTION = ("AES256", "aws:kms", "aws:kms:KEY")

# What boto3 sends of the environment.
_VARIABLES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"
)  # fmt: skip

# A connection that does not come about, or takes nothing of what is sent, and one on which nothing comes: a transfer
# that moves, however slowly, is not ended. Busy servers think about a large put for some seconds.
_CONNECT_S = 10
_READ_S = 30
# What may wait unsent in the kernel, or the answer to megabytes that a slow line has yet to take would be late.
_MOST_UNSENT = 32 << 10
_TCP_NOTSENT_LOWAT = 25  # Linux
# A page of a listing is a thousand entries, each with a key of a kilobyte at most.
_MOST_ANSWER = 16 << 20


@dataclass(frozen=True, slots=True)
class S3Options:
    """What a user can say about object storage; the rest is found by boto3's own chain."""

    endpoint_url: str = ""  # empty: that of the profile or the environment, else AWS
    region: str = ""
    profile: str = ""
    addressing: str = "auto"  # where the bucket's name stands: in the path, or in the host's name
    ca_bundle: str = ""  # a file of certificates to trust; empty: the system's
    connections: int = DEFAULT_CONNECTIONS
    classes: tuple[tuple[str, str], ...] = ()  # (start of the key, storage class) for objects not of the usual class
    thawable: str = ""  # how keys begin of what may be in an archive class, as it can be thawed; empty: all
    encryption: str = ""  # by the server: AES256, aws:kms or aws:kms:KEY
    limit_upload: int = 0  # bytes a second; 0: no limit
    limit_download: int = 0


def make_client(options: S3Options, requests: Requests) -> Any:
    """Return a boto3 client. Raises: UsageError."""
    import logging

    import boto3
    import botocore.session
    from botocore import exceptions as boto
    from botocore.config import Config

    _require_plain(options)
    try:
        core = botocore.session.Session(profile=options.profile or None)
        endpoint = (
            options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            or core.get_scoped_config().get("endpoint_url") or ""
        )  # fmt: skip
        _require_proxy(endpoint)
        addressing = options.addressing
        if addressing == "auto" and endpoint and ".amazonaws.com" not in endpoint:
            # Few servers but Amazon's have a host name for each bucket.
            addressing = "path"
        config = Config(
            s3={"addressing_style": addressing, "payload_signing_enabled": False},
            signature_version="s3v4",
            max_pool_connections=options.connections,
            # Trailers of checksums are what older servers do not understand; the MD5 is sent with each put.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=_CONNECT_S,
            read_timeout=_READ_S,
            tcp_keepalive=True,
        )
        client = boto3.Session(botocore_session=core).client(
            "s3",
            region_name=options.region or core.get_config_variable("region") or "us-east-1",
            endpoint_url=endpoint or None,
            verify=_trusted(options.ca_bundle, core, endpoint),
            config=config,
        )
    except boto.ProfileNotFound as error:
        raise UsageError(f"{text_of(error)}: name one of ~/.aws/config with --profile") from error
    except ValueError as error:
        raise UsageError(f"object storage cannot be used, see --endpoint-url and --region: {text_of(error)}") from error
    except boto.BotoCoreError as error:
        raise UsageError(f"object storage cannot be used: {text_of(error)}") from error
    # boto3 has no option for it; whoever makes connections later reads this list.
    session = client._endpoint.http_session
    session._socket_options.append((socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _MOST_UNSENT))
    session.send = functools.partial(_send, session.send)
    # It says with the whole certificate what the error says as well.
    logging.getLogger("urllib3.connection").setLevel(logging.ERROR)
    client.meta.events.register("before-send.s3", requests.count)
    client.meta.events.register("response-received.s3", requests.note_answer)
    return client


def _send(send: Callable[[Any], Any], request: Any) -> Any:
    """Send a request, and read its answer if that is no object: boto3 would read on as long as anything comes."""
    is_object = request.stream_output
    request.stream_output = True
    response = send(request)
    if not is_object or response.status_code >= 300:
        parts, size = [], 0
        for part in response.raw.stream():
            size += len(part)
            if size > _MOST_ANSWER:
                response.raw.close()
                raise ValueError("it is too long")
            parts.append(part)
        response._content = b"".join(parts)
    return response


def _require_plain(options: S3Options) -> None:
    """Raise UsageError for what cannot be in a request's head: it would fail each time, and not say what it is."""
    named = [("--region", options.region), ("--encryption", options.encryption)]
    named += [("--storage-class", storage_class) for _, storage_class in options.classes]
    named += [(name, os.environ.get(name, "")) for name in _VARIABLES]
    for name, text in named:
        # The secret key is not sent, but signed with, so it may be of any letters.
        if not text.isprintable() or not (text.isascii() or name == "AWS_SECRET_ACCESS_KEY"):
            raise UsageError(f"{name} has a character in it that cannot be sent, as the end of a line: set it anew")


def _require_proxy(endpoint: str) -> None:
    """Raise UsageError for a proxy on the way to an endpoint that is no address of one."""
    from urllib.parse import urlsplit

    from botocore.utils import get_environ_proxies
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

    scheme = "http" if endpoint.startswith("http://") else "https"
    proxy = get_environ_proxies(endpoint or "https://s3.amazonaws.com").get(scheme, "")
    if not proxy:
        return
    try:
        # A name alone is fine.
        address = parse_url(proxy if "://" in proxy else f"http://{proxy}")
        if address.scheme not in ("http", "https") or not address.host or not urlsplit(address.url).hostname:
            raise ValueError("it is none of a web proxy")
    except (ValueError, LocationParseError) as error:
        # It may hold a password.
        raise UsageError(f"{scheme.upper()}_PROXY is no address of a proxy: that is http://HOST:PORT") from error


def _trusted(option: str, core: Any, endpoint: str) -> str | bool:
    """Return the file of certificates to trust, True for the usual ones. Raises: UsageError if it holds none."""
    import ssl

    named = [("--ca-bundle", option)]
    if not endpoint.startswith("http://"):
        # The order of the AWS tools. What is empty is as if it were not there.
        named += [
            ("AWS_CA_BUNDLE", os.environ.get("AWS_CA_BUNDLE", "")),
            ("ca_bundle of the profile,", core.get_scoped_config().get("ca_bundle", "")),
            ("REQUESTS_CA_BUNDLE", os.environ.get("REQUESTS_CA_BUNDLE", "")),
        ]
    name, path = next((pair for pair in named if pair[1]), ("", ""))
    if not path:
        return True
    if os.path.isdir(path):
        raise UsageError(f"{name} {shown(path)}: it is a folder; give one file with all certificates")
    try:
        ssl.create_default_context(cafile=path)
    except (OSError, ValueError) as error:
        reason = "it holds no certificates" if isinstance(error, ssl.SSLError) else text_of(error)
        if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
            reason = error.strerror or reason
        raise UsageError(f"{name} {shown(path)}: {reason}") from error
    return path
