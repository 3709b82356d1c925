"""Hosts that back up to a bucket of a real server, by the command line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.buckets import options_of
from tests.servers import Server

Run = Callable[..., subprocess.CompletedProcess[str]]


def environment_of(server: Server, folder: Path, bucket: str) -> dict[str, str]:
    """Return the environment of a host whose repository is in a bucket, and whose cache and state are in a folder."""
    options = options_of(server)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BACKUPFS_", "AWS_"))} | {
        "AWS_SHARED_CREDENTIALS_FILE": os.environ["AWS_SHARED_CREDENTIALS_FILE"],
        "AWS_PROFILE": options.profile,
        "AWS_ENDPOINT_URL": server.endpoint_url,
        "BACKUPFS_PASSWORD": "a password",
        "BACKUPFS_CACHE_DIR": str(folder / "cache"),
        "BACKUPFS_REPOSITORY": f"s3://{bucket}/host/a",
        "XDG_STATE_HOME": str(folder / "state"),
    }
    if server.ca_bundle:
        environment["AWS_CA_BUNDLE"] = str(server.ca_bundle)
    return environment


def runner(server: Server, folder: Path, bucket: str) -> Run:
    environment = environment_of(server, folder, bucket)

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "backupfs", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done

    return run


def summary_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the last line of what a command printed with --json."""
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
