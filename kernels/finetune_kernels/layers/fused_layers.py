"""Installs `DecoderLayer` in the layers of a transformers model with a peft adapter.

Each layer module gets a `forward` of ours; nothing else in the process is touched. What several layers of a pass share
(rotation cos_sin, document boundaries) is made once.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from finetune_kernels.layers.attention_block import CosSin
from finetune_kernels.layers.host_memory import HostMemory
from finetune_kernels.layers.host_vocabulary import move_to_host
from finetune_kernels.layers.layer_builder import build_layer
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.ops.attention import PackedSequences
from finetune_kernels.planning.activation_policy import ActivationPolicy


class FusedLayers:
    """The layers of one model; make it only where `layer_builder.why_not_fused` gives None."""

    def __init__(
        self, causal: Any, policies: Sequence[ActivationPolicy], dtype: torch.dtype, *, keep_dequantized: bool
    ) -> None:
        self._causal = causal
        host = HostMemory()
        self.layers = [
            build_layer(index, layer, causal.config, policy, dtype, host, keep_dequantized=keep_dequantized)
            for index, (layer, policy) in enumerate(zip(causal.model.layers, policies, strict=True))
        ]
        self._cos_sin: dict[str | None, CosSin] = {}
        self._documents: PackedSequences | None = None
        for index, layer in enumerate(causal.model.layers):
            layer.forward = _Forward(self, index, layer)

    def set_policies(self, policies: Sequence[ActivationPolicy]) -> None:
        """ActivationPolicy something else from the next forward pass on."""
        for layer, policy in zip(self.layers, policies, strict=True):
            layer.policy = policy

    def release_weights(self) -> None:
        """Let go of weights that stay; they are decoded where they are used from now on."""
        for group in self._groups():
            group.frozen.release()

    def use_fp8(self) -> None:
        """Multiply by the frozen weights in 8 bits; the weights that stay are replaced, one at a time."""
        for group in self._groups():
            group.frozen.use_fp8()

    def use_compute_dtype(self) -> None:
        """Multiply in the compute type again."""
        for group in self._groups():
            group.frozen.use_compute_dtype()

    @property
    def dequantized_bytes(self) -> int:
        """Bytes of weights that stay beside those loaded."""
        return sum(group.frozen.dequantized_bytes for group in self._groups())

    def _groups(self) -> Iterator[LinearGroup]:
        return (group for layer in self.layers for group in layer.groups)

    def move_vocabulary(self) -> None:
        """Move embedding and head to host memory."""
        move_to_host(self._causal)

    def run(
        self,
        index: int,
        hidden: torch.Tensor,
        kind: str | None,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        options: Any,
    ) -> Any:
        """One layer: hidden [B, T, hidden] -> the same. Layers of one `kind` turn by the same cos_sin."""
        batch, length, _ = hidden.shape
        if index == 0 or self._documents is None:
            self._cos_sin = {}
            self._documents = _documents(batch, length, hidden.device, options)
        if kind not in self._cos_sin:
            self._cos_sin[kind] = CosSin(*(angle.expand(batch, -1, -1).flatten(0, 1).contiguous() for angle in cos_sin))
        rows = hidden.contiguous().flatten(0, 1)
        return self.layers[index](rows, self._cos_sin[kind], self._documents).view(hidden.shape)


class _Forward:
    """What a layer module calls instead of its own forward."""

    def __init__(self, fused: FusedLayers, index: int, layer: Any) -> None:
        self._fused, self._index, self._original = fused, index, layer.forward
        self._kind = getattr(layer.self_attn, "layer_type", None)

    def __call__(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, position_ids: Any = None,
        past_key_values: Any = None, position_embeddings: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        """See transformers' decoder layers; with a cache the layer's own forward answers."""
        if past_key_values is not None:
            return self._original(
                hidden_states, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, position_embeddings=position_embeddings, **options,
            )  # fmt: skip
        return self._fused.run(self._index, hidden_states, self._kind, position_embeddings, options)


def _documents(batch: int, length: int, device: torch.device, options: Any) -> PackedSequences:
    ends = options.get("cu_seq_lens_q")
    if ends is None:
        return PackedSequences.of_length(length, batch, device)
    return PackedSequences(ends.to(torch.int32), int(options["max_length_q"]), batch * length)
