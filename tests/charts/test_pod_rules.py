"""Rules that reviewers of charts ask for, over every pod of the chart (`make chart-audit` has checkov's)."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from finetune_test_programs.chart import Object, of_kind, operator_pod, render

pytestmark = pytest.mark.cluster
STABLE = re.compile(r"^(v1|[a-z.0-9]+/v[0-9]+)$")


def _drop_all(container: Object) -> bool:
    return bool(container["securityContext"]["capabilities"] == {"drop": ["ALL"]})


RULES: dict[str, Callable[[Object, Object], Any]] = {
    "requests of CPU and memory": lambda _, container: {"cpu", "memory"} <= set(container["resources"]["requests"]),
    "a limit of memory": lambda _, container: "memory" in container["resources"]["limits"],
    "a tag that does not move": lambda _, container: not re.search(r"(:latest|/[^:@]+)$", container["image"]),
    "no root": lambda pod, _: pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 10000,
    "a read-only root": lambda _, container: container["securityContext"]["readOnlyRootFilesystem"],
    "no escalation": lambda _, container: container["securityContext"]["allowPrivilegeEscalation"] is False,
    "no capabilities": lambda _, container: _drop_all(container),
    "seccomp": lambda pod, _: pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"},
    "nothing of the host": lambda pod, _: (
        not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        and not [volume for volume in pod["volumes"] if "hostPath" in volume]
    ),
    "an account of its own": lambda pod, _: pod["serviceAccountName"] not in ("", "default"),
    "no Secret in the environment": lambda _, container: "secretKeyRef" not in str(container["env"]),
}


def _pods() -> Iterator[Object]:
    yield operator_pod(render())
    yield of_kind(render(test=True), "Pod")[0]["spec"]


@pytest.fixture(scope="module")
def pods() -> list[Object]:
    return list(_pods())


@pytest.mark.parametrize("rule", RULES)
def test_every_pod_keeps_the_rule(rule: str, pods: list[Object]) -> None:
    for pod in pods:
        for container in pod["containers"]:
            assert RULES[rule](pod, container)


def test_liveness_and_readiness_ask_different_questions(pods: list[Object]) -> None:
    (container,) = pods[0]["containers"]
    asked = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")]
    assert asked == ["/healthz", "/healthz", "/readyz"]


def test_only_stable_api_versions_are_used() -> None:
    for document in [*render("--set", "networkPolicy.operator.enabled=true"), *render(test=True)]:
        assert STABLE.match(document["apiVersion"]), document["kind"]


def test_every_exception_has_its_reason() -> None:
    exceptions = 0
    for document in [*render(), *render(test=True)]:
        for key, value in (document["metadata"].get("annotations") or {}).items():
            if key.startswith("checkov.io/skip"):
                rule, _, reason = value.partition("=")
                assert re.match(r"CKV2?_K8S_\d+$", rule)
                assert len(reason.split()) > 4
                exceptions += 1
    assert exceptions > 4


def test_an_image_with_a_digest_needs_one_exception_less() -> None:
    (deployment,) = of_kind(render("--set", f"image.digest=sha256:{'0' * 64}"), "Deployment")
    assert "CKV_K8S_43" not in str(deployment["metadata"]["annotations"])
