"""The type of each tensor in a GGUF file: the same that llama.cpp's quantiser chooses.

Some matrices need more bits than others: the output head decides every logit, and the results of value and down
projections are added to all later layers. llama.cpp's rules look at the tensor's role, at its layer and at the model's
shape. They are tables here; `llama_model_quantize` judges them in the tests.

Source: llama.cpp's llama_tensor_get_type (llama-quant.cpp).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType

from finetune_api.vocabulary import GgufType
from finetune_trainer.export.quantization.file_types import FileType
from finetune_trainer.export.quantization.floats import FLOAT_DTYPES

_T = GGMLQuantizationType
# The nearest type with blocks of 32, for rows that do not divide into super-blocks of 256.
_SMALLER_BLOCKS = {
    _T.Q2_K: _T.Q4_0, _T.Q3_K: _T.Q4_0, _T.Q4_K: _T.Q5_0, _T.Q5_K: _T.Q5_1, _T.Q6_K: _T.Q8_0, _T.IQ4_XS: _T.IQ4_NL,
}  # fmt: skip
_NEVER_QUANTISED = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight", "shortconv.conv.weight",
    "altup_correct_coef.weight", "altup_predict_coef.weight",
)  # fmt: skip
_LAYERS_EMBEDDING = "per_layer_token_embd.weight"
"""Gemma 3n's and 4's embedding of each token for every layer: it counts as the embedding."""
_KEPT = re.compile(r"(^per_layer_model_proj|(^|\.)altup_\w+|\.laurel_\w+)\.weight$")
"""Gemma 3n's and 4's projection of the embedding for every layer, and Gemma 3n's small matrices between its streams:
llama.cpp's quantiser leaves them as they are, and only its converter makes Q8_0 of them."""
_BLOCK = re.compile(r"blk\.(\d+)\.")
LAYERS_OF_70B = 80  # Llama and Qwen2 of about 70 billion parameters
EIGHT = 8
MIN_WIDE_GROUP = 4  # query heads that share a key and value head: values are few then, and cheap to keep


class Role(Enum):
    """The purpose of a matrix; the value is the end of its GGUF name."""

    OUTPUT = "output.weight"
    EMBEDDING = "token_embd.weight"
    VALUES = "attn_v.weight"
    ATTENTION = "attn_qkv.weight"  # fused projection: counts as VALUES, which it contains
    KEYS = "attn_k.weight"
    ATTENTION_OUTPUT = "attn_output.weight"
    DOWN = "ffn_down.weight"
    OTHER = ""


@dataclass(frozen=True)
class TensorTypeInputs:
    """Facts about a model that the rules depend on."""

    architecture: MODEL_ARCH
    layers: int
    heads: int
    kv_heads: int
    """Of the first layer, which llama.cpp's rules look at; 0: it has no attention."""
    experts: int = 0
    """Experts of a layer; 0: the model has none."""

    @classmethod
    def of(cls, architecture: MODEL_ARCH, config: Mapping[str, Any], kv_heads: int) -> "TensorTypeInputs":
        """Read the facts from a Hugging Face config; `kv_heads` are those of the first layer."""
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        counts = (config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
        return cls(architecture, layers, heads, kv_heads, next(filter(None, counts), 0))

    @property
    def has_eight_experts(self) -> bool:
        """True for the size of Mixtral, whose attention llama.cpp keeps in more bits: it is little beside experts."""
        return self.experts == EIGHT

    @property
    def has_wide_groups(self) -> bool:
        """True if many query heads share one key and value head."""
        return self.kv_heads > 0 and self.heads // self.kv_heads >= MIN_WIDE_GROUP

    @property
    def is_70b(self) -> bool:
        """True if llama.cpp takes it for a 70B model, whose value projection is an eighth of the query projection."""
        if self.layers != LAYERS_OF_70B:
            return False
        grouped = self.architecture is MODEL_ARCH.LLAMA and self.heads != self.kv_heads
        return grouped or self.architecture is MODEL_ARCH.QWEN2


@dataclass(frozen=True)
class _TensorPosition:
    """The position of a matrix among those of its role, counted by layer."""

    index: int
    count: int
    model: TensorTypeInputs

    @property
    def is_first_eighth(self) -> bool:
        return self.index < self.count // 8

    @property
    def gets_more_bits(self) -> bool:
        """True in the first and last eighth of the layers, and for every third layer between."""
        eighth = self.count // 8
        return self.is_first_eighth or self.index >= 7 * self.count // 8 or (self.index - eighth) % 3 == 2


_Choice = Callable[[_TensorPosition], GGMLQuantizationType | None]


def _always(chosen: GGMLQuantizationType) -> _Choice:
    return lambda position: chosen


def _more_bits(position: _TensorPosition) -> GGMLQuantizationType | None:
    return _T.Q6_K if position.gets_more_bits else None


def _values_of_wide_groups(position: _TensorPosition) -> GGMLQuantizationType | None:
    return _T.Q5_K if position.model.has_wide_groups else None


def _down_of_first_eighth(position: _TensorPosition) -> GGMLQuantizationType | None:
    return _T.Q5_K if position.is_first_eighth else None


# (file type, role) -> the type of those matrices; None keeps the file's own type.
_RULES: dict[tuple[GgufType, Role], _Choice] = {
    (GgufType.Q2_K, Role.VALUES): lambda position: _T.Q4_K if position.model.has_wide_groups else _T.Q3_K,
    (GgufType.Q2_K, Role.ATTENTION_OUTPUT): _always(_T.Q3_K),
    (GgufType.Q2_K, Role.DOWN): _always(_T.Q3_K),
    (GgufType.Q3_K_M, Role.VALUES): lambda position: _T.Q5_K if position.index < 2 else _T.Q4_K,
    (GgufType.Q3_K_M, Role.ATTENTION_OUTPUT): _always(_T.Q4_K),
    (GgufType.Q3_K_M, Role.DOWN): lambda position: _T.Q5_K if position.index < position.count // 16 else _T.Q4_K,
    (GgufType.Q3_K_L, Role.VALUES): _always(_T.Q5_K),
    (GgufType.Q3_K_L, Role.ATTENTION_OUTPUT): _always(_T.Q5_K),
    (GgufType.Q3_K_L, Role.DOWN): _always(_T.Q5_K),
    (GgufType.Q4_K_S, Role.VALUES): lambda position: _T.Q5_K if position.index < 4 else None,
    (GgufType.Q4_K_S, Role.DOWN): _down_of_first_eighth,
    (GgufType.Q4_K_M, Role.VALUES): _more_bits,
    (GgufType.Q4_K_M, Role.DOWN): _more_bits,
    (GgufType.IQ4_NL, Role.VALUES): _values_of_wide_groups,
    (GgufType.IQ4_NL, Role.DOWN): _down_of_first_eighth,
    (GgufType.IQ4_XS, Role.VALUES): _values_of_wide_groups,
    (GgufType.IQ4_XS, Role.DOWN): _down_of_first_eighth,
    (GgufType.Q5_K_M, Role.VALUES): _more_bits,
    (GgufType.Q5_K_M, Role.DOWN): _more_bits,
}


_SMALLER_THAN_Q5 = (
    GgufType.Q2_K, GgufType.Q3_K_S, GgufType.Q3_K_M, GgufType.Q4_K_S, GgufType.Q4_K_M, GgufType.IQ4_NL, GgufType.IQ4_XS,
)  # fmt: skip


def choose_tensor_types(
    file_type: FileType, model: TensorTypeInputs, tensors: Sequence[tuple[str, tuple[int, ...]]]
) -> dict[str, GGMLQuantizationType]:
    """Choose the type of every tensor of a file; `tensors` are all its GGUF names and shapes, in any order."""
    names = [name for name, _ in tensors]
    is_tied = Role.OUTPUT.value not in names
    roles = {name: _role(name, is_tied=is_tied) for name in names}
    values = sum(role is Role.VALUES for role in roles.values())

    seen = dict.fromkeys(Role, 0)  # matrices of each role so far
    chosen = {}
    for name, shape in sorted(tensors, key=lambda tensor: (_layer(tensor[0]), tensor[0])):
        role = roles[name]
        if not _is_matrix(name, shape) or (_KEPT.search(name) and file_type.matrices not in (*FLOAT_DTYPES, _T.Q8_0)):
            chosen[name] = _T.F32
            continue

        # Values count as many as the file has, matrices of other roles as many as there are layers.
        index = _layer(name) if model.experts and role is Role.DOWN else seen[role]  # a layer may have several
        position = _TensorPosition(index, values if role is Role.VALUES else model.layers, model)
        wanted = _choose(file_type, role, shape[-1], position)
        if wanted is _T.MXFP4 and not _is_stack(shape):
            wanted = _T.Q8_0
        chosen[name] = _fit(wanted, shape[-1])
        seen[role] += 1
    return chosen


def _role(name: str, *, is_tied: bool) -> Role:
    if ".ffn_down" in name:
        return Role.DOWN  # of experts, too
    if name == _LAYERS_EMBEDDING:
        name = Role.EMBEDDING.value
    found = next(role for role in Role if name == role.value or name.endswith(f".{role.value}") or role is Role.OTHER)
    if found is Role.ATTENTION:
        return Role.VALUES
    return Role.OUTPUT if is_tied and found is Role.EMBEDDING else found


def _layer(name: str) -> int:
    """The layer's number; -1 for tensors outside the layers, which come first."""
    found = _BLOCK.match(name)
    return int(found[1]) if found else -1


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """False for vectors (also those stored as one row), norms, routers and convolutions: they are never quantised."""
    return any(size > 1 for size in shape[:-1]) and name.endswith("weight") and not name.endswith(_NEVER_QUANTISED)


def _is_stack(shape: tuple[int, ...]) -> bool:
    """True for the experts of a layer, which have a tensor together."""
    return len(shape) > 2 and shape[-3] > 1


def _choose(file_type: FileType, role: Role, columns: int, position: _TensorPosition) -> GGMLQuantizationType:
    if file_type.matrices in FLOAT_DTYPES:
        return file_type.matrices

    # The output head decides every logit: at least Q6_K.
    if role is Role.OUTPUT:
        fits = columns % GGML_QUANT_SIZES[file_type.matrices][0] == 0
        return _T.Q6_K if fits and file_type.matrices not in (_T.Q8_0, _T.MXFP4) else _T.Q8_0

    if file_type.matrices is _T.MXFP4:
        return _T.MXFP4

    if position.model.has_eight_experts:
        if role in (Role.VALUES, Role.KEYS):
            return _T.Q8_0
        if role is Role.ATTENTION_OUTPUT:
            return _T.Q5_K if file_type.name in _SMALLER_THAN_Q5 else file_type.matrices

    rule = _RULES.get((file_type.name, role))
    chosen = (rule(position) if rule else None) or file_type.matrices
    if role is Role.VALUES and position.model.is_70b and chosen in (_T.Q3_K, _T.Q4_K):
        return _T.Q5_K
    return chosen


def _fit(chosen: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """`chosen`, or a type whose blocks divide rows of this length; else F16 (llama.cpp refuses some such rows)."""
    for candidate in (chosen, _SMALLER_BLOCKS.get(chosen, _T.F16)):
        if columns % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return _T.F16
