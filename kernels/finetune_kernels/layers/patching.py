"""Puts the kernels into single modules of a transformers model with a peft adapter, and reports what was replaced.

Only instances are changed: each replaced module gets a `forward` of ours, and nothing else in the process is touched.
A module that is not known to compute the same is left as it is and listed with the reason.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from finetune_kernels.ops.gated_activation import Activation, gated_activation
from finetune_kernels.ops.lora_linear import Weight, lora_linear
from finetune_kernels.ops.rms_norm import Norm, rms_norm
from finetune_kernels.planning.families import MLP_FAMILIES, NORM_OFFSETS, family_of
from finetune_kernels.planning.family import Family
from finetune_kernels.planning.fused_support import ACTIVATIONS, activation_name
from finetune_kernels.primitives.nf4 import dequantize


class Planned(NamedTuple):
    """Modules of each kind that a model must have at least, counted from its configuration and from peft's list: what
    its modules should be, not what they are."""

    norms: int = 0
    mlps: int = 0
    adapters: int = 0


def plan_patches(model: Any) -> Planned:
    """Counts what should be replaced in a transformers model, with a peft adapter or without."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapters = len(model.base_model.targeted_module_names) if hasattr(model, "peft_config") else 0
    family = family_of(causal)
    if family is None:
        return Planned(adapters=adapters)

    # The norms of a layer beside those of heads, and the last one before the head.
    layers, norms = causal.config.num_hidden_layers, len(family.block_norms)
    rms = norms * layers + 1 if family.norm_kind == "rms" else 0
    has_mlps = family.mlp in MLP_FAMILIES and (family.mixture is None or family.mixture.shared is not None)
    return Planned(rms, layers if has_mlps else 0, adapters)


@dataclass
class PatchReport:
    """Number of replaced modules of each kind, and the reasons why others were left."""

    planned: Planned
    norms: int = 0
    mlps: int = 0
    adapters: int = 0
    dequantized_bytes: int = 0
    """Bytes of weights that are kept dequantised."""
    left: dict[str, int] = field(default_factory=dict)
    """Reason -> number of modules that were left as they are."""
    _refused: Counter[str] = field(default_factory=Counter)
    """Kind -> number of modules among them."""

    def leave(self, kind: str, reason: str) -> None:
        """Counts a module that is left as it is."""
        self.left[reason] = self.left.get(reason, 0) + 1
        self._refused[kind] += 1

    def check(self) -> None:
        """Raises RuntimeError if modules of a kind should have been replaced, none was, and no reason is known. They
        have another name or another make in this version of transformers or peft, and training would silently be
        slow."""
        for kind, planned in self.planned._asdict().items():
            wanted = planned - self._refused[kind]
            if wanted > 0 and getattr(self, kind) == 0:
                raise RuntimeError(f"{wanted} {kind} were expected to be replaced, but none was ({self})")

    def __str__(self) -> str:
        """One line for a log."""
        done = f"kernels: {self.norms} norms, {self.mlps} MLPs, {self.adapters} adapters replaced"
        if self.dequantized_bytes:
            done += f"; {self.dequantized_bytes / 2**30:.1f} GiB of weights kept dequantised"
        kept = "; ".join(f"{count} left: {reason}" for reason, count in sorted(self.left.items()))
        return f"{done}; {kept}" if kept else done


def patch_model(model: nn.Module, *, keep_dequantized: bool) -> PatchReport:
    """Replaces all modules that are known. `keep_dequantized` keeps 16-bit copies of NF4 weights for speed, 2 bytes per
    parameter.

    Raises RuntimeError if modules of a kind were expected and none was replaced (`PatchReport.check`).
    """
    report = PatchReport(plan_patches(model))
    config = getattr(model.config, "get_text_config", lambda: model.config)()

    for module in model.modules():
        kind = type(module).__name__
        if kind in NORM_OFFSETS:
            _patch_norm(module, NORM_OFFSETS[kind], report)
        elif kind in MLP_FAMILIES:
            _patch_mlp(module, MLP_FAMILIES[kind], config, report)
        elif hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            _patch_adapter(module, report, keep_dequantized=keep_dequantized)

    report.check()
    return report


def _patch_norm(module: Any, offset: float, report: PatchReport) -> None:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    if getattr(module, "weight", None) is None:
        report.leave("norms", "norms without weights")
        return
    if module.weight.requires_grad:
        report.leave("norms", "norm weights that train")
        return

    module.forward = lambda x: rms_norm(x, Norm(module.weight, eps, offset))
    report.norms += 1


def _patch_mlp(module: Any, family: Family, config: Any, report: PatchReport) -> None:
    name = activation_name(config, family)
    activation = ACTIVATIONS.get(str(name))
    dropout = getattr(module, "residual_dropout", 0)
    if activation is None or dropout:
        report.leave("mlps", f"activation {name}" if activation is None else f"residual_dropout = {dropout}")
        return

    module.forward = partial(_mlp, module, family, activation)
    report.mlps += 1


def _mlp(module: Any, family: Family, activation: Activation, x: torch.Tensor) -> torch.Tensor:
    inputs = [getattr(module, name)(x) for name in family.mlp_inputs]
    gate, up = inputs if len(inputs) == 2 else inputs[0].chunk(2, dim=-1)  # [B, T, F] each
    result: torch.Tensor = getattr(module, family.mlp_output)(gated_activation(gate, up, activation))
    return result


def _patch_adapter(module: Any, report: PatchReport, *, keep_dequantized: bool) -> None:
    reason = why_not_adapter(module) or _why_not_alone(module)
    if reason is not None:
        report.leave("adapters", reason)
        return

    (name,) = module.active_adapters
    base = module.base_layer
    weight = _weight(base, report, keep_dequantized=keep_dequantized)

    def forward(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        # Read anew in each pass: the optimiser changes them. [r, in], [out, r]
        down, up = module.lora_A[name].weight, module.lora_B[name].weight
        return lora_linear(x, weight, down, up, module.scaling[name], base.bias)

    module.forward = forward
    report.adapters += 1


def why_not_adapter(module: Any) -> str | None:
    """Returns why the kernels cannot run one of peft's LoRA layers; None if they can."""
    names = module.active_adapters
    if len(names) != 1 or names[0] not in module.lora_A:
        return "not exactly one adapter"
    if has_dora(module) and not isinstance(module.lora_dropout[names[0]], nn.Identity):
        return "DoRA with dropout"

    if not isinstance(module.base_layer, nn.Linear):
        return f"base layer {type(module.base_layer).__name__}"
    if module.base_layer.weight.requires_grad:
        return "base weights that train"
    return None


def _why_not_alone(module: Any) -> str | None:
    """Returns why a LoRA layer outside a fused decoder layer is left to peft; None if it is not."""
    (name,) = module.active_adapters
    if has_dora(module):
        return "DoRA"
    return None if isinstance(module.lora_dropout[name], nn.Identity) else "adapter dropout"


def has_dora(module: Any) -> bool:
    """True if a LoRA layer's one adapter has magnitudes."""
    (name,) = module.active_adapters
    return name in module.lora_magnitude_vector


def _weight(base: Any, report: PatchReport, *, keep_dequantized: bool) -> Weight:
    """Returns a function that gives a base layer's weights in 16 bits."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return lambda: base.weight

    def read() -> torch.Tensor:
        weight = base.weight.data  # streamed, it is not always in the same place
        return dequantize(weight, state, torch.empty(state.shape, dtype=state.dtype, device=weight.device))

    if not keep_dequantized:
        return read

    kept = read()
    report.dequantized_bytes += kept.numel() * kept.element_size()
    return lambda: kept
