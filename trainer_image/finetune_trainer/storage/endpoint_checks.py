"""Checks of where a connection leads, made when it is opened.

A name is looked up once, its addresses are checked, and the connection goes to an address that was checked: a second
look-up, which might give another one, does not take place. TLS still verifies the name.
"""

import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import urllib3.exceptions
from botocore.awsrequest import AWSHTTPConnection, AWSHTTPConnectionPool, AWSHTTPSConnection, AWSHTTPSConnectionPool

from finetune_api.failures import FailureReason
from finetune_api.spec.endpoints import EndpointPolicy
from finetune_trainer.errors import TrainerError

_ADVICE = (
    "if a proxy or an authority of your own signs it, spec.pod.caBundle names the ConfigMap with that authority's "
    "certificate"
)


class EndpointRefusedError(TrainerError):
    """The policy of the installation refuses an address."""

    def __init__(self, where: str) -> None:
        super().__init__(FailureReason.ENDPOINT_NOT_ALLOWED, where)


def check_url(policy: EndpointPolicy | None, url: str) -> None:
    """Checks an endpoint as it is written. Raises EndpointRefusedError."""
    refusal = policy.refuse_url(url) if policy is not None else None
    if refusal is not None:
        raise EndpointRefusedError(f"the endpoint {url} is not allowed: {refusal}")


def find_addresses(policy: EndpointPolicy, host: str, port: int) -> list[str]:
    """Looks a name up, once. Raises EndpointRefusedError if any of its addresses is refused, and socket.gaierror."""
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))

    for address in addresses:
        if (refusal := policy.refuse_address(address, port)) is not None:
            raise EndpointRefusedError(f"{host} is not allowed as an endpoint: {refusal}")
    return addresses


def checked_pools(policy: EndpointPolicy) -> dict[str, type]:
    """Returns botocore's connection pools by scheme, with connections that the policy allows."""
    http = type("CheckedConnection", (_Checked, AWSHTTPConnection), {"policy": policy})
    https = type("CheckedTlsConnection", (_Checked, AWSHTTPSConnection), {"policy": policy})
    return {
        "http": type("CheckedPool", (AWSHTTPConnectionPool,), {"ConnectionCls": http}),
        "https": type("CheckedTlsPool", (AWSHTTPSConnectionPool,), {"ConnectionCls": https}),
    }


class _Checked:
    """Part of a connection of urllib3 that opens its socket."""

    policy: EndpointPolicy
    port: int
    _dns_host: str

    def _new_conn(self) -> socket.socket:
        name = self._dns_host
        open_socket: Callable[[], socket.socket] = super()._new_conn  # type: ignore[misc]  # urllib3's
        try:
            addresses = find_addresses(self.policy, name, self.port)
        except socket.gaierror as error:
            raise urllib3.exceptions.NameResolutionError(name, self, error) from error  # type: ignore[arg-type]

        # urllib3 connects to `_dns_host`, and takes the name for TLS from it afterwards.
        try:
            for address in addresses[:-1]:
                self._dns_host = address
                try:
                    return open_socket()
                except (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError):
                    continue
            self._dns_host = addresses[-1]
            return open_socket()
        finally:
            self._dns_host = name


class CheckedBackend:
    """A network backend of httpcore that opens only connections that the policy allows."""

    def __init__(self, inner: Any, policy: EndpointPolicy) -> None:
        """`inner`: the backend that opens them."""
        self._inner = inner
        self._policy = policy

    def connect_tcp(self, host: str, port: int, *arguments: Any, **options: Any) -> Any:
        """Opens a connection to an address of `host` that was checked."""
        try:
            address = find_addresses(self._policy, host, port)[0]
        except socket.gaierror as error:
            raise httpx.ConnectError(str(error)) from error
        return self._inner.connect_tcp(address, port, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the inner backend's."""
        return getattr(self._inner, name)


def explain_untrusted(error: BaseException) -> str | None:
    """Says that a server's certificate is not trusted, and what to do, if that is what an error comes from."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the certificate of the server is not trusted ({cause.verify_message}): {_ADVICE}"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it: libraries keep theirs as cause, as argument, or, as botocore does, by name."""
    todo, seen = [error], set[int]()
    while todo:
        cause = todo.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause

        kept = getattr(cause, "kwargs", {})
        named = kept.values() if isinstance(kept, dict) else ()
        behind = (cause.__cause__, cause.__context__, getattr(cause, "reason", None), *cause.args, *named)
        todo += [each for each in behind if isinstance(each, BaseException)]
