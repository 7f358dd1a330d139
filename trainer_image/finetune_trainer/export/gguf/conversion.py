"""A conversion to GGUF without its weights: everything that config, tokenizer and names of tensors decide.

Preflight plans the same conversion as an export does, by the same function: what an export would refuse is known before
anything trains. Needs no PyTorch, as preflight does not have it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH_NAMES, GGUFWriter, Metadata

from finetune_api.vocabulary import GgufType
from finetune_trainer.export.base_model.tokenizer_files import TokenizerFiles
from finetune_trainer.export.errors import ExportError, UnsupportedTypeError
from finetune_trainer.export.gguf.config_checks import Shapes, check_sizes
from finetune_trainer.export.gguf.families.table import find_family
from finetune_trainer.export.gguf.family_row import GgufFamily
from finetune_trainer.export.gguf.hyperparameters import add_hyperparameters
from finetune_trainer.export.gguf.layers.experts import count_experts
from finetune_trainer.export.gguf.layers.first_layers import check_unread_keys
from finetune_trainer.export.gguf.tensor_names import TensorNames
from finetune_trainer.export.gguf.tokenizer import GgufTokenizer, read_tokenizer

WAY_ON = "to train without GGUF files, write export: {gguf: []}"


@dataclass(frozen=True)
class GgufConversion:
    """A conversion that nothing speaks against."""

    family: GgufFamily
    config: Mapping[str, Any]
    tokenizer: GgufTokenizer

    def new_writer(self, general: Metadata) -> GGUFWriter:
        """A writer that has all metadata; `general` are those of the model's origin."""
        writer = GGUFWriter(None, MODEL_ARCH_NAMES[self.family.architecture])
        general.set_gguf_meta_model(writer)
        add_hyperparameters(writer, self.family, self.config)
        self.tokenizer.add_to(writer)
        return writer


def plan_conversion(
    config: Mapping[str, Any], tokenizer: TokenizerFiles, generation: Mapping[str, Any], shapes: Shapes | None
) -> GgufConversion:
    """Plan the conversion of a model with this full `config`.

    `shapes` are its tensors; None: they are not known. Raises ExportError if llama.cpp has no equal of the model, of
    one of its settings, or of its tokenizer.
    """
    check_sizes(config, shapes)
    family = find_family(config)
    names = TensorNames(family, config)
    for name, _ in shapes or ():
        names.destinations(name)
    if shapes is not None:
        check_unread_keys(family, config, {name for name, _ in shapes})

    conversion = GgufConversion(family, config, read_tokenizer(tokenizer, config, generation, family.tokenizer))
    conversion.new_writer(
        Metadata(name="planned", size_label="0")
    )  # some settings are refused where they would be written
    return conversion


def check_types(types: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise UnsupportedTypeError for a type of experts among `types` if the model has none."""
    if GgufType.MXFP4_MOE in types and not count_experts(config):
        raise UnsupportedTypeError(
            "MXFP4_MOE has the experts of a model in 4 bits and everything else in Q8_0, but this model has no "
            "experts: choose Q8_0, or Q4_K_M for 4 bits"
        )


def check_conversion(
    types: Iterable[str],
    config: Mapping[str, Any],
    tokenizer: TokenizerFiles,
    generation: Mapping[str, Any],
    shapes: Shapes | None,
) -> None:
    """Raise the ExportError of an export of this model to these types now, for a job that is yet to train."""
    try:
        check_types(types, config)
        plan_conversion(config, tokenizer, generation, shapes)
    except ExportError as error:
        said = error.message.removesuffix(": export without GGUF")
        raise type(error)(f"spec.export.gguf: {said}; {WAY_ON}") from error
