"""Desired objects: one golden manifest each, and what differs from it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.job import ObjectMeta
from finetune_api.run_config import RunConfig
from finetune_operator.desired.names import (
    TRAINER,
    child_labels,
    child_metadata,
    child_name,
    controller_uid,
    preflight_name,
)
from finetune_operator.desired.pod_plan import PodPlan
from finetune_operator.desired.preflight_job import build_preflight_job
from finetune_operator.desired.run_config_map import RUN_CONFIG_KEY, build_run_config, build_run_config_map
from finetune_operator.desired.trainer_job import build_trainer_job, remaining_deadline
from finetune_operator.desired.trainer_pod import build_pod_spec
from finetune_operator.observe.children import ChildJob
from finetune_test_operator.snapshot_builder import (
    INSTALLATION,
    METADATA,
    a_snapshot,
    a_spec,
    a_trainer_job,
    decision_about,
)

GOLDEN = Path(__file__).parent / "golden"
FULL: dict[str, Any] = {
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
    "runPolicy": {"maxRetries": 5, "activeDeadlineSeconds": 3600, "terminationGracePeriodSeconds": 60},
}


def _job(**sections: Any) -> dict[str, Any]:
    return build_trainer_job(METADATA, a_spec(**sections), INSTALLATION.trainer_image)


def _pod(**sections: Any) -> dict[str, Any]:
    return build_pod_spec(PodPlan.for_component(TRAINER, METADATA, a_spec(**sections), INSTALLATION.trainer_image))


def _trainer(**sections: Any) -> dict[str, Any]:
    container: dict[str, Any] = _pod(**sections)["containers"][0]
    return container


@pytest.mark.parametrize(("name", "sections"), [("smallest", {}), ("full", FULL)])
def test_the_job_is_the_golden_one(name: str, sections: dict[str, Any]) -> None:
    assert _job(**sections) == yaml.safe_load((GOLDEN / f"trainer_job_{name}.yaml").read_text())


def test_the_job_of_preflight_is_the_golden_one() -> None:
    job = build_preflight_job(METADATA, a_spec(**FULL), INSTALLATION.trainer_image, active_seconds=3)
    assert job == yaml.safe_load((GOLDEN / "preflight_job_full.yaml").read_text())


def test_preflight_asks_for_no_gpu_and_wakes_no_gpu_node() -> None:
    labels = {
        "nvidia.com/gpu.product": "NVIDIA-H200",
        "node.kubernetes.io/instance-type": "p5",
        "kubernetes.io/arch": "amd64",
        "topology.kubernetes.io/zone": "a",
    }
    resources = {"nodeSelector": labels, "runtimeClassName": "nvidia", "memory": "64Gi", "cpu": 16}
    pod = build_preflight_job(METADATA, a_spec(resources=resources), "i")["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"kubernetes.io/arch": "amd64", "topology.kubernetes.io/zone": "a"}
    assert "runtimeClassName" not in pod
    assert pod["containers"][0]["resources"] == {
        "requests": {"cpu": "500m", "memory": "1Gi"},
        "limits": {"memory": "1Gi"},
    }
    on_cpu = build_preflight_job(METADATA, a_spec(resources=resources | {"gpus": 0}), "i")["spec"]["template"]["spec"]
    assert on_cpu["nodeSelector"] == labels
    assert on_cpu["runtimeClassName"] == "nvidia"


def test_preflight_has_no_token_and_otherwise_what_the_trainer_has() -> None:
    checks = build_preflight_job(METADATA, a_spec(**FULL), "i")["spec"]["template"]["spec"]
    trains = _pod(**FULL)
    assert {volume["name"] for volume in trains["volumes"]} - {volume["name"] for volume in checks["volumes"]} == {
        "token"
    }
    assert "FINETUNE_TOKEN_FILE" not in {entry["name"] for entry in checks["containers"][0]["env"]}
    assert checks["automountServiceAccountToken"] is False
    assert checks["securityContext"] == trains["securityContext"]
    assert checks["containers"][0]["securityContext"] == trains["containers"][0]["securityContext"]


def test_a_cpu_run_requests_no_gpu() -> None:
    resources = _trainer(resources={"gpus": 0})["resources"]
    assert set(resources["limits"]) == {"memory"}
    assert set(resources["requests"]) == {"cpu", "memory"}


def test_a_pod_without_credentials_has_no_folder_for_them() -> None:
    container = _trainer()
    assert "FINETUNE_CREDENTIALS_DIR" not in {entry["name"] for entry in container["env"]}
    assert "credentials" not in {volume["name"] for volume in _pod()["volumes"]}


def test_only_documented_keys_of_a_secret_are_mounted() -> None:
    volumes = {volume["name"]: volume for volume in _pod(**FULL)["volumes"]}
    items = [
        (source["secret"]["name"], item["path"])
        for source in volumes["credentials"]["projected"]["sources"]
        for item in source["secret"]["items"]
    ]
    assert items == [
        ("s3", "output/AWS_ACCESS_KEY_ID"),
        ("s3", "output/AWS_SECRET_ACCESS_KEY"),
        ("s3", "output/AWS_SESSION_TOKEN"),
        ("hub", "model/HF_TOKEN"),
        ("hub-writer", "hub/HF_TOKEN"),
    ]


def test_every_path_in_the_environment_lies_below_a_mount() -> None:
    container = _trainer(**FULL)
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]] + [container["terminationMessagePath"]]
    paths = [entry["value"] for entry in container["env"] if entry.get("value", "").startswith("/")]
    assert len(paths) > 5
    assert not [path for path in paths if not any(path == at or path.startswith(at + "/") for at in mounts)]


def test_the_token_is_bound_to_the_audience_of_this_job() -> None:
    volumes = {volume["name"]: volume for volume in _pod()["volumes"]}
    token = volumes["token"]["projected"]["sources"][0]["serviceAccountToken"]
    assert token == {"audience": f"finetune.dev/{METADATA.uid}", "expirationSeconds": 3600, "path": "token"}
    assert _pod()["automountServiceAccountToken"] is False


def test_the_run_config_survives_the_config_map() -> None:
    config = build_run_config(METADATA, a_spec(**FULL), INSTALLATION.progress_url, INSTALLATION.ca_certificate)
    written = build_run_config_map(METADATA, config)
    assert RunConfig.from_yaml(written["data"][RUN_CONFIG_KEY]) == config
    assert config.progress is not None
    assert config.progress.url == (
        "https://operator:8443/apis/finetune.dev/v1alpha1/namespaces/team/finetunejobs/bot/status"
    )


def test_a_running_job_keeps_the_configuration_that_its_image_knows() -> None:
    snapshot = a_snapshot()
    assert snapshot.config_map is not None
    document = yaml.safe_load(snapshot.config_map["data"]["run_config.yaml"])
    older = document | {"gpus": 0} | {"progress": document["progress"] | {"caCertificate": "OLD"}}
    del older["gpu"]

    def update_of(mounted: dict[str, object], job: ChildJob | None) -> dict[str, object] | None:
        text = {"run_config.yaml": yaml.safe_dump(mounted)}
        kept = {"metadata": snapshot.config_map["metadata"], "data": text}  # type: ignore[index]
        return decision_about(a_snapshot(job=job, config_map=kept)).actions.update_config_map

    assert update_of(older | {"progress": document["progress"]}, a_trainer_job()) is None
    update = update_of(older, a_trainer_job())
    assert update is not None
    assert yaml.safe_load(update["data"]["run_config.yaml"]) == older | {"progress": document["progress"]}  # type: ignore[index]
    assert update_of(older, None) == {"data": snapshot.config_map["data"]}


NAMES = ["a", "bot", "a.b.c", "x" * 63, "x" * 57 + "-yyyyy", "1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_childs_name_fits_a_label_and_a_pods_name(name: str) -> None:
    for child in (child_name(ObjectMeta(name=name, uid="u")), preflight_name(ObjectMeta(name=name, uid="u"))):
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", child)
        assert len(child) <= 63


def test_a_job_made_again_has_other_children() -> None:
    assert child_name(ObjectMeta(name="bot", uid="1")) != child_name(ObjectMeta(name="bot", uid="2"))


def test_children_are_owned_and_labelled() -> None:
    metadata = child_metadata(METADATA, child_name(METADATA), "trainer")
    assert controller_uid(metadata) == METADATA.uid
    assert metadata["ownerReferences"][0]["blockOwnerDeletion"] is True
    assert metadata["labels"] == child_labels(METADATA, "trainer") == _job()["spec"]["template"]["metadata"]["labels"]


REMAINING = {"no limit": (None, 50, None), "fresh": (100, 0, 100), "resumed": (100, 40, 60), "used up": (100, 140, 1)}


@pytest.mark.parametrize(("total", "active", "left"), REMAINING.values(), ids=REMAINING)
def test_what_is_left_of_a_deadline(total: int | None, active: int, left: int | None) -> None:
    assert remaining_deadline(total, active) == left
