"""What the place where the trainer runs says: the only reader of the environment.

The job itself is in the RunConfig; this is about folders, mounts and identity.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_trainer.errors import TrainerError

DEFAULT_TERMINATION_LOG = "/dev/termination-log"


@dataclass(frozen=True)
class Settings:
    """Folders and identity of one attempt."""

    work: Path
    """Scratch space for the base model, checkpoints and artifacts."""
    attempt_id: str
    """Fence of everything that this attempt writes: the pod's UID."""
    config: Path | None = None
    """The mounted run_config.yaml."""
    credentials: Path | None = None
    """Folder with output/, model/, dataset/ and hub/, each a mounted Secret."""
    token: Path | None = None
    """Projected token for progress reports."""
    termination_log: Path | None = None
    model_mount: Path | None = None
    """Where the PersistentVolumeClaim of a pvc:// model is mounted."""
    dataset_mount: Path | None = None
    output_folder: Path | None = None
    """Results go here instead of S3 (`finetune run --output`)."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Settings of a pod; raises KeyError for a variable that the operator always sets."""

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
        )

    def credentials_of(self, use: str) -> Path | None:
        """Folder of the Secret for `output`, `model`, `dataset` or `hub`; None where the job names none."""
        folder = self.credentials / use if self.credentials else None
        return folder if folder and folder.is_dir() else None


def load_config(settings: Settings) -> RunConfig:
    """The mounted RunConfig; raises TrainerError (InvalidConfiguration) with every error at once."""
    assert settings.config is not None
    try:
        return RunConfig.from_yaml(settings.config.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, f"{settings.config}: {error}") from None
