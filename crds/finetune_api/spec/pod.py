"""Identity, labels, registries, proxies and authorities of the job's pods, so that they fit a company's cluster.

An allow-list instead of a PodSpec. Which of these fields a job may set is the administrator's choice, as some lead to
rights or secrets of others: `finetune_api.spec.pod_policy`.
"""

import re
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import QUALIFIED_NAME, SUBDOMAIN, ApiModel, Pattern, ResourceName, Rule
from finetune_api.spec.run import LabelKey, LabelValue
from finetune_api.spec.scheduling import OTHER_SCHEDULERS

PROXY_NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
_HUB_NAMES = ("HF_ENDPOINT", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "HF_HUB_DISABLE_XET")
_AWS_NAMES = (
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_STS_REGIONAL_ENDPOINTS",
    "AWS_USE_FIPS_ENDPOINT",
    "AWS_USE_DUALSTACK_ENDPOINT",
    "AWS_EC2_METADATA_DISABLED",
)
_NETWORK_NAMES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_DEBUG")
ENV_NAMES = (*PROXY_NAMES, *_HUB_NAMES, *_AWS_NAMES, *_NETWORK_NAMES)
"""Variables of proxies, mirrors and the network between nodes: none holds a secret or switches a check off. A mirror
and a proxy see what they are asked with, tokens too, so they are the administrator's to name."""

_OWN = r"([a-z0-9.-]+\.)?(finetune\.dev|kueue\.x-k8s\.io)/"
RESERVED_LABELS = rf"^({_OWN}|([a-z0-9.-]+\.)?(kubernetes|k8s)\.io/|{OTHER_SCHEDULERS}/|job-name$|controller-uid$)"
RESERVED_ANNOTATIONS = rf"^({_OWN}|{OTHER_SCHEDULERS}/|([a-z0-9.-]+\.)?(security|pod)\.(alpha|beta)\.kubernetes\.io/)"
_PASSWORD = "://[^/]*@"  # noqa: S105 (a pattern)

EnvName = Annotated[
    str,
    Field(max_length=64),
    Pattern(f"^({'|'.join(ENV_NAMES)})$", f"write one of {', '.join(ENV_NAMES)}; other variables are not passed on"),
]
ConfigMapKey = Annotated[
    str, Field(max_length=253), Pattern(r"^[-._a-zA-Z0-9]+$", "write a key of the ConfigMap, such as ca.crt")
]
TopologyKey = Annotated[
    str,
    Field(max_length=317),
    Pattern(rf"^({SUBDOMAIN}/)?{QUALIFIED_NAME}$", "write a label of nodes, such as topology.kubernetes.io/zone"),
]
GpuProduct = Annotated[
    str,
    Field(min_length=1, max_length=63),
    Pattern(rf"^{QUALIFIED_NAME}$", "write a value of the node label nvidia.com/gpu.product, such as NVIDIA-H200"),
]
ShortText = Annotated[str, Field(max_length=256)]


class CaBundle(ApiModel):
    """Certificates of authorities, in PEM."""

    config_map_name: ResourceName
    """ConfigMap of the job's namespace."""

    key: ConfigMapKey = "ca.crt"
    """Key of the ConfigMap. Default ca.crt, as cert-manager's trust-manager and OpenShift write it."""


class TopologySpread(ApiModel):
    """Spread of the pods of a namespace's jobs over zones, racks or nodes."""

    topology_key: TopologyKey
    """Label of nodes whose values are the places, such as topology.kubernetes.io/zone."""

    max_skew: Annotated[int, Field(ge=1, le=100)] = 1
    """Pods that one place may have more than another. Default 1."""

    when_unsatisfiable: Literal["ScheduleAnyway", "DoNotSchedule"] = "ScheduleAnyway"
    """What happens if no node fits. Default ScheduleAnyway."""


class PodOptions(ApiModel):
    """Identity, labels, registries, proxies and places of the job's pods, those of preflight and of the trainer.

    The administrator sets defaults (podDefaults of the operator's chart) and says which of these fields a job may set
    (allowedOverrides); a job that sets another one is refused before any pod."""

    service_account_name: ResourceName | None = None
    """ServiceAccount of the pods, for clouds that give it an identity. Its token is not mounted. Default: the
    administrator's, else the namespace's default one."""

    labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=16, default_factory=dict)]
    """Labels of the pods, such as a cost centre, or azure.workload.identity/use. Those of a scheduler stand in
    spec.scheduling.labels."""

    annotations: Annotated[
        dict[LabelKey, Annotated[str, Field(max_length=256)]], Field(max_length=16, default_factory=dict)
    ]
    """Annotations of the pods. Those of a scheduler stand in spec.scheduling.annotations."""

    image_pull_secrets: Annotated[tuple[ResourceName, ...], Field(max_length=8)] = ()
    """Secrets of the job's namespace with which the image is pulled."""

    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When the image is pulled. Default: the administrator's, else IfNotPresent."""

    env: Annotated[dict[EnvName, Annotated[str, Field(max_length=512)]], Field(max_length=24, default_factory=dict)]
    """Variables for proxies, mirrors and the network between nodes, such as HTTPS_PROXY, NO_PROXY, HF_ENDPOINT,
    AWS_REGION and NCCL_SOCKET_IFNAME. A value may hold no
    password, as everybody who reads the job reads it."""

    ca_bundle: CaBundle | None = None
    """Authorities that the pods trust in addition to the public ones, as for a proxy that opens TLS."""

    gpu_products: Annotated[tuple[GpuProduct, ...], Field(max_length=16)] = ()
    """GPU products of which the trainer's node has one, by the node label nvidia.com/gpu.product; the job has to fit
    into the smallest. Default: any."""

    topology_spread: Annotated[tuple[TopologySpread, ...], Field(max_length=4)] = ()
    """Spread of the trainers over zones or nodes. Default: the scheduler's."""

    cache_claim: ResourceName | None = None
    """PersistentVolumeClaim of the job's namespace in which models and data of the Hub, and base models in NF4, are
    kept for the next job; several jobs at a time need one that many nodes can write. Default: each pod downloads and
    quantises them."""

    rules = (
        Rule(
            cel=f"!has(self.labels) || self.labels.all(key, !key.matches(r'{RESERVED_LABELS}'))",
            holds=lambda pod: not any(re.search(RESERVED_LABELS, key) for key in pod.labels),
            message="spec.pod.labels: keys of Kubernetes, Kueue and this operator are not to be set here; "
            "those of a scheduler stand in spec.scheduling.labels",
        ),
        Rule(
            cel=f"!has(self.annotations) || self.annotations.all(key, !key.matches(r'{RESERVED_ANNOTATIONS}'))",
            holds=lambda pod: not any(re.search(RESERVED_ANNOTATIONS, key) for key in pod.annotations),
            message="spec.pod.annotations: keys of Kueue, of this operator and of old security fields are not to be "
            "set here; those of a scheduler stand in spec.scheduling.annotations",
        ),
        Rule(
            cel=f"!has(self.env) || self.env.all(name, !self.env[name].matches(r'{_PASSWORD}'))",
            holds=lambda pod: not any(re.search(_PASSWORD, value) for value in pod.env.values()),
            message="spec.pod.env: a value holds a user or a password, which everybody reads who may read the job: "
            "write the address alone",
        ),
    )
