"""The plan of one pod of the trainer's image: for which job, what it runs, and which volumes it needs.

Training and preflight run the same image with the same inputs. What differs follows from `component`: the command, and
whether the pod has a token to report progress with. Claims and credentials are computed once, because the pod's
environment, its mounts and its volumes must all agree about them.
"""

from dataclasses import dataclass
from typing import Literal, Self

from finetune_api.base import Json
from finetune_api.job import ObjectMeta
from finetune_api.spec.sources import Scheme, Source
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.vocabulary import MultiNode
from finetune_operator.desired.names import PREFLIGHT, TRAINER, Component, child_name, job_set_job_name, preflight_name

S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
S3_OPTIONAL_KEYS = ("AWS_SESSION_TOKEN",)
HUB_KEYS = ("HF_TOKEN",)


@dataclass(frozen=True)
class PodPlan:
    """One pod of the trainer's image. Build it with `for_component`."""

    job: ObjectMeta
    spec: FineTuneJobSpec
    image: str
    config_map: str
    """Name of the ConfigMap that the pod mounts."""

    component: Component
    claims: dict[str, str]
    """Names of PersistentVolumeClaims by purpose (`model`, `dataset`). One claim may serve both purposes."""

    credentials: list[Json]
    """Sources of the projected volume that holds the credentials; empty if the job names no Secret."""

    @classmethod
    def for_component(
        cls, component: Component, job: ObjectMeta, spec: FineTuneJobSpec, image: str, config_map: str
    ) -> Self:
        """Plans the pod that trains (`trainer`) or checks (`preflight`) for `job`."""
        return cls(job, spec, image, config_map, component, _claims(spec), _credential_sources(spec))

    @property
    def command(self) -> Literal["run", "preflight"]:
        """Subcommand of `finetune-trainer`."""
        return "preflight" if self.component == PREFLIGHT else "run"

    @property
    def reports_progress(self) -> bool:
        """True if the pod gets a token for the operator's progress endpoint. Preflight needs none: all it has to say
        fits into its termination message."""
        return self.component == TRAINER

    @property
    def nodes(self) -> int:
        """Number of pods that run together, each on a node of its own."""
        return self.spec.resources.nodes if self.component == TRAINER else 1

    @property
    def job_name(self) -> str:
        """Name of the batch/v1 Job that runs the pod."""
        return preflight_name(self.job) if self.component == PREFLIGHT else trainer_job_name(self.job, self.spec)


def is_in_job_set(spec: FineTuneJobSpec) -> bool:
    """True if a JobSet makes the trainer's Job, and gives it its name."""
    return spec.resources.multi_node is MultiNode.JOB_SET


def trainer_job_name(job: ObjectMeta, spec: FineTuneJobSpec) -> str:
    """Name of the batch/v1 Job that trains."""
    return job_set_job_name(job) if is_in_job_set(spec) else child_name(job)


def _claims(spec: FineTuneJobSpec) -> dict[str, str]:
    sources = {"model": Source.parse(spec.model.source), "dataset": Source.parse(spec.dataset.source)}
    return {purpose: source.location for purpose, source in sources.items() if source.scheme is Scheme.PVC}


def _credential_sources(spec: FineTuneJobSpec) -> list[Json]:
    """Secrets as folders of one volume (output/, model/, dataset/, hub/).

    Only documented keys are mounted, so a Secret that holds more than those does not end up in the pod. A missing
    Secret or a missing required key keeps the pod from starting.
    """
    hub = spec.output.hub
    users = (
        ("output", spec.output.s3.credentials, Scheme.S3),
        ("model", spec.model.credentials, Source.parse(spec.model.source).scheme),
        ("dataset", spec.dataset.credentials, Source.parse(spec.dataset.source).scheme),
        ("hub", hub.credentials if hub else None, Scheme.HUGGING_FACE),
    )

    sources: list[Json] = []
    for folder, credentials, scheme in users:
        if credentials is None or scheme not in (Scheme.S3, Scheme.HUGGING_FACE):
            continue
        required, optional = (S3_KEYS, S3_OPTIONAL_KEYS) if scheme is Scheme.S3 else (HUB_KEYS, ())
        sources.append({"secret": _items(credentials.secret_name, folder, required)})
        if optional:
            sources.append({"secret": _items(credentials.secret_name, folder, optional) | {"optional": True}})

    return sources


def _items(secret: str, folder: str, keys: tuple[str, ...]) -> Json:
    return {"name": secret, "items": [{"key": key, "path": f"{folder}/{key}"} for key in keys]}
