"""Mixtures with random NF4 weights, drawn where they are used: ready in seconds, and never whole in 16 bits.

The model is the one that the trainer's loader makes of a checkpoint of that configuration: bitsandbytes' linear layers,
our stacked experts, routers in fp32. Of each stack a few matrices are drawn and quantised, and the others are copies of
them: the bytes and the work are the same.
"""

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from finetune_api.vocabulary import Precision
from finetune_kernels.experts.replacing import WEIGHTS, expert_modules, replace_experts, stacked_experts
from finetune_kernels.experts.routers import keep_routers_in_fp32, router_paths
from finetune_kernels.planning.expert_families import expert_family_of_type
from finetune_kernels.primitives.nf4_stack import Nf4Stack
from finetune_trainer.model.expert_files import PARTS, STACKED_PARTS, StoredExperts
from finetune_trainer.training.loaded_model import LoadedModel
from speed.models.checkpoint import draw, linears, on_meta
from speed.rows import SEED

DRAWN = 4
"""Matrices of a stack that are drawn."""


def load(folder: Path, device: str = "cuda", precision: Precision = Precision.BF16) -> LoadedModel:
    """The mixture whose configuration lies below `folder`, as `load_model` would return it."""
    torch.manual_seed(SEED)
    config = AutoConfig.from_pretrained(folder)
    model = on_meta(config)

    for path, module in expert_modules(model):
        for name in WEIGHTS & dict(module.named_parameters()).keys():
            getattr(module, name).nf4_stack = _random_stack(model, getattr(module, name), device)
            if (bias := getattr(module, f"{name}_bias", None)) is not None:
                setattr(module, f"{name}_bias", nn.Parameter(draw(path, bias, device), requires_grad=False))
    replace_experts(model)
    for path, experts in stacked_experts(model):
        experts.stored_experts = _stored(model, path, experts.num_experts)

    _fill(model, device)
    keep_routers_in_fp32(model)
    model.config.use_cache = False
    model.is_loaded_in_4bit = True  # peft asks for it
    return LoadedModel(
        model.eval(), AutoTokenizer.from_pretrained(folder), type(model).__name__, precision, torch.device(device)
    )


def _random_stack(model: Any, meta: torch.Tensor, device: str) -> Nf4Stack:
    family = expert_family_of_type(model.config.model_type)
    assert family is not None
    count, rows, columns = meta.transpose(1, 2).shape if family.is_transposed else meta.shape
    matrices = (torch.randn(rows, columns, dtype=torch.bfloat16, device=device) / 50 for _ in range(min(DRAWN, count)))
    few = Nf4Stack.of(matrices, double=True)

    copies = torch.arange(count, device=device) % DRAWN
    each = {name: getattr(few, name)[copies] for name in ("codes", "scales", "scales2", "offsets")}
    return Nf4Stack((count, rows, columns), code=few.code, code8=few.code8, **each)


def _stored(model: Any, path: str, count: int) -> StoredExperts:
    """The names in the published files, by which adapters on experts are named."""
    stacked = model.config.model_type in ("gpt_oss", "qwen3_5_moe_text", "gemma4_text")
    parts = STACKED_PARTS if stacked else PARTS
    return StoredExperts(path, tuple(f"{part}_proj" for part in parts), count)


def _fill(model: Any, device: str) -> None:
    """Gives all that has no weights yet random ones: linears in NF4."""
    routers = tuple(f"{path}." for path in router_paths(model))
    for name, module in linears(model).items():
        if name.startswith(routers):
            continue
        made: Any = Linear4bit(  # type: ignore[no-untyped-call]
            module.in_features, module.out_features, module.bias is not None, torch.bfloat16, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        weight = draw(name, module.weight, device)
        packed: Any = Params4bit(weight, requires_grad=False, quant_type="nf4", module=made)
        made.weight, made.bias = packed.to(device), module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made)

    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(draw(name, parameter, device), requires_grad=False))
    model.tie_weights()
    for module in model.modules():
        buffers = {name: value for name, value in module.named_buffers(recurse=False) if value.is_meta}
        if buffers and module is not model.model.rotary_emb:
            for name, value in buffers.items():
                setattr(module, name, torch.empty_like(value, device=device))
            model._init_weights(module)  # the numbers of scaled embeddings and outputs of layers
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
