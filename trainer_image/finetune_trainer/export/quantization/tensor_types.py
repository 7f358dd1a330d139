"""Which type each tensor of a GGUF file has: the same that llama.cpp's quantiser chooses.

Not all matrices bear the same rounding: the output decides every logit, values and the way down of the feed-forward
are added to all later layers. llama.cpp gives those more bits, by rules that look at the tensor's role, at its layer
and at the model's shape. They are tables here; `llama_model_quantize` judges them in the tests.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType

from finetune_api.vocabulary import GgufType
from finetune_trainer.export.quantization.file_types import FileType

_T = GGMLQuantizationType
PLAIN = frozenset({_T.F32, _T.F16, _T.BF16})
# The nearest type with blocks of 32 for rows that do not split into super-blocks of 256.
_SMALLER_BLOCKS = {_T.Q2_K: _T.Q4_0, _T.Q3_K: _T.Q4_0, _T.Q4_K: _T.Q5_0, _T.Q5_K: _T.Q5_1, _T.Q6_K: _T.Q8_0}
_BLOCK = re.compile(r"blk\.(\d+)\.")
LARGE_LAYERS = 80  # Llama and Qwen2 of about 70 billion parameters
WIDE_GROUPS = 4  # query heads to one key head, from which on values are cheap to keep


class Role(Enum):
    """What a matrix is for, by the part of its name."""

    OUTPUT = "output.weight"
    EMBEDDING = "token_embd.weight"
    VALUES = "attn_v.weight"
    ATTENTION = "attn_qkv.weight"  # holds the values too, and counts as they do
    ATTENTION_OUTPUT = "attn_output.weight"
    DOWN = "ffn_down.weight"
    OTHER = ""


@dataclass(frozen=True)
class TensorTypeInputs:
    """What the rules ask about a model."""

    architecture: MODEL_ARCH
    layers: int
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, architecture: MODEL_ARCH, config: Mapping[str, Any]) -> "TensorTypeInputs":
        """From a Hugging Face config."""
        return cls(
            architecture, config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]
        )

    @property
    def has_wide_groups(self) -> bool:
        """Whether many query heads share one key and value head."""
        return self.heads // self.kv_heads >= WIDE_GROUPS

    @property
    def is_large(self) -> bool:
        """Whether llama.cpp takes it for one of the 70B models, whose values are an eighth of the queries."""
        if self.layers != LARGE_LAYERS:
            return False
        grouped = self.architecture is MODEL_ARCH.LLAMA and self.heads != self.kv_heads
        return grouped or self.architecture is MODEL_ARCH.QWEN2


@dataclass(frozen=True)
class _Place:
    """Where a matrix stands among those of its role, counted by layer."""

    index: int
    count: int
    shape: TensorTypeInputs

    @property
    def is_first_eighth(self) -> bool:
        return self.index < self.count // 8

    @property
    def deserves_more(self) -> bool:
        """The first and last eighth of the layers, and every third between."""
        eighth = self.count // 8
        return self.is_first_eighth or self.index >= 7 * self.count // 8 or (self.index - eighth) % 3 == 2


_Choice = Callable[[_Place], GGMLQuantizationType | None]


def _always(chosen: GGMLQuantizationType) -> _Choice:
    return lambda place: chosen


def _more_bits(place: _Place) -> GGMLQuantizationType | None:
    return _T.Q6_K if place.deserves_more else None


# File type and role -> the type instead of the file's own; None keeps that.
_RULES: dict[tuple[GgufType, Role], _Choice] = {
    (GgufType.Q2_K, Role.VALUES): lambda place: _T.Q4_K if place.shape.has_wide_groups else _T.Q3_K,
    (GgufType.Q2_K, Role.ATTENTION_OUTPUT): _always(_T.Q3_K),
    (GgufType.Q2_K, Role.DOWN): _always(_T.Q3_K),
    (GgufType.Q3_K_M, Role.VALUES): lambda place: _T.Q5_K if place.index < 2 else _T.Q4_K,
    (GgufType.Q3_K_M, Role.ATTENTION_OUTPUT): _always(_T.Q4_K),
    (GgufType.Q3_K_M, Role.DOWN): lambda place: _T.Q5_K if place.index < place.count // 16 else _T.Q4_K,
    (GgufType.Q3_K_L, Role.VALUES): _always(_T.Q5_K),
    (GgufType.Q3_K_L, Role.ATTENTION_OUTPUT): _always(_T.Q5_K),
    (GgufType.Q3_K_L, Role.DOWN): _always(_T.Q5_K),
    (GgufType.Q4_K_S, Role.VALUES): lambda place: _T.Q5_K if place.index < 4 else None,
    (GgufType.Q4_K_S, Role.DOWN): lambda place: _T.Q5_K if place.is_first_eighth else None,
    (GgufType.Q4_K_M, Role.VALUES): _more_bits,
    (GgufType.Q4_K_M, Role.DOWN): _more_bits,
    (GgufType.Q5_K_M, Role.VALUES): _more_bits,
    (GgufType.Q5_K_M, Role.DOWN): _more_bits,
}


def choose_tensor_types(
    file_type: FileType, model: TensorTypeInputs, tensors: Sequence[tuple[str, tuple[int, ...]]]
) -> dict[str, GGMLQuantizationType]:
    """The type of every tensor of a file; `tensors` are all its GGUF names and shapes, in any order."""
    names = [name for name, _ in tensors]
    is_tied = Role.OUTPUT.value not in names
    roles = {name: _role(name, is_tied=is_tied) for name in names}
    values = sum(role is Role.VALUES for role in roles.values())
    seen = dict.fromkeys(Role, 0)
    chosen = {}
    for name, shape in sorted(tensors, key=lambda tensor: (_layer(tensor[0]), tensor[0])):
        role = roles[name]
        if not _is_matrix(name, shape):
            chosen[name] = _T.F32
            continue
        place = _Place(seen[role], values if role is Role.VALUES else model.layers, model)
        chosen[name] = _fit(_choose(file_type, role, shape[-1], place), shape[-1])
        seen[role] += 1
    return chosen


def _role(name: str, *, is_tied: bool) -> Role:
    found = next(role for role in Role if name == role.value or name.endswith(f".{role.value}") or role is Role.OTHER)
    if found is Role.ATTENTION:
        return Role.VALUES
    return Role.OUTPUT if is_tied and found is Role.EMBEDDING else found


def _layer(name: str) -> int:
    found = _BLOCK.match(name)
    return int(found[1]) if found else -1


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Vectors (also those stored as one row) and norms are never quantised."""
    return any(size > 1 for size in shape[:-1]) and name.endswith("weight") and not name.endswith("_norm.weight")


def _choose(file_type: FileType, role: Role, columns: int, place: _Place) -> GGMLQuantizationType:
    if file_type.matrices in PLAIN:
        return file_type.matrices
    if role is Role.OUTPUT:
        fits = columns % GGML_QUANT_SIZES[file_type.matrices][0] == 0
        return _T.Q6_K if fits and file_type.matrices is not _T.Q8_0 else _T.Q8_0
    rule = _RULES.get((file_type.name, role))
    chosen = (rule(place) if rule else None) or file_type.matrices
    if role is Role.VALUES and place.shape.is_large and chosen in (_T.Q3_K, _T.Q4_K):
        return _T.Q5_K
    return chosen


def _fit(chosen: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """`chosen`, or what takes rows of this length; F16 where no blocks do (llama.cpp refuses some of those)."""
    for candidate in (chosen, _SMALLER_BLOCKS.get(chosen, _T.F16)):
        if columns % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return _T.F16
