"""Snapshots for tests of the operator's pure functions: a small job at a fixed time, and what a test is about."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.base import Json
from finetune_api.job import ObjectMeta
from finetune_api.outcome import Outcome
from finetune_api.progress import ProgressReport
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.status import Condition, FineTuneJobStatus
from finetune_api.vocabulary import ConditionType
from finetune_operator.decide.chain import Chain
from finetune_operator.decide.decide import decide
from finetune_operator.decide.decision import Decision
from finetune_operator.desired.installation import Installation
from finetune_operator.desired.names import PREFLIGHT, TRAINER
from finetune_operator.desired.preflight_job import build_preflight_job
from finetune_operator.desired.run_config_map import build_run_config_map
from finetune_operator.desired.trainer_job import build_trainer_job
from finetune_operator.observe.children import INDEX_ANNOTATION, ChildJob, TrainerPod
from finetune_operator.observe.job_set import JobSet
from finetune_operator.observe.report_store import ReceivedReport
from finetune_operator.observe.snapshot import AnySnapshot, BlindSnapshot, ChildRun, Snapshot, UnreadableSnapshot
from finetune_operator.observe.workload import DEACTIVATED_ANNOTATION, Workload
from finetune_test_operator.jobs import Outcomes

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
METADATA = ObjectMeta(name="bot", namespace="team", uid="0b5e7b1e-5d1a-4a51-9a53-0f6f6c2ce0a1", generation=1)
INSTALLATION = Installation("finetune-trainer:1", "https://operator:8443", "PEM", denied_namespaces=("kube-system",))
LIMITED = replace(INSTALLATION, max_gpus_per_namespace=4)
POD = "pod-1"
PREFIX = "team/bot"
LOCATION = f"s3://results/{PREFIX}/"
FULL_SECTIONS: dict[str, Any] = {
    "model": {"source": "hf://org/base", "credentials": {"secretName": "hub"}},
    "dataset": {"source": "pvc://claim-1/data/chat.jsonl", "credentials": {"secretName": "unused"}},
    "output": {
        "s3": {"bucket": "results", "credentials": {"secretName": "s3"}},
        "hub": {"repository": "acme/tiny", "credentials": {"secretName": "hub-writer"}},
    },
    "resources": {
        "gpus": 1,
        "gpuResourceName": "nvidia.com/mig-3g.40gb",
        "cpu": "500m",
        "memory": "8Gi",
        "ephemeralStorage": "100Gi",
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "runtimeClassName": "nvidia",
        "priorityClassName": "research",
    },
    "pod": {
        "serviceAccountName": "trainer",
        "labels": {"azure.workload.identity/use": "true"},
        "annotations": {"example.com/owner": "team-a"},
        "imagePullSecrets": ["registry"],
        "imagePullPolicy": "Always",
        "env": {"HTTPS_PROXY": "http://proxy.example.com:3128", "HF_ENDPOINT": "https://hub.example.com"},
        "caBundle": {"configMapName": "company-ca"},
        "gpuProducts": ["NVIDIA-H200", "NVIDIA-B200"],
        "topologySpread": [{"topologyKey": "topology.kubernetes.io/zone"}],
        "cacheClaim": "hub-cache",
    },
    "runPolicy": {"maxRetries": 5, "activeDeadlineSeconds": 3600, "terminationGracePeriodSeconds": 60},
}
"""Sections of a spec that sets everything that a pod depends on, in their wire form."""


def at(seconds: float) -> str:
    """A time so many seconds after NOW, as Kubernetes writes it."""
    return (NOW + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def a_spec(**sections: Any) -> FineTuneJobSpec:
    """The shortest spec; keyword arguments are further sections in their wire form."""
    wire: Json = {
        "model": {"source": "s3://models/tiny/"},
        "dataset": {"source": "s3://data/chat.jsonl"},
        "output": {"s3": {"bucket": "results"}},
    }
    return FineTuneJobSpec.model_validate(wire | sections)


def a_config_map(spec: FineTuneJobSpec | None = None, installation: Installation = INSTALLATION) -> Json:
    """The ConfigMap as the operator makes it for `spec`."""
    return build_run_config_map(METADATA, spec or a_spec(), PREFIX, installation)


def a_trainer_job(spec: FineTuneJobSpec | None = None, owner: str | None = None, **changes: Any) -> ChildJob:
    """The child Job as made for `spec`, started at NOW; keyword arguments replace what was parsed."""
    name = a_config_map(spec)["metadata"]["name"]
    body = build_trainer_job(METADATA, spec or a_spec(), INSTALLATION.trainer_image, name)
    body["metadata"] |= {"uid": "child-uid", "resourceVersion": "1"}
    body["status"] = {} if body["spec"]["suspend"] else {"startTime": at(0)}
    child = ChildJob.parse(body)
    return replace(child, owner_uid=owner or METADATA.uid, **changes)


def a_preflight_job(spec: FineTuneJobSpec | None = None, **changes: Any) -> ChildJob:
    """The Job of preflight as made for `spec`, started at NOW; its pods are those of the builders below."""
    name = a_config_map(spec)["metadata"]["name"]
    body = build_preflight_job(METADATA, spec or a_spec(), INSTALLATION.trainer_image, name)
    body["metadata"] |= {"uid": "child-uid", "resourceVersion": "1"}
    body["status"] = {} if body["spec"]["suspend"] else {"startTime": at(0)}
    return replace(ChildJob.parse(body), **changes)


def a_pod(
    uid: str = POD, *, created: float = 0, state: Json | None = None, index: int = 0, **status: Any
) -> TrainerPod:
    """A pod of the child. `state` is the container's; keyword arguments are fields of the pod's status."""
    container = [{"name": "trainer", "state": state}] if state else []
    owner = {"kind": "Job", "name": "bot-1", "uid": "child-uid", "controller": True}
    metadata: Json = {"name": f"bot-{uid}", "uid": uid, "creationTimestamp": at(created), "ownerReferences": [owner]}
    metadata["annotations"] = {INDEX_ANNOTATION: str(index)}
    return TrainerPod.parse({"metadata": metadata, "status": {"containerStatuses": container} | status})


def a_running_pod(uid: str = POD, created: float = 0, index: int = 0) -> TrainerPod:
    """A pod whose trainer runs."""
    return a_pod(uid, created=created, index=index, state={"running": {"startedAt": at(created + 1)}}, phase="Running")


def an_ended_pod(
    exit_code: int, outcome: Outcome | None = None, uid: str = POD, created: float = 0, **status: Any
) -> TrainerPod:
    """A pod whose trainer ended, ten seconds after the pod was made."""
    terminated = {
        "exitCode": exit_code,
        "reason": "Completed" if exit_code == 0 else "Error",
        "message": outcome.encode() if outcome else "",
        "startedAt": at(created + 1),
        "finishedAt": at(created + 10),
    }
    phase = "Succeeded" if exit_code == 0 else "Failed"
    return a_pod(
        uid, created=created, state={"terminated": terminated | status.pop("terminated", {})}, phase=phase, **status
    )


def a_workload(
    *conditions: tuple[str, str, str, str], active: bool = True, ours: bool = False, **status: Any
) -> Workload:
    """The Workload of the trainer's Job. A condition is type, status, reason and message."""
    names = ("type", "status", "reason", "message")
    wire = [dict(zip(names, each, strict=True)) for each in conditions]
    annotations = {DEACTIVATED_ANNOTATION: "x"} if ours else {}
    metadata = {"name": "job-bot", "namespace": "team", "annotations": annotations}
    return Workload.parse({"metadata": metadata, "spec": {"active": active}, "status": {"conditions": wire} | status})


def a_condition(kind: ConditionType, since: float = 0) -> Condition:
    """A condition that is true since so many seconds after NOW."""
    time = NOW + timedelta(seconds=since)
    return Condition(type=kind, status="True", reason="Test", last_transition_time=time, observed_generation=1)


def a_report(
    sequence: int = 1, stage: str = "Training", percent: int = 40, pod: str = POD, **run: Any
) -> ReceivedReport:
    """A report that arrived at NOW; keyword arguments are fields of its `finetune` part, in their wire form."""
    body = {
        "trainerStatus": {
            "progressPercentage": percent,
            "estimatedRemainingSeconds": 75,
            "lastUpdatedTime": at(0),
        },
        "finetune": {"sequence": sequence, "stage": stage, **run},
    }
    return ReceivedReport(pod, NOW, ProgressReport.model_validate(body))


_AS_BUILT: Any = object()  # a Job that the builder makes itself


def a_snapshot(
    spec: FineTuneJobSpec | None = None,
    *,
    job: ChildJob | None = _AS_BUILT,
    pods: tuple[TrainerPod, ...] = (),
    report: ReceivedReport | None = None,
    **fields: Any,
) -> Snapshot:
    """A job whose trainer's Job exists and whose pod does not yet. `job`, `pods` and `report` are those of training;
    further keyword arguments replace fields of the snapshot."""
    spec = spec or a_spec()
    snapshot = Snapshot(
        metadata=METADATA,
        spec=spec,
        status=FineTuneJobStatus(),
        result_location=LOCATION,
        config_map=a_config_map(spec),
        training=ChildRun(TRAINER, a_trainer_job(spec) if job is _AS_BUILT else job, pods, report),
        now=NOW,
    )
    return replace(snapshot, **fields)


def a_preflight_snapshot(
    *pods: TrainerPod, spec: FineTuneJobSpec | None = None, job: ChildJob | None = _AS_BUILT, **fields: Any
) -> Snapshot:
    """A job whose preflight Job exists, with these pods. `job` is that of preflight; further keyword arguments replace
    fields of the snapshot."""
    preflight = ChildRun(PREFLIGHT, a_preflight_job() if job is _AS_BUILT else job, pods)
    return a_snapshot(spec, job=None, preflight=preflight, **fields)


def an_unreadable_snapshot(spec_error: str, **arguments: Any) -> UnreadableSnapshot:
    """The same job with a spec that this version of the operator cannot read."""
    fields = vars(a_snapshot(**arguments)) | {"spec_error": spec_error}
    del fields["spec"]
    return UnreadableSnapshot(**fields)


def a_blind_snapshot(refusal: str, status: FineTuneJobStatus) -> BlindSnapshot:
    """The same job under a role that does not let the operator read its children."""
    return BlindSnapshot(
        metadata=METADATA, status=status, result_location=a_snapshot().result_location, now=NOW, refusal=refusal
    )


OWN: Any = {
    "metadata": {
        "name": "nodes-bot",
        "ownerReferences": [{"controller": True, "kind": "FineTuneJob", "name": "bot", "uid": METADATA.uid}],
    }
}
"""A child of the job, by which its pods find each other."""


def an_outlived_attempt() -> Snapshot:
    """A job on two nodes: its first pod has ended, and the one of the other node has not."""
    seen = a_snapshot(a_spec(resources={"nodes": 2}), pods=(an_ended_pod(30, Outcomes.interrupted),))
    peers = replace(seen.peers, service=OWN, network_policy=OWN)
    others = (a_running_pod("second", index=1),)
    return replace(seen, peers=peers, training=replace(seen.training, others=others))


def decision_about(snapshot: Snapshot | UnreadableSnapshot | BlindSnapshot) -> Decision:
    """Returns the decision about a snapshot."""
    return decide(snapshot, LIMITED)


def deciding_rule(chain: Chain[Any], snapshot: AnySnapshot, run: ChildRun) -> str:
    """Returns the name of the rule of a chain that decides about a snapshot."""
    rules = (rule for rule in chain.rules if rule(snapshot, run, LIMITED) is not None)
    return next(rules, chain.otherwise).__name__


def without_a_job_set() -> tuple[Snapshot, Snapshot]:
    """A job that asks for a JobSet where none can be made, and one whose JobSet has made no Job yet."""
    job_set = JobSet("set", "set-uid", METADATA.uid, deleting=False)
    spec = a_spec(runPolicy={"preflight": "Skip"})
    return a_snapshot(job=None, job_set_problem="it is missing"), a_snapshot(
        spec, training=ChildRun(TRAINER, job_set=job_set)
    )
