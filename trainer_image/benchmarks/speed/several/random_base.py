"""A base model of random weights, made on the device in NF4: 70B are ready in seconds, from no file.

Codes and scales are drawn, not quantised; a layer's are the same on every rank. Of a sharded base each rank makes a
whole layer, keeps its part, and makes the next.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Parallelism, Precision
from finetune_kernels.streaming.host_layers import HostLayers
from finetune_trainer.job.machine import PROCESS_BYTES, free_memory, host_room
from finetune_trainer.preflight.memory.plans import Plans, plan_of_job
from finetune_trainer.stages.placement import placement_by
from finetune_trainer.stages.streamed_loading import Placement, decoder_layers, taking_layers
from finetune_trainer.training.loaded_model import LoadedModel
from finetune_trainer.training.memory.room import available_bytes
from speed.models.checkpoint import tokenizer
from speed.rows import MAX_POSITIONS, SEED

SPREAD = 0.02
"""Standard deviation of the weights."""
CODES_SPREAD = 0.55
"""Standard deviation of NF4's 16 values, of which each is as likely."""


def random_base(shape: dict[str, Any], device: torch.device, placement: Placement | None) -> LoadedModel:
    """Returns a Llama of `shape`, the fields of its configuration; `placement`: where its layers lie, if not
    whole on the device."""
    config = random_config(shape)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32

    with taking_layers(placement) if placement else nullcontext() as taken:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=compute)  # type: ignore[no-untyped-call]
            for layer in model.model.layers:
                _use_nf4(layer, compute)
        _fill(model, device, compute)

    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    if config.tie_word_embeddings:
        model.tie_weights()
    model.is_loaded_in_4bit = True  # peft and TRL ask
    model.config.use_cache = False
    precision = Precision.BF16 if device.type == "cuda" else Precision.FP32
    window = taken.window(model) if taken else None
    streamed = taken.host_layers(model) if taken else HostLayers(decoder_layers(model))
    return LoadedModel(model, tokenizer(), "LlamaForCausalLM", precision, device, window, streamed=streamed)


def streaming_placement(
    config: RunConfig, shape: dict[str, Any], device: torch.device, *, processes: int
) -> Placement | None:
    """Returns where the layers of such a base lie in a run of `processes` on this machine, none of which shares it;
    None: all of them on the device."""
    room = host_room(free_memory(), processes, PROCESS_BYTES)
    plans = Plans.of(config, random_config(shape), Parallelism.REPLICATED)
    plan = plan_of_job(config, plans, available_bytes(device), room)
    return None if plan is None else placement_by(plan)


def random_config(shape: dict[str, Any]) -> Any:
    """Returns the configuration of a Llama of `shape`."""
    kind: Any = LlamaConfig
    return kind(
        **{name: value for name, value in shape.items() if name != "model_type"},
        max_position_embeddings=MAX_POSITIONS, bos_token_id=0, eos_token_id=1, pad_token_id=2, dtype="bfloat16",
    )  # fmt: skip


def _use_nf4(layer: nn.Module, compute: torch.dtype) -> None:
    """Puts bitsandbytes' layers, without weights, in place of a decoder layer's linear ones."""
    for path, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            packed = Linear4bit(module.in_features, module.out_features, False, compute, True, "nf4")  # type: ignore[no-untyped-call]
            packed.support_avx512bf16_for_cpu = False
            setattr(layer.get_submodule(parent), name, packed)


def _fill(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Gives every module its weights, in the order of the layers."""
    generator = torch.Generator(device).manual_seed(SEED)
    example = quantize_4bit(torch.ones(64, 64, device=device, dtype=dtype), compress_statistics=True, quant_type="nf4")

    for module in list(model.modules()):
        if isinstance(module, Linear4bit):
            shape = module.out_features, module.in_features
            module.weight = _random_nf4(module, torch.Size(shape), example[1], generator)
            continue
        for name, meta in list(module.named_parameters(recurse=False)):
            weight = torch.ones(meta.shape, dtype=dtype, device=device)
            if meta.ndim > 1:
                weight.normal_(std=SPREAD, generator=generator)
            setattr(module, name, nn.Parameter(weight, requires_grad=False))


def _random_nf4(module: Linear4bit, shape: torch.Size, example: QuantState, draw: torch.Generator) -> Params4bit:
    """Draws the codes, and scales that give weights of SPREAD."""
    device, count = example.code.device, math.prod(shape)
    codes = torch.randint(256, (count // 2, 1), dtype=torch.uint8, device=device, generator=draw)
    blocks = -(-count // example.blocksize)
    scales = torch.randint(256, (blocks,), dtype=torch.uint8, device=device, generator=draw)

    # A scale is code8[its byte] * absmax2 + offset: around SPREAD / CODES_SPREAD, by a tenth of it more or less.
    middle, second = SPREAD / CODES_SPREAD, example.state2
    nested = QuantState(  # type: ignore[no-untyped-call]
        absmax=torch.full((-(-blocks // second.blocksize),), 0.1 * middle, device=device),
        code=second.code, blocksize=second.blocksize, dtype=second.dtype,
    )  # fmt: skip
    state = QuantState(  # type: ignore[no-untyped-call]
        absmax=scales, shape=shape, code=example.code, blocksize=example.blocksize, quant_type="nf4",
        dtype=example.dtype, offset=torch.tensor(middle, device=device), state2=nested,
    )  # fmt: skip
    module.quant_state = state
    return Params4bit(
        codes, requires_grad=False, quant_state=state, blocksize=example.blocksize, compress_statistics=True,
        quant_type="nf4", module=module, bnb_quantized=True,
    )  # fmt: skip
