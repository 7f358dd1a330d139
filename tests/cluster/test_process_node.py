"""The process node does what a kubelet does, judged through the real API server."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from finetune_devcluster.cluster import DevCluster
from finetune_devcluster.process_node.node import NodeOptions, ProcessNode
from finetune_test_programs.child_process import free_port

pytestmark = pytest.mark.cluster
Manifest = dict[str, Any]
GPU = "nvidia.com/gpu"


@pytest.fixture(scope="module")
def node(dev_cluster: DevCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessNode]:
    images = {"tools": tmp_path_factory.mktemp("programs"), "python": Path(sys.executable).parent}
    with ProcessNode.start(dev_cluster, NodeOptions(images, name="test-node")) as running:
        yield running


@pytest.fixture
def core(dev_cluster: DevCluster) -> Any:
    return client.CoreV1Api(dev_cluster.api_client())


class Pods:
    """Creates pods on the test node in one namespace, and waits for what becomes of them."""

    def __init__(self, core: Any, namespace: str) -> None:
        self.core = core
        self.namespace = namespace

    def create(self, name: str, script: str, container: Manifest | None = None, **spec: Any) -> Any:
        main = {"name": "main", "image": "registry.example/tools:1", "command": ["sh", "-c", script]}
        body = {
            "metadata": {"name": name},
            "spec": {
                "restartPolicy": "Never",
                "nodeSelector": {"kubernetes.io/hostname": "test-node"},
                "containers": [main | (container or {})],
            }
            | spec,
        }
        return self.core.create_namespaced_pod(self.namespace, body)

    def get(self, name: str) -> Any:
        return self.core.read_namespaced_pod(name, self.namespace)

    def wait(self, name: str, holds: Callable[[Any], bool], timeout: float = 20) -> Any:
        deadline = time.monotonic() + timeout
        while not holds(pod := self.get(name)):
            assert time.monotonic() < deadline, f"{name}: {pod.status}"
            time.sleep(0.05)
        return pod

    def wait_for_phase(self, name: str, phase: str, timeout: float = 20) -> Any:
        return self.wait(name, lambda pod: pod.status.phase == phase, timeout)

    def wait_gone(self, name: str, timeout: float = 20) -> None:
        deadline = time.monotonic() + timeout
        while any(pod.metadata.name == name for pod in self.core.list_namespaced_pod(self.namespace).items):
            assert time.monotonic() < deadline, f"{name} is still there"
            time.sleep(0.05)

    def log(self, name: str, **options: Any) -> str:
        return str(self.core.read_namespaced_pod_log(name, self.namespace, **options))


@pytest.fixture
def pods(core: Any, namespace: str, node: ProcessNode) -> Pods:
    deadline = time.monotonic() + 20
    while not core.list_namespaced_service_account(namespace).items:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return Pods(core, namespace)


def restarts(pod: Any) -> int:
    return sum(container.restart_count for container in pod.status.container_statuses or [])


def terminated(pod: Any) -> Any:
    return pod.status.container_statuses[0].state.terminated


def test_a_pod_that_succeeds_reports_its_exit_message_and_log(pods: Pods) -> None:
    pods.create("good", "echo hello; printf done >/dev/termination-log")
    # The shell's own text is a path contract too: the message path is substituted inside arguments.
    pod = pods.wait_for_phase("good", "Succeeded")
    state = terminated(pod)
    assert (state.exit_code, state.reason, state.message) == (0, "Completed", "done")
    assert state.started_at <= state.finished_at
    assert pods.log("good") == "hello\n"
    assert pods.log("good", tail_lines=0) == ""


def test_a_failing_pod_reports_its_exit_code_and_is_not_restarted(pods: Pods) -> None:
    pods.create("bad", "echo problem >&2; exit 11")
    pod = pods.wait_for_phase("bad", "Failed")
    assert (terminated(pod).exit_code, terminated(pod).reason) == (11, "Error")
    assert pod.status.container_statuses[0].restart_count == 0
    assert terminated(pod).message is None


def test_the_message_falls_back_to_the_log_only_where_the_pod_says_so(pods: Pods) -> None:
    pods.create("talks", "echo problem; exit 1", {"terminationMessagePolicy": "FallbackToLogsOnError"})
    assert terminated(pods.wait_for_phase("talks", "Failed")).message == "problem\n"


def test_environment_volumes_and_token_reach_the_process(pods: Pods, core: Any) -> None:
    core.create_namespaced_secret(pods.namespace, {"metadata": {"name": "keys"}, "stringData": {"KEY": "s3cret"}})
    core.create_namespaced_config_map(pods.namespace, {"metadata": {"name": "settings"}, "data": {"run.yaml": "a: 1"}})
    script = (
        'cat "$CONFIG"; echo; echo $KEY $NAME $(KEY); cat "$FOLDER/KEY"; echo; test -s "$TOKEN" && cut -c1-2 "$TOKEN"'
    )
    container = {
        "env": [
            {"name": "CONFIG", "value": "/etc/settings/run.yaml"},
            {"name": "FOLDER", "value": "/run/keys"},
            {"name": "TOKEN", "value": "/run/token/token"},
            {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "KEY"}}},
            {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        ],
        "volumeMounts": [
            {"name": "settings", "mountPath": "/etc/settings"},
            {"name": "keys", "mountPath": "/run/keys"},
            {"name": "token", "mountPath": "/run/token"},
        ],
    }
    token = {"serviceAccountToken": {"audience": "somebody", "expirationSeconds": 600, "path": "token"}}
    volumes = [
        {"name": "settings", "configMap": {"name": "settings"}},
        {"name": "keys", "secret": {"secretName": "keys"}},
        {"name": "token", "projected": {"sources": [token]}},
    ]
    pods.create("reads", script, container, volumes=volumes)
    pods.wait_for_phase("reads", "Succeeded")
    assert pods.log("reads").splitlines() == ["a: 1", "s3cret reads s3cret", "s3cret", "ey"]


def test_init_containers_run_first_and_a_failing_one_ends_the_pod(pods: Pods) -> None:
    shared = {"volumeMounts": [{"name": "work", "mountPath": "/shared"}]}
    volumes = [{"name": "work", "emptyDir": {}}]

    def init(script: str) -> list[Manifest]:
        return [{"name": "first", "image": "tools", "command": ["sh", "-c", script]} | shared]

    pods.create("ordered", "cat /shared/file", shared, volumes=volumes, initContainers=init("echo made >/shared/file"))
    pods.wait_for_phase("ordered", "Succeeded")
    assert pods.log("ordered") == "made\n"
    pods.create("stopped", "true", shared, volumes=volumes, initContainers=init("exit 3"))
    pod = pods.wait_for_phase("stopped", "Failed")
    assert pod.status.init_container_statuses[0].state.terminated.exit_code == 3
    assert terminated(pod) is None


def test_deletion_sends_sigterm_waits_and_reports_before_the_pod_goes(pods: Pods, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trap = f"trap 'echo stopping >>{trace}; sleep 0.5; echo stopped >>{trace}; exit 30' TERM"
    script = f"{trap}; echo up; while :; do sleep 0.05; done"
    pods.create("polite", script, terminationGracePeriodSeconds=10)
    pods.wait("polite", lambda pod: pod.status.phase == "Running" and "up" in pods.log("polite"))
    pods.core.delete_namespaced_pod("polite", pods.namespace)
    pods.wait_gone("polite")
    assert trace.read_text().split() == ["stopping", "stopped"]


def test_deletion_without_grace_kills_at_once(pods: Pods, tmp_path: Path) -> None:
    trace = tmp_path / "alive"
    pods.create("forced", f"trap '' TERM; while :; do date +%s%N >{trace}; sleep 0.05; done")
    pods.wait("forced", lambda pod: pod.status.phase == "Running" and trace.exists())
    pods.core.delete_namespaced_pod("forced", pods.namespace, grace_period_seconds=0)
    pods.wait_gone("forced")
    time.sleep(0.3)
    last = trace.read_text()
    time.sleep(0.3)
    assert trace.read_text() == last, "the process outlived its pod"


def test_a_process_that_ignores_sigterm_is_killed_after_its_grace_period(pods: Pods) -> None:
    pods.create("stubborn", "trap '' TERM; echo up; while :; do sleep 0.05; done", terminationGracePeriodSeconds=1)
    pods.wait("stubborn", lambda pod: pod.status.phase == "Running" and "up" in pods.log("stubborn"))
    began = time.monotonic()
    pods.core.delete_namespaced_pod("stubborn", pods.namespace)
    pods.wait_gone("stubborn")
    assert 1 <= time.monotonic() - began < 5


def test_restart_policy_always_restarts_with_back_off(pods: Pods) -> None:
    pods.create("looping", "exit 1", restartPolicy="Always")
    pod = pods.wait("looping", lambda pod: restarts(pod) >= 2)
    assert pod.status.phase == "Running"
    assert pod.status.container_statuses[0].last_state.terminated.exit_code == 1


def test_probes_decide_readiness_and_restart_what_is_dead(pods: Pods, tmp_path: Path) -> None:
    port = free_port()
    probe = {"httpGet": {"path": "/health", "port": "web"}, "periodSeconds": 1}
    container = {
        "image": "python",
        "command": ["python", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(tmp_path), str(port)],
        "ports": [{"name": "web", "containerPort": port}],
        "startupProbe": probe | {"failureThreshold": 60},
        "readinessProbe": probe,
        "livenessProbe": probe | {"failureThreshold": 1},
    }

    pods.create("probed", "", container, restartPolicy="Always", terminationGracePeriodSeconds=1)
    pods.wait_for_phase("probed", "Running")
    time.sleep(1.5)
    assert not pods.get("probed").status.container_statuses[0].ready
    assert restarts(pods.get("probed")) == 0, "until it has started, its death is not asked about"

    (tmp_path / "health").touch()
    pods.wait("probed", lambda pod: pod.status.container_statuses[0].ready)
    (tmp_path / "health").unlink()
    pods.wait("probed", lambda pod: restarts(pod) >= 1)


def test_missing_secrets_and_unknown_images_wait_with_the_kubelets_reasons(pods: Pods, core: Any) -> None:
    missing = {"env": [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "later", "key": "KEY"}}}]}
    pods.create("waits", "echo $KEY", missing)
    pods.create("unknown", "true", {"image": "registry.example/nothing:1"})

    def reason(pod: Any) -> str | None:
        waiting = pod.status.container_statuses and pod.status.container_statuses[0].state.waiting
        return waiting.reason if waiting else None

    pods.wait("waits", lambda pod: reason(pod) == "CreateContainerConfigError")
    pods.wait("unknown", lambda pod: reason(pod) in ("ErrImagePull", "ImagePullBackOff"))
    core.create_namespaced_secret(pods.namespace, {"metadata": {"name": "later"}, "stringData": {"KEY": "now"}})
    pods.wait_for_phase("waits", "Succeeded")
    assert pods.log("waits") == "now\n"


def test_a_gpu_is_given_to_one_pod_at_a_time(pods: Pods) -> None:
    gpu = {"resources": {"limits": {GPU: "1"}}}
    pods.create("holds", "sleep 2", gpu)
    pods.wait_for_phase("holds", "Running")
    pods.create("queues", "true", gpu)
    time.sleep(0.5)
    assert pods.get("queues").spec.node_name is None
    pods.wait_for_phase("queues", "Succeeded")
    held, queued = (terminated(pods.get(name)) for name in ("holds", "queues"))
    assert held.finished_at <= queued.started_at


def test_an_evicted_pod_says_so_with_a_disruption_condition(pods: Pods, node: ProcessNode) -> None:
    created = pods.create("evicted", "while :; do sleep 0.05; done", terminationGracePeriodSeconds=1)
    pods.wait_for_phase("evicted", "Running")
    node.evict(created.metadata.uid)
    pod = pods.wait_for_phase("evicted", "Failed")
    assert pod.status.reason == "Evicted"
    assert [condition.status for condition in pod.status.conditions if condition.type == "DisruptionTarget"] == ["True"]


def test_an_out_of_memory_kill_has_the_runtimes_reason_and_code(pods: Pods, node: ProcessNode) -> None:
    created = pods.create("hungry", "while :; do sleep 0.05; done")
    pods.wait_for_phase("hungry", "Running")
    node.kill_out_of_memory(created.metadata.uid)
    state = terminated(pods.wait_for_phase("hungry", "Failed"))
    assert (state.exit_code, state.reason) == (137, "OOMKilled")


def test_a_node_that_is_lost_takes_its_processes_along_and_says_so_when_it_returns(
    pods: Pods, node: ProcessNode, tmp_path: Path
) -> None:
    trace = tmp_path / "alive"
    pods.create("lost", f"while :; do date +%s%N >{trace}; sleep 0.05; done")
    pods.wait("lost", lambda pod: pod.status.phase == "Running" and trace.exists())
    node.lose()
    time.sleep(0.3)
    last = trace.read_text()
    time.sleep(0.3)
    assert trace.read_text() == last, "the process outlived its node"
    assert pods.get("lost").status.phase == "Running", "nobody has reported anything yet"
    node.restore()
    assert terminated(pods.wait_for_phase("lost", "Failed")).reason == "ContainerStatusUnknown"


def test_never_start_holds_new_pods_until_it_is_taken_back(pods: Pods, node: ProcessNode) -> None:
    node.never_start_pods()
    try:
        pods.create("held", "true")
        time.sleep(1)
        assert pods.get("held").status.phase == "Pending"
    finally:
        node.never_start_pods(on=False)
    pods.wait_for_phase("held", "Succeeded")
