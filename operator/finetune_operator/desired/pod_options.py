"""The parts of a pod that `spec.pod` adds: identity, registries, proxies, authorities, a cache and places.

The ServiceAccount's token is not mounted, as for every pod. The webhooks of clouds need it not: AWS's and Azure's mount
a token of their own for the account they know, Google's answers at the node.
"""

from finetune_api.base import Json
from finetune_api.gpus import PRODUCT_LABEL
from finetune_api.spec.pod import PodOptions
from finetune_api.vocabulary import COMPONENT_LABEL
from finetune_operator.desired.names import FIELD_MANAGER
from finetune_operator.desired.peers import own_pods
from finetune_operator.desired.pod_plan import PodPlan

HOSTNAME_LABEL = "kubernetes.io/hostname"
CA_DIR = "/etc/finetune-ca"
CA_FILE = "ca.crt"
CACHE_DIR = "/cache"


def pod_options(plan: PodPlan) -> Json:
    """Builds fields of the pod's spec; one without a value is not in the manifest."""
    pod = plan.spec.pod
    return {
        "serviceAccountName": pod.service_account_name,
        "imagePullSecrets": [{"name": name} for name in pod.image_pull_secrets],
        "affinity": _affinity(plan),
        "topologySpreadConstraints": [
            each.to_wire() | {"labelSelector": {"matchLabels": _alike(plan)}} for each in pod.topology_spread
        ],
    }


def option_variables(pod: PodOptions) -> dict[str, str]:
    """Builds variables of the container. The trainer adds the mounted authorities to the public ones itself."""
    values = dict(pod.env)
    if pod.ca_bundle is not None:
        values["FINETUNE_CA_BUNDLE"] = f"{CA_DIR}/{CA_FILE}"
    if pod.cache_claim is not None:
        values |= {"HF_HOME": f"{CACHE_DIR}/huggingface", "FINETUNE_HUB_CACHE": f"{CACHE_DIR}/huggingface"}
        values["FINETUNE_NF4_CACHE"] = f"{CACHE_DIR}/nf4"
    return values


def option_mounts(pod: PodOptions) -> list[Json]:
    """Builds mounts of the container."""
    mounts: list[Json] = []
    if pod.ca_bundle is not None:
        mounts.append({"name": "ca-bundle", "mountPath": CA_DIR, "readOnly": True})
    if pod.cache_claim is not None:
        mounts.append({"name": "cache", "mountPath": CACHE_DIR})
    return mounts


def option_volumes(pod: PodOptions) -> list[Json]:
    """Builds volumes of the pod."""
    volumes: list[Json] = []
    if (bundle := pod.ca_bundle) is not None:
        source = {"name": bundle.config_map_name, "items": [{"key": bundle.key, "path": CA_FILE}]}
        volumes.append({"name": "ca-bundle", "configMap": source})
    if pod.cache_claim is not None:
        volumes.append({"name": "cache", "persistentVolumeClaim": {"claimName": pod.cache_claim}})
    return volumes


def _affinity(plan: PodPlan) -> Json:
    products = plan.spec.pod.gpu_products if plan.spec.resources.gpus else ()
    affinity: Json = {}
    if products:
        product = {"key": PRODUCT_LABEL, "operator": "In", "values": list(products)}
        terms = {"nodeSelectorTerms": [{"matchExpressions": [product]}]}
        affinity["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": terms}
    if plan.nodes > 1:
        # A pod a node: of two on one node, neither would have the network that the job's author counts on.
        apart = {"topologyKey": HOSTNAME_LABEL, "labelSelector": {"matchLabels": own_pods(plan.job)}}
        affinity["podAntiAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}
    return affinity


def _alike(plan: PodPlan) -> Json:
    return {"app.kubernetes.io/managed-by": FIELD_MANAGER, COMPONENT_LABEL: plan.component}
