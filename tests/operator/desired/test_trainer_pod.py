"""The trainer's pod: resources, credentials, paths and the token."""

from typing import Any

from finetune_operator.desired.names import (
    TRAINER,
)
from finetune_operator.desired.pod_plan import PodPlan
from finetune_operator.desired.trainer_pod import build_pod_spec
from finetune_test_operator.snapshot_builder import (
    FULL_SECTIONS,
    INSTALLATION,
    METADATA,
    a_spec,
)


def _pod(**sections: Any) -> dict[str, Any]:
    return build_pod_spec(
        PodPlan.for_component(TRAINER, METADATA, a_spec(**sections), INSTALLATION.trainer_image, "config")
    )


def _trainer(**sections: Any) -> dict[str, Any]:
    container: dict[str, Any] = _pod(**sections)["containers"][0]
    return container


def test_a_cpu_run_requests_no_gpu() -> None:
    resources = _trainer(resources={"gpus": 0})["resources"]
    assert set(resources["limits"]) == {"memory"}
    assert set(resources["requests"]) == {"cpu", "memory"}


def test_several_gpus_have_shared_memory_for_nccl_and_one_has_none() -> None:
    several, one = _pod(resources={"gpus": 4}), _pod(resources={"gpus": 1})
    assert several["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory"}} in several["volumes"]
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in several["containers"][0]["volumeMounts"]
    assert "shared-memory" not in {volume["name"] for volume in one["volumes"]}


def test_a_pod_without_credentials_has_no_folder_for_them() -> None:
    container = _trainer()
    assert "FINETUNE_CREDENTIALS_DIR" not in {entry["name"] for entry in container["env"]}
    assert "credentials" not in {volume["name"] for volume in _pod()["volumes"]}


def test_only_documented_keys_of_a_secret_are_mounted() -> None:
    volumes = {volume["name"]: volume for volume in _pod(**FULL_SECTIONS)["volumes"]}
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
    container = _trainer(**FULL_SECTIONS)
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]] + [container["terminationMessagePath"]]
    paths = [entry["value"] for entry in container["env"] if entry.get("value", "").startswith("/")]
    assert len(paths) > 5
    assert not [path for path in paths if not any(path == at or path.startswith(at + "/") for at in mounts)]


def test_the_token_is_bound_to_the_audience_of_this_job() -> None:
    volumes = {volume["name"]: volume for volume in _pod()["volumes"]}
    token = volumes["token"]["projected"]["sources"][0]["serviceAccountToken"]
    assert token == {"audience": f"finetune.dev/{METADATA.uid}", "expirationSeconds": 3600, "path": "token"}
    assert _pod()["automountServiceAccountToken"] is False
