"""Differences of the first layers that llama.cpp hard-codes (Gemma 3n's), and their metadata. Needs no PyTorch.

The MLPs of the first layers keep only the largest gates of each token, and layers beyond the first ones read the keys
and values of an earlier layer.
"""

from collections.abc import Collection, Mapping
from typing import Any

from gguf import GGUFWriter

from finetune_trainer.export.errors import UnsupportedArchitectureError
from finetune_trainer.export.gguf.family_row import GgufFamily

SPARSITY = 0.95
"""The share of gates that become 0."""
SCALES = {SPARSITY: 1.6448535919189453, 0.0: float("-inf")}
"""Standard deviations above the mean at which a share of a normal distribution ends, in fp32."""
SETTING = "activation_sparsity_pattern"


def check_first_layers(family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedArchitectureError if other layers than llama.cpp's are sparse, or read others' keys."""
    layers: int = config["num_hidden_layers"]
    if family.sparse_layers is not None:
        found = [float(each) for each in config[SETTING]]
        if found != [SPARSITY if index < family.sparse_layers else 0.0 for index in range(layers)]:
            raise UnsupportedArchitectureError(
                f"llama.cpp leaves out {SPARSITY:.0%} of the gates in the first {family.sparse_layers} layers of this "
                f"architecture and none in others, but config.json has {SETTING} {found}: export without GGUF"
            )

    if family.own_kv_layers is not None:
        shared = config["num_kv_shared_layers"]
        if layers - shared != family.own_kv_layers:
            raise UnsupportedArchitectureError(
                f"llama.cpp computes keys and values in the first {family.own_kv_layers} layers of this architecture, "
                f"but config.json has num_hidden_layers {layers} and num_kv_shared_layers {shared}: export without GGUF"
            )


def check_unread_keys(family: GgufFamily, config: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise UnsupportedArchitectureError if tensors are missing that llama.cpp wants and nobody reads: keys and values
    of layers that read others'. Published files have them, those that transformers 5 saves do not."""
    if family.own_kv_layers is None:
        return

    for layer in range(family.own_kv_layers, config["num_hidden_layers"]):
        wanted = [f"model.layers.{layer}.self_attn.{part}.weight" for part in ("k_proj", "v_proj", "k_norm")]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise UnsupportedArchitectureError(
                f"llama.cpp wants keys and values in every layer of this architecture, also where it reads those of an "
                f"earlier one, but the weight files have no {missing[0]}: use the model's folder as it was published, "
                "or export without GGUF"
            )


def add_first_layers(writer: GGUFWriter, family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Write the point of each layer's normal distribution below which gates become 0."""
    if family.sparse_layers is not None:
        writer.add_activation_sparsity_scale([SCALES[float(each)] for each in config[SETTING]])
