"""The Job of preflight: the golden manifest, and how it differs from the trainer's."""

from pathlib import Path
from typing import Any

import yaml

from finetune_operator.desired.names import (
    TRAINER,
)
from finetune_operator.desired.pod_plan import PodPlan
from finetune_operator.desired.preflight_job import build_preflight_job
from finetune_operator.desired.trainer_pod import build_pod_spec
from finetune_test_operator.snapshot_builder import (
    FULL_SECTIONS,
    INSTALLATION,
    METADATA,
    a_spec,
)

GOLDEN = Path(__file__).parent / "golden"


def _pod(**sections: Any) -> dict[str, Any]:
    return build_pod_spec(
        PodPlan.for_component(TRAINER, METADATA, a_spec(**sections), INSTALLATION.trainer_image, "config")
    )


def test_the_job_of_preflight_is_the_golden_one() -> None:
    spec = a_spec(**FULL_SECTIONS)
    job = build_preflight_job(METADATA, spec, INSTALLATION.trainer_image, "config", active_seconds=3)
    assert job == yaml.safe_load((GOLDEN / "preflight_job_full.yaml").read_text())


def test_preflight_asks_for_no_gpu_and_wakes_no_gpu_node() -> None:
    labels = {
        "nvidia.com/gpu.product": "NVIDIA-H200",
        "node.kubernetes.io/instance-type": "p5",
        "kubernetes.io/arch": "amd64",
        "topology.kubernetes.io/zone": "a",
    }
    resources = {"nodeSelector": labels, "runtimeClassName": "nvidia", "memory": "64Gi", "cpu": 16}
    pod = build_preflight_job(METADATA, a_spec(resources=resources), "i", "config")["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"kubernetes.io/arch": "amd64", "topology.kubernetes.io/zone": "a"}
    assert "runtimeClassName" not in pod
    assert pod["containers"][0]["resources"] == {
        "requests": {"cpu": "500m", "memory": "1Gi"},
        "limits": {"memory": "1Gi"},
    }
    spec = a_spec(resources=resources | {"gpus": 0})
    on_cpu = build_preflight_job(METADATA, spec, "i", "config")["spec"]["template"]["spec"]
    assert on_cpu["nodeSelector"] == labels
    assert on_cpu["runtimeClassName"] == "nvidia"


def test_preflight_has_no_token_and_otherwise_what_the_trainer_has() -> None:
    checks = build_preflight_job(METADATA, a_spec(**FULL_SECTIONS), "i", "config")["spec"]["template"]["spec"]
    trains = _pod(**FULL_SECTIONS)
    assert {volume["name"] for volume in trains["volumes"]} - {volume["name"] for volume in checks["volumes"]} == {
        "token"
    }
    assert "FINETUNE_TOKEN_FILE" not in {entry["name"] for entry in checks["containers"][0]["env"]}
    assert checks["automountServiceAccountToken"] is False
    assert checks["securityContext"] == trains["securityContext"]
    assert checks["containers"][0]["securityContext"] == trains["containers"][0]["securityContext"]
