"""RunConfig: the hand-over from operator to trainer, mounted into the pod as one YAML file.

It holds everything about the job; everything about the node (folders, credentials, tokens) comes through the
environment. `finetune run` builds the same object on the user's machine.
"""

import hashlib
import json
from functools import lru_cache
from typing import Literal, Self

import yaml

from finetune_api import API_VERSION
from finetune_api.base import ApiModel, NonNegative
from finetune_api.cost.usage import Currency
from finetune_api.gpus import ExpectedGpu, expected_gpu, to_bytes
from finetune_api.logs.formats import LogFormat
from finetune_api.pod_ends.stalls import StallLimit
from finetune_api.spec.endpoints import EndpointPolicy
from finetune_api.spec.inputs import DatasetSpec, ModelSpec
from finetune_api.spec.location import DEFAULT_TEMPLATE
from finetune_api.spec.output import ExportSpec, OutputSpec
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.spec.training import AdapterSpec, TrainingSpec

TRAINED_BY = ("model", "dataset", "adapter", "training")
"""Sections of the spec that determine the trained adapter."""
NOT_IN_DIGEST = {
    "model": {"credentials"},
    "dataset": {"credentials"},
    "training": {"logging_steps", "checkpoint_steps", "parallelism"},
}
REMEMBERED = 256
"""Files that are remembered as written, about 5 kB each: the operator asks for a new job's file several times, and
writing YAML takes 3 ms."""
DEFAULTS_VERSION = 1
"""Raised when a default changes: the same spec then means another run, and must have another digest."""


class JobIdentity(ApiModel):
    """Namespace, name and UID of the job."""

    namespace: str
    name: str
    uid: str
    """UID of the FineTuneJob: a job deleted and created again under the same name is another job."""

    @property
    def path(self) -> str:
        """Namespace and name, as people write a job."""
        return f"{self.namespace}/{self.name}"


class GpuHourPrice(ApiModel):
    """Price of one GPU for an hour, by the administrator's table."""

    currency: Currency
    per_hour: NonNegative


class ProgressTarget(ApiModel):
    """Endpoint for progress reports. The bearer token is in the file that FINETUNE_TOKEN_FILE names."""

    url: str
    """Full https URL of this job's progress endpoint."""

    ca_certificate: str | None = None
    """PEM certificate of the authority that signed the server's certificate; None trusts the system's authorities."""

    interval_seconds: float = 5.0
    """Minimum seconds between two reports; a change of stage is reported at once."""


class RunConfig(ApiModel):
    """One training run, completely described."""

    api_version: Literal["finetune.dev/v1alpha1"] = API_VERSION
    kind: Literal["RunConfig"] = "RunConfig"
    job: JobIdentity
    model: ModelSpec
    dataset: DatasetSpec
    adapter: AdapterSpec
    training: TrainingSpec
    export: ExportSpec
    output: OutputSpec
    output_prefix: str
    """Prefix of every key that this job writes, without a slash at either end. The operator resolves it."""
    checkpoints_to_keep: int
    keep_checkpoints_after_success: bool = False
    termination_grace_period_seconds: int
    stall: StallLimit | None = None
    """Limit of the watchdog; None, in the file of an older operator: nothing is watched."""
    gpus: int
    """GPUs of a node."""
    nodes: int = 1
    """Nodes that train together; absent in the file of an older operator."""
    memory_bytes: int | None = None
    """Host memory that the pod may use; None, for a run without a cluster: what the machine has free."""
    ephemeral_storage_bytes: int | None = None
    """Disk that the pod may use; None: whatever the node has."""
    gpu: ExpectedGpu | None = None
    """GPU that preflight estimates for; the trainer reads the real GPU."""
    price: GpuHourPrice | None = None
    """Price that preflight's report reckons with; None if the job has none, or runs without a cluster."""
    kernels: bool = True
    """True if a GPU run may use our kernels; false trains on plain PyTorch, for comparison."""
    graphs: bool = True
    """True if passes of one shape, or packs of about one size, may be launched as CUDA graphs where the GPU waits for
    the host; false launches each kernel, for comparison."""
    progress: ProgressTarget | None = None
    """None for a run without a cluster."""
    endpoints: EndpointPolicy | None = None
    """Addresses that the trainer may connect to; None, for a run without a cluster: any."""
    log_format: LogFormat = LogFormat.TEXT
    """Form of the pod's log lines."""

    @property
    def processes(self) -> int:
        """Processes that train together: one a GPU, or one a node without GPUs."""
        return max(1, self.gpus) * self.nodes

    @classmethod
    def from_spec(
        cls, job: JobIdentity, spec: FineTuneJobSpec, progress: ProgressTarget | None, output_prefix: str | None = None
    ) -> Self:
        """Build the run that a job's spec describes. `output_prefix`: None is that of the default template, by which
        runs without a cluster write."""
        storage = spec.resources.ephemeral_storage
        by_default = DEFAULT_TEMPLATE.resolve(spec.output.s3.prefix, **job.model_dump())

        return cls(
            job=job,
            model=spec.model,
            dataset=spec.dataset,
            adapter=spec.adapter,
            training=spec.training,
            export=spec.export,
            output=spec.output,
            output_prefix=output_prefix or by_default,
            checkpoints_to_keep=spec.run_policy.checkpoints_to_keep,
            keep_checkpoints_after_success=spec.run_policy.keep_checkpoints_after_success,
            termination_grace_period_seconds=spec.run_policy.termination_grace_period_seconds,
            stall=StallLimit.of(spec.run_policy.stall_timeout_seconds),
            gpus=spec.resources.gpus,
            nodes=spec.resources.nodes,
            ephemeral_storage_bytes=to_bytes(storage) if storage is not None else None,
            gpu=expected_gpu(spec.resources, spec.pod.gpu_products),
            progress=progress,
        )

    def to_yaml(self) -> str:
        """Serialise to the file that the pod mounts."""
        return _dump_yaml(json.dumps(self.to_wire()))

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Parse the mounted file; raises pydantic.ValidationError with every error at once."""
        return cls.model_validate(yaml.safe_load(text), by_alias=True, by_name=False)

    def spec_digest(self) -> str:
        """SHA-256 (hex) of every field that determines the result: results with equal digests are interchangeable.

        Output location, logging and credentials are left out."""
        return self._digest(*TRAINED_BY, "export")

    def training_digest(self) -> str:
        """SHA-256 (hex) of every field that determines the trained adapter; it keys checkpoints.

        The export is left out too: a checkpoint outlives a change of it."""
        return self._digest(*TRAINED_BY)

    def _digest(self, *sections: str) -> str:
        """Digest of what the job sets otherwise than by default, so that a field of a new version changes none."""
        fields = {
            name: getattr(self, name).model_dump(mode="json", exclude=NOT_IN_DIGEST.get(name), exclude_defaults=True)
            for name in sections
        }
        text = json.dumps({"defaults": DEFAULTS_VERSION} | fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=REMEMBERED)
def _dump_yaml(document: str) -> str:
    """Serialise a JSON document to YAML."""
    return yaml.safe_dump(json.loads(document), sort_keys=False, allow_unicode=True)
