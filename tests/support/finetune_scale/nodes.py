"""Plays the kubelets of all pods: each starts at once, and ends a while later unless it is to go on.

The Job controller that makes the pods is real; the scheduler is not asked, as there is nothing to choose.
"""

import asyncio
import time
from datetime import UTC, datetime

from finetune_api.base import Json
from finetune_api.outcome import Artifact, Outcome, Result
from finetune_api.vocabulary import JOB_NAME_LABEL, JOB_UID_LABEL, ArtifactType, Stage
from finetune_scale.api import MERGE, PODS, Api, pod_path
from finetune_scale.load import job_number
from finetune_test_operator.played_kubelet import NODE

RUNS_FOR_SECONDS = 5.0


class Nodes:
    """Runs every pod. `started` and `ended` tell when, by number of the job, in seconds of the monotonic clock."""

    def __init__(self, api: Api, go_on: range) -> None:
        """`go_on`: numbers of the jobs whose pods do not end by themselves."""
        self._api = api
        self._go_on = go_on
        self.started: dict[int, float] = {}
        self.ended: dict[int, float] = {}
        self.pods: dict[int, Json] = {}

    async def play(self) -> None:
        """Run pods until cancelled."""
        await self._api.request("POST", "/api/v1/nodes", {"metadata": {"name": NODE}, "spec": {"unschedulable": True}})
        async with asyncio.TaskGroup() as tasks:
            async for event in self._api.watch(f"{PODS}/pods", JOB_UID_LABEL):
                number = job_number(event["object"]["metadata"]["labels"][JOB_NAME_LABEL])
                if event["type"] == "ADDED" and number not in self.pods:
                    self.pods[number] = event["object"]
                    tasks.create_task(self._run(number))

    async def end(self, number: int) -> None:
        """End the pod of a job as a trainer that succeeded."""
        pod = self.pods[number]
        state = {"exitCode": 0, "reason": "Completed", "message": _outcome(pod).encode()}
        await self._set(pod, "Succeeded", {"terminated": state | {"startedAt": _now(), "finishedAt": _now()}})
        self.ended[number] = time.monotonic()

    async def _run(self, number: int) -> None:
        metadata = self.pods[number]["metadata"]
        binding = {"metadata": {"name": metadata["name"]}, "target": {"kind": "Node", "name": NODE}}
        await self._api.request("POST", pod_path(metadata["namespace"], metadata["name"], "binding"), binding)
        await self._set(self.pods[number], "Running", {"running": {"startedAt": _now()}})
        self.started[number] = time.monotonic()

        if number not in self._go_on:
            await asyncio.sleep(RUNS_FOR_SECONDS)
            await self.end(number)

    async def _set(self, pod: Json, phase: str, state: Json) -> None:
        container = {"name": "trainer", "image": "x", "imageID": "", "ready": "running" in state, "restartCount": 0}
        status = {"phase": phase, "containerStatuses": [container | {"state": state}]}
        path = pod_path(pod["metadata"]["namespace"], pod["metadata"]["name"], "status")
        await self._api.request("PATCH", path, {"status": status}, MERGE)


def _outcome(pod: Json) -> Outcome:
    metadata = pod["metadata"]
    labels = metadata["labels"]
    location = f"s3://results/{metadata['namespace']}/{labels[JOB_NAME_LABEL]}/"
    uploads = f"{location}attempts/{labels[JOB_UID_LABEL]}.{metadata['uid']}/"

    artifact = Artifact(
        type=ArtifactType.ADAPTER, uri=f"{uploads}adapter/", bytes=12, sha256="a" * 64, format="safetensors"
    )
    return Outcome(
        result=Result.SUCCEEDED,
        stage=Stage.UPLOADING,
        manifest_uri=f"{location}manifest.json",
        artifacts=(artifact,),
        finished=datetime.now(UTC),
    )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
