"""One row of the table of families: everything that llama.cpp does with a family and config.json does not say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import MODEL_ARCH


@dataclass(frozen=True)
class Split:
    """A stored tensor that llama.cpp has as several tensors, or with its last two dimensions swapped."""

    into: tuple[str, ...]
    """The ends of names that take the place of the stored tensor's."""
    transposed: bool = False
    """The last two dimensions are swapped first."""
    interleaved: bool = False
    """Rows take turns; else each part has its rows together."""
    per_head: tuple[str, ...] = ()
    """Settings of config.json with each part's rows in a head, where every head has rows of each part. The first part
    is turned over: [heads, columns, rows]."""
    projected: bool = False
    """It is Qwen3-Next's projection of linear attention; see `state_layers`."""


@dataclass(frozen=True)
class Form:
    """Models of a family that llama.cpp has as another architecture, or with other tensors."""

    has_states: bool
    """Some layer keeps a state."""
    has_experts: bool
    """Some layer has experts."""
    differences: Mapping[str, Any]
    """Fields of the row, with their values in this form."""


@dataclass(frozen=True)
class GgufFamily:
    """The differences between a Hugging Face `model_type` and its llama.cpp architecture."""

    architecture: MODEL_ARCH
    """llama.cpp's architecture, which also gives the names of the tensors."""
    permuted_heads: bool = False
    """The rows of q and k go from RoPE's halves to interleaved pairs."""
    norm_offset: float = 0.0
    """Added to norm weights: Hugging Face stores them around 0, GGUF around 1."""
    sliding_window: bool = False
    """llama.cpp wants the window's size: some layers attend within a sliding window."""
    rope_dimensions: bool = False
    """llama.cpp wants the number of rotated dimensions of a head."""
    fixed_scale_layers: int | None = None
    """Number of layers at which llama.cpp's attention scale, 1/sqrt(head size), becomes 1/sqrt(hidden/heads).

    None: llama.cpp does not hard-code the scale of this architecture.
    """
    window_period: int | None = None
    """Every n-th layer attends fully, which llama.cpp hard-codes; None: no layer has a window there."""
    window_pattern: bool = False
    """llama.cpp is told which layers attend within a window."""
    windowed_layers: int | None = None
    """The number of layers of the one size that llama.cpp computes windows for; None: of every size."""
    normed_heads_from: int | None = None
    """The number of layers from which on llama.cpp expects norms of the heads of q and k, and in smaller models none.

    None: it takes them from the architecture or from the file's tensors.
    """
    sparse_layers: int | None = None
    """The number of layers, from the first, whose MLPs keep only the largest gates, which llama.cpp hard-codes."""
    own_kv_layers: int | None = None
    """The number of layers, from the first, with keys and values of their own, which llama.cpp hard-codes."""
    no_rope_period: int | None = None
    """Every n-th layer has no RoPE, which llama.cpp hard-codes; None: every layer has."""
    activation: str = "silu"
    """The activation that gates the MLP, which llama.cpp hard-codes."""
    rope_tensors: bool = False
    """llama.cpp takes divisors of RoPE's frequencies from tensors."""
    names_longrope: bool = True
    """The scaling type must be written for llama.cpp to look for the short and long divisors."""
    rope_sections: bool = False
    """llama.cpp wants the numbers of dimensions that time, height, width and nothing rotate; on text all are alike."""
    original_context: bool = False
    """The context length before scaling is always written."""
    scaled_rope: bool = True
    """False: llama.cpp is told that RoPE is never scaled."""
    stretched_rope: bool = False
    """A RoPE scaling `dynamic` that has an `alpha` stretches the base frequency once and for all (Hunyuan)."""
    feed_forward: str = "intermediate_size"
    """The setting that has the width of MLPs outside experts."""
    cut_ramp: bool = True
    """False: a YaRN ramp that transformers does not truncate is accepted, although llama.cpp truncates it."""
    leading_dense: bool = False
    """llama.cpp is told how many of the first layers have no experts; False: every layer has, or config.json says
    otherwise which."""
    layer_sizes: bool = False
    """Full and windowed layers differ in the sizes of their heads (Gemma 4)."""
    tokenizer: str = "llama"
    """llama.cpp's tokenizer model of a BPE with byte fallback."""
    latent_attention: bool = False
    """Keys and values are made from one low-rank state (DeepSeek's MLA)."""
    latent_heads: bool = False
    """Keys and values of every head are computed from the low-rank state before attention, and so cached."""
    yarn_log: str | None = None
    """The RoPE setting that llama.cpp takes YaRN's weight on the logarithm from; None: it takes the factor itself."""
    plain_norms: tuple[str, ...] = ()
    """Ends of the names of norms that `norm_offset` is not added to."""
    state_layers: str | None = None
    """The kind, in config.json's layer_types, of layers that keep a state instead of keys and values."""
    rope_switch: bool = False
    """llama.cpp is told whether attention has RoPE; without it, a model that keeps states has no longest context."""
    rms_epsilon: str | None = None
    """The setting that has the epsilon of RMS norms; None: its name says so."""
    step_floor: str | None = None
    """The setting to which transformers raises smaller steps of the state, which llama.cpp does not do."""
    forms: tuple[Form, ...] = ()
    """What differs without states, or without experts."""
    attention_interval: int | None = None
    """Every n-th layer has attention if config.json does not say; None: llama.cpp is told the kind of each layer."""
    changes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """End of a stored tensor's name -> changes of its values, in order (`state_layers.tensors`)."""
    scales: Mapping[str, tuple[str | tuple[str, int], ...]] = field(default_factory=dict)
    """End of a stored tensor's name -> settings of config.json (in a list: with the place) that multiply what it gives,
    in order. llama.cpp knows no such factors, so GGUF has them inside the weights."""
    products: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Method of GGUFWriter -> settings of config.json whose product it writes."""
    splits: Mapping[str, Split] = field(default_factory=dict)
    """By the end of the stored tensor's name."""
    spellings: Mapping[str, str] = field(default_factory=dict)
    """End of a stored tensor's name -> the end under which the table of the `gguf` package has it."""
    arrays: Mapping[str, str] = field(default_factory=dict)
    """End of the name of a scalar that every layer has -> the method of GGUFWriter that writes all of them."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Setting of config.json -> the method of GGUFWriter that writes it; settings that are null are left out."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Method of GGUFWriter -> a value that all models of the family have."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings of config.json whose value llama.cpp hard-codes, with that value."""
    same: Mapping[str, str] = field(default_factory=dict)
    """Settings of config.json that llama.cpp takes to be equal to another one, with that one's name."""
