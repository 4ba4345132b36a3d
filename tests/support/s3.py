"""A throwaway S3 server for tests.

Moto runs in a process of its own, so that a test that blocks, forks or kills things cannot take the server along.
"""

import http.client
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import boto3
from botocore.config import Config

CREDENTIALS = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
REGION = "us-east-1"


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/moto-api/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@contextmanager
def moto_server(timeout: float = 60) -> Iterator[str]:
    """Run a fresh, empty moto server on a free port; yield its URL and kill it at the end."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with tempfile.TemporaryFile() as log:  # not a pipe: nobody reads it, and a full pipe would stop the server
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + timeout
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"moto does not answer on port {port}: {log.read()[-2000:].decode()}")
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def make_bucket(url: str, name: str) -> None:
    """Create bucket `name` on the server at `url`."""
    if urlsplit(url).scheme != "http":
        raise ValueError(f"not a test server: {url}")
    config = Config(s3={"addressing_style": "path"})
    boto3.client("s3", endpoint_url=url, region_name=REGION, config=config, **CREDENTIALS).create_bucket(Bucket=name)
