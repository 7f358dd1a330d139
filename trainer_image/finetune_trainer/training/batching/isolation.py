"""Keeps documents apart: finds the batching in which no document sees another, by computing two of them.

What a model does with the boundaries of packed documents differs by architecture, by version of transformers and by
installed kernels, and nothing says so: gpt-oss takes them and ignores them. So the loaded model is asked, with its
adapter and kernels in place. For documents x and y, and others x' and y' of the same lengths, logits must be equal:

    of y, together with x and with x'        y sees nothing of x
    of x, together with y and with y'        x sees nothing of y; the control, since x comes first
    of each, together and alone              positions begin anew; up to rounding, as the shapes differ

With equal shapes, rounding is equal too: over all causal language models of transformers 5.23 on a CPU the first
difference is 0 in bfloat16 and at most 1e-6 in float32 where documents are apart, and at least 1e-2 where they are not
(`make architectures`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune_api.failures import FailureReason
from finetune_api.vocabulary import Batching
from finetune_kernels.layers.supervised_loss import causal_model
from finetune_kernels.mixers.isolation import isolate_documents
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.description import first_line
from finetune_trainer.training.batching.trial import (
    DEVICE_ERRORS,
    LENGTHS,
    compute_type,
    failures_of_architecture,
    on_device,
)
from finetune_trainer.training.collator import COLLATORS
from finetune_trainer.training.loaded_model import LoadedModel
from finetune_trainer.training.samples import sampling_mode

log = logging.getLogger(__name__)
EXACT = 1e-3
"""Accepted difference between passes of the same shape. GPU kernels of experts may choose tiles by the routing."""
ROUNDED = 0.15
"""Accepted difference between passes of different shapes. Measured in bfloat16: at most 7e-3 over 4 layers, and 5.6e-2
over the 32 of Qwen 3.5 9B, with random weights."""
LEAK = 0.05
"""Difference between passes of the same shape that no rounding makes."""
CONTROL = 4.0
"""Accepted ratio to the same difference of a document that cannot see the other."""
Document = list[int]


@dataclass(frozen=True)
class BatchingChoice:
    """The batching in which documents are apart."""

    kind: Batching
    reason: str | None = None
    """Why documents are not packed; None if they are."""


PACKED = BatchingChoice(Batching.PACKED)


def choose_batching(model: Any, loaded: LoadedModel) -> BatchingChoice:
    """Returns the first of packed, padded and single documents in which no document of `model` sees another. Mixers of
    hybrids are made to keep them apart.

    Raises TrainerError (UnsupportedArchitecture) if the model cannot be computed, or its tokens see those after them.
    """
    if mixers := isolate_documents(causal_model(model)):
        log.info("%d layers without attention run each packed document by itself, in padded batches", mixers)

    probe = _Probe(model, loaded)
    with sampling_mode(model, seed=0):
        with failures_of_architecture(loaded):
            sees_later = probe.sees_later_tokens()
        if sees_later:
            message = f"{loaded.architecture} is no causal language model here: its tokens see those after them"
            raise TrainerError(FailureReason.UNSUPPORTED_ARCHITECTURE, message)

        reason = None
        for kind in (Batching.PACKED, Batching.PADDED):
            if (problem := probe.why_not(kind)) is None:
                return BatchingChoice(kind, reason)
            log.warning("%s documents of %s: %s", kind.lower(), loaded.architecture, problem)
            reason = reason or f"{loaded.architecture} cannot pack documents: {problem}"
    return BatchingChoice(Batching.SINGLE, reason)


class _Probe:
    """Two documents that are computed together and alone."""

    def __init__(self, model: Any, loaded: LoadedModel) -> None:
        self._model, self._loaded = model, loaded
        generator = torch.Generator().manual_seed(0)
        x, y, *others = (
            torch.randint(loaded.embedding_rows, (length,), generator=generator).tolist() for length in LENGTHS * 2
        )
        self._x, self._y, self._other_x, self._other_y = x, y, *others

    def sees_later_tokens(self) -> bool:
        """True if logits change with the tokens after them; not so in a causal language model.

        Raises TrainerError (NonFiniteLoss) for logits that are no numbers.
        """
        changed = self._x[: LENGTHS[1]] + self._other_x[LENGTHS[1] :]
        (one,), (other,) = (self._logits(Batching.SINGLE, [document]) for document in (self._x, changed))
        if one.isnan().any():
            message = f"before training, the logits of {self._loaded.architecture} are no numbers (NaN)"
            raise TrainerError(FailureReason.NON_FINITE_LOSS, message)
        return _distance(other[: LENGTHS[1]], one[: LENGTHS[1]]) > LEAK

    def why_not(self, kind: Batching) -> str | None:
        """Returns why documents are not apart in a batching of this `kind`; None if they are."""
        try:
            x, y = self._logits(kind, [self._x, self._y])
            _, y_after_other = self._logits(kind, [self._other_x, self._y])
            x_before_other, _ = self._logits(kind, [self._x, self._other_y])
        except DEVICE_ERRORS:
            raise
        except Exception as error:  # any module of any architecture may fail in any way
            log.info("%s documents cannot be computed", kind.lower(), exc_info=True)
            return f"the model does not take them ({type(error).__name__}: {first_line(error)[:120]})"

        (x_alone,), (y_alone,) = (self._logits(Batching.SINGLE, [document]) for document in (self._x, self._y))
        seen, control = _distance(y_after_other, y), _distance(x_before_other, x)
        moved, rounding = _distance(y, y_alone), _distance(x, x_alone)
        log.info(
            "%s documents: logits of the second change by %.1e with the first, of the first by %.1e with the second; "
            "by %.1e and %.1e against each alone",
            kind.lower(), seen, control, moved, rounding,
        )  # fmt: skip

        # Comparisons with NaN are false, so logits that are NaN are never apart.
        if not (control <= LEAK and seen <= max(EXACT, CONTROL * control)):
            return f"they see each other (logits change by {max(seen, control):.0%} with the other document)"
        if not (rounding <= ROUNDED and moved <= max(ROUNDED, CONTROL * rounding)):
            return f"they are not computed as each alone (logits differ by {max(moved, rounding):.0%})"
        return None

    def _logits(self, kind: Batching, documents: Sequence[Document]) -> list[torch.Tensor]:
        """Logits of each document, [its tokens, vocabulary], from one pass over all of them."""
        batch = COLLATORS[kind]([{"input_ids": document, "labels": list(document)} for document in documents])
        inputs = on_device(batch, self._loaded.device)
        del inputs["labels"], inputs["supervised"]

        with compute_type(self._loaded):
            logits = self._model(**inputs, use_cache=False).logits  # [1, T, V] or [B, T, V]
        if kind is Batching.PACKED:
            return list(logits[0].split([len(document) for document in documents]))
        return [row[: len(document)] for row, document in zip(logits, documents, strict=True)]


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference of logits [T, V] around their mean: the median over the tokens.

    Not the largest: rounding may send a single token to another expert, and a leak changes most tokens.
    """
    one, other = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (found, expected))
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-30)).median())
