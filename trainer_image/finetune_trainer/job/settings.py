"""Reads folders, mounts and identity of an attempt from the environment; nothing else reads it.

The job itself is in the RunConfig.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_trainer.distributed.nodes.place import Place
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.retry import HUB_RETRIES, RetryPolicy

LOCAL_HUB_RETRIES = RetryPolicy(outage_seconds=10, first_wait=1)
"""Retries where somebody waits at a terminal, who can start the command again."""
LOCAL_ATTEMPT = "local"
"""Stands for the pod of a run without a cluster: each such run is a job of its own."""
CPU_RANKS = "FINETUNE_CPU_RANKS"
DEFAULT_TERMINATION_LOG = "/dev/termination-log"


@dataclass(frozen=True)
class Settings:
    """Folders and identity of one attempt."""

    work: Path
    """Scratch space for the base model, checkpoints and artifacts."""
    attempt_id: str
    """The pod's UID; everything that this attempt writes carries it, so that attempts cannot mix."""
    config: Path | None = None
    """The mounted run_config.yaml."""
    credentials: Path | None = None
    """Folder with output/, model/, dataset/ and hub/, each a mounted Secret."""
    token: Path | None = None
    """Projected token for progress reports."""
    termination_log: Path | None = None
    """File that Kubernetes reads the termination message from."""
    model_mount: Path | None = None
    """Mount of the PersistentVolumeClaim, if the model is a pvc:// source."""
    dataset_mount: Path | None = None
    """Mount of the PersistentVolumeClaim, if the dataset is a pvc:// source."""
    hub_retries: RetryPolicy = HUB_RETRIES
    """Time for which the Hugging Face Hub is asked again."""
    cpu_ranks: int = 1
    """Processes of a pod that train together where a job has no GPU."""
    node: int = 0
    """The pod's completion index, in a run on several nodes."""
    rendezvous: str | None = None
    """HOST:PORT at which the pods of a run on several nodes meet; None on one node."""
    triton_seed: Path | None = None
    """What the image has compiled for Triton; None outside the image."""
    triton_cache: Path | None = None
    """Triton's cache; None: below the user's home folder."""
    ca_bundle: Path | None = None
    """Mounted certificates of authorities to trust beside the public ones."""
    hub_cache: bool = False
    """True if the Hub's own cache is on a volume that outlives the pod."""
    nf4_cache: Path | None = None
    """Folder of base models in NF4, on a volume that outlives the pod; None: each run quantises its own."""
    output_folder: Path | None = None
    """Results go here instead of S3 (`finetune run --output`)."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Settings of a pod. Raises KeyError if a variable is missing that the operator always sets."""

        def path(name: str) -> Path | None:
            return Path(environment[name]) if environment.get(name) else None

        return cls(
            work=Path(environment["FINETUNE_WORK_DIR"]),
            attempt_id=environment["FINETUNE_ATTEMPT_ID"],
            config=Path(environment["FINETUNE_CONFIG"]),
            credentials=path("FINETUNE_CREDENTIALS_DIR"),
            token=path("FINETUNE_TOKEN_FILE"),
            termination_log=Path(environment.get("FINETUNE_TERMINATION_LOG", DEFAULT_TERMINATION_LOG)),
            model_mount=path("FINETUNE_MODEL_MOUNT"),
            dataset_mount=path("FINETUNE_DATASET_MOUNT"),
            triton_seed=path("FINETUNE_TRITON_SEED"),
            triton_cache=path("TRITON_CACHE_DIR"),
            ca_bundle=path("FINETUNE_CA_BUNDLE"),
            hub_cache="FINETUNE_HUB_CACHE" in environment,
            nf4_cache=path("FINETUNE_NF4_CACHE"),
            cpu_ranks=int(environment.get(CPU_RANKS, "1")),
            node=int(environment.get("JOB_COMPLETION_INDEX", "0")),
            rendezvous=environment.get("FINETUNE_RENDEZVOUS"),
        )

    def place_among(self, nodes: int) -> Place | None:
        """Place of this pod among the `nodes` of its run; None in a run on one node."""
        return Place.parse(self.node, nodes, self.rendezvous) if nodes > 1 and self.rendezvous else None

    def credentials_of(self, use: str) -> Path | None:
        """Folder of the Secret for `output`, `model`, `dataset` or `hub`; None if the job names none."""
        folder = self.credentials / use if self.credentials else None
        return folder if folder and folder.is_dir() else None


def load_config(settings: Settings) -> RunConfig:
    """Reads the mounted RunConfig. Raises TrainerError (InvalidConfiguration) with all errors together."""
    assert settings.config is not None
    try:
        return RunConfig.from_yaml(settings.config.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, f"{settings.config}: {error}") from None
