"""Encoding of tensors into a file as they come: on a CPU piece by piece, each on the thread that writes it.

A piece of 2^18 weights is widened, encoded and written while it lies in a core's cache. Encoding whole tensors first
was rejected: the kernel hands out memory for them at 2.4 GB/s, which is slower than encoding and as slow as writing.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from gguf import GGMLQuantizationType

from finetune_trainer.export.errors import OverflowingWeightsError
from finetune_trainer.export.quantization.floats import FLOAT_DTYPES
from finetune_trainer.export.quantization.quantize import encoded_size, is_worth_compiling, quantize
from finetune_trainer.export.tensor_io.file_writer import AppendedFile, Piece
from finetune_trainer.export.tensor_io.stopwatch import Stopwatch


class StreamedEncoder:
    """Encodes the tensors of one output, whose types and sizes are known from the start."""

    def __init__(self, tensors: Iterable[tuple[tuple[int, ...], GGMLQuantizationType]], *, advice: str) -> None:
        """Decide which types are worth compiling for.

        `tensors` are the shapes and types of all tensors. `advice` ends the error about weights that float16 cannot
        hold: it tells the user what to choose instead.
        """
        totals: Counter[GGMLQuantizationType] = Counter()  # weights of each type
        for shape, tensor_type in tensors:
            totals[tensor_type] += torch.Size(shape).numel()
        self._compiled = {kind for kind, total in totals.items() if is_worth_compiling(total, kind)}
        self._advice = advice

    def append(
        self,
        file: AppendedFile,
        name: str,
        weights: torch.Tensor,
        tensor_type: GGMLQuantizationType,
        watch: Stopwatch,
    ) -> int:
        """Append `weights` of 16 or 32 bits to `file`; returns the bytes that they take.

        The caller must not change `weights` afterwards. `watch` measures the encoding. Raises OverflowingWeightsError,
        now or at a later write.
        """
        if weights.dtype is FLOAT_DTYPES.get(tensor_type):
            return file.append(weights)  # nothing to encode

        if weights.device.type == "cpu" and tensor_type in self._compiled:
            return file.append_made(self._pieces(name, weights.contiguous(), tensor_type, watch))

        with watch.running(weights.device):
            encoded = quantize(weights, tensor_type)
        if tensor_type is GGMLQuantizationType.F16 and encoded.view(torch.float16).isinf().any():
            raise self._overflow(name)
        return file.append(encoded)

    def _pieces(
        self, name: str, weights: torch.Tensor, tensor_type: GGMLQuantizationType, watch: Stopwatch
    ) -> Iterator[Piece]:
        """The encoded bytes of `weights` as pieces that are still to be made."""
        from finetune_trainer.export.quantization.cpu.encode import (  # imports numba
            TASK_WEIGHTS,
            encode_piece,
            holds_infinity,
        )

        def make(piece: torch.Tensor) -> torch.Tensor:
            began = time.monotonic()
            encoded = encode_piece(piece, tensor_type)
            if tensor_type is GGMLQuantizationType.F16 and holds_infinity(encoded):
                raise self._overflow(name)
            watch.add((time.monotonic() - began) / torch.get_num_threads())  # as many threads share the time
            return encoded

        flat = weights.flatten()
        for start in range(0, flat.numel(), TASK_WEIGHTS):
            piece = flat[start : start + TASK_WEIGHTS]
            yield Piece(encoded_size(piece.shape, tensor_type), partial(make, piece))

    def _overflow(self, name: str) -> OverflowingWeightsError:
        return OverflowingWeightsError(f"{name} has weights beyond +-65504, which float16 cannot hold; {self._advice}")
