"""The life of one pod on the process node: volumes, init containers, containers, restarts, probes, termination."""

import asyncio
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from finetune_devcluster.process_node.api import STRATEGIC_PATCH, Api, ApiError, Object
from finetune_devcluster.process_node.container import ContainerRun, now
from finetune_devcluster.process_node.environment import (
    command_line,
    declared_environment,
    path_map,
    process_environment,
)
from finetune_devcluster.process_node.pod_status import ContainerState, phase_of, pod_status
from finetune_devcluster.process_node.probes import succeeds
from finetune_devcluster.process_node.volumes import ContainerConfigError, Volumes

RETRY_SECONDS = 1.0
FIRST_BACK_OFF, MAX_BACK_OFF = 1.0, 30.0


@dataclass
class Misbehaviour:
    """Faults that the node shows on demand, for single images and as a whole."""

    never_start: bool = False
    broken_images: set[str] = field(default_factory=set)


class PodWorker:
    """Runs one pod until its end. `delete` begins its termination; `evict` and `kill_out_of_memory` misbehave."""

    def __init__(self, api: Api, pod: Object, folder: Path, images: dict[str, Path], faults: Misbehaviour) -> None:
        self._api = api
        self.pod = pod
        self._folder = folder
        self._images = images
        self._faults = faults
        self._init = [_fresh(container) for container in pod["spec"].get("initContainers", [])]
        self._main = [_fresh(container) for container in pod["spec"]["containers"]]
        self._started = now()
        self._stopping = False
        self._volumes = Volumes(api, pod, folder / "volumes")
        self._extra_status: Object = {}

        self.runs: dict[str, list[ContainerRun]] = {}
        self.task = asyncio.create_task(self._live())

    async def delete(self, pod: Object) -> None:
        """The pod was deleted: stop it within its grace period; the final status is written before the object goes."""
        if self._stopping:
            return
        self._stopping = True
        await self._stop_all(pod["metadata"].get("deletionGracePeriodSeconds", 30))
        await self.task

    async def evict(self, message: str) -> None:
        """Evict the pod as a kubelet under pressure does."""
        condition = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet", "message": message}
        self.pod.setdefault("status", {}).setdefault("conditions", []).append(condition | {"lastTransitionTime": now()})
        self._extra_status = {"phase": "Failed", "reason": "Evicted", "message": message}
        self._stopping = True
        await self._stop_all(self.pod["spec"].get("terminationGracePeriodSeconds", 30))

    def kill_out_of_memory(self) -> None:
        """End the running containers as the kernel's OOM killer does."""
        for run in self._current_runs():
            run.forced_reason = "OOMKilled"
            run.signal(signal.SIGKILL)

    def abandon(self) -> None:
        """Kill everything: the pod object is gone, deleted without grace."""
        self.task.cancel()
        for runs in self.runs.values():
            runs[-1].signal(signal.SIGKILL)

    async def _stop_all(self, grace: float) -> None:
        stops = [asyncio.create_task(run.stop(grace)) for run in self._current_runs()]
        await asyncio.wait({self.task, *stops}, return_when=asyncio.FIRST_COMPLETED) if stops else self.task.cancel()
        for stop in stops:
            if self.task.done():
                stop.cancel()

    def _current_runs(self) -> list[ContainerRun]:
        running = {state.name for state in [*self._init, *self._main] if state.is_running}
        return [runs[-1] for name, runs in self.runs.items() if name in running]

    async def _live(self) -> None:
        try:
            await self._report()
            await self._prepare()
            renewal = asyncio.create_task(self._renew_tokens())
            try:
                await self._run_everything()
            finally:
                renewal.cancel()
        except asyncio.CancelledError:
            if not self._stopping:
                raise
        await self._report()

    async def _prepare(self) -> None:
        """Make the volumes; a failure is posted as an Event and tried again for ever, as a kubelet does."""
        while True:
            try:
                if not self._faults.never_start:
                    await self._volumes.make()
                    return
            except ContainerConfigError as error:
                await self._event("FailedMount", f"MountVolume.SetUp failed: {error}")
            await asyncio.sleep(RETRY_SECONDS)

    async def _run_everything(self) -> None:
        for container, state in zip(self.pod["spec"].get("initContainers", []), self._init, strict=True):
            await self._run_container(container, state, "OnFailure" if self._policy != "Never" else "Never")
            if state.exit_code != 0:
                return

        tasks = [
            self._run_container(container, state, self._policy)
            for container, state in zip(self.pod["spec"]["containers"], self._main, strict=True)
        ]

        deadline = self.pod["spec"].get("activeDeadlineSeconds")
        try:
            async with asyncio.timeout(deadline):
                await asyncio.gather(*tasks)
        except TimeoutError:
            self._extra_status = {"phase": "Failed", "reason": "DeadlineExceeded"}
            await self._stop_all(self.pod["spec"].get("terminationGracePeriodSeconds", 30))

    @property
    def _policy(self) -> str:
        return str(self.pod["spec"].get("restartPolicy", "Always"))

    async def _run_container(self, container: Object, state: ContainerState, policy: str) -> None:
        """Run a container, again and again if the restart policy says so."""
        back_off = FIRST_BACK_OFF
        while True:
            run = await self._start(container, state)
            begun = time.monotonic()
            probes = asyncio.create_task(self._probe_all(container, state, run))

            state.ready = "readinessProbe" not in container
            await self._report()
            code = await run.wait()

            probes.cancel()
            state.ready = False
            state.state = {"terminated": run.terminated(code)}
            await self._report()

            if self._stopping or policy == "Never" or (policy == "OnFailure" and code == 0):
                return

            state.last_state, state.restarts = state.state, state.restarts + 1
            back_off = FIRST_BACK_OFF if time.monotonic() - begun > MAX_BACK_OFF else back_off
            state.state = {"waiting": {"reason": "CrashLoopBackOff", "message": f"back-off {back_off:g}s"}}
            await self._report()
            await asyncio.sleep(back_off)
            back_off = min(back_off * 2, MAX_BACK_OFF)

    async def _start(self, container: Object, state: ContainerState) -> ContainerRun:
        """Start a process; waits, with the reason in the status, until that is possible."""
        while True:
            try:
                programs = self._programs(container["image"])
                declared = await declared_environment(self._api, self.pod, container)
                folder = self._folder / container["name"]
                folder.mkdir(parents=True, exist_ok=True)

                runs = self.runs.setdefault(container["name"], [])
                identity = f"{self.pod['metadata']['uid']}-{container['name']}"
                run = ContainerRun(identity, container, folder, len(runs))

                paths = path_map(container, self._volumes, run.termination_log)
                environment = process_environment(declared, paths, programs, folder, self._api.url)
                command = command_line(container, declared, paths)
                directory = Path(paths.apply(container["workingDir"])) if container.get("workingDir") else folder

                run.start(command, environment, directory)
                runs.append(run)
                state.container_id, state.state = run.id, {"running": {"startedAt": run.started}}
                return run
            except ImageError as error:
                reason = "ErrImagePull" if "ErrImagePull" not in str(state.state) else "ImagePullBackOff"
                state.state = {"waiting": {"reason": reason, "message": str(error)}}
            except ContainerConfigError as error:
                state.state = {"waiting": {"reason": "CreateContainerConfigError", "message": str(error)}}
            except OSError as error:
                state.state = {"waiting": {"reason": "RunContainerError", "message": str(error)}}
            await self._report()
            await asyncio.sleep(RETRY_SECONDS)

    def _programs(self, image: str) -> Path:
        name = image.rsplit("/", 1)[-1].partition("@")[0].partition(":")[0]
        if name not in self._images or name in self._faults.broken_images:
            raise ImageError(f'failed to pull image "{image}": not found')
        return self._images[name]

    async def _probe_all(self, container: Object, state: ContainerState, run: ContainerRun) -> None:
        """Run the probes for as long as the process lives: that of the start, and once it has succeeded the others."""
        if probe := container.get("startupProbe"):
            patience = probe.get("failureThreshold", 3) * probe.get("periodSeconds", 10)
            end = time.monotonic() + probe.get("initialDelaySeconds", 0) + patience
            while not await succeeds(probe, container):
                if time.monotonic() > end:
                    await self._event("Unhealthy", "Startup probe failed")
                    await run.stop(self.pod["spec"].get("terminationGracePeriodSeconds", 30))
                await asyncio.sleep(0.5)

        async with asyncio.TaskGroup() as tasks:
            for kind in PROBES:
                if kind in container:
                    tasks.create_task(self._probe(container, state, run, kind))

    async def _probe(self, container: Object, state: ContainerState, run: ContainerRun, kind: str) -> None:
        """Run one probe for as long as the process lives."""
        probe, failures = container[kind], 0
        await asyncio.sleep(probe.get("initialDelaySeconds", 0))
        if startup := container.get("startupProbe"):
            await _wait_for_start(startup, container)

        while True:
            good = await succeeds(probe, container)
            failures = 0 if good else failures + 1
            over = failures >= probe.get("failureThreshold", 3)

            if kind == "livenessProbe" and over:
                await self._event("Unhealthy", "Liveness probe failed")
                await run.stop(self.pod["spec"].get("terminationGracePeriodSeconds", 30))
            elif kind == "readinessProbe" and ((good and not state.ready) or (over and state.ready)):
                state.ready = good
                await self._report()

            await asyncio.sleep(probe.get("periodSeconds", 10) if state.ready else 0.5)

    async def _renew_tokens(self) -> None:
        while True:
            await asyncio.sleep(5)
            await self._volumes.renew_tokens()

    async def _report(self) -> None:
        """Write the status; a pod that is gone needs none."""
        phase = phase_of(self._init, self._main, self._policy)
        if (
            self._stopping
            and self.task.done() is False
            and phase in ("Pending", "Running")
            and not self._current_runs()
        ):
            phase = "Failed"

        status = pod_status(
            self._init, self._main, phase=self._extra_status.get("phase", phase), started=self._started, now=now(),
            previous=self.pod.get("status", {}))  # fmt: skip

        metadata = self.pod["metadata"]
        body = {"metadata": {"uid": metadata["uid"]}, "status": status | self._extra_status}
        try:
            url = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/status"
            self.pod["status"] = (await self._api.call("PATCH", url, body, kind=STRATEGIC_PATCH))["status"]
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def _event(self, reason: str, message: str) -> None:
        metadata = self.pod["metadata"]
        body = {
            "apiVersion": "v1", "kind": "Event", "type": "Warning", "reason": reason, "message": message, "count": 1,
            "metadata": {"name": f"{metadata['name']}.{reason.lower()}", "namespace": metadata["namespace"]},
            "involvedObject": {
                "apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "namespace": metadata["namespace"],
                "uid": metadata["uid"]},
            "source": {"component": "process-node"}, "firstTimestamp": now(), "lastTimestamp": now(),
        }  # fmt: skip

        try:
            await self._api.call("POST", f"/api/v1/namespaces/{metadata['namespace']}/events", body)
        except ApiError as error:
            if error.status != 409:  # posted before
                raise


PROBES = ("livenessProbe", "readinessProbe")


async def _wait_for_start(startup: Object, container: Object) -> None:
    """Wait until a startup probe succeeds, or until it has had its time: the others begin afterwards."""
    with suppress(TimeoutError):
        async with asyncio.timeout(startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3)):
            while not await succeeds(startup, container):
                await asyncio.sleep(0.2)


class ImageError(Exception):
    """The image is not in the node's map."""


def _fresh(container: Object) -> ContainerState:
    return ContainerState(container["name"], container["image"])
