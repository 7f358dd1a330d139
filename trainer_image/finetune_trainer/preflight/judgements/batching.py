"""Judges what it costs that a model's documents cannot be packed. Pure."""

from collections.abc import Iterator, Sequence
from typing import Any

from finetune_api.run_config import RunConfig
from finetune_kernels.planning.families import family_of_config
from finetune_kernels.planning.micro_batch import default_micro_batch
from finetune_trainer.data.length_grouping import group_by_length, padding_share
from finetune_trainer.model.architectures import UNPACKED
from finetune_trainer.preflight.report import Finding

PACKING = "spec.dataset.packing"


def pads_rows(config: RunConfig, model: Any) -> bool:
    """True if documents of `model`, transformers' configuration, would see each other if they were packed. The kernels'
    attention, on a GPU, keeps apart those of models with sinks; transformers' own takes their bounds and ignores them.
    """
    family = None if model is None else family_of_config(model)
    has_own_attention = config.gpus == 0 and family is not None and family.has_sinks
    return has_own_attention or getattr(model, "model_type", None) in UNPACKED


def judge_batching(model: Any, lengths: Sequence[int], config: RunConfig) -> Iterator[Finding]:
    """A warning if rows of `lengths` tokens will be padded; they are a sample of those that train, after truncation."""
    if not pads_rows(config, model) or not lengths:
        return

    sequences = config.training.sequences_per_step()
    size = config.training.batch_size or default_micro_batch(sequences).size
    if size == 1 and not config.dataset.packing:
        return  # one row a pass is what the job asks for

    order = group_by_length(lengths, sequences, config.training.seed)
    share = padding_share([lengths[number] for number in order], size)
    tokens = round(sum(lengths) / len(lengths) * sequences)
    yield Finding.warning(
        PACKING,
        f"documents of a {model.model_type} model would see each other if they were packed, so rows are padded to the "
        f"longest of {size}: about {share:.1%} of the tokens computed are padding, and a step has {sequences} rows, "
        f"about {tokens} tokens; for larger steps, raise spec.training.gradientAccumulation",
    )
