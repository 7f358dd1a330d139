"""Asks a tiny model of every causal language model type of transformers how its documents are kept apart.

`make architectures` prints the answer for all types (2 minutes on two cores), and fails where one differs from the
table that preflight reads.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import set_verbosity_error

from finetune_api.vocabulary import Batching, Precision
from finetune_test_models.tiny_architectures import VOCABULARY, tiny_architecture
from finetune_trainer.model.architectures import UNPACKED, why_untrainable
from finetune_trainer.training.batching.isolation import choose_batching
from finetune_trainer.training.collator import COLLATORS
from finetune_trainer.training.loaded_model import LoadedModel
from finetune_trainer.training.losses import supervised_loss

LENGTHS = (20, 33, 40, 27)
NEAR = 0.01
"""Accepted difference between the summed loss of documents together and alone, in nats."""


@dataclass(frozen=True)
class Answer:
    """The batching of one model type, or why there is none."""

    model_type: str
    batching: Batching | None
    """None: the type is refused, or has no model of its own."""
    remark: str = ""
    is_right: bool = True
    """True if batches have the loss of their documents, a backward pass works, and preflight's table agrees."""


def types() -> list[str]:
    """Every type, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def ask(model_type: str) -> Answer:
    """The answer for one type."""
    if reason := why_untrainable(model_type):
        return Answer(model_type, None, reason)
    if (text_type := CONFIG_MAPPING[model_type]().get_text_config().model_type) != model_type:
        return Answer(model_type, None, f"its language model is {text_type}")

    model = tiny_architecture(model_type)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    choice = choose_batching(model, LoadedModel(model, None, name, Precision.FP32, torch.device("cpu")))

    rows = _documents()
    together = _loss(model, choice.kind, rows)
    together.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        apart = sum(_loss(model, Batching.SINGLE, [row]).item() for row in rows)

    remark = choice.reason or ""
    if not (has_loss := abs(together.item() - apart) < NEAR):
        remark += f" together {together.item():.3f} nats, apart {apart:.3f}"
    if not (agrees := (choice.kind is not Batching.PACKED) == (model_type in UNPACKED)):
        remark += " preflight's table says otherwise"
    return Answer(model_type, choice.kind, remark, has_loss and agrees)


def _documents() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": ids, "labels": list(ids)} for ids in drawn]


def _loss(model: Any, kind: Batching, rows: list[dict[str, Any]]) -> torch.Tensor:
    batch = COLLATORS[kind](rows)
    labels, positions = batch.pop("labels"), batch.pop("supervised")
    return supervised_loss(model, batch, labels, positions, 1)


def sweep(model_types: list[str]) -> Iterator[Answer]:
    """Answers for all `model_types`; one that cannot be built or asked is not right."""
    for model_type in model_types:
        try:
            yield ask(model_type)
        except Exception as error:  # noqa: BLE001  # every architecture may fail in a way of its own
            yield Answer(model_type, None, f"{type(error).__name__}: {error}", is_right=False)


def main() -> None:
    """Prints a line for each type, and exits with 1 unless all are right."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)

    answers = []
    for answer in sweep(sys.argv[1:] or types()):
        answers.append(answer)
        mark = "" if answer.is_right else "WRONG "
        print(
            f"{answer.model_type:<26} {mark}{answer.batching or '-':<8} {' '.join(answer.remark.split())}", flush=True
        )

    for kind in (*Batching, None):
        print(f"{kind or 'none':<8} {sum(answer.batching is kind for answer in answers)}")
    sys.exit(not all(answer.is_right for answer in answers))


if __name__ == "__main__":
    main()
