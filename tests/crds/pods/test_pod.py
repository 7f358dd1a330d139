"""spec.pod: what pods may carry, by the API server and by `finetune validate`, and what administrators allow of it."""

from typing import Any

import pytest

from finetune_api.spec.pod import ENV_NAMES, PodOptions
from finetune_api.spec.pod_policy import AllowedOverrides, PodPolicy
from finetune_api.structural import structural_schema
from finetune_test_operator.rule_messages import messages
from finetune_test_operator.snapshot_builder import a_spec
from finetune_test_operator.two_doors import refusals

VALID: dict[str, dict[str, Any]] = {
    "nothing": {},
    "Azure's label": {"labels": {"azure.workload.identity/use": "true", "cost-centre": "nlp"}},
    "annotations of a mesh and an autoscaler": {
        "annotations": {
            "sidecar.istio.io/inject": "false",
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        }
    },
    "proxies and mirrors": {"env": dict.fromkeys(ENV_NAMES, "http://proxy.example.com:3128")},
    "a bundle under another key": {"caBundle": {"configMapName": "company-ca", "key": "bundle.pem"}},
    "places": {
        "gpuProducts": ["NVIDIA-H200"],
        "topologySpread": [{"topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule"}],
    },
}
LABELS = "keys of Kubernetes, Kueue and this operator are not to be set here"
INVALID: dict[str, tuple[dict[str, Any], str, str]] = {
    "a label by which jobs are found": ({"labels": {"finetune.dev/job-uid": "x"}}, "spec.pod.labels", LABELS),
    "a label of Kubernetes": ({"labels": {"app.kubernetes.io/component": "trainer"}}, "spec.pod.labels", LABELS),
    "a label of the Job controller": ({"labels": {"batch.kubernetes.io/job-name": "x"}}, "spec.pod.labels", LABELS),
    "its old name": ({"labels": {"job-name": "x"}}, "spec.pod.labels", LABELS),
    "Kueue's queue": ({"labels": {"kueue.x-k8s.io/queue-name": "x"}}, "spec.pod.labels", LABELS),
    "a scheduler's label": ({"labels": {"kai.scheduler/queue": "x"}}, "spec.pod.labels", "in spec.scheduling.labels"),
    "a scheduler's annotation": (
        {"annotations": {"scheduling.volcano.sh/queue-name": "x"}},
        "spec.pod.annotations",
        "in spec.scheduling.annotations",
    ),
    "an old security annotation": (
        {"annotations": {"container.apparmor.security.beta.kubernetes.io/trainer": "unconfined"}},
        "spec.pod.annotations",
        "old security fields",
    ),
    "a variable that is no proxy": ({"env": {"LD_PRELOAD": "/x.so"}}, "spec.pod.env", "other variables are not passed"),
    "a variable with a password": (
        {"env": {"HTTPS_PROXY": "http://me:secret@proxy:3128"}},
        "spec.pod.env",
        "write the address alone",
    ),
    "a place that no node names": (
        {"topologySpread": [{"topologyKey": "not a label"}]},
        "topologyKey",
        "write a label of nodes",
    ),
    "a key that is none": ({"annotations": {"not a key": "x"}}, "spec.pod.annotations", "write a key such as zone"),
    "a value that is no label's": ({"labels": {"zone": "-x"}}, "spec.pod.labels", "write at most 63 letters"),
    "an account's name that is none": (
        {"serviceAccountName": "Not a name"},
        "serviceAccountName",
        "write the object's n",
    ),
    "a product that no label can name": ({"gpuProducts": ["an H200"]}, "gpuProducts", "such as NVIDIA-H200"),
    "a file's path as a key": (
        {"caBundle": {"configMapName": "company-ca", "key": "etc/ca.crt"}},
        "caBundle.key",
        "write a key of the ConfigMap",
    ),
    "a pull policy that does not exist": ({"imagePullPolicy": "Sometimes"}, "imagePullPolicy", "Always"),
    "a bundle without a ConfigMap": ({"caBundle": {"key": "ca.crt"}}, "caBundle.configMapName", "equired"),
}


@pytest.mark.cluster
@pytest.mark.parametrize("name", VALID)
def test_what_pods_may_carry_is_accepted_by_both(jobs: Any, minimal: dict[str, Any], name: str) -> None:
    manifest = minimal | {"spec": minimal["spec"] | {"pod": VALID[name]}}
    assert refusals(jobs, manifest) == ("", "")


@pytest.mark.cluster
@pytest.mark.parametrize("name", INVALID)
def test_what_they_may_not_is_refused_by_both(jobs: Any, minimal: dict[str, Any], name: str) -> None:
    pod, field, remedy = INVALID[name]
    manifest = minimal | {"spec": minimal["spec"] | {"pod": pod}}
    for refusal in refusals(jobs, manifest):
        assert field in refusal
        assert remedy in refusal


def test_every_rule_is_broken_by_a_manifest_of_the_table() -> None:
    remedies = [remedy for _, _, remedy in INVALID.values()]
    found = messages(structural_schema(PodOptions))
    assert len(found) > 5
    assert not [message for message in found if not any(remedy in message for remedy in remedies)]


def a_pod(**fields: Any) -> PodOptions:
    return PodOptions.model_validate(fields)


DEFAULTS = a_pod(
    serviceAccountName="trainer",
    labels={"cost-centre": "ml", "owner": "platform"},
    env={"HTTPS_PROXY": "http://proxy:3128"},
    caBundle={"configMapName": "company-ca"},
    imagePullSecrets=["mirror"],
)
NOTHING, EVERYTHING = (
    AllowedOverrides(fields=()),
    AllowedOverrides(
        fields=("labels", "annotations", "caBundle", "cacheClaim"), env=("HF_ENDPOINT",), service_accounts=("train-*",)
    ),
)
REFUSED: dict[str, tuple[PodOptions, AllowedOverrides, list[str]]] = {
    "nothing": (a_pod(), NOTHING, []),
    "the default itself": (a_pod(serviceAccountName="trainer", env={"HTTPS_PROXY": "http://proxy:3128"}), NOTHING, []),
    "another identity": (
        a_pod(serviceAccountName="admin"),
        EVERYTHING,
        ["spec.pod.serviceAccountName (allowedOverrides.serviceAccounts: train-*)"],
    ),
    "an allowed identity": (a_pod(serviceAccountName="train-nlp"), EVERYTHING, []),
    "another proxy": (
        a_pod(env={"HTTPS_PROXY": "http://evil:1", "HF_ENDPOINT": "https://mirror"}),
        EVERYTHING,
        ["spec.pod.env.HTTPS_PROXY (allowedOverrides.env: HF_ENDPOINT)"],
    ),
    "fields": (
        a_pod(labels={"a": "b"}, imagePullPolicy="Always"),
        NOTHING,
        ["spec.pod.labels (allowedOverrides.fields: none)", "spec.pod.imagePullPolicy (allowedOverrides.fields: none)"],
    ),
    "fields that give nothing, by default": (
        a_pod(imagePullPolicy="Always", imagePullSecrets=["mine"], gpuProducts=["NVIDIA-L4"]),
        AllowedOverrides(),
        [],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_job_sets_what_the_administrator_allows(name: str) -> None:
    pod, allowed, expected = REFUSED[name]
    assert PodPolicy(defaults=DEFAULTS, allowed=allowed).refuse(pod) == expected


def test_by_default_no_field_that_gives_rights_or_sees_tokens_is_a_jobs_to_set() -> None:
    dangerous = a_pod(
        serviceAccountName="a",
        labels={"aadpodidbinding": "x"},
        annotations={"iam.amazonaws.com/role": "admin"},
        env={"HF_ENDPOINT": "https://evil"},
        caBundle={"configMapName": "x"},
        cacheClaim="x",
    )
    assert len(PodPolicy().refuse(dangerous)) == 6


def test_defaults_are_merged_by_key_and_lists_are_replaced() -> None:
    own = a_pod(labels={"cost-centre": "nlp"}, env={"NO_PROXY": ".svc"}, imagePullSecrets=["mine"])
    merged = PodPolicy(defaults=DEFAULTS).apply(a_spec().model_copy(update={"pod": own})).pod
    assert merged == a_pod(
        serviceAccountName="trainer",
        labels={"cost-centre": "nlp", "owner": "platform"},
        env={"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": ".svc"},
        caBundle={"configMapName": "company-ca"},
        imagePullSecrets=["mine"],
    )
    assert PodPolicy(defaults=DEFAULTS).apply(a_spec()).pod == DEFAULTS
    assert PodPolicy().apply(a_spec()) == a_spec()
