"""A model's weights as they are published, by the headers of its files: which train, which are copied, and which are
decoded first. Pure, and without PyTorch: preflight says it before a GPU is asked for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_trainer.model.description import read_written_config
from finetune_trainer.model.expert_files import turned_shape, turned_stacks
from finetune_trainer.model.multimodal import TURNED_TYPES, is_multimodal, split_headers, what_it_reads
from finetune_trainer.model.published_formats import decoded_headers, packed_formats
from finetune_trainer.model.safetensors_header import TensorHeader
from finetune_trainer.model.weight_files import list_weights_below
from finetune_trainer.storage.sizes import format_size


@dataclass(frozen=True)
class PublishedWeights:
    """The tensors of a model's files."""

    own: tuple[TensorHeader, ...]
    """Those of the language model, under its own names, and as they are once decoded and turned."""
    copied: tuple[TensorHeader, ...]
    """All others, which merged weights hold unchanged."""
    formats: tuple[str, ...]
    """Formats of fewer than 16 bits from which weights are decoded."""
    reads: str | None
    """What the model reads beside text; None for a language model."""

    @property
    def is_plain(self) -> bool:
        """True for a language model whose files transformers loads as they are."""
        return self.reads is None and not self.formats

    @property
    def copied_bytes(self) -> int:
        """Bytes of the tensors that are copied."""
        return sum(header.end - header.start for header in self.copied)

    def sentence(self) -> str | None:
        """Says what happens to the weights, for people; None for a language model in 16 bits."""
        said = []
        if self.reads is not None:
            said.append(
                f"this model also reads {self.reads}; its language model trains on text, and the rest "
                f"({format_size(self.copied_bytes)}) is copied unchanged; GGUF files hold the language model alone"
            )

        if self.formats:
            size = format_size(2 * sum(header.parameters for header in self.own))
            said.append(
                f"its weights are published in {' and '.join(self.formats)}: they are decoded tensor by tensor, and "
                f"merged weights have 16 bits ({size})"
            )
        return "; ".join(said) or None


def describe_published(headers: Iterable[TensorHeader], config: Mapping[str, Any]) -> PublishedWeights:
    """Describe the tensors of a model whose config.json, as written, is `config`.

    Raises TrainerError (InvalidConfiguration) for experts that are stored in an unknown order.
    """
    own, copied = split_headers(headers, config)
    reads = what_it_reads(config) if is_multimodal(config) else None
    decoded = _as_loaded(decoded_headers(own), config)
    return PublishedWeights(tuple(decoded), tuple(copied), tuple(packed_formats(own)), reads)


def _as_loaded(headers: list[TensorHeader], config: Mapping[str, Any]) -> list[TensorHeader]:
    """The headers, with stacks of experts as [experts, out, in]."""
    if config.get("model_type") not in TURNED_TYPES:
        return headers
    turned = turned_stacks((header.name, header.shape) for header in headers)
    return [replace(each, shape=turned_shape(each.shape)) if each.name in turned else each for each in headers]


def published_below(folder: Path) -> PublishedWeights:
    """Describe the model in a local folder. Raises TrainerError for files that are missing or damaged, and for
    experts that are stored in an unknown order."""
    return describe_published(list_weights_below(folder), read_written_config(folder))
