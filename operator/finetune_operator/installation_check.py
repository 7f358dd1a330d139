"""`finetune-operator check-installation`: asks whether an installation is whole, as `helm test` runs it.

Nothing is created: the job that it sends is a dry run. The environment is the operator's own.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable

import aiohttp

from finetune_api import API_VERSION, GROUP, KIND, PLURAL
from finetune_api.base import Json
from finetune_operator.cluster.connection import ApiConnection
from finetune_operator.errors import ApiError, ApiUnavailableError
from finetune_operator.reports.certificate import trust_authority
from finetune_operator.settings import Settings

ATTEMPTS, WAIT_SECONDS = 6, 5.0
TIMEOUT = aiohttp.ClientTimeout(total=5)
_SPEC: Json = {
    "model": {"source": "hf://acme/model", "maxSequenceLength": 1024},
    "dataset": {"source": "hf://acme/rows"},
    "output": {"s3": {"bucket": "results", "prefix": "installation-check"}},
}


class CheckFailedError(Exception):
    """Something of the installation is missing; the message says what to look at."""


async def check_installation(settings: Settings) -> bool:
    """Run every check, and print what each found; returns True if all succeeded."""
    connection = await ApiConnection.open(settings.api_server)
    checks: dict[str, Callable[[], Awaitable[None]]] = {
        "the API server takes a FineTuneJob": lambda: _try_job(connection, settings.lease_namespace),
        "the API server refuses a FineTuneJob without a dataset": lambda: _try_wrong_job(connection, settings),
        "a replica of the operator leads": lambda: _find_leader(connection, settings),
        f"the progress server answers over TLS at {settings.progress_url}": lambda: _reach_server(settings),
    }
    try:
        return all([await _report(sentence, check) for sentence, check in checks.items()])
    finally:
        await connection.close()


async def _report(sentence: str, check: Callable[[], Awaitable[None]]) -> bool:
    """Run one check until it succeeds, a few times: the operator may have started just now."""
    for attempt in range(ATTEMPTS):
        try:
            await check()
            _say(f"ok      {sentence}")
            return True
        except (CheckFailedError, ApiError, ApiUnavailableError, aiohttp.ClientError, TimeoutError, OSError) as error:
            found = f"{type(error).__name__}: {error}"
        if attempt < ATTEMPTS - 1:
            await asyncio.sleep(WAIT_SECONDS)
    _say(f"FAILED  {sentence}: {found}")
    return False


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def _try_job(connection: ApiConnection, namespace: str, spec: Json = _SPEC) -> None:
    body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "installation-check"}, "spec": spec}
    path = f"/apis/{API_VERSION}/namespaces/{namespace}/{PLURAL}"
    try:
        await connection.request("POST", path, body, query={"dryRun": "All", "fieldValidation": "Strict"})
    except ApiError as error:
        if error.status == 404:
            raise CheckFailedError(
                f"there is no CustomResourceDefinition {PLURAL}.{GROUP}: set crds.enabled"
            ) from error
        raise


async def _try_wrong_job(connection: ApiConnection, settings: Settings) -> None:
    try:
        await _try_job(connection, settings.lease_namespace, {key: _SPEC[key] for key in ("model", "output")})
    except ApiError as error:
        if error.status == 422:
            return
        raise
    raise CheckFailedError("it takes a job without a dataset: the CustomResourceDefinition is not this version's")


async def _find_leader(connection: ApiConnection, settings: Settings) -> None:
    leases = f"/apis/coordination.k8s.io/v1/namespaces/{settings.lease_namespace}/leases"
    lease = await connection.request("GET", f"{leases}/{settings.lease_name}")
    if not (lease.get("spec") or {}).get("holderIdentity"):
        raise CheckFailedError(f"nobody holds the Lease {settings.lease_name}: read the log of the operator's pods")


async def _reach_server(settings: Settings) -> None:
    """Ask for a page; any answer will do, under a certificate that the authority of trainers has signed."""
    tls = trust_authority(settings.tls_dir)
    async with (
        aiohttp.ClientSession(timeout=TIMEOUT, trust_env=False) as session,
        session.get(settings.progress_url, ssl=tls, allow_redirects=False),
    ):
        pass
