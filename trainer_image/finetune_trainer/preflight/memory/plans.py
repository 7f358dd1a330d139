"""Memory plans of a job whose model is not loaded, from its configuration. Pure."""

from copy import copy
from dataclasses import replace
from typing import Any

from finetune_api.gpus import BF16_CAPABILITY
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import AdapterVariant, MemoryMode, Parallelism, Precision, Quantization
from finetune_kernels.planning.described_shape import shape_from_config
from finetune_kernels.planning.fp16_shape import in_fp16
from finetune_kernels.planning.loaded_weights import let_stream, loaded_bytes, share_out, with_new_tokens
from finetune_kernels.planning.memory_plan import MemoryPlan, plan_memory
from finetune_kernels.planning.micro_batch import choose_micro_batch, written_micro_batch
from finetune_kernels.planning.model_shape import ModelShape
from finetune_kernels.planning.rates import H200, H200_FP8, UNLIMITED, Machine
from finetune_trainer.distributed.shares import split_batch
from finetune_trainer.job.machine import PROCESS_BYTES, host_room
from finetune_trainer.preflight.memory.fused_layers import why_not_fused
from finetune_trainer.preflight.steps import TrainingSize


class Plans:
    """Memory plans of one model, for each process of a job."""

    def __init__(self, config: RunConfig, shape: ModelShape, base: int, parallelism: Parallelism) -> None:
        """`base`: bytes of the weights once they are loaded, adapters included."""
        double = config.model.double_quantization
        self.shape, self._base = shape, base
        if parallelism is Parallelism.SHARDED:
            self.shape, self._base = share_out(shape, base, config.processes, double_quantized=double)
        in_fp8 = config.training.precision is Precision.FP8 and parallelism is Parallelism.REPLICATED
        self._rates = H200_FP8 if in_fp8 else H200
        self._room = host_room(config.memory_bytes, max(1, config.gpus), PROCESS_BYTES)

    @classmethod
    def of(cls, config: RunConfig, model: Any, parallelism: Parallelism) -> "Plans | None":
        """The plans for a job with `parallelism`; `model` is transformers' configuration of the language model. None
        for a model whose layers the plan does not know."""
        quantized = config.model.quantization is Quantization.NF4
        adapter = config.adapter
        shape = shape_from_config(
            model,
            adapter.target_modules,
            adapter.rank,
            quantized=quantized,
            dropout=adapter.dropout > 0,
            magnitudes=adapter.variant is AdapterVariant.DORA,
        )

        if shape is None:
            return None
        if computes_in_fp16(config):
            shape = in_fp16(shape, model)
        shape = with_new_tokens(shape, model, len(config.model.new_tokens))
        double = config.model.double_quantization
        base = loaded_bytes(model, shape, double_quantized=double)
        if parallelism is Parallelism.REPLICATED and why_not_fused(config, model) is None:
            shape = let_stream(shape, double_quantized=double)  # only fused layers run by a plan
        return cls(config, shape, base, parallelism)

    @property
    def base_bytes(self) -> int:
        """Bytes of the weights that a process keeps, adapters included."""
        return self._base

    def at(self, tokens: int, mode: MemoryMode, total: int, room: int | None = None) -> MemoryPlan:
        """The plan for micro-batches of `tokens` tokens on a GPU of `total` bytes. `room`: host memory that it may
        pin; None for that of the job's pod."""
        machine = Machine(self._room if room is None else room, self._rates)
        return plan_memory(self.shape, tokens, base_bytes=self._base, total_bytes=total, mode=mode, machine=machine)

    def without_streaming(self) -> "Plans":
        """The plans that keep all weights on the GPU."""
        plans = copy(self)
        plans.shape = replace(self.shape, streamable_bytes=())
        return plans

    def smallest(self, tokens: int, total: int = UNLIMITED, room: int | None = None) -> MemoryPlan:
        """The plan that needs the least memory of the GPU."""
        return self.at(tokens, MemoryMode.SMALLEST, total, room)


def computes_in_fp16(config: RunConfig) -> bool:
    """True if the job asks for FP16, or leaves the type to a card that has no bfloat16."""
    capability = config.gpu.capability if config.gpu else None
    is_old = capability is not None and capability < BF16_CAPABILITY
    return config.training.precision is Precision.FP16 or (config.training.precision is Precision.AUTO and is_old)


def rows_of(config: RunConfig, plans: Plans, total: int) -> int:
    """Sequences in one micro-batch; if the job leaves them open, the plan's choice."""
    training, length = config.training, config.model.max_sequence_length
    batch = written_micro_batch(training) or choose_micro_batch(
        plans.shape,
        training.sequences_per_step(),
        length,
        training.memory,
        lambda tokens: plans.at(tokens, training.memory, total),
    )
    return split_batch(batch, config.processes).size


def plan_of_job(config: RunConfig, plans: Plans | None, total: int, room: int) -> MemoryPlan | None:
    """Returns the plan for a job on GPUs of `total` bytes, none of which shares the base with another; None without
    `plans`. `room`: host memory that each process may pin."""
    if plans is None:
        return None
    tokens = rows_of(config, plans, total) * config.model.max_sequence_length
    return plans.at(tokens, config.training.memory, total, room)


def max_length_of(config: RunConfig, size: TrainingSize | None) -> int:
    """Tokens of the longest sequence that can occur."""
    limit = config.model.max_sequence_length
    return min(limit, size.longest_sequence) if size else limit
