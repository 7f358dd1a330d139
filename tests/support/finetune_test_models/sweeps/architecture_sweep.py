"""Asks a tiny model of every causal language model type of transformers how its documents are kept apart.

`make architectures` writes the answers for all types into the table that preflight reads (see `family_table`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_api.spec.training import ALL_LINEAR, DEFAULT_TARGETS, AdapterSpec
from finetune_api.vocabulary import Batching, Precision
from finetune_kernels.layers.packed_attention import use_packed_attention
from finetune_kernels.layers.supervised_loss import causal_model
from finetune_test_models.tiny_architectures import VOCABULARY, tiny_architecture
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.architectures import why_no_decoder
from finetune_trainer.stages.adapter_injection import inject_adapter
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
    """True if batches have the loss of their documents, and a backward pass works."""


def types() -> list[str]:
    """Every type, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def ask(model_type: str) -> Answer:
    """The answer for one type."""
    if reason := why_no_decoder(model_type):
        return Answer(model_type, None, reason)
    if (text_type := CONFIG_MAPPING[model_type]().get_text_config().model_type) != model_type:
        return Answer(model_type, None, f"its language model is {text_type}")

    model = _with_adapters(tiny_architecture(model_type)).eval()  # without the dropout of old families
    use_packed_attention(causal_model(model))  # as on a GPU, for families that the kernels know
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
    return Answer(model_type, choice.kind, remark, has_loss)


def _with_adapters(model: Any) -> Any:
    """The model as it trains: with adapters on the default layers, or on all linear ones where it has none of them."""
    for targets in (DEFAULT_TARGETS, (ALL_LINEAR,)):
        try:
            return inject_adapter(model, AdapterSpec(target_modules=targets), 0).model
        except TrainerError:
            continue
    return model


def _documents() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": ids, "labels": list(ids)} for ids in drawn]


def _loss(model: Any, kind: Batching, rows: list[dict[str, Any]]) -> torch.Tensor:
    batch = COLLATORS[kind](rows)
    labels, positions = batch.pop("labels"), batch.pop("supervised")
    return supervised_loss(model, batch, labels, positions, 1)
