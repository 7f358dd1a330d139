"""The status that a kubelet writes, as a pure function of the states of a pod's containers."""

from dataclasses import dataclass, field

from finetune_devcluster.process_node.api import Object


@dataclass
class ContainerState:
    """State of one container; `state` is the `state` of its container status."""

    name: str
    image: str
    state: Object = field(default_factory=lambda: {"waiting": {"reason": "ContainerCreating"}})
    last_state: Object = field(default_factory=dict)
    restarts: int = 0
    ready: bool = False
    container_id: str = ""

    @property
    def exit_code(self) -> int | None:
        """Exit code, once it has ended."""
        return self.state["terminated"]["exitCode"] if "terminated" in self.state else None

    @property
    def is_running(self) -> bool:
        """True while its process runs."""
        return "running" in self.state

    def to_status(self) -> Object:
        """The container status."""
        return {
            "name": self.name,
            "image": self.image,
            "imageID": self.image if self.container_id else "",
            "containerID": self.container_id,
            "state": self.state,
            "lastState": self.last_state,
            "restartCount": self.restarts,
            "ready": self.ready,
            "started": self.is_running,
        }


def phase_of(init: list[ContainerState], main: list[ContainerState], restart_policy: str) -> str:
    """Pod phase, as the API documents it."""
    if any(state.exit_code not in (None, 0) for state in init) and restart_policy == "Never":
        return "Failed"
    if any(state.exit_code != 0 for state in init):
        return "Pending"

    codes = [state.exit_code for state in main]
    ended = None not in codes
    if ended and restart_policy != "Always":
        if all(code == 0 for code in codes):
            return "Succeeded"
        if restart_policy == "Never":
            return "Failed"

    started = any(state.is_running or state.exit_code is not None or state.restarts for state in main)
    return "Running" if started else "Pending"


def pod_status(
    init: list[ContainerState], main: list[ContainerState], *, phase: str, started: str, now: str, previous: Object
) -> Object:
    """Returns the whole status. Conditions that did not change keep their transition time of `previous`."""
    over = phase in ("Succeeded", "Failed")
    initialized = all(state.exit_code == 0 for state in init)
    ready = not over and bool(main) and all(state.ready for state in main)

    wanted: dict[str, tuple[bool, str]] = {
        "PodReadyToStartContainers": (not over, "PodCompleted" if over else ""),
        "Initialized": (initialized, "" if initialized else "ContainersNotInitialized"),
        "Ready": (ready, "" if ready else "PodCompleted" if over else "ContainersNotReady"),
        "ContainersReady": (ready, "" if ready else "PodCompleted" if over else "ContainersNotReady"),
    }

    known = {condition["type"]: condition for condition in previous.get("conditions", [])}
    conditions = [condition for kind, condition in known.items() if kind not in wanted]
    for kind, (holds, reason) in wanted.items():
        status = "True" if holds else "False"
        same = known.get(kind, {}).get("status") == status
        moment = known[kind].get("lastTransitionTime", now) if same else now
        conditions.append({"type": kind, "status": status, "reason": reason, "lastTransitionTime": moment})

    return {
        "phase": phase,
        "hostIP": "127.0.0.1",
        "podIP": "127.0.0.1",
        "podIPs": [{"ip": "127.0.0.1"}],
        "startTime": started,
        "initContainerStatuses": [state.to_status() for state in init],
        "containerStatuses": [state.to_status() for state in main],
        "conditions": conditions,
    }


def lost_status(pod: Object, now: str) -> Object:
    """Status of a pod whose containers ended with an earlier run of the node, as a real kubelet writes it."""
    status = pod["status"]
    gone = {
        "exitCode": 137,
        "reason": "ContainerStatusUnknown",
        "message": "The container could not be located",
        "finishedAt": now,
    }

    containers = [
        container | {"ready": False, "started": False, "state": {"terminated": gone}}
        if "terminated" not in container.get("state", {})
        else container
        for container in status.get("containerStatuses", [])
    ]
    return {"phase": "Failed", "containerStatuses": containers}
