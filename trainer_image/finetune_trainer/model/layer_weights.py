"""The weights of a model's layers, by the names and shapes in its files: linear layers, and experts that are stacked in
one tensor. Pure, and without PyTorch: preflight asks too.

transformers 5 stacks the experts of a mixture in 3-D tensors when it loads them, also where the files hold a matrix for
each. bitsandbytes and peft know linear layers only. Experts of families that our kernels know are quantised and adapted
by our own module; all others get neither.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from finetune_kernels.planning.expert_families import expert_family_of_type
from finetune_trainer.model.expert_files import LAYER, StoredExperts, find_experts
from finetune_trainer.model.safetensors_header import TensorHeader

RENAMED_TYPES = frozenset({"axk2", "bailing_hybrid", "deepseek_v4", "hrm_text", "hy_v4", "inkling2_text"})
"""Model types whose linear layers transformers renames when it loads them, so that names in the files tell nothing.

Found by loading a tiny model of each causal language model of transformers 5.23.
"""
_EXPERT = re.compile(r"\.experts\.\d+\.")
_VOCABULARY = ("wte", "wpe", "w", "lm_head", "embed_out", "shared", "head", "decoder", "output_projection")


@dataclass(frozen=True)
class LayerWeight:
    """A weight of the layers: embeddings, head, norms and biases are none."""

    name: str
    """Name of the layer, such as model.layers.0.mlp.up_proj."""
    parameters: int
    shape: tuple[int, ...] | None
    """None for packed NF4 weights, whose files do not tell it in their header."""
    is_linear: bool
    """True for a linear layer, which can get an adapter and can be quantised."""
    is_stacked: bool
    """True for experts in a 3-D tensor that the kernels do not know: no adapter, and 16 bits."""
    is_quantized: bool
    expert_part: str | None = None
    """Part of experts that the kernels know, such as gate; see `expert_files`."""

    @property
    def last_name(self) -> str:
        """Last part of the name, such as up_proj."""
        return self.name.rsplit(".", 1)[-1]


def layer_weights(
    headers: Iterable[TensorHeader], *, quantized: bool, model_type: str | None = None
) -> list[LayerWeight]:
    """The layers' weights of a model that is not loaded; `quantized`: its linear layers will be in NF4."""
    found = [header for header in headers if is_layer_weight(header.name, header.shape)]
    # A router lies beside its experts, and is no linear layer.
    blocks = {_EXPERT.split(header.name)[0] for header in found if _EXPERT.search(header.name)}
    blocks |= {header.name.rpartition(".experts.")[0] for header in found if ".experts." in header.name}

    experts = known_experts(found, model_type)
    weights = []
    for header in found:
        if header.dtype == "U8" and not header.name.endswith(".weight"):
            continue  # a part of an NF4 weight
        weights.append(_describe(header, blocks, _expert_part(header.name, experts), quantized=quantized))
    return weights


def known_experts(headers: Iterable[TensorHeader], model_type: str | None) -> Mapping[int, StoredExperts]:
    """The experts of each layer, if our kernels know the family and the names; else empty."""
    headers = list(headers)
    if expert_family_of_type(model_type) is None or any(header.dtype == "U8" for header in headers):
        return {}
    return find_experts((header.name, header.shape) for header in headers)


def _expert_part(name: str, experts: Mapping[int, StoredExperts]) -> str | None:
    layer = LAYER.search(name)
    stored = experts.get(int(layer[1])) if layer else None
    return stored.part_of(name) if stored else None


def _describe(header: TensorHeader, blocks: set[str], part: str | None, *, quantized: bool) -> LayerWeight:
    name = header.name.removesuffix(".weight")
    parent = name.rpartition(".")[0]
    is_packed = header.dtype == "U8"  # two NF4 codes share a byte
    is_stacked = part is None and (bool(_EXPERT.search(header.name)) or is_stack(header.name, header.shape))
    # Hunyuan's gate has a linear layer within it.
    is_router = is_router_name(name) or any(
        path.endswith(".gate") and path.removesuffix(".gate") in blocks for path in (name, parent)
    )
    is_linear = header.name.endswith(".weight") and len(header.shape) == 2
    is_linear = is_linear and part is None and not is_stacked and not is_router

    return LayerWeight(
        name,
        2 * header.parameters if is_packed else header.parameters,
        None if is_packed else header.shape,
        is_linear=is_linear,
        is_stacked=is_stacked,
        is_quantized=is_packed or ((is_linear or part is not None) and quantized),
        expert_part=part,
    )


def linear_names(weights: Iterable[LayerWeight]) -> set[str]:
    """Last parts of the linear layers' names."""
    return {weight.last_name for weight in weights if weight.is_linear}


def is_layer_weight(name: str, shape: tuple[int, ...]) -> bool:
    """True for a weight of the layers; biases of stacked experts have two dimensions."""
    return len(shape) > 1 and not name.endswith("bias") and not is_vocabulary(name)


def is_router_name(name: str) -> bool:
    """True for a layer of a router, by its name; those of some families are not named so."""
    return "router" in name.split(".")


def is_vocabulary(name: str) -> bool:
    """True for an embedding or the head, by the name of its weight."""
    parts = name.removesuffix(".weight").split(".")
    return "lm_head" in parts or "embed" in parts[-1] or parts[-1] in _VOCABULARY


def is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """True for a tensor that stacks several matrices; a convolution's does not."""
    return len(shape) == 3 and "conv" not in name and all(size > 1 for size in shape) and prod(shape) > 0
