"""Values that the installation of the operator gives to every job: images, addresses and limits."""

from dataclasses import dataclass, field

from finetune_api.cost.prices import PriceTable
from finetune_api.logs.formats import LogFormat
from finetune_api.spec.endpoints import EndpointPolicy
from finetune_api.spec.location import DEFAULT_TEMPLATE, LocationTemplate
from finetune_api.spec.pod_policy import PodPolicy


@dataclass(frozen=True)
class Installation:
    """Values that every job gets from the operator's installation."""

    trainer_image: str
    progress_url: str
    ca_certificate: str | None
    """PEM text of the authority that signed the operator's certificate; None if a public one did."""

    location_template: LocationTemplate = DEFAULT_TEMPLATE
    """Where in its bucket a new job writes, below `spec.output.s3.prefix`."""

    denied_namespaces: tuple[str, ...] = ()
    """Namespaces whose jobs are refused."""

    endpoints: EndpointPolicy = field(default_factory=EndpointPolicy)
    """Addresses that trainers may connect to."""

    prices: PriceTable | None = None
    """Prices of GPUs; None: nothing is said about cost."""

    log_format: LogFormat = LogFormat.TEXT
    """Form of the trainers' log lines."""

    kueue: bool = False
    """Whether the operator has rights on Kueue's objects."""

    queue_preflight: bool = False
    """Whether preflight's Job waits in its job's queue too, as clusters need in which Kueue manages every Job."""

    pods: PodPolicy = field(default_factory=PodPolicy)
    """What pods carry, and what a job may set of it."""

    max_gpus_per_namespace: int | None = None
    """GPUs that the jobs of one namespace may hold at a time; None: as many as there are."""

    job_sets: bool = False
    """Whether the operator has rights on JobSets."""
