"""FineTuneJobs of a test on a real API server, and the final outcomes that their played pods leave."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kubernetes import client, watch
from kubernetes.client.exceptions import ApiException

from finetune_api import GROUP, PLURAL, VERSION
from finetune_api.base import Json
from finetune_api.failures import ExitCode, FailureReason
from finetune_api.job import ObjectMeta
from finetune_api.outcome import Artifact, Outcome, Result
from finetune_api.preflight import PreflightSummary
from finetune_api.vocabulary import ArtifactType, Stage
from finetune_devcluster.cluster import DevCluster
from finetune_operator.desired.names import child_name
from finetune_test_operator.played_kubelet import LOCATION, UPLOADS, wait_for

OPERATOR_WRITES = (("finetunejobs", "status"), ("jobs", ""), ("configmaps", ""), ("events", ""))
FINISHED = datetime(2026, 11, 24, tzinfo=UTC)


@dataclass(frozen=True)
class Outcomes:
    """Final outcomes that the played trainers leave; `PlayedKubelet` fills in where their pods write."""

    artifact = Artifact(
        type=ArtifactType.ADAPTER, uri=f"{UPLOADS}adapter/", bytes=12, sha256="a" * 64, format="safetensors"
    )
    success = Outcome(
        result=Result.SUCCEEDED,
        stage=Stage.UPLOADING,
        step=20,
        total_steps=20,
        loss=1.5,
        manifest_uri=f"{LOCATION}manifest.json",
        artifacts=(artifact,),
        finished=FINISHED,
    )
    checked = Outcome(
        result=Result.SUCCEEDED,
        message="rows: 40",
        stage=Stage.PREFLIGHT,
        preflight=PreflightSummary(errors=0, rows=40, steps=20, report_uri=f"{LOCATION}preflight/report.html"),
        finished=FINISHED,
    )
    refused = Outcome(
        result=Result.FAILED,
        reason=FailureReason.INVALID_ROW,
        message="2 errors: chat.jsonl:2: messages is not a list; chat.jsonl:9: not valid JSON",
        exit_code=ExitCode.DATA,
        stage=Stage.PREFLIGHT,
        preflight=PreflightSummary(errors=2, rows=40, bad_rows=2),
        finished=FINISHED,
    )
    bad_row = Outcome(
        result=Result.FAILED,
        reason=FailureReason.INVALID_ROW,
        message="line 2: messages is not a list",
        exit_code=ExitCode.DATA,
        stage=Stage.DATA_FORMATTING,
        step=0,
        finished=FINISHED,
    )
    interrupted = Outcome(
        result=Result.INTERRUPTED,
        reason=FailureReason.INTERRUPTED,
        message="stopped after a checkpoint",
        exit_code=ExitCode.INTERRUPTED,
        stage=Stage.TRAINING,
        step=7,
        checkpoint_step=7,
        finished=FINISHED,
    )


class Jobs:
    """FineTuneJobs in the test's namespace."""

    def __init__(self, cluster: DevCluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.multi_node = "Job"
        self._api: Any = client.CustomObjectsApi(cluster.api_client())
        self._core: Any = client.CoreV1Api(cluster.api_client())
        self._batch: Any = client.BatchV1Api(cluster.api_client())

    def create(
        self, name: str, secret: str = "", scheduling: Json | None = None, nodes: int = 1, **run_policy: Any
    ) -> Json:
        """A small job whose trainer comes at once, unless `preflight` says otherwise; further keyword arguments are
        fields of spec.runPolicy. `secret`: the Secret with the credentials of its model, data and output."""
        credentials = {"credentials": {"secretName": secret}} if secret else {}
        spec = {
            "model": {"source": "s3://models/tiny/"} | credentials,
            "dataset": {"source": "s3://data/chat.jsonl"} | credentials,
            "output": {"s3": {"bucket": "results"} | credentials},
            "resources": {"gpus": 0, "nodes": nodes, "multiNode": self.multi_node},
            "scheduling": scheduling or {},
            "runPolicy": {"preflight": "Skip"} | run_policy,
        }
        body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
        created: Json = self._api.create_namespaced_custom_object(*self._path(), body)
        return created

    def patch_run_policy(self, name: str, **fields: Any) -> None:
        """Change spec.runPolicy."""
        self._api.patch_namespaced_custom_object(*self._path(), name, {"spec": {"runPolicy": fields}})

    def get(self, name: str) -> Json:
        found: Json = self._api.get_namespaced_custom_object(*self._path(), name)
        return found

    def exists(self, name: str) -> bool:
        """True until the job is gone."""
        found: Json = self._api.list_namespaced_custom_object(*self._path())
        return name in [item["metadata"]["name"] for item in found["items"]]

    def job_is_over(self, name: str) -> bool:
        """True if the Job controller has declared a batch/v1 Job complete."""
        return self._batch.read_namespaced_job(name, self.namespace).status.completion_time is not None

    def delete(self, name: str, propagation: str = "Background") -> None:
        """Delete a job as `kubectl delete --cascade` would."""
        self._api.delete_namespaced_custom_object(*self._path(), name, propagation_policy=propagation)

    def delete_all(self) -> None:
        """Leave nothing for the operator to do."""
        self._api.delete_collection_namespaced_custom_object(*self._path())

    def wait(self, name: str, holds: Callable[[Json], Any], what: str, seconds: float = 15) -> Json:
        """The job, as soon as its status is as wanted."""

        def get() -> Json | None:
            job = self.get(name)
            return job if holds(job.get("status", {})) else None

        try:
            return wait_for(get, what, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; status: {self.get(name).get('status')}") from None

    def wait_for_phase(self, name: str, phase: str, seconds: float = 15) -> Json:
        return self.wait(name, lambda status: status.get("phase") == phase, phase, seconds)

    def label(self, name: str, key: str, value: str) -> None:
        """Change a label, which gives a watch event."""
        self._api.patch_namespaced_custom_object(*self._path(), name, {"metadata": {"labels": {key: value}}})

    def label_child(self, name: str, key: str, value: str) -> None:
        """Change a label of the trainer's Job."""
        labels = {"metadata": {"labels": {key: value}}}
        self._batch.patch_namespaced_job(child_name(self._metadata(name)), self.namespace, labels)

    def child_deadline(self, name: str) -> int | None:
        """activeDeadlineSeconds of the trainer's Job."""
        seconds: int | None = self.child(name)["spec"].get("activeDeadlineSeconds")
        return seconds

    def set_child_deadline(self, name: str, seconds: int) -> None:
        """Change activeDeadlineSeconds of the trainer's Job."""
        change = {"spec": {"activeDeadlineSeconds": seconds}}
        self._batch.patch_namespaced_job(child_name(self._metadata(name)), self.namespace, change)

    def set_status(self, name: str, status: Json) -> None:
        """Write a status as an operator would have done."""
        self._api.patch_namespaced_custom_object_status(*self._path(), name, {"status": status})

    def event_reasons(self, name: str) -> list[str]:
        """Reasons of the job's events."""
        found = self._core.list_namespaced_event(self.namespace, field_selector=f"involvedObject.name={name}").items
        ours = [event for event in found if event.involved_object.kind == "FineTuneJob"]
        return [event.reason for event in sorted(ours, key=lambda event: int(event.metadata.resource_version))]

    def find_child(self, name: str, naming: Callable[[ObjectMeta], str] = child_name) -> Json | None:
        """The trainer's Job as JSON, or that of preflight."""
        try:
            found = self._batch.read_namespaced_job(naming(self._metadata(name)), self.namespace)
        except ApiException as error:
            if error.status == 404:
                return None
            raise
        serialized: Json = self._batch.api_client.sanitize_for_serialization(found)
        return serialized

    def child(self, name: str, naming: Callable[[ObjectMeta], str] = child_name) -> Json:
        """The trainer's Job, or that of preflight, which must exist."""
        found = self.find_child(name, naming)
        assert found is not None
        return found

    def delete_child(
        self, name: str, naming: Callable[[ObjectMeta], str] = child_name, propagation: str = "Background"
    ) -> None:
        """Delete the trainer's Job, or that of preflight, as `kubectl delete --cascade` would."""
        child = naming(self._metadata(name))
        self._batch.delete_namespaced_job(child, self.namespace, propagation_policy=propagation)

    def create_foreign_child(self, job: Json, naming: Callable[[ObjectMeta], str] = child_name) -> Json:
        """A Job with the name of a child, made by someone else."""
        container = {"name": "main", "image": "x"}
        spec = {"suspend": True, "template": {"spec": {"restartPolicy": "Never", "containers": [container]}}}
        name = naming(ObjectMeta.model_validate(job["metadata"]))
        created = self._batch.create_namespaced_job(self.namespace, {"metadata": {"name": name}, "spec": spec})
        return {"metadata": {"uid": created.metadata.uid}}

    def config_maps(self, name: str) -> list[Any]:
        """ConfigMaps of the job."""
        selector = f"finetune.dev/job-name={name}"
        found: list[Any] = self._core.list_namespaced_config_map(self.namespace, label_selector=selector).items
        return found

    def writes(self) -> dict[str, int]:
        """Writes of the kinds that the operator makes, as the API server counts them (it may delete nothing)."""
        counted: dict[str, int] = {}
        for line in self.cluster.kubectl("get", "--raw", "/metrics").stdout.splitlines():
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line)) if line.startswith("apiserver_request_total") else {}
            what = (labels.get("resource", ""), labels.get("subresource", ""))
            if what in OPERATOR_WRITES and labels["verb"] in ("POST", "PUT", "PATCH", "APPLY"):
                key = f"{labels['verb']} {'/'.join(what)}"
                counted[key] = counted.get(key, 0) + int(float(line.rsplit(" ", 1)[1]))
        return counted

    def events_since(self, version: str, name: str) -> list[Json]:
        """Watch events of a job after a version, until now."""
        api = client.CustomObjectsApi(self.cluster.api_client())
        options = {"field_selector": f"metadata.name={name}", "resource_version": version, "timeout_seconds": 1}
        stream: Any = watch.Watch().stream  # type: ignore[no-untyped-call]
        return list(stream(api.list_namespaced_custom_object, *self._path(), **options))

    def _metadata(self, name: str) -> ObjectMeta:
        return ObjectMeta.model_validate(self.get(name)["metadata"])

    def _path(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self.namespace, PLURAL
