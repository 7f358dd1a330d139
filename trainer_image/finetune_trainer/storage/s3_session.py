"""One S3 client with our patience: every operation of ours goes through `S3Session.call`.

botocore (adaptive mode) repeats a request a few times within seconds and slows down when told to. Around it, this
waits for outages of minutes and for credentials that expired, so that hours of training are not lost to a store that
restarts.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from finetune_trainer.storage.s3_credentials import FolderCredentials, folder_has_keys
from finetune_trainer.storage.s3_faults import CREDENTIAL_KINDS, RETRIED, FaultKind, FaultReasons, S3Fault, classify

log = logging.getLogger(__name__)
Value = TypeVar("Value")
DEFAULT_REGION = "us-east-1"


@dataclass(frozen=True)
class S3Location:
    """Which store: None means AWS, and the region that the machine's configuration says."""

    endpoint_url: str | None = None
    region: str | None = None


@dataclass(frozen=True)
class Patience:
    """How long failures are endured, in seconds."""

    outage_seconds: float = 900
    """A store that does not answer, counted for each request."""
    expired_seconds: float = 300
    """Expired credentials, until the mounted Secret changes."""
    rejected_seconds: float = 10
    """Rejected credentials: a Secret's files may change one after the other."""
    first_wait: float = 0.5
    longest_wait: float = 30
    requests: int = 4
    """Requests that botocore makes for one call."""

    def limit(self, kind: FaultKind) -> float:
        """How long this kind of fault is endured."""
        limits = {FaultKind.EXPIRED: self.expired_seconds, FaultKind.REJECTED: self.rejected_seconds}
        return limits.get(kind, self.outage_seconds if kind in RETRIED else 0.0)


PROBE_PATIENCE = Patience(outage_seconds=30, expired_seconds=5, rejected_seconds=0)


class S3Session:
    """A bucket, reached with one identity. Safe to use from several threads."""

    def __init__(
        self,
        bucket: str,
        location: S3Location,
        credentials: Path | None,
        reasons: FaultReasons,
        patience: Patience | None = None,
        anonymous_allowed: bool = False,
    ) -> None:
        """`credentials` is a folder with a mounted Secret, None means boto3's default chain; `anonymous_allowed` reads
        unsigned where the chain finds nothing."""
        self.bucket = bucket
        self.reasons = reasons
        self.patience = patience or Patience()
        self._closing = threading.Event()
        try:
            self.client = _build_client(location, credentials, self.patience, anonymous_allowed)
        except BotoCoreError as error:
            raise self.fault(error, "credentials", None) from None

    def call(self, operation: str, key: str | None = None, patience: Patience | None = None, **parameters: Any) -> Any:
        """Run an operation of the client (its snake_case name) on the bucket. Raises S3Fault."""
        if key is not None:
            parameters["Key"] = key
        method = getattr(self.client, operation)
        return self.patiently(lambda: method(Bucket=self.bucket, **parameters), operation, key, patience)

    def pages(self, operation: str, marker: str, next_marker: str, **parameters: Any) -> Iterator[Any]:
        """Every page of a listing. Raises S3Fault."""
        page: dict[str, Any] = {"IsTruncated": True}
        while page.get("IsTruncated"):
            continued = {marker: page[next_marker]} if next_marker in page else {}
            page = self.call(operation, **parameters, **continued)
            yield page

    def patiently(
        self, action: Callable[[], Value], operation: str, key: str | None, patience: Patience | None = None
    ) -> Value:
        """Run an action that talks to the store until it works or the patience for its fault is used up."""
        limits, first, wait = patience or self.patience, time.monotonic(), 0.0
        while True:
            try:
                return action()
            except (ClientError, BotoCoreError, HTTPError, ConnectionError, TimeoutError) as error:
                fault = self.fault(error, operation, key)
                wait = min(limits.longest_wait, 2 * wait or limits.first_wait)
                if time.monotonic() + wait > first + limits.limit(fault.kind) or self._closing.is_set():
                    raise fault from None
                log.warning("%s; trying again in %.1f s", fault.message, wait)
                # Expired credentials are polled at a steady pace: the file changes once, at no predictable time.
                pause = limits.first_wait if fault.kind in CREDENTIAL_KINDS else wait * random.uniform(0.7, 1)  # noqa: S311
                self._closing.wait(pause)

    def fault(self, error: BaseException, operation: str, key: str | None) -> S3Fault:
        """Our error for one that boto3 raised. Callers raise it `from None`: the original may quote the request."""
        kind, code = classify(error)
        if kind is FaultKind.KEY_MISSING and key is None:
            kind = FaultKind.BUCKET_MISSING
        where = f"s3://{self.bucket}/{key}" if key is not None else f"s3://{self.bucket}"
        return S3Fault(kind, self.reasons.reason(kind), operation, where, code)

    def give_up(self) -> None:
        """Let no operation wait any longer: the process is about to end."""
        self._closing.set()


def _build_client(location: S3Location, credentials: Path | None, patience: Patience, anonymous_allowed: bool) -> Any:
    core = botocore.session.get_session()
    if credentials is not None and folder_has_keys(credentials):
        core._credentials = FolderCredentials(credentials)  # botocore offers no public setter for a credentials object
    elif credentials is not None and not anonymous_allowed:
        FolderCredentials(credentials)  # raises, and names what is missing
    session = boto3.Session(botocore_session=core)
    config = Config(
        retries={"mode": "adaptive", "total_max_attempts": patience.requests},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=32,
        tcp_keepalive=True,
        s3={"addressing_style": "path"} if location.endpoint_url else {},
        # Checksums are ours (see s3_upload): a store that does not know the newer ones must not fail on them.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    if anonymous_allowed and session.get_credentials() is None:
        config = config.merge(Config(signature_version=UNSIGNED))
    region = location.region or session.region_name or DEFAULT_REGION
    return session.client("s3", endpoint_url=location.endpoint_url, region_name=region, config=config)
