"""What can keep an export from being made, as an error tree; messages are for the person who wrote the job.

ExportError
├── InvalidBaseError            the base folder is not a usable 16/32-bit model
├── InvalidAdapterError         the adapter is not a LoRA that can be merged into this base
├── UnsupportedArchitectureError    llama.cpp has, or we know, no conversion for the family
├── UnsupportedTokenizerError   llama.cpp could not reproduce the tokenizer
├── UnsupportedTypeError        an output type we do not write, or none asked for
└── OverflowingWeightsError     weights that float16 cannot hold
"""

from typing import ClassVar

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError


class ExportError(TrainerError):
    """Base of all; `default_reason` is the machine-readable reason the job ends with."""

    default_reason: ClassVar[FailureReason] = FailureReason.INVALID_CONFIGURATION

    def __init__(self, message: str) -> None:
        super().__init__(self.default_reason, message)


class InvalidBaseError(ExportError):
    """The base folder lacks a file, or its weights are damaged, pickled or quantised."""


class InvalidAdapterError(ExportError):
    """The adapter does not fit the base, or uses a method that a merge cannot express."""


class UnsupportedArchitectureError(ExportError):
    """The model family, or one of its settings, has no faithful GGUF form here."""

    default_reason = FailureReason.UNSUPPORTED_ARCHITECTURE


class UnsupportedTokenizerError(ExportError):
    """llama.cpp has no equal of this tokenizer, or we do not know which one it is."""

    default_reason = FailureReason.UNSUPPORTED_ARCHITECTURE


class UnsupportedTypeError(ExportError):
    """The request names a type that is not written here, or nothing at all."""


class OverflowingWeightsError(ExportError):
    """Some weights are beyond float16's largest number (65504)."""
