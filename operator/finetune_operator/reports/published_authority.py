"""Publishes the authority of the progress server, for readers that are no job: Prometheus, `helm test` and people.

The chart makes an empty ConfigMap for it, and the operator may patch that one and no other.
"""

import asyncio
import logging
from pathlib import Path

from finetune_operator.cluster.connection import ApiConnection
from finetune_operator.desired.names import FIELD_MANAGER
from finetune_operator.errors import ApiError, ApiUnavailableError
from finetune_operator.reports.certificate import AUTHORITY

RETRY_SECONDS = 15.0
APPLY = "application/apply-patch+yaml"

logger = logging.getLogger(__name__)


async def publish_authority(connection: ApiConnection, namespace: str, name: str, tls_dir: Path) -> None:
    """Write ca.crt into the ConfigMap; tries until that has worked. Nothing waits for it."""
    path = f"/api/v1/namespaces/{namespace}/configmaps/{name}"
    body = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace},
        "data": {AUTHORITY: (tls_dir / AUTHORITY).read_text()},
    }

    while True:
        try:
            await connection.request(
                "PATCH", path, body, query={"fieldManager": FIELD_MANAGER, "force": "true"}, content_type=APPLY
            )
            return
        except (ApiError, ApiUnavailableError) as error:
            logger.warning("the authority is not published, so Prometheus does not trust this operator: %s", error)
        await asyncio.sleep(RETRY_SECONDS)
