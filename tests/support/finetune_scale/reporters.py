"""Posts progress for the jobs that train, each on a connection that it keeps from report to report, as trainers do."""

import asyncio
import ipaddress
import random
import ssl
import time
from collections import Counter
from datetime import UTC, datetime

import aiohttp

from finetune_api.base import Json
from finetune_api.progress import progress_path, token_audience
from finetune_api.vocabulary import JOB_NAME_LABEL, JOB_UID_LABEL
from finetune_scale.api import Api


class Reporters:
    """Reports of many pods. `answers` counts HTTP statuses, `seconds` has the time of each post, and `sent` the time
    of each step by number of the job."""

    def __init__(self, api: Api, url: str, tls: ssl.SSLContext) -> None:
        self._api = api
        self._url = url
        self._tls = tls
        self.answers: Counter[int | str] = Counter()
        self.seconds: list[float] = []
        self.sent: dict[int, list[float]] = {}

    async def report(self, number: int, pod: Json, interval: float) -> None:
        """Post a new step of one job every `interval` seconds, until cancelled."""
        token = await self._token(pod)
        metadata = pod["metadata"]
        url = self._url + progress_path(metadata["namespace"], metadata["labels"][JOB_NAME_LABEL])
        await asyncio.sleep(interval * random.random())

        connector = aiohttp.TCPConnector(ssl=self._tls, local_addr=(_address(number), 0))
        times = self.sent.setdefault(number, [])
        async with aiohttp.ClientSession(connector=connector) as session:
            while True:
                begun = time.monotonic()
                times.append(begun)
                await self._post(session, url, token, len(times))
                await asyncio.sleep(max(0.0, begun + interval - time.monotonic()))

    async def _post(self, session: aiohttp.ClientSession, url: str, token: str, step: int) -> None:
        begun = time.monotonic()
        try:
            headers = {"Authorization": f"Bearer {token}"}
            async with session.post(url, json=_report(step), headers=headers) as answer:
                await answer.read()
                self.answers[answer.status] += 1
        except aiohttp.ClientError as error:
            self.answers[type(error).__name__] += 1
        self.seconds.append(time.monotonic() - begun)

    async def _token(self, pod: Json) -> str:
        """Ask for a token of the pod, as the kubelet does."""
        metadata = pod["metadata"]
        bound = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
        audience = token_audience(metadata["labels"][JOB_UID_LABEL])
        body = {"spec": {"audiences": [audience], "expirationSeconds": 3600, "boundObjectRef": bound}}
        path = f"/api/v1/namespaces/{metadata['namespace']}/serviceaccounts/default/token"
        answer = await self._api.request("POST", path, body)
        return str(answer["status"]["token"])


def _address(number: int) -> str:
    """Loopback address of a reporter: pods have addresses of their own, and the progress server bounds each."""
    return str(ipaddress.IPv4Address("127.0.1.0") + number)


def _report(step: int) -> Json:
    now = datetime.now(UTC).isoformat()
    return {
        "trainerStatus": {
            "progressPercentage": min(99, step // 10),
            "estimatedRemainingSeconds": 1000,
            "metrics": [{"name": "loss", "value": "1.5"}],
            "lastUpdatedTime": now,
        },
        "finetune": {
            "sequence": step,
            "stage": "Training",
            "stages": [{"name": "Training", "startTime": now}],
            "step": step,
            "totalSteps": 100000,
        },
    }
