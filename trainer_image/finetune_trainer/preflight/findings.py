"""Collects what the checks find: errors and warnings, and the facts about the model that later checks need."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import OnBadRow
from finetune_trainer.chat.new_tokens import FIELD as NEW_TOKENS
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.published_weights import PublishedWeights
from finetune_trainer.model.safetensors_header import TensorHeader
from finetune_trainer.preflight.judgements.rows import FIELD_OF, judge_rows
from finetune_trainer.preflight.report import Finding
from finetune_trainer.preflight.scan import Scan

Value = TypeVar("Value")


@dataclass
class Findings:
    """Errors and warnings as they are found."""

    found: list[Finding] = field(default_factory=list)
    unlisted: int = 0
    """Bad rows beyond those in `found`: they count as errors, too."""

    def attempt(self, location: str, action: Callable[[], Value]) -> Value | None:
        """The action's value; if it fails, None, and the error is noted for `location`."""
        try:
            return action()
        except TrainerError as failure:
            if failure.reason is FailureReason.INTERRUPTED:
                raise
            named = NEW_TOKENS if failure.message.startswith(f"{NEW_TOKENS}: ") else location
            found = Finding.error(FIELD_OF.get(failure.reason, named), failure.message, failure.reason)
            self.found.append(found)
            return None

    def judge_rows(self, scan: Scan, config: RunConfig, *source: str) -> None:
        self.found += judge_rows(scan, config, *source)
        if config.dataset.on_bad_row is OnBadRow.FAIL:
            self.unlisted += scan.unlisted_bad


@dataclass(frozen=True)
class ModelFacts:
    """Facts about the model that need no weights."""

    revision: str | None
    version: str
    """`FetchedSource.version`, of all files that a run fetches."""
    architecture: str | None
    configuration: Any | None
    """transformers' configuration of the language model."""
    tokenizer: Any | None
    base_model: str | None
    """Sign that the model was never trained on conversations; None without one."""
    weights: tuple[TensorHeader, ...] | None
    """Every tensor of the language model; None if they could not be read."""
    published: PublishedWeights | None = None
    """The weights as they are published; None if they could not be read."""
    new_tokens: str | None = None
    """What the job's new tokens make of the vocabulary; None without any."""
