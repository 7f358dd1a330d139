"""Trial of a model: what fails in one small step is the architecture's failure, with a reason, not a defect at step 1.

A pass without gradients does not find all of it: in training mode Gemma 3n clamps weights that NF4 has packed.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from finetune_api.failures import FailureReason
from finetune_api.vocabulary import Batching, Precision
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.description import first_line
from finetune_trainer.training.collator import COLLATORS
from finetune_trainer.training.loaded_model import LoadedModel

log = logging.getLogger(__name__)
DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors of the device, not of the architecture."""
LENGTHS = (24, 17)
"""Tokens of two documents: short, so that a leak into the first tokens alone is seen, and of two lengths."""
Loss = Callable[[Any, Mapping[str, Any], torch.Tensor, torch.Tensor, torch.Tensor | int | None], torch.Tensor]


@contextmanager
def failures_of_architecture(loaded: LoadedModel) -> Iterator[None]:
    """Raises TrainerError (UnsupportedArchitecture) for whatever fails in the block, but for errors of the device."""
    try:
        yield
    except (TrainerError, *DEVICE_ERRORS):
        raise
    except Exception as error:  # any module of any architecture may fail in any way
        log.exception("%s cannot be computed", loaded.architecture)
        message = f"{loaded.architecture} cannot be trained here: {type(error).__name__}: {first_line(error)}"
        if getattr(loaded.model, "is_loaded_in_4bit", False):
            message += " (its weights are in NF4: with spec.model.quantization: None it may train)"
        raise TrainerError(FailureReason.UNSUPPORTED_ARCHITECTURE, message) from error


def try_step(model: Any, loaded: LoadedModel, loss: Loss, kind: Batching) -> None:
    """Runs one forward and backward pass over short documents, and forgets their gradients and random numbers.

    Raises TrainerError (UnsupportedArchitecture) if that fails.
    """
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(loaded.embedding_rows, (length,), generator=generator).tolist() for length in LENGTHS]
    count = 1 if kind is Batching.SINGLE else len(documents)
    batch = COLLATORS[kind]([{"input_ids": document, "labels": list(document)} for document in documents[:count]])
    inputs = on_device(batch, loaded.device)
    labels, positions = inputs.pop("labels"), inputs.pop("supervised")

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    was_training = model.training
    model.train()
    try:
        with failures_of_architecture(loaded), torch.random.fork_rng(devices=devices):
            with compute_type(loaded):
                computed = loss(model, inputs, labels, positions, None)
            computed.backward()  # type: ignore[no-untyped-call]
    finally:
        model.train(was_training)
        for parameter in model.parameters():
            parameter.grad = None


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Returns a batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def compute_type(loaded: LoadedModel) -> torch.autocast:
    """Returns the autocast in which transformers' loop computes."""
    dtype = torch.float16 if loaded.precision is Precision.FP16 else torch.bfloat16
    return torch.autocast(loaded.device.type, dtype, enabled=loaded.precision is not Precision.FP32)
