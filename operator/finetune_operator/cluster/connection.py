"""The connection to the API server: `kubernetes.aio`, configured by a service account or by a kubeconfig.

The official asyncio client finds the server, trusts its authority and keeps credentials fresh. Objects stay plain
dictionaries: importing the client's typed APIs takes a process from 59 to 173 MiB (resident, measured with 37.0.1), its
connection alone adds 1 MiB. Its retries are off, because the work queue decides when to try again.

kopf makes requests of its own and therefore gets a session of its own, under the same configuration.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

import aiohttp
import yaml
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_kube_config
from kubernetes.aio.config.incluster_config import InClusterConfigLoader

from finetune_api.base import Json
from finetune_operator.cluster.answers import decode_object, read_message, read_retry_after
from finetune_operator.cluster.server_clock import ServerClock
from finetune_operator.cluster.usable_answers import only_usable_answers
from finetune_operator.errors import (
    ApiError,
    ApiUnavailableError,
    ConflictError,
    ForbiddenError,
    NotFoundError,
    SettingsError,
)
from finetune_operator.metrics.series import API_REQUESTS, API_SECONDS
from finetune_operator.settings import Kubeconfig, ServiceAccount

KUBECONFIG_SECONDS = 60.0
"""Age at which a kubeconfig is read again; tokens from files and exec plugins expire. The client's own loader reads a
service account's token again after the same time."""

TIMEOUT = aiohttp.ClientTimeout(total=30, sock_connect=10)
APPLY = "application/apply-patch+yaml"
MERGE_PATCH = "application/merge-patch+json"
USER_AGENT = "finetune-operator"

_UNREADABLE_CREDENTIALS = (ConfigException, yaml.YAMLError, OSError)
_MALFORMED_KUBECONFIG = (AttributeError, TypeError, ValueError)  # the client's loader expects a well-formed file
_Handler = Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]]
_ERRORS: dict[int, type[ApiError]] = {403: ForbiddenError, 404: NotFoundError, 409: ConflictError}


class ApiConnection:
    """Requests to the API server, whose refusals become errors of our own tree.

    A server that names a time in Retry-After gets no request until then, whichever job is due: it counts requests by
    user, and all of them are this one's.
    """

    def __init__(self, configuration: Configuration) -> None:
        self._session_options: dict[str, Any] = {
            "trust_env": False,  # proxies are the kubeconfig's to name, not the environment's
            "middlewares": (_Authorization(configuration),),
        }
        configuration.client_session_kwargs = self._session_options
        configuration.connection_pool_maxsize = 0  # no limit, as in kopf's session
        configuration.retries = None

        self._configuration = configuration
        self._paused_until = 0.0  # reading of the monotonic clock
        self._client: Any = ApiClient(configuration)  # the client has types for some of its methods only
        self._client.user_agent = USER_AGENT
        self.clock = ServerClock()

    @classmethod
    async def open(cls, api_server: ServiceAccount | Kubeconfig) -> Self:
        """Read credentials and certificates; raises SettingsError if that fails. Nothing is sent yet."""
        configuration = Configuration()
        try:
            if isinstance(api_server, ServiceAccount):
                _use_service_account(configuration, api_server)
            else:
                await _use_kubeconfig(configuration, api_server)
            return cls(configuration)
        except (*_UNREADABLE_CREDENTIALS, *_MALFORMED_KUBECONFIG) as error:
            raise SettingsError(f"{api_server}: {error}") from error

    @property
    def api_url(self) -> str:
        """Base URL of the API server, without a trailing slash."""
        return str(self._configuration.host)

    def open_session(self) -> aiohttp.ClientSession:
        """Returns a session for kopf under the same configuration; the caller closes it."""
        middlewares = (only_usable_answers, *self._session_options["middlewares"])
        connector = aiohttp.TCPConnector(ssl=self._client.rest_client.ssl_context, limit=0)
        return aiohttp.ClientSession(
            connector=connector,
            proxy=self._configuration.proxy,
            headers={"User-Agent": USER_AGENT},
            **self._session_options | {"middlewares": middlewares},
        )

    async def close(self) -> None:
        """Close the client's connections."""
        await self._client.close()

    async def request(
        self,
        verb: str,
        path: str,
        body: Json | None = None,
        *,
        query: dict[str, str] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Json:
        """Send one request and return the decoded answer, an object of Kubernetes; raises ApiError or
        ApiUnavailableError."""
        label = f"{verb} {path}"
        pause = self._paused_until - time.monotonic()
        if pause > 0:
            raise ApiUnavailableError(f"{label}: not sent: the API server asked for {pause:.0f} s of peace", pause)

        headers, sent = {"Accept": accept, "Content-Type": content_type}, time.monotonic()
        try:
            method, url, headers, payload, _ = await self._client.param_serialize(
                verb, path, query_params=query, header_params=headers, body=body
            )
            response = await self._client.call_api(method, url, headers, payload, _request_timeout=TIMEOUT)
            self.clock.note(response.headers.get("Date"), sent)
            text = (await response.read()).decode(errors="replace")  # the timeout covers the body too
            _count(verb, str(response.status), sent)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            _count(verb, "0", sent)
            raise ApiUnavailableError(f"{label}: {type(error).__name__}: {error}") from error

        # 429 and 5xx pass by themselves; every other refusal needs a decision.
        if response.status == 429 or response.status >= 500:
            retry_after = read_retry_after(response.headers)
            self._paused_until = max(self._paused_until, time.monotonic() + retry_after)
            raise ApiUnavailableError(f"{label}: {response.status}: {read_message(text)}", retry_after)
        if response.status >= 400:
            raise _ERRORS.get(response.status, ApiError)(response.status, label, read_message(text))
        return decode_object(label, text)


def _count(verb: str, code: str, sent: float) -> None:
    API_REQUESTS.labels(verb, code).inc()
    API_SECONDS.labels(verb).observe(time.monotonic() - sent)


class _Authorization:
    """Middleware that gives every request of a session the configuration's current credentials.

    The configuration's refresh hook runs here. The client's own way (`auth_settings` of each call) would do so for its
    requests only, and kopf's watches outlive many tokens. Credentials that cannot be read count as a failed connection,
    which both kopf and the work queue try again.
    """

    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration

    async def __call__(self, request: aiohttp.ClientRequest, handler: _Handler) -> aiohttp.ClientResponse:
        try:
            credentials = await self._configuration.get_api_key_with_prefix("BearerToken")
        except _UNREADABLE_CREDENTIALS as error:
            raise aiohttp.ClientConnectionError(f"credentials: {error}") from error

        if credentials:  # absent where a client certificate identifies us
            request.headers["Authorization"] = credentials.strip()

        # Only the client passes a kubeconfig's `tls-server-name` on; kopf's requests need it as well.
        if self._configuration.tls_server_name:
            request.server_hostname = self._configuration.tls_server_name
        return await handler(request)


class _KubeconfigReader:
    """Refresh hook that reads a kubeconfig again once it is old; requests meanwhile use the credentials at hand."""

    def __init__(self, kubeconfig: Kubeconfig) -> None:
        self._kubeconfig = kubeconfig
        self._due = 0.0

    async def __call__(self, configuration: Configuration) -> None:
        if time.monotonic() < self._due:
            return

        self._due = time.monotonic() + KUBECONFIG_SECONDS
        await load_kube_config(  # type: ignore[no-untyped-call]
            config_file=str(self._kubeconfig.path),
            context=self._kubeconfig.context,
            client_configuration=configuration,
            persist_config=False,  # the user's file is not ours to write
        )


def _use_service_account(configuration: Configuration, account: ServiceAccount) -> None:
    """Fill a configuration as inside a pod; the loader's refresh hook reads the token again every minute."""
    loader: Any = InClusterConfigLoader(  # type: ignore[no-untyped-call]
        token_filename=str(account.folder / "token"),
        cert_filename=str(account.folder / "ca.crt"),
        environ={"KUBERNETES_SERVICE_HOST": account.host, "KUBERNETES_SERVICE_PORT": str(account.port)},
    )
    loader.load_and_set(configuration)


async def _use_kubeconfig(configuration: Configuration, kubeconfig: Kubeconfig) -> None:
    """Fill a configuration from a kubeconfig's context: certificates, tokens, exec plugins, proxy."""
    if not kubeconfig.path.is_file():
        raise SettingsError(f"{kubeconfig}: there is no such file")

    reader = _KubeconfigReader(kubeconfig)
    await reader(configuration)
    configuration.refresh_api_key_hook = reader  # type: ignore[assignment]  # inferred from its default, None
