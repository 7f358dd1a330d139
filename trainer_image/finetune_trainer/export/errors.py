"""Errors that end an export, as a tree; messages are for the person who wrote the job.

ExportError
├── InvalidBaseError              the base folder is not a usable 16-bit or 32-bit model
├── InvalidAdapterError           the adapter is not a LoRA that can be merged into this base
├── UnsupportedArchitectureError  no conversion to GGUF is known for the family, or for one of its settings
├── UnsupportedTokenizerError     llama.cpp has no equal of the tokenizer
├── UnsupportedTypeError          an unknown output type, or none asked for
└── OverflowingWeightsError       weights that float16 cannot hold
"""

from typing import ClassVar

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError


class ExportError(TrainerError):
    """Base of all errors of an export."""

    default_reason: ClassVar[FailureReason] = FailureReason.INVALID_CONFIGURATION
    """Machine-readable reason with which the job ends."""

    def __init__(self, message: str) -> None:
        super().__init__(self.default_reason, message)


class InvalidBaseError(ExportError):
    """The base folder lacks a file, or its weights are damaged, pickled or quantised."""


class InvalidAdapterError(ExportError):
    """The adapter does not fit the base, or uses a method that a merge cannot express."""


class UnsupportedArchitectureError(ExportError):
    """The model family, or one of its settings, cannot be converted to GGUF faithfully."""

    default_reason = FailureReason.UNSUPPORTED_ARCHITECTURE


class UnsupportedTokenizerError(ExportError):
    """llama.cpp has no equal of this tokenizer, or the equal is not known."""

    default_reason = FailureReason.UNSUPPORTED_ARCHITECTURE


class UnsupportedTypeError(ExportError):
    """The request names an unknown output type, or asks for no output."""


class OverflowingWeightsError(ExportError):
    """Some weights are larger than float16's largest number (65504)."""
