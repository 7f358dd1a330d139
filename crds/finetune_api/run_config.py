"""Hand-over from operator to trainer: the resolved job, mounted into the pod as one YAML file.

Everything about the node (folders, credentials, tokens) comes through the environment, everything about the job is in
here. `finetune run` builds the same object on the user's machine.
"""

import hashlib
import json
from typing import Literal, Self

import yaml

from finetune_api import API_VERSION
from finetune_api.base import ApiModel
from finetune_api.gpus import ExpectedGpu, expected_gpu
from finetune_api.spec.inputs import DatasetSpec, ModelSpec
from finetune_api.spec.output import ExportSpec, OutputSpec
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.spec.training import AdapterSpec, TrainingSpec


class JobIdentity(ApiModel):
    """Which job this is."""

    namespace: str
    name: str
    uid: str
    """UID of the FineTuneJob: two jobs of one name are different jobs."""


class ProgressTarget(ApiModel):
    """Where the trainer reports to. The bearer token lies in the file that FINETUNE_TOKEN_FILE names."""

    url: str
    """Full https URL of this job's progress endpoint."""

    ca_certificate: str | None = None
    """PEM of the authority that signed the server's certificate; None means the system's authorities."""

    interval_seconds: float = 5.0
    """Shortest time between two reports, except that a change of stage is reported at once."""


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
    checkpoints_to_keep: int
    termination_grace_period_seconds: int
    gpus: int
    gpu: ExpectedGpu | None = None
    """What preflight estimates for; the trainer looks at the GPU itself."""
    kernels: bool = True
    """Whether a GPU run may use our kernels; false trains on plain PyTorch, for comparison."""
    progress: ProgressTarget | None = None
    """None for a run without a cluster."""

    @classmethod
    def from_spec(cls, job: JobIdentity, spec: FineTuneJobSpec, progress: ProgressTarget | None) -> Self:
        """The run that a job's spec describes."""
        return cls(
            job=job,
            model=spec.model,
            dataset=spec.dataset,
            adapter=spec.adapter,
            training=spec.training,
            export=spec.export,
            output=spec.output,
            checkpoints_to_keep=spec.run_policy.checkpoints_to_keep,
            termination_grace_period_seconds=spec.run_policy.termination_grace_period_seconds,
            gpus=spec.resources.gpus,
            gpu=expected_gpu(spec.resources),
            progress=progress,
        )

    def to_yaml(self) -> str:
        """The file that the pod mounts."""
        return yaml.safe_dump(self.to_wire(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Read the file back; raises pydantic.ValidationError with every error at once."""
        return cls.model_validate(yaml.safe_load(text))

    def spec_digest(self) -> str:
        """SHA-256 (hex) of everything that determines the result: it keys checkpoints and committed results. Where
        the result is stored, how it is logged and who may read the inputs do not count."""
        sections = {
            "model": self.model.model_dump(mode="json", exclude={"credentials"}),
            "dataset": self.dataset.model_dump(mode="json", exclude={"credentials"}),
            "adapter": self.adapter.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json", exclude={"logging_steps", "checkpoint_steps"}),
            "export": self.export.model_dump(mode="json"),
        }
        return hashlib.sha256(json.dumps(sections, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def output_prefix(self) -> str:
        """Key prefix of everything this job writes, without a trailing slash."""
        base = self.output.s3.prefix.strip("/") or self.job.namespace
        return f"{base}/{self.job.name}"
