"""Installs `DecoderLayer`s or `OneBlockLayer`s in the layers of a transformers model with a peft adapter.

Each layer module gets a `forward` of ours; nothing else in the process is touched. What the layers of a pass share
(RoPE's cos and sin, the bounds of packed sequences) is made once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune_kernels.graphs.layer_graphs import LayerGraphs, RecordedPass
from finetune_kernels.layers.blocks.attention_block import LayerInputs
from finetune_kernels.layers.blocks.projected_heads import CosSin
from finetune_kernels.layers.layer_builder import build_layers
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.layers.one_block_layer import OneBlockLayer
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.families import family_of
from finetune_kernels.primitives.attention.inputs import PackedSequences
from finetune_kernels.primitives.attention.pass_counts import PassCounts
from finetune_kernels.vocabulary.host_vocabulary import move_to_host


class FusedLayers:
    """The layers of one model, for which `layer_check.why_not_fused` must return None."""

    def __init__(
        self, causal: Any, policies: Sequence[ActivationPolicy], dtype: torch.dtype, *, keep_dequantized: bool
    ) -> None:
        self._causal = causal
        self.layers = build_layers(causal, policies, dtype, keep_dequantized=keep_dequantized)
        self._cos_sin: dict[int, tuple[CosSin, Any]] = {}
        self._rotary = RotaryInputs.of(causal)
        family = family_of(causal)
        self.returns_tuple = family is not None and family.returns_tuple
        self.is_wide = family is not None and family.overflows_fp16 and dtype is torch.float16
        """True if the residual stream is fp32."""
        self._passes = PassCounts()
        self._sequences: PackedSequences | None = None
        self._graphs: LayerGraphs | None = None
        self._recorded: RecordedPass | None = None
        """Where the pass that runs now is recorded."""

        takes_own = family is not None and family.layers_differ
        masked = [at for at, made in enumerate(self.layers) if not (isinstance(made, OneBlockLayer) and made.is_mlp)]
        for index, layer in enumerate(causal.model.layers):
            forward = _LayerForward(self, index, layer, checks_mask=[index] == masked[:1])
            layer.forward = _WithOwnInput(forward) if takes_own else forward

    def set_policies(self, policies: Sequence[ActivationPolicy]) -> None:
        """Gives every layer its activation policy, from the next forward pass on."""
        self._forget_graphs()
        for layer, policy in zip(self.layers, policies, strict=True):
            layer.policy = policy

    def keep_weights(self, count: int) -> None:
        """Keeps the weights of the last `count` layers dequantised, and releases all others, which are dequantised
        where they are used from now on."""
        self._forget_graphs()
        for index, layer in enumerate(self.layers):
            for group in layer.groups:
                if index < len(self.layers) - count:
                    group.frozen.release()
                else:
                    group.frozen.keep()

    def use_fp8(self) -> float:
        """Multiplies by the frozen weights in FP8; kept weights are replaced one at a time. Returns the share of these
        weights that FP8 takes."""
        self._forget_graphs()
        for group in self._groups():
            group.frozen.use_fp8()

        sizes = [(group.frozen.is_fp8, sum(group.frozen.sizes) * group.frozen.features) for group in self._groups()]
        return sum(size for is_fp8, size in sizes if is_fp8) / sum(size for _, size in sizes)

    def use_compute_dtype(self) -> None:
        """Multiplies in the compute type again."""
        self._forget_graphs()
        for group in self._groups():
            group.frozen.use_compute_dtype()

    def use_graphs(self, graphs: LayerGraphs) -> None:
        """Launches passes whose shape comes again and again as graphs; packs of documents of about one size share them,
        with empty rows. Weights have to stay where they are: not for layers whose weights stream."""
        self._graphs = graphs

    def drop_graphs(self) -> bool:
        """Launches kernel by kernel from now on; False if nothing was recorded."""
        had_some = self._graphs is not None and self._graphs.has_some
        self._forget_graphs()
        self._graphs = None
        return had_some

    def _forget_graphs(self) -> None:
        """Records anew: what the layers launch is about to change."""
        self._recorded = None
        if self._graphs is not None:
            self._graphs.forget()

    @property
    def dequantized_bytes(self) -> int:
        """Bytes of kept weights beside those loaded."""
        return sum(group.frozen.dequantized_bytes for group in self._groups())

    def _groups(self) -> Iterator[LinearGroup]:
        return (group for layer in self.layers for group in layer.groups)

    def move_vocabulary(self) -> None:
        """Moves embedding and head to host memory."""
        move_to_host(self._causal)

    def run(self, index: int, hidden: torch.Tensor, cos_sin: Any, positions: Any, options: Any) -> Any:
        """Runs one layer: hidden [B, T, hidden] -> the same shape. Layers that get the same cos and sin share what is
        made of them.

        Raises ValueError if the layer gets fewer tokens than the first one did.
        """
        batch, length, _ = hidden.shape

        # The first layer begins a pass: what was shared in the one before is out of date.
        if index == 0 or self._sequences is None:
            self._cos_sin = {}
            self._sequences = self._passes.begin(_packed_sequences(batch, length, hidden.device, options))
            self._recorded = self._begin_recorded(hidden, self._sequences)
        sequences = self._sequences if self._recorded is None else self._recorded.sequences

        kind = 0 if cos_sin is None else id(cos_sin if isinstance(cos_sin, torch.Tensor) else cos_sin[0])
        if kind not in self._cos_sin:
            made = self._rotary.prepare(cos_sin, hidden, positions, sequences.max_seqlen)
            if self._recorded is not None:
                made = CosSin(*self._recorded.share(len(self._cos_sin), made))  # type: ignore[arg-type]
            self._cos_sin[kind] = made, cos_sin  # kept, so that no other tensor of the pass gets its id

        x = hidden.contiguous().flatten(0, 1)  # [B T, hidden]
        if x.shape[0] != self._sequences.tokens:
            raise ValueError(f"layer {index} gets {x.shape[0]} of {self._sequences.tokens} tokens: ask for all logits")
        own = options.get("per_layer_input")
        inputs = LayerInputs(
            x, self._cos_sin[kind][0], sequences, None if own is None else own.flatten(0, 1),
            self._reused(index, options),
        )  # fmt: skip
        y, kv = self._run_layer(index, inputs)
        if kv is not None:
            options["shared_kv_states"][self._attention_type(index)] = (kv,)
        return y.view(hidden.shape)

    def _begin_recorded(self, hidden: torch.Tensor, sequences: PackedSequences) -> RecordedPass | None:
        """Returns where the pass that begins is recorded; None if it runs kernel by kernel. What cannot be recorded
        takes the rows of the pass, not those of a recording that has more."""
        if self._graphs is None:
            return None
        return self._graphs.begin(hidden, sequences, pads=all(layer.is_recordable for layer in self.layers))

    def _run_layer(self, index: int, inputs: LayerInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs one layer, recorded or not; see `DecoderLayer` and `OneBlockLayer`."""
        layer, recorded = self.layers[index], self._recorded
        if recorded is None or not layer.is_recordable:
            found = layer(inputs)
        else:
            if index not in recorded.layers:
                stays = inputs._replace(x=inputs.x.new_empty(0))  # x comes with every pass
                recorded.add(index, layer.function, layer.arguments(stays), layer.parameters)
            found = recorded.layers[index](inputs.x), None

        if self._graphs is not None:
            self._graphs.launched(len(self.layers) - 1 - index)
        return found

    def _reused(self, index: int, options: Any) -> torch.Tensor | None:
        """The keys and values of an earlier layer that a layer reuses, from what transformers hands through a pass."""
        if not self.layers[index].reuses:
            return None
        (kv,) = options["shared_kv_states"][self._attention_type(index)]
        return kv  # type: ignore[no-any-return]

    def _attention_type(self, index: int) -> str:
        return str(self._causal.config.layer_types[index])


@dataclass(frozen=True)
class RotaryInputs:
    """Brings the cos and sin of a transformers model into the kernels' form."""

    in_order: bool
    """True if each angle comes twice in a row, and not in halves."""
    once: bool
    """True if each angle comes once."""
    long_beta: float | None
    """Growth of q with the logarithm of its position (Ministral 3); None: q does not grow."""
    trained_length: int

    @classmethod
    def of(cls, causal: Any) -> "RotaryInputs":
        """Reads a model's row and configuration."""
        family = family_of(causal)
        scales = family is not None and family.scales_queries
        rope = causal.config.rope_parameters if scales else {}
        order = "halves" if family is None else family.rope
        beta, length = rope.get("llama_4_scaling_beta"), int(rope.get("original_max_position_embeddings", 0))
        return cls(order == "pairs in order", order == "halves once", beta, length)

    def prepare(self, cos_sin: Any, hidden: torch.Tensor, positions: Any, longest: int) -> CosSin:
        """Returns cos and sin [B T, R] of the rows of `hidden` [B, T, hidden], and factors of q if any document is
        `longest` enough. R is 0 for a model without RoPE."""
        batch, length, _ = hidden.shape
        if cos_sin is None:
            empty = hidden.new_empty(batch * length, 0, dtype=torch.float32)
            return CosSin(empty, empty)

        is_complex = isinstance(cos_sin, torch.Tensor)  # DeepSeek V2's are the parts of a complex number
        if is_complex:
            cos_sin = cos_sin.real, cos_sin.imag

        cos, sin = (part.expand(batch, -1, -1).flatten(0, 1) for part in cos_sin)  # [B T, R] each
        if self.in_order:
            cos, sin = (torch.cat((part[:, ::2], part[:, ::2]), dim=1) for part in (cos, sin))
        if self.once or is_complex:
            cos, sin = (torch.cat((part, part), dim=1) for part in (cos, sin))

        scale = None
        if self.long_beta is not None and longest > self.trained_length:
            turns = torch.floor(positions.expand(batch, -1).flatten() / self.trained_length)
            scale = (1 + self.long_beta * torch.log1p(turns)).to(hidden.dtype)[:, None, None]
        return CosSin(cos.contiguous(), sin.contiguous(), scale)


class _LayerForward:
    """Stands in for the `forward` of a layer module."""

    def __init__(self, fused: FusedLayers, index: int, layer: Any, *, checks_mask: bool) -> None:
        self._fused, self._index, self._original = fused, index, layer.forward
        self._checks_mask = checks_mask

    def __call__(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, position_ids: Any = None,
        past_key_values: Any = None, position_embeddings: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        """Takes what transformers' decoder layers take; with a cache, the layer's own forward answers.

        Raises ValueError if padding stands before a token.
        """
        if self._fused.is_wide:
            hidden_states = hidden_states.float()
        if past_key_values is not None:
            return self._original(
                hidden_states, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, position_embeddings=position_embeddings, **options,
            )  # fmt: skip
        if self._checks_mask and attention_mask is not None:
            _check_padding(attention_mask)
        y = self._fused.run(self._index, hidden_states, position_embeddings, position_ids, options)
        return (y, None) if self._fused.returns_tuple else y


@dataclass(frozen=True)
class _WithOwnInput:
    """The same for Gemma 4, whose layers take an input of their own, or None, behind the hidden states."""

    forward: _LayerForward

    def __call__(self, hidden_states: torch.Tensor, per_layer_input: Any = None, **options: Any) -> Any:
        """Takes what Gemma 4's layers take."""
        return self.forward(hidden_states, per_layer_input=per_layer_input, **options)


def _packed_sequences(batch: int, length: int, device: torch.device, options: Any) -> PackedSequences:
    """The bounds that the collator passed along, or else one sequence for each row of the batch."""
    ends = options.get("cu_seq_lens_q")
    if ends is None:
        return PackedSequences.of_length(length, batch, device)
    return PackedSequences(ends.to(torch.int32), int(options["max_length_q"]), batch * length)


def _check_padding(mask: torch.Tensor) -> None:
    """Raises ValueError if `mask` [B, T] or [B, 1, T, T], of booleans or of what is added to scores, hides a token that
    others follow. The layers read no mask: padding behind a row's tokens reaches none of them, padding before does."""
    # The diagonal tells which tokens see themselves: True, or 0 added.
    tokens = mask if mask.dim() == 2 else mask.diagonal(dim1=-2, dim2=-1)
    seen = tokens == 0 if mask.dim() != 2 and mask.is_floating_point() else tokens.bool()
    # Of one token there is nothing to ask: a mask without values has this form (image_build/compile_kernels.py).
    if seen.shape[-1] > 1 and bool((seen[..., 1:] & ~seen[..., :-1]).any()):
        raise ValueError(
            "fused layers take rows that are padded on the right, or packed; this mask hides a token before one"
        )
