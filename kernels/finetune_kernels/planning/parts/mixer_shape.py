"""The sizes of a hybrid's other mixer (linear attention, short convolution, Mamba 2) that memory and time depend on,
from its configuration, and the packages whose kernels would run it. Pure.

Bytes are those that autograd keeps of transformers' plain PyTorch, in bfloat16: fitted to modules of 8 sizes each, to
within a twentieth (`test_mixer_shape.py` measures them again). Those of fla's kernels are counted, in their backward,
whose own tensors are more than what it needs, and in the graph that stays till then (`test_gpu_linear_attention.py`
measures both).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.family import Family

CHUNK = 64
"""Tokens that the gated delta rule takes at a time."""
DISTRIBUTIONS = {
    "fla": "fla-core with Triton 3.7.1 or newer", "causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm",
}  # fmt: skip
"""Module -> the package that has it."""
_FLA_TRITON = (3, 7, 1)
"""Oldest Triton for fla, which refuses its backward on Hopper below: the compiler made it give wrong numbers."""

_NEMOTRON = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups")


@dataclass(frozen=True)
class MixerShape:
    """Sizes of the mixer in one layer, and the layers that have it."""

    layers: tuple[int, ...]
    """Indices, in order."""
    linears: dict[str, tuple[int, int]]
    """Output and input size of each linear layer."""
    bytes_per_token: int
    """Bytes a token that its backward needs, with the kernels that are installed."""
    graph_bytes: int = 0
    """Bytes a token that stay until backward where a layer saves all; 0: the mixer runs again under every policy."""
    beside_attention: bool = False
    """True if these layers have attention as well."""

    @property
    def parameters(self) -> int:
        """Parameters of the linear layers of one mixer."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def all_parameters(self) -> int:
        """Parameters of the linear layers of all mixers, which are never kept dequantised."""
        return len(self.layers) * self.parameters

    @property
    def without_attention(self) -> int:
        """Number of layers that have this mixer in the place of attention."""
        return 0 if self.beside_attention else len(self.layers)

    def runs_again(self, policy: ActivationPolicy) -> bool:
        """True if backward runs the mixer of a layer with this policy a second time."""
        return policy is not ActivationPolicy.SAVE_ALL or not self.graph_bytes


def mixer_shape(config: Any, family: Family | None) -> MixerShape | None:
    """Returns the shape of the mixer that the family's row names; None if no layer of the configuration has it."""
    if family is None or family.mixer is None:
        return None
    layers = tuple(index for index, kind in enumerate(config.layer_types or ()) if kind == family.mixer.layer_type)
    if not layers:
        return None

    sizes = {"GatedDeltaNet": _delta_net, "ShortConv": _short_convolution}.get(family.mixer.kind, _mamba)
    return MixerShape(layers, *sizes(config), family.mixer.beside_attention)


def _delta_net(config: Any) -> tuple[dict[str, tuple[int, int]], int, int]:
    """The linear layers of the gated delta rule, the bytes of its backward and of its graph."""
    heads, hidden = config.linear_num_value_heads, config.hidden_size
    key_size, value_size = config.linear_key_head_dim, config.linear_value_head_dim
    keys, values = config.linear_num_key_heads * key_size, heads * value_size
    convolved = 2 * keys + values

    inputs = {"in_proj_qkv": convolved, "in_proj_z": values, "in_proj_b": heads, "in_proj_a": heads}
    if config.model_type.startswith("qwen3_next"):
        inputs = {"in_proj_qkvz": convolved + values, "in_proj_ba": 2 * heads}
    linears = {name: (rows, hidden) for name, rows in inputs.items()} | {"out_proj": (hidden, values)}

    # A state for each chunk, twice in 16 bits (by kernels: with its gradient) or once in fp32. Documents that are
    # shorter than a chunk have one each, which is not counted.
    states = 4 * heads * key_size * value_size // CHUNK
    if not is_usable("fla"):
        return linears, 4 * convolved + 26 * values + 32 * heads * key_size + 21 * heads * CHUNK + states, 0

    # The convolution's input and output, a triangle of each chunk, decays and factors; gradients of the output and of
    # its gate. Then what the rule's backward makes: w with its gradient, those of q, and of k in two parts, for each
    # value head; u, what is left of the values, and their gradient in two parts.
    needed = 4 * convolved + 4 * values + 2 * heads * CHUNK + 24 * heads
    backward = needed + 10 * heads * key_size + 8 * values + states

    # The graph: the module's input, the convolution's, q and k as normed (transformers 5.17 repeats them for each value
    # head), v, the output, its gate and both as normed, the triangle; decays, factors and norms' sums, most in fp32.
    graph = 2 * hidden + 2 * convolved + 4 * heads * key_size + 8 * values + 2 * heads * CHUNK + 32 * heads
    return linears, backward, graph


def _short_convolution(config: Any) -> tuple[dict[str, tuple[int, int]], int, int]:
    hidden = config.hidden_size
    return {"in_proj": (3 * hidden, hidden), "out_proj": (hidden, hidden)}, 10 * hidden, 0


def _mamba(config: Any) -> tuple[dict[str, tuple[int, int]], int, int]:
    # Nemotron H has its own names.
    own = hasattr(config, "mamba_num_heads")
    names = _NEMOTRON if own else ("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups")
    heads, size, state, count = (getattr(config, name) for name in names)
    hidden, inner, groups = config.hidden_size, heads * size, count * state
    linears = {"in_proj": (2 * inner + 2 * groups + heads, hidden), "out_proj": (hidden, inner)}

    chunk = config.chunk_size if own else config.mamba_chunk_size
    states = inner * state // chunk
    return linears, 40 * inner + 24 * heads * state + 12 * heads * chunk + states + 8 * groups, 0


def is_usable(name: str) -> bool:
    """True if the kernels of a module of `DISTRIBUTIONS` are installed, and may run."""
    if find_spec(name) is None:
        return False
    return name != "fla" or tuple(int(part) for part in re.findall(r"\d+", version("triton"))[:3]) >= _FLA_TRITON


def missing_packages(config: Any, family: Family | None) -> list[str]:
    """Returns the packages that the mixers of a configuration would run faster with and that are not installed."""
    if family is None or family.mixer is None or mixer_shape(config, family) is None:
        return []
    return [DISTRIBUTIONS[name] for name in family.mixer.packages if not is_usable(name)]


def cost_of_missing(config: Any, family: Family | None) -> str | None:
    """Says what the missing packages cost, for people; None if none is missing."""
    shape, missing = mixer_shape(config, family), missing_packages(config, family)
    if shape is None or not missing:
        return None
    count = f"{len(shape.layers)} of {config.num_hidden_layers} layers"
    return (
        f"{count} have {_kind(family)}, which runs in transformers' plain PyTorch, as {_and(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} not installed: these layers take longer, and "
        f"{shape.bytes_per_token / 1024:.0f} KiB a token while one works"
    )


def _kind(family: Family | None) -> str:
    kind = "" if family is None or family.mixer is None else family.mixer.kind
    return {"GatedDeltaNet": "linear attention", "ShortConv": "a short convolution"}.get(kind, "Mamba")


def _and(names: Iterable[str]) -> str:
    return " and ".join(names)
