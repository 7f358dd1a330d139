"""The description of one model family: everything that the kernels know of its layers and that the model's own
configuration does not say.

A decoder layer has an attention block and an MLP. Norms stand before both, after both, or on both sides; or one norm
stands before both blocks, which then run side by side (`parallel`).

    pre_norms    two: before attention and before the MLP; one: before both blocks of a parallel layer; none
    post_norms   two: of the attention's and of the MLP's output; none

Attention is causal, with a window, a softcap and sinks at most, without biases on scores; the head is linear, with a
softcap, a factor or neither. In a hybrid, some layers have another mixer in attention's place: linear attention, Mamba,
or a short convolution. In a mixture, an MLP's place has a router and experts, most often beside an MLP that all tokens
share.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from finetune_kernels.planning.expert_families import expert_family_of_type
from finetune_kernels.planning.family_parts import Latent, LayerInput, Mixer, Mixture

LLAMA_NAMES = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"), "dense": ("o_proj",),
    "input_linear": ("gate_proj", "up_proj"), "output_linear": ("down_proj",), "fc1": ("up_proj",),
    "fc2": ("down_proj",), "fc_in": ("up_proj",), "fc_out": ("down_proj",), "c_fc": ("up_proj",),
    "c_proj": ("down_proj",), "w1": ("gate_proj",), "w3": ("up_proj",), "w2": ("down_proj",),
    "out_proj": ("o_proj",), "in_proj": ("q_proj", "k_proj", "v_proj"),
    "in_proj_qkv": ("q_proj", "k_proj", "v_proj"), "in_proj_z": ("q_proj", "k_proj", "v_proj"),
    "in_proj_qkvz": ("q_proj", "k_proj", "v_proj"), "q_a_proj": ("q_proj",), "q_b_proj": ("q_proj",),
    "kv_a_proj_with_mqa": ("k_proj", "v_proj"), "kv_b_proj": ("k_proj", "v_proj"),
}  # fmt: skip
"""Other families' names of linear layers -> the names of Llama's that they stand for. The mixers of hybrids read and
write the residual stream where attention does."""
EXPERTS = "StackedExperts"
"""Class of our experts, in whatever model."""
AFTER_BOTH = ("post_attention_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Family:
    """One row of the table. Names of modules and configuration fields are transformers'."""

    prefix: str
    """Prefix of the family's classes in transformers: Llama in LlamaForCausalLM, LlamaRMSNorm and LlamaMLP."""
    model_type: str
    """`model_type` of its text configuration."""
    part_prefix: str | None = None
    """Prefix of the classes of attention and MLP, if it is another one (Gemma4TextMLP)."""
    layers_differ: bool = False
    """True if layers differ in their heads and in more than the window (`layer_sizes`)."""
    block: Literal["any", "attention", "mixer", "mlp", "experts"] | None = None
    """The one block of a layer; "any": the layer's type says which (`row_of_layer`); None: a layer has two."""

    norm_kind: Literal["rms", "layer", "torch layer"] = "rms"
    """Class of the norms: the family's own RMSNorm or LayerNorm, or PyTorch's LayerNorm, which has a bias."""
    norm_offset: float = 0.0
    """Added to every norm's weight: Gemma stores its weights around zero."""
    pre_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    post_norms: tuple[str, ...] = ()
    parallel_option: str | None = None
    """Field of the configuration that makes the layers parallel, so that only the first of `pre_norms` exists."""

    attention_name: str = "self_attn"
    attention_inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Linear layers of q, k and v, or the one that they are merged into."""
    attention_output: str = "o_proj"
    gates_heads: bool = False
    """True if a sigmoid gates attention's output: q's layer has each head's queries, then its gate (Qwen3.5)."""
    head_norms: tuple[str, ...] = ()
    """Norms of q and of k."""
    head_norm_option: str | None = None
    """Field of the configuration without which a model has no such norms (GLM 4.5)."""
    head_norm_place: Literal["head", "row", "rotated head"] = "head"
    """What they norm: each head before RoPE, all heads of a row before RoPE, or each head after RoPE."""
    value_norm: str | None = None
    """Norm of v, head by head, without weights."""
    caps_scores: bool = False
    """True if attention scores have a softcap."""
    has_sinks: bool = False
    """True if each head has a sink: a score that takes a share of every row and gives nothing (gpt-oss)."""
    window: Literal["none", "model", "layer", "layer type"] = "none"
    """Where the attention window is written: nowhere, in the configuration, in each attention module, or in the
    configuration for layers of the type sliding_attention."""

    passes_bounds: bool = True
    """False if the layer does not tell its attention module where packed documents end."""

    rope: Literal["halves", "halves once", "pairs", "pairs in order"] = "halves"
    """What RoPE turns: the halves of a head or its neighbours; "once": cos and sin come for one half only; "in order":
    they come repeated, each angle beside itself."""
    rope_layers: Literal["all", "use_rope", "windowed", "windowed if any"] = "all"
    """Layers that have RoPE: all, those whose attention says `use_rope`, or those with a window ("if any": all layers
    of a model without windows)."""
    scales_queries: bool = False
    """True if q grows with the logarithm of its position beyond the length of pretraining (Ministral 3)."""

    latent: Latent | None = None
    """Latent attention, whose first projections are `attention_inputs`."""
    layer_input: LayerInput | None = None
    """The third block of layers with inputs of their own."""
    layer_scalar: str | None = None
    """Buffer of a layer, whose one number multiplies its output."""
    mixer: Mixer | None = None
    """The mixer of a hybrid's other layers."""
    mixture: Mixture | None = None
    """The experts of layers that have some."""

    mlp_name: str = "mlp"
    mlp_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    """Linear layers of gate and up, or the one that they are merged into, or that of an MLP without a gate."""
    mlp_output: str = "down_proj"
    gated: bool = True
    activation_field: str = "hidden_act"
    """Field of the configuration that names the MLP's activation."""
    activation: str | None = None
    """The activation of a family that has no such field."""
    feed_forward_field: str = "intermediate_size"
    """Field of the configuration that says the MLP's width."""

    overflows_fp16: bool = False
    """True if the residual stream of published models is beyond fp16's 65,504: in fp16 it is kept in fp32."""

    scales_embedding: bool = False
    """True if the embedding is a module of the family's own, which stays on the GPU."""
    head_bias: bool = False
    """True if the head has a bias: the fused loss and host memory take no such head."""
    factors: tuple[str, ...] = ()
    """Fields of the configuration that scale embedding, residual stream, scores or logits. The model applies the
    first, attention's module says the third, and fused layers and the loss apply the others."""
    returns_tuple: bool = False
    """True if a layer returns a tuple of its output and of attention's weights, which nobody asks for."""

    def __post_init__(self) -> None:
        """Raises ValueError for a row that no layer of ours computes."""
        if self.mixture is not None and self.post_norms and self.mixture.branch_norms is None:
            raise ValueError(f"{self.model_type}: the output of experts has no norm in fused layers")
        if self.block is not None and self.post_norms:
            raise ValueError(f"{self.model_type}: the output of a layer's one block has no norm in fused layers")

    @property
    def architecture(self) -> str:
        """Class of the causal language model."""
        return f"{self.prefix}ForCausalLM"

    @property
    def norm(self) -> str:
        """Class of the norms."""
        return {"rms": f"{self.prefix}RMSNorm", "layer": f"{self.prefix}LayerNorm"}.get(self.norm_kind, "LayerNorm")

    @property
    def mlp(self) -> str:
        """Class of the MLP."""
        return f"{self.part_prefix or self.prefix}MLP"

    @property
    def attention(self) -> str:
        """Class of the attention module."""
        return f"{self.part_prefix or self.prefix}Attention"

    @property
    def mixer_class(self) -> str | None:
        """Class of the other mixer."""
        return None if self.mixer is None else f"{self.prefix}{self.mixer.kind}"

    @property
    def barred(self) -> tuple[str, ...]:
        """Linear layers that get no adapter."""
        return () if self.mixer is None else self.mixer.barred

    @property
    def parallel(self) -> bool:
        """True if both blocks read the same norm's output."""
        return len(self.pre_norms) == 1 and self.block is None

    @property
    def second_norms(self) -> bool:
        """True if the outputs of the attention and the MLP block are normed."""
        return bool(self.post_norms)

    @property
    def block_norms(self) -> tuple[str, ...]:
        """Norms before and after a layer's blocks."""
        third = () if self.layer_input is None else (self.layer_input.norm,)
        branches = None if self.mixture is None else self.mixture.branch_norms
        return (*self.pre_norms, *self.post_norms, *(branches or ()), *third)

    @property
    def norms(self) -> tuple[str, ...]:
        """All norms of a layer with attention."""
        latent = () if self.latent is None else self.latent.norms
        return (*self.block_norms, *(f"{self.attention_name}.{name}" for name in (*self.head_norms, *latent)))

    @property
    def attention_linears(self) -> tuple[str, ...]:
        """Linear layers of attention, in the order of their use."""
        widening = () if self.latent is None else self.latent.widening
        return tuple(
            f"{self.attention_name}.{name}" for name in (*self.attention_inputs, *widening, self.attention_output)
        )

    def mlp_linears(self, mlp: str | None = None) -> tuple[str, ...]:
        """Linear layers of the MLP, or of one of another name, in the order of their use."""
        return tuple(f"{mlp or self.mlp_name}.{name}" for name in (*self.mlp_inputs, self.mlp_output))

    @property
    def linears(self) -> tuple[str, ...]:
        """All linear layers of a layer with attention and an MLP, in the order of their use."""
        return (*self.attention_linears, *self.mlp_linears(), *self.layer_input_linears)

    def has_attention(self, *, mixer: bool) -> bool:
        """True if a layer has attention; `mixer`: one with the other mixer."""
        if self.block not in (None, "attention"):
            return False
        return not mixer or (self.mixer is not None and self.mixer.beside_attention)

    @property
    def layer_input_linears(self) -> tuple[str, ...]:
        """Linear layers of the third block."""
        return () if self.layer_input is None else self.layer_input.linears

    def modules(self, *, mixer: bool = False, mixture: bool = False) -> dict[str, str | None]:
        """Name of each module that a layer has -> its class; None for linear layers, which are peft's or PyTorch's.

        `mixer`: of a layer with the other mixer, whose own modules are left out; `mixture`: of one with experts.
        """
        found: dict[str, str | None] = dict.fromkeys(self.block_norms, self.norm)
        if mixer and self.mixer is not None:
            found[self.mixer.name] = self.mixer_class
        if self.has_attention(mixer=mixer):
            found |= {self.attention_name: self.attention, **dict.fromkeys(self.norms, self.norm)}
            found |= dict.fromkeys(self.attention_linears)
            found |= {} if self.value_norm is None else {f"{self.attention_name}.{self.value_norm}": self.norm}
        found |= dict.fromkeys(self.layer_input_linears)

        if mixture:
            return found | self._mixture_modules()
        mlp = {self.mlp_name: self.mlp, **dict.fromkeys(self.mlp_linears())}
        return found | mlp if self.block in (None, "mlp") else found

    def _mixture_modules(self) -> dict[str, str | None]:
        """The modules of a layer's experts, of which ours stand in the place of transformers'."""
        mixture, experts = self.mixture, expert_family_of_type(self.model_type)
        if mixture is None:
            return {}
        found: dict[str, str | None] = {
            mixture.router: None if experts is None else experts.router_class,
            mixture.experts: EXPERTS,
        }
        if mixture.block:
            found |= {mixture.block: f"{self.prefix}{mixture.kind}"}
        if mixture.shared is not None:
            found |= {mixture.shared: self.mlp, **dict.fromkeys(self.mlp_linears(mixture.shared))}
        return found if mixture.shared_gate is None else {**found, mixture.shared_gate: None}

    @property
    def own_tensors(self) -> dict[str, tuple[str, ...]]:
        """Names of parameters and buffers that modules of a layer have beside those of their parts."""
        experts = None if self.mixture is None else expert_family_of_type(self.model_type)
        found: dict[str, tuple[str, ...]] = {self.attention_name: ("sinks",)} if self.has_sinks else {}
        found |= {} if self.layer_scalar is None else {"": (self.layer_scalar,)}
        if self.mixture is None or experts is None or experts.block_bias is None:
            return found
        return found | {self.mixture.block: (experts.block_bias,)}

    @property
    def whole_modules(self) -> tuple[str, ...]:
        """Modules of a layer whose own parts nobody looks at: the other mixer, experts and router."""
        mixers = () if self.mixer is None else (self.mixer.name,)
        return mixers if self.mixture is None else (*mixers, self.mixture.experts, self.mixture.router)

    def layer_input_size(self, config: Any) -> int:
        """Elements of the input that each layer of a configuration has of its own."""
        return 0 if self.layer_input is None else int(getattr(config, self.layer_input.size_option))

    def of(self, config: Any) -> "Family":
        """Returns the row for a model's configuration: with one norm if that makes the layers parallel, and without
        what its options leave out."""
        row, mixture = self, self.mixture
        if self.parallel_option is not None and getattr(config, self.parallel_option, False):
            row = replace(row, pre_norms=self.pre_norms[:1], parallel_option=None)
        if self.head_norm_option is not None and not getattr(config, self.head_norm_option, False):
            row = replace(row, head_norms=(), head_norm_option=None)
        if not self.layer_input_size(config):
            row = replace(row, layer_input=None)
        if mixture is not None and mixture.option is not None and not getattr(config, mixture.option):
            row = replace(row, mixture=None)
        elif mixture is not None and mixture.shared_option is not None and not getattr(config, mixture.shared_option):
            row = replace(row, mixture=replace(mixture, shared=None, shared_option=None))
        return row if self.latent is None else row._with_latent(self.latent, config)

    def _with_latent(self, latent: Latent, config: Any) -> "Family":
        """The row of a model with latent attention: whose queries may have no latent vector, and whose RoPE may turn
        halves."""
        row = self
        if getattr(config, "q_lora_rank", 0) is None:
            inputs = ("q_proj", *self.attention_inputs[1:])
            row = replace(row, attention_inputs=inputs, latent=latent.without_query_latent)
        if latent.rope_option is not None and not getattr(config, latent.rope_option, True):
            row = replace(row, rope="halves")
        return row
