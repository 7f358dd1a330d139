"""A model's weights as they are published, by the headers of its files: which train, which are copied, and which are
decoded first. Pure, and without PyTorch: preflight says it before a GPU is asked for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.model.description import read_written_config
from finetune_trainer.model.multimodal import is_multimodal, split_headers, what_it_reads
from finetune_trainer.model.published_formats import decoded_headers, packed_formats
from finetune_trainer.model.safetensors_header import TensorHeader
from finetune_trainer.model.weight_files import list_weights_below
from finetune_trainer.storage.sizes import format_size


@dataclass(frozen=True)
class PublishedWeights:
    """The tensors of a model's files."""

    own: tuple[TensorHeader, ...]
    """Those of the language model, under its own names, and as they are once decoded."""
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
    """Describe the tensors of a model whose config.json, as written, is `config`."""
    own, copied = split_headers(headers, config)
    reads = what_it_reads(config) if is_multimodal(config) else None
    return PublishedWeights(tuple(decoded_headers(own)), tuple(copied), tuple(packed_formats(own)), reads)


def published_below(folder: Path) -> PublishedWeights:
    """Describe the model in a local folder. Raises TrainerError for files that are missing or damaged."""
    return describe_published(list_weights_below(folder), read_written_config(folder))
