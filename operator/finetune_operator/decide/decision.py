"""What is decided about one observation: the phase, in words, and the writes to child objects (pure)."""

from dataclasses import dataclass

from finetune_api.base import Json
from finetune_api.outcome import Outcome
from finetune_api.status import Failure
from finetune_api.vocabulary import Phase, PreflightResult

RETRY_SECONDS = 30.0


@dataclass(frozen=True)
class Installation:
    """What every job gets from the way the operator was installed."""

    trainer_image: str
    progress_url: str
    ca_certificate: str | None


@dataclass(frozen=True)
class Actions:
    """Writes to child objects, in the order of the fields."""

    create_config_map: Json | None = None
    update_config_map: Json | None = None
    create_job: Json | None = None
    """The trainer's Job, or that of preflight."""

    patch_job: Json | None = None
    patch_preflight: Json | None = None


@dataclass(frozen=True)
class Decision:
    """The answer to one observation."""

    phase: Phase
    reason: str
    message: str
    actions: Actions = Actions()
    is_stalled: bool = False
    """Whether the job needs a person."""

    failure: Failure | None = None
    outcome: Outcome | None = None
    """The last words of a job that has ended, or of its newest pod."""

    preflight: PreflightResult | None = None
    """How preflight ended, where that was seen just now."""

    requeue_seconds: float | None = None
    """Look again after this time even if nothing happens."""
