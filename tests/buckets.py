"""Stores of the tests' servers, and a look at them past the store."""

import os
import tempfile
from typing import Any

import boto3
from botocore.config import Config

from backupfs.stores.s3 import S3Store
from backupfs.stores.s3_client import S3Options
from tests.servers import Server

BUCKET = "backups"


_folder = tempfile.TemporaryDirectory()
_known: set[str] = set()


def profile_of(server: Server) -> str:
    """Return the name of a profile with a server's credentials, in a file that boto3 looks into from now on."""
    path = os.path.join(_folder.name, "credentials")
    name = server.endpoint_url.rpartition(":")[2]
    if name not in _known:
        with open(path, "a", encoding="ascii") as file:
            file.write(
                f"[{name}]\naws_access_key_id = {server.access_key}\naws_secret_access_key = {server.secret_key}\n"
            )
        _known.add(name)
    os.environ["AWS_SHARED_CREDENTIALS_FILE"] = path
    return name


def options_of(server: Server, endpoint_url: str = "") -> S3Options:
    """Return what a user says to get at a server; `endpoint_url` instead of its own, as of a proxy before it."""
    bundle = str(server.ca_bundle) if server.ca_bundle and not endpoint_url else ""
    return S3Options(endpoint_url or server.endpoint_url, profile=profile_of(server), ca_bundle=bundle)


def bucket_of(server: Server, prefix: str = "", endpoint_url: str = "") -> S3Store:
    """Return a store in a server's bucket."""
    return S3Store(BUCKET, prefix, options_of(server, endpoint_url))


def client_of(server: Server) -> Any:
    """Return a client of a server."""
    config = Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required")
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        verify=str(server.ca_bundle) if server.ca_bundle else None,
        config=config,
    )
