"""Judges whether the exports that a job asks for can be made, from config, tokenizer and headers of tensors alone."""

from collections.abc import Iterator, Sequence

from finetune_api.base import Json
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import GgufType, MergedType
from finetune_trainer.export.base_model.tokenizer_files import TokenizerFiles
from finetune_trainer.export.errors import ExportError
from finetune_trainer.export.gguf.conversion import check_conversion
from finetune_trainer.export.planned_merge import check_stored_types, check_targets
from finetune_trainer.model.safetensors_header import TensorHeader
from finetune_trainer.preflight.report import Finding

LOCATION = "spec.export.gguf"


def judge_merge(
    config: RunConfig, model_type: str | None, weights: Sequence[TensorHeader] | None, stored: Sequence[TensorHeader]
) -> Iterator[Finding]:
    """The errors that merging the adapter would end with, if the job asks for merged weights or GGUF files.

    `weights` are the headers of the weight files; None: unknown, or with names that tell nothing of the layers.
    `stored`: the same, whatever their names tell; empty if unknown.
    """
    if config.export.merged is MergedType.NONE and not config.export.gguf:
        return

    try:
        check_targets(model_type, config.adapter.target_modules, weights)
    except ExportError as error:
        yield Finding.error("spec.adapter.targetModules", error.message, error.reason)
    try:
        check_stored_types(stored)
    except ExportError as error:
        yield Finding.error("spec.model.source", error.message, error.reason)


def judge_gguf(
    types: Sequence[GgufType],
    config: Json,
    generation: Json,
    tokenizer: TokenizerFiles,
    weights: Sequence[TensorHeader] | None,
) -> Iterator[Finding]:
    """The error that an export to these types would end with, if any.

    `config` has its defaults filled in; `tokenizer` are the files that would lie beside the adapter, `weights` the
    headers of the weight files.
    """
    # The header of packed NF4 weights tells neither their shapes nor which tensors are parts of them.
    is_plain = weights is not None and all(header.dtype != "U8" for header in weights)
    shapes = [(header.name, header.shape) for header in weights] if weights is not None and is_plain else None
    try:
        check_conversion(types, config, tokenizer, generation, shapes)
    except ExportError as error:
        yield Finding.error(LOCATION, error.message, error.reason)
