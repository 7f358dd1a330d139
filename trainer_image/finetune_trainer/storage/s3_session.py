"""One S3 client whose requests are retried: every request to S3 goes through `S3Session.call` or `S3Session.retry`.

botocore (adaptive mode) repeats a request a few times within seconds and slows down when the store asks for it. Around
it, the session waits for outages of minutes and for expired credentials, so that a store that restarts does not cost
hours of training.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.handlers import add_expect_header
from urllib3.exceptions import HTTPError

from finetune_api.spec.endpoints import EndpointPolicy
from finetune_trainer.storage.endpoint_checks import check_url, checked_pools
from finetune_trainer.storage.retry import Cause, RetryPolicy, retry
from finetune_trainer.storage.s3_credentials import FolderCredentials, folder_has_keys
from finetune_trainer.storage.s3_faults import FaultKind, FaultReasons, S3Fault, classify, refuse_redirect

Value = TypeVar("Value")
DEFAULT_REGION = "us-east-1"
BOTOCORE_ATTEMPTS = 4
"""Requests that botocore makes for one call, before our own retries."""
UNSENT_BYTES = 32 << 10
PROBE_RETRIES = RetryPolicy(outage_seconds=30, expired_seconds=5, rejected_seconds=0)
_RETRIED_ERRORS = (ClientError, BotoCoreError, HTTPError, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class S3Location:
    """Address of an S3 store."""

    endpoint_url: str | None = None
    """None is AWS."""
    region: str | None = None
    """None is the region of the machine's AWS configuration."""
    endpoints: EndpointPolicy | None = None
    """Addresses that the installation allows; None: any."""


class S3Session:
    """A bucket, reached with one identity. Safe to use from several threads."""

    def __init__(
        self,
        bucket: str,
        location: S3Location,
        credentials: Path | None,
        reasons: FaultReasons,
        *,
        anonymous_allowed: bool = False,
    ) -> None:
        """Builds the client. `credentials` is the folder of a mounted Secret; None is boto3's default chain.

        With `anonymous_allowed`, requests are not signed if the chain finds no credentials. Raises S3Fault for a folder
        without usable keys.
        """
        self.bucket = bucket
        self.reasons = reasons
        self._closing = threading.Event()
        try:
            self.client = _build_client(location, credentials, anonymous_allowed=anonymous_allowed)
        except BotoCoreError as error:
            raise self.fault(error, "credentials", None) from None

    def call(self, operation: str, key: str | None = None, policy: RetryPolicy | None = None, **parameters: Any) -> Any:
        """Runs an operation of boto3's client (its snake_case name) on the bucket, with retries. Raises S3Fault."""
        if key is not None:
            parameters["Key"] = key
        method = getattr(self.client, operation)
        return self.retry(lambda: method(Bucket=self.bucket, **parameters), operation, key, policy)

    def pages(self, operation: str, marker: str, next_marker: str, **parameters: Any) -> Iterator[Any]:
        """Yields every page of a listing. Raises S3Fault.

        `marker` is the request's field for where a page begins, `next_marker` the answer's field for the next one.
        """
        page: dict[str, Any] = {"IsTruncated": True}
        while page.get("IsTruncated"):
            continued = {marker: page[next_marker]} if next_marker in page else {}
            page = self.call(operation, **parameters, **continued)
            yield page

    def retry(
        self, action: Callable[[], Value], operation: str, key: str | None, policy: RetryPolicy | None = None
    ) -> Value:
        """Runs an action that talks to the store until it works, or until the policy's time is over. Raises S3Fault."""

        def explain(error: Exception) -> tuple[S3Fault, Cause]:
            fault = self.fault(error, operation, key)
            return fault, fault.kind.cause

        return retry(action, policy or RetryPolicy(), _RETRIED_ERRORS, explain, self._closing)

    def fault(self, error: BaseException, operation: str, key: str | None) -> S3Fault:
        """Our error for an error of boto3. Raise it `from None`: the original may quote the request."""
        kind, code = classify(error)
        # A 404 without a key in the request can only mean the bucket.
        if kind is FaultKind.KEY_MISSING and key is None:
            kind = FaultKind.BUCKET_MISSING

        where = f"s3://{self.bucket}/{key}" if key is not None else f"s3://{self.bucket}"
        return S3Fault(kind, self.reasons.reason(kind), operation, where, code)

    def close(self) -> None:
        """Ends all waits: a failing request raises at once from now on, because the process is about to end."""
        self._closing.set()


def _build_client(location: S3Location, credentials: Path | None, *, anonymous_allowed: bool) -> Any:
    # A mounted Secret goes before the machine's own configuration.
    core = botocore.session.get_session()
    if credentials is not None and folder_has_keys(credentials):
        core._credentials = FolderCredentials(credentials)  # botocore offers no public setter for a credentials object
    elif credentials is not None and not anonymous_allowed:
        FolderCredentials(credentials)  # raises an error that names the missing key

    session = boto3.Session(botocore_session=core)
    config = Config(
        retries={"mode": "adaptive", "total_max_attempts": BOTOCORE_ATTEMPTS},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=32,  # above the parts in flight, or threads would wait for connections
        tcp_keepalive=True,
        # Stores other than AWS rarely have a host name for each bucket.
        s3={"addressing_style": "path"} if location.endpoint_url else {},
        # We send checksums ourselves (see s3_upload): a store that does not know the newer ones must not fail on them.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    if anonymous_allowed and session.get_credentials() is None:
        config = config.merge(Config(signature_version=UNSIGNED))

    region = location.region or session.region_name or DEFAULT_REGION
    client = session.client("s3", endpoint_url=location.endpoint_url, region_name=region, config=config)
    _restrict(client, location)
    _send_as_it_goes(client)
    # A body that is read while it is sent would make each request wait for a "100 Continue", which few stores send.
    client.meta.events.unregister("before-call.s3", add_expect_header)
    return client


def _send_as_it_goes(client: Any) -> None:
    """Keeps the kernel from taking more of a body than it can soon send: what it holds moves unseen, and after it the
    store's answer has to come within the read time-out. What is in flight is not limited, so neither is the speed."""
    if (option := getattr(socket, "TCP_NOTSENT_LOWAT", None)) is not None:
        options = client._endpoint.http_session._manager.connection_pool_kw
        options["socket_options"] = [*(options.get("socket_options") or ()), (socket.IPPROTO_TCP, option, UNSENT_BYTES)]


def _restrict(client: Any, location: S3Location) -> None:
    """Lets a client connect only where the policy allows it, and follow no redirect of an endpoint that a user wrote.

    Raises EndpointRefusedError.
    """
    if location.endpoint_url is not None:
        check_url(location.endpoints, location.endpoint_url)
        client.meta.events.register("before-parse.s3", refuse_redirect)
    if location.endpoints is not None:
        # botocore has no setting for it; a proxy that the image sets stays as it is, and decides itself.
        manager = client._endpoint.http_session._manager
        manager.pool_classes_by_scheme = checked_pools(location.endpoints)
