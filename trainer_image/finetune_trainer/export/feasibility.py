"""Asks before training what an export would answer after it: can this adapter be merged, this model be converted?

The answers are those of the export's own functions, on the base's real files and on the adapter as it will be saved.
"""

from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict

from finetune_api.spec.output import ExportSpec
from finetune_api.vocabulary import MergedType
from finetune_trainer.export.adapter import check_merge
from finetune_trainer.export.base_model.folder import BaseModel, open_base_model, with_new_tokens
from finetune_trainer.export.base_model.grown_vocabulary import TRAINED_ROWS, trained_rows_of
from finetune_trainer.export.base_model.tokenizer_files import TokenizerFiles
from finetune_trainer.export.errors import InvalidAdapterError, InvalidBaseError
from finetune_trainer.export.expert_adapters import (
    adapted_parts,
    expert_targets,
    is_swapped,
    published_state,
    stored_of,
)
from finetune_trainer.export.gguf.conversion import check_conversion
from finetune_trainer.export.planned_merge import ADAPTER_ALONE


def check_export(spec: ExportSpec, base: Path, tokenizer: TokenizerFiles, model: Any) -> None:
    """Raise ExportError for an export that could not be made of `model`, peft's, trained on the folder `base`.

    `tokenizer` are the files that will lie beside the adapter.
    """
    if spec.merged is MergedType.NONE and not spec.gguf:
        return

    try:
        opened = open_base_model(base)
        opened = with_new_tokens(opened, dict.fromkeys(_trained_rows(model), ()))
    except InvalidBaseError as error:
        raise InvalidBaseError(f"spec.model.source: {error.message}; {ADAPTER_ALONE}") from error

    try:
        check_adapter(model, opened)
    except InvalidAdapterError as error:
        raise InvalidAdapterError(f"spec.adapter.targetModules: {error.message}; {ADAPTER_ALONE}") from error

    if spec.gguf:
        check_conversion(spec.gguf, opened.full_config, tokenizer, opened.generation_config, opened.shapes)


def _trained_rows(model: Any) -> list[int]:
    """Ids of the tokens whose rows `model`, peft's, trains."""
    setting = getattr(model.peft_config["default"], TRAINED_ROWS)
    return [number for _, ids in trained_rows_of(setting) for number in ids]


def check_adapter(model: Any, base: BaseModel) -> None:
    """Raise InvalidAdapterError if the adapter of `model`, peft's, as it will be published, has no place in `base`."""
    config, stored = model.peft_config["default"].to_dict(), stored_of(model)
    trained = get_peft_model_state_dict(model, save_embedding_layers=False)
    state = published_state(trained, stored, config, swapped=is_swapped(base.config))
    if parts := adapted_parts(model):
        config |= expert_targets(config, parts, stored)
    check_merge(config, {name: tuple(weights.shape) for name, weights in state.items()}, base)
