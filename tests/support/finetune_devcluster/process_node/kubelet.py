"""The node program: registers the Node, keeps its heartbeat, and gives every pod bound to it a worker."""

import asyncio
import json
import logging
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from finetune_devcluster.process_node.api import MERGE_PATCH, Api, ApiError, Object
from finetune_devcluster.process_node.container import ContainerRun, now
from finetune_devcluster.process_node.log_server import LogServer
from finetune_devcluster.process_node.node_object import lease_object, node_object, node_status
from finetune_devcluster.process_node.pod import Misbehaviour, PodWorker
from finetune_devcluster.process_node.pod_status import lost_status

log = logging.getLogger(__name__)
LEASE_SECONDS = 5
TERMINAL = ("Succeeded", "Failed")


@dataclass(frozen=True)
class KubeletConfig:
    """Configuration of the program, given as JSON on its command line."""

    name: str
    kubeconfig: str
    folder: str
    ca_file: str
    certificate: str
    key: str
    images: dict[str, str]
    """Last part of an image's name -> folder of its programs."""
    capacity: dict[str, str] = field(default_factory=dict)


class Kubelet:
    """One node. `run` returns only on cancellation."""

    def __init__(self, config: KubeletConfig, api: Api) -> None:
        self._config = config
        self._api = api
        self._images = {name: Path(folder) for name, folder in config.images.items()}
        self._faults = Misbehaviour()
        self._workers: dict[str, PodWorker] = {}
        self._deletions: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Register, then serve until cancelled."""
        config = self._config
        server = LogServer(Path(config.ca_file), Path(config.certificate), Path(config.key), self._find_log)
        port = await server.start()
        await self._register(port)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat())
            group.create_task(self._obey())
            group.create_task(self._follow_pods())
            print("ready", flush=True)

    async def _register(self, port: int) -> None:
        try:
            await self._api.call("POST", "/api/v1/nodes", node_object(self._config.name))
        except ApiError as error:
            if error.status != 409:
                raise
        status = {"status": node_status(self._config.capacity, port)}
        await self._api.call("PATCH", f"/api/v1/nodes/{self._config.name}/status", status, kind=MERGE_PATCH)

    async def _beat(self) -> None:
        leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        try:
            await self._api.call("POST", leases, lease_object(self._config.name))
        except ApiError as error:
            if error.status != 409:
                raise
        while True:
            body = {"spec": lease_object(self._config.name)["spec"]}
            await self._api.call("PATCH", f"{leases}/{self._config.name}", body, kind=MERGE_PATCH)
            await asyncio.sleep(LEASE_SECONDS)

    async def _obey(self) -> None:
        """Commands, one JSON object a line on stdin; each is answered by a line."""
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            command = json.loads(line)
            try:
                await self._do(**command)
                answer: Object = {}
            except KeyError as error:
                answer = {"error": f"unknown: {error}"}
            print(json.dumps(answer), flush=True)

    async def _do(self, verb: str, *, uid: str = "", image: str = "", on: bool = True) -> None:
        if verb == "never-start":
            self._faults.never_start = on
        elif verb == "break-image":
            (self._faults.broken_images.add if on else self._faults.broken_images.discard)(image)
        elif verb == "evict":
            await self._workers[uid].evict("The node was low on resource: memory.")
        elif verb == "out-of-memory":
            self._workers[uid].kill_out_of_memory()
        else:
            raise KeyError(verb)

    async def _follow_pods(self) -> None:
        path = f"/api/v1/pods?fieldSelector=spec.nodeName%3D{self._config.name}"
        while True:
            try:
                listing = await self._api.call("GET", path)
                present = {pod["metadata"]["uid"] for pod in listing["items"]}
                for uid in set(self._workers) - present:
                    self._forget(uid)
                for pod in listing["items"]:
                    self._handle(pod)
                async for event in self._api.watch(path, listing["metadata"]["resourceVersion"]):
                    if event["type"] == "ERROR":
                        break
                    self._forget(event["object"]["metadata"]["uid"]) if event["type"] == "DELETED" else self._handle(
                        event["object"]
                    )
            except (ApiError, aiohttp.ClientError) as error:
                log.warning("watching pods: %s", error)
                await asyncio.sleep(1)

    def _handle(self, pod: Object) -> None:
        """A pod was added or changed."""
        uid, status = pod["metadata"]["uid"], pod.get("status", {})
        if "deletionTimestamp" in pod["metadata"]:
            if uid not in self._deletions:
                self._deletions[uid] = self._spawn(self._delete(pod))
        elif uid not in self._workers and status.get("phase") not in TERMINAL:
            if status.get("startTime") and pod["spec"].get("restartPolicy") == "Never":
                self._deletions[uid] = self._spawn(self._declare_lost(pod))
            else:
                folder = Path(self._config.folder) / "pods" / uid
                self._workers[uid] = PodWorker(self._api, pod, folder, self._images, self._faults)

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(_log_failure)
        return task

    async def _delete(self, pod: Object) -> None:
        """End the pod, then remove the object: the API server keeps it until its node says that it is gone."""
        metadata = pod["metadata"]
        if worker := self._workers.get(metadata["uid"]):
            await worker.delete(pod)

        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "gracePeriodSeconds": 0,
            "preconditions": {"uid": metadata["uid"]},
        }

        try:
            await self._api.call(
                "DELETE", f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}", options
            )
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def _declare_lost(self, pod: Object) -> None:
        """Report a pod as failed that an earlier run of this node had started; its processes died with that run."""
        metadata = pod["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/status"
        body = {"metadata": {"uid": metadata["uid"]}, "status": lost_status(pod, now())}
        await self._api.call("PATCH", path, body, kind=MERGE_PATCH)
        del self._deletions[metadata["uid"]]

    def _forget(self, uid: str) -> None:
        self._deletions.pop(uid, None)
        if worker := self._workers.pop(uid, None):
            worker.abandon()
            shutil.rmtree(Path(self._config.folder) / "pods" / uid, ignore_errors=True)

    def _find_log(self, namespace: str, pod: str, container: str, previous: bool) -> ContainerRun | None:
        for worker in self._workers.values():
            metadata = worker.pod["metadata"]
            if (metadata["namespace"], metadata["name"]) == (namespace, pod):
                runs = worker.runs.get(container, [])
                index = -2 if previous else -1
                return runs[index] if len(runs) >= -index else None
        return None


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("%s", error, exc_info=error)
