"""Parts that some families have in a layer in place of Llama's: latent attention, another mixer, or experts. Names are
transformers'."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Latent:
    """Attention whose keys and values are widened from a latent vector, normed before, and its queries most often as
    well (DeepSeek's MLA). The part of the keys that RoPE turns comes with the latent vector, one for all heads.

    `Family.attention_inputs` make the latent vectors. Names are those of modules of attention.
    """

    norms: tuple[str, ...] = ("q_a_layernorm", "kv_a_layernorm")
    """Norms of the latent vectors; one if queries have none."""
    widening: tuple[str, ...] = ("q_b_proj", "kv_b_proj")
    """Linear layers that make q, and k and v, of them."""
    rope_option: str | None = "rope_interleave"
    """Field of the configuration that says that RoPE turns neighbours; None: the family's `rope` says it."""

    @property
    def has_query_latent(self) -> bool:
        """True if queries come from a latent vector, too."""
        return len(self.widening) > 1

    @property
    def without_query_latent(self) -> "Latent":
        """The same of a model whose configuration has no `q_lora_rank`."""
        return Latent(self.norms[-1:], self.widening[-1:], self.rope_option)


@dataclass(frozen=True)
class LayerInput:
    """A third block, which reads an input of the layer's own beside the residual stream (Gemma 4 E2B and E4B)."""

    size_option: str = "hidden_size_per_layer_input"
    """Field of the configuration with the input's size, which is 0 for models without it."""
    gate: str = "per_layer_input_gate"
    """Linear layer that narrows the residual stream to the input's size."""
    projection: str = "per_layer_projection"
    """Linear layer that widens the product again."""
    norm: str = "post_per_layer_input_norm"
    """Norm of the block's output."""
    source: str = "per_layer_model_projection"
    """Linear layer of the model that makes the inputs of all layers."""

    @property
    def linears(self) -> tuple[str, ...]:
        """Linear layers, in the order of their use."""
        return self.gate, self.projection


@dataclass(frozen=True)
class Mixer:
    """A mixer other than attention, in its place or beside it, which transformers' own module runs."""

    name: str
    """Name of the module in a layer, where other layers have attention."""
    kind: str
    """Class of the module, behind the family's prefix."""
    packages: tuple[str, ...]
    """Packages whose kernels run it; plain PyTorch stands in for one that is not installed."""
    layer_type: str = "linear_attention"
    """Type of such layers in the configuration."""
    barred: tuple[str, ...] = ()
    """Linear layers that get no adapter: kernels read their weights past it."""
    beside_attention: bool = False
    """True if such a layer has attention as well, and adds what both make of the same norm's output."""


class BranchNorms(NamedTuple):
    """Norms of an MLP and of experts that stand side by side (Gemma 4): the experts have one of their own before them,
    and what both make is normed before it is added up. The MLP's first norm is the family's."""

    after_mlp: str
    before_experts: str
    after_experts: str


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts in the MLP's place or beside it. Names are those of modules of a layer; `expert_families`
    knows experts and router."""

    block: str = "mlp"
    """Name of the module that has router and experts; empty if the layer itself has them (Gemma 4)."""
    kind: str = "SparseMoeBlock"
    """Class of that module, behind the family's prefix."""
    router: str = "mlp.gate"
    shared: str | None = "mlp.shared_expert"
    """The MLP that all tokens share."""
    shared_option: str | None = None
    """Field of the configuration that is 0 for models without it (ERNIE, Granite)."""
    shared_gate: str | None = "mlp.shared_expert_gate"
    """Linear layer of the one number that scales what they share."""
    option: str | None = None
    """Field of the configuration without which a model has no experts (Gemma 4)."""
    branch_norms: BranchNorms | None = None
    """Norms of experts that read the residual stream beside the MLP, not its norm's output; None if they do not."""

    @property
    def experts(self) -> str:
        """Name of the experts."""
        return f"{self.block}.experts" if self.block else "experts"
