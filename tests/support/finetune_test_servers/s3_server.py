"""S3 over HTTP on loopback: moto's server in a process of its own, so that nothing of it leaks into the tests'
process."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from finetune_test_programs.child_process import Program, free_port


@dataclass(frozen=True)
class S3Server:
    """A running S3 server."""

    endpoint_url: str
    access_key: str = "AKIADEVCLUSTER"
    secret_key: str = "devcluster-secret-key-canary"

    @classmethod
    @contextmanager
    def start(cls, host: str = "127.0.0.1", port: int | None = None) -> Iterator[Self]:
        """Start the server, wait until it answers, stop it at the end. `port`: None takes any that is free."""
        port = port or free_port()
        with TemporaryDirectory(prefix="finetune-s3-") as folder:
            command = [sys.executable, "-m", "moto.server", "--host", host, "--port", str(port)]
            names = os.environ | {"S3_IGNORE_SUBDOMAIN_BUCKETNAME": "true"}  # s3.example.internal is no bucket "s3"
            server = Program("moto", command, Path(folder) / "moto.log", names)
            try:
                store = cls(f"http://{host}:{port}")
                store._wait(server)
                yield store
            finally:
                server.stop()

    def client(self) -> Any:  # boto3 makes its client classes at run time
        """A boto3 S3 client of this server."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 1}, connect_timeout=2),
        )

    def create_bucket(self, name: str) -> None:
        """Create an empty bucket."""
        self.client().create_bucket(Bucket=name)

    def _wait(self, server: Program, timeout: float = 20) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.client().list_buckets()
                return
            except BotoCoreError:
                server.check()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"moto did not answer after {timeout} s:\n{server.tail()}") from None
                time.sleep(0.1)
