"""The sizes of a model that memory and time depend on, and the formulas over them.

They come from a loaded model's counted parameters or from its configuration alone (`config` is transformers' text
configuration, of which only numbers are read).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.block_sizes import TILE_ROWS
from finetune_kernels.planning.families import family_of_config
from finetune_kernels.planning.fused_support import PLAIN_ATTENTION, feed_forward_size, head_size, largest
from finetune_kernels.planning.parts.expert_shape import DenseLayers, ExpertShape, dense_layers, expert_shape
from finetune_kernels.planning.parts.latent_shape import LatentShape, latent_shape
from finetune_kernels.planning.parts.layer_sizes import LayerSizes, layer_sizes
from finetune_kernels.planning.parts.mixer_shape import MixerShape, mixer_shape
from finetune_kernels.planning.parts.vocabulary import loss_bytes, pinned_table_bytes

BYTES = 2
"""Bytes of one element in 16 bits."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model with its adapter."""

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    linear_parameters: int
    """Parameters of the linear layers in all decoder layers."""
    adapter_parameters: int
    quantized: bool
    movable_bytes: int = 0
    """Bytes of embedding and head, if they can move to host memory."""
    second_norms: bool = False
    """True if the blocks' outputs are normed (Gemma): these norms' inputs are saved, or made again."""
    parallel: bool = False
    """True if the MLP reads the layer's input and not the attention's output as well (Cohere): one stream less."""
    gated: bool = True
    """True if the MLP has a gate beside its up projection."""
    dropout: bool = False
    """True if adapters drop a part of their inputs."""
    magnitudes: bool = False
    """True if adapters have DoRA's magnitudes."""
    experts: ExpertShape | None = None
    """The experts of a mixture; `feed_forward` is the shared experts' then, and `linear_parameters` are without
    experts."""
    dense: DenseLayers | None = None
    """Layers of a mixture that have an MLP in place of experts."""
    score_heads: int = 0
    """Heads of which layers that are not fused keep the scores of every pair of tokens of a row."""
    gathered_bytes: int = 0
    """Bytes of the layers that are whole at a time, if each rank keeps a part of the base; 0 if it keeps all."""
    streamable_bytes: tuple[int, ...] = ()
    """Bytes of each layer's frozen weights, with its experts, if layers can stream from host memory."""
    mixers: MixerShape | None = None
    """The other mixer of a hybrid, which `feed_forward` and heads do not describe."""
    latent: LatentShape | None = None
    """Latent attention, of which less is saved than q, k and v."""
    gates_heads: bool = False
    """True if q's projection makes a gate of attention's output as well."""
    sizes: tuple[LayerSizes, ...] = ()
    """Sizes of each layer, if they differ; heads and MLP are the largest layer's then."""
    projections: int = 2
    """Projections beside q's that a layer saves the output of: of k and v, of k alone, or none."""
    stores_keys: bool = False
    """True if a layer's keys and values stay for others."""
    one_block: bool = False
    """True if a layer has one block, and so one norm, and no stream between two."""
    layer_input: int = 0
    """Elements of the input that each layer has of its own (Gemma 4 E2B)."""
    stream_bytes: int = BYTES
    """Bytes of an element of the residual stream."""
    gradient_bytes: int = BYTES
    """Bytes of an element of an adapter's gradient."""

    @property
    def stream(self) -> int:
        """Elements of 16 bits in a row of the residual stream."""
        return self.hidden * self.stream_bytes // BYTES

    @property
    def attention_width(self) -> int:
        """Elements of a row of q, k and v, and of the gate beside q."""
        return self.projected_width + (2 - self.projections) * self.key_value_heads * self.head_size

    @property
    def projected_width(self) -> int:
        """Elements of a row of what attention's first projections make."""
        queries = 2 * self.heads if self.gates_heads else self.heads
        return (queries + self.projections * self.key_value_heads) * self.head_size

    def in_layer(self, sizes: LayerSizes) -> "ModelShape":
        """The same with the sizes of one layer, as far as that layer is concerned."""
        return replace(
            self, sizes=(), dense=None, key_value_heads=sizes.key_value_heads, head_size=sizes.head_size,
            feed_forward=sizes.feed_forward, projections=sizes.projections, stores_keys=sizes.sharing == "stores",
            one_block=sizes.block is not None, heads=self.heads if sizes.block in (None, "attention") else 0,
            mixers=self.mixers if sizes.block in (None, "mixer") else None,
            experts=self.experts if sizes.block in (None, "experts") else None,
        )  # fmt: skip

    def repeated_parameters(self, policies: Sequence[ActivationPolicy]) -> int:
        """Parameters of linear layers in transformers' own mixers that run again in backward."""
        if self.mixers is None:
            return 0
        return sum(self.mixers.runs_again(policies[index]) for index in self.mixers.layers) * self.mixers.parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that a token is multiplied by in the layers: those of its experts only."""
        experts = 0 if self.experts is None else self.mixture_layers * self.experts.active_parameters
        return self.linear_parameters + experts

    @property
    def mixture_layers(self) -> int:
        """Number of layers that have experts."""
        if self.experts is None:
            return 0
        return self.layers - (0 if self.dense is None else len(self.dense.layers))

    @property
    def in_dense_layers(self) -> "ModelShape":
        """The same with the MLP of `dense`, as far as a layer is concerned."""
        return self if self.dense is None else replace(self, experts=None, feed_forward=self.dense.feed_forward)

    def saved_by(self, policies: Sequence[ActivationPolicy]) -> int:
        """Bytes per token that stay on the GPU between forward and backward, of all layers."""
        return sum(count * shape.saved_bytes(policy, mixer=kind) for shape, policy, kind, count in self._each(policies))

    def recomputed_by(self, policies: Sequence[ActivationPolicy]) -> float:
        """FLOP per token that backward spends on recomputing, in all layers."""
        each = self._each(policies)
        return sum(count * shape.recomputed_flop(policy, mixer=kind) for shape, policy, kind, count in each)

    def decoded_experts(self, policies: Sequence[ActivationPolicy]) -> int:
        """Weights of experts that are decoded in a pass: twice, and what is recomputed once more."""
        dense = () if self.dense is None else self.dense.layers
        mixtures = [policy for index, policy in enumerate(policies) if index not in dense]
        return 0 if self.experts is None else self.experts.decoded(mixtures, normed=self.second_norms)

    def _each(self, policies: Sequence[ActivationPolicy]) -> list[tuple["ModelShape", ActivationPolicy, bool, int]]:
        """Numbers of layers that are alike: with their shape, their policy, and whether they have the other mixer."""
        others = () if self.mixers is None else self.mixers.layers
        dense = () if self.dense is None else self.dense.layers
        if self.sizes:
            alike = Counter(zip(self.sizes, policies, strict=True)).items()
            return [(self.in_layer(sizes), policy, sizes.block == "mixer", count) for (sizes, policy), count in alike]
        counts = Counter((index in dense, policy, index in others) for index, policy in enumerate(policies))
        shapes = self, self.in_dense_layers
        return [(shapes[is_dense], policy, mixer, count) for (is_dense, policy, mixer), count in counts.items()]

    def saved_bytes(self, policy: ActivationPolicy, *, mixer: bool = False) -> int:
        """Bytes per token and layer that stay on the GPU until backward; `mixer`: of one with the other mixer."""
        # Under every policy: the layer's own input, and keys and values that others read.
        outside = self.layer_input + 2 * self.stores_keys * self.key_value_heads * self.head_size
        if policy is ActivationPolicy.OFFLOAD:
            return outside * BYTES
        elements = outside + self.stream  # the layer's input
        if policy is not ActivationPolicy.RECOMPUTE_ALL:
            # h and both norms' rstd (fp32, hence twice); attention's output, q k v and the softmax sums
            elements += 2 if self.one_block else (0 if self.parallel else self.stream) + 4
            replaced = mixer and self.mixers is not None and not self.mixers.beside_attention
            elements += 0 if replaced else self._saved_attention
            elements += (3 if self.experts else 2) * (self.hidden + 2) if self.second_norms else 0
        if policy is not ActivationPolicy.SAVE_ALL:
            return elements * BYTES

        elements += self.wide_inputs * self.feed_forward  # gate and up
        graph = self.mixers.graph_bytes if mixer and self.mixers is not None else 0
        return elements * BYTES + graph + (0 if self.experts is None else self.experts.fused_bytes)

    @property
    def _saved_attention(self) -> int:
        """Elements of a row that attention saves: its output, q, k and v or what they are made of, the softmax sums."""
        if self.latent is not None:
            return self.latent.narrow + self.heads * self.latent.value + 2 * self.heads
        return self.heads * self.head_size + self.projected_width + 2 * self.heads

    @property
    def wide_inputs(self) -> int:
        """Projections that widen the MLP's input: gate and up, or up."""
        return 1 + self.gated

    def recomputed_flop(self, policy: ActivationPolicy, *, mixer: bool = False) -> float:
        """FLOP per token and layer that backward spends on recomputing; `mixer`: in a layer with the other mixer."""
        down = 2.0 * self.hidden * self.feed_forward
        gate_up = self.wide_inputs * down
        narrow = 0.0 if self.experts is None else 2.0 * self.hidden * self.experts.chosen * self.experts.wide
        down, gate_up = down + narrow, gate_up + (0 if self.experts is None else self.experts.wide_inputs) * narrow
        if mixer and self.mixers is not None:
            again = 2.0 * self.mixers.parameters * self.mixers.runs_again(policy)
            if self.mixers.beside_attention:
                return again + self.recomputed_flop(policy)
            return again + (0.0 if policy is ActivationPolicy.SAVE_ALL else gate_up)
        # q, k and v are always made of the latent vectors again, and the third block runs again.
        widened = 0.0 if self.latent is None else 2.0 * self.latent.widening_parameters
        widened += 4.0 * self.hidden * self.layer_input
        if policy is ActivationPolicy.SAVE_ALL:
            return widened
        if policy is ActivationPolicy.RECOMPUTE_MLP:
            return gate_up + widened

        attention = 2.0 * self.hidden * (self.projected_width + self.heads * self.head_size)
        attention = attention if self.latent is None else 2.0 * self.latent.parameters
        return gate_up + attention + widened + (down if self.second_norms else 0.0)

    def working_bytes(self, tokens: int, *, tiled: bool) -> int:
        """Bytes that one layer's backward needs beside what is saved; `tiled`: the MLP takes `TILE_ROWS` at a time."""
        if self.sizes:
            return max(self.in_layer(sizes).working_bytes(tokens, tiled=tiled) for sizes in set(self.sizes))
        q, stream = self.heads * self.head_size, self.stream
        third = 3 * stream if self.layer_input else 0  # the third block's input, output and gradient
        # gate, up, their gradients and the activation's. One more is what dropout leaves of the activation, or the
        # gradients of gate and up times DoRA's factors (by then the activation is released).
        parts = 2 * self.wide_inputs + (2 if self.dropout or self.magnitudes else 1)
        wide = parts * self.feed_forward
        wide += 2 * self.hidden if self.second_norms and self.experts else 0  # experts' and MLP's, before their norms
        whole = wide + 6 * stream + third + 2 * self.attention_width
        # x, two gradients of the residual stream, attention's output and its gradient; q, k, v and their gradients,
        # once more merged; fp32 sums and each query head's own gradients of k and v inside attention; of latent
        # attention what is widened. The attention of cards without bfloat16 repeats k and v for each query head.
        repeated = 2 * q if self.gradient_bytes > BYTES else 0
        widened = 0 if self.latent is None else self.latent.widened
        attention = tokens * (3 * stream + 2 * q + 3 * self.attention_width + 4 * q + repeated + widened) * BYTES

        mixer = 0 if self.mixers is None else tokens * (self.mixers.bytes_per_token + 4 * stream * BYTES)
        mixer = max(mixer, attention) if self.latent or self.one_block else mixer
        tiled = tiled and tokens > TILE_ROWS
        experts = 0
        if self.experts is not None:
            mixer = max(mixer, self.in_dense_layers.working_bytes(tokens, tiled=tiled) if self.dense else 0)
            experts = self.experts.working_bytes(TILE_ROWS if tiled else tokens, keeps=tiled)
        if not tiled:
            return max(tokens * whole * BYTES + experts, mixer)

        mlp = tokens * (4 * stream + third + self.attention_width + q) + TILE_ROWS * (wide + 2 * stream)
        return max(mlp * BYTES + experts, attention, mixer)

    def pinned_table_bytes(self, moved: int) -> int:
        """Bytes of host memory that embedding and head take there, `moved` on the GPU."""
        return pinned_table_bytes(moved, self.vocabulary * self.hidden * BYTES)

    def loss_bytes(self, tokens: int, *, blocked: bool) -> int:
        """Bytes that the loss needs; `blocked`: the head is in host memory."""
        return loss_bytes(tokens, self.hidden, self.vocabulary, stream=None if blocked else self.stream)


class ParameterCounts(NamedTuple):
    """The part of a shape that is counted, not read from the configuration."""

    linears: int
    adapters: int
    quantized: bool
    movable_bytes: int


def build_shape(config: Any, counts: ParameterCounts, *, dropout: bool = False, magnitudes: bool = False) -> ModelShape:
    """Returns the shape of a model whose parameters were counted. One without attention (Mamba, RWKV) is planned as if
    it had one head, and one without an MLP as if it had Llama's."""
    family, experts = family_of_config(config), expert_shape(config, quantized=counts.quantized)
    field = "intermediate_size" if family is None else family.feed_forward_field
    heads, latent = largest(config, "num_attention_heads") or 1, latent_shape(config, family)
    sizes = layer_sizes(config, family)
    widths = [layer.feed_forward for layer in sizes] or [feed_forward_size(config, field) or 4 * config.hidden_size]

    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        key_value_heads=heads if latent else largest(config, "num_key_value_heads") or heads,
        head_size=head_size(config),
        feed_forward=max(widths) if experts is None else experts.shared,
        vocabulary=config.vocab_size,
        linear_parameters=counts.linears,
        adapter_parameters=counts.adapters,
        quantized=counts.quantized,
        movable_bytes=counts.movable_bytes,
        second_norms=family is not None and family.second_norms,
        parallel=family is not None and family.parallel,
        gated=family is None or family.gated,
        dropout=dropout,
        magnitudes=magnitudes,
        experts=experts,
        dense=dense_layers(config),
        score_heads=heads if getattr(config, "model_type", "") in PLAIN_ATTENTION else 0,
        mixers=mixer_shape(config, family),
        latent=latent,
        gates_heads=family is not None and family.gates_heads,
        sizes=sizes,
        layer_input=0 if family is None else family.layer_input_size(config),
    )
