"""Linear attention by fla-core's kernels on GPUs, where it is installed, and by transformers' own loops on CPUs.

transformers takes fla's functions when a modelling file is imported, if fla can be imported then. There need be no GPU,
and tensors of a CPU would go to Triton's compiler; if fla cannot be imported, for whatever reason, its loops run, and
up to 5.17 they let packed documents see each other. So the functions of that file are replaced by ones that look where
their tensors are, and take fla's themselves, or fail. The short convolution before the gated delta rule, for which
transformers knows causal-conv1d alone, and the gated norm behind it are fla's as well. Rule and convolution take the
ends of packed documents.

The alternative, transformers' forward written anew, was rejected: each family splits its projections otherwise.
"""

import sys
from collections.abc import Callable
from functools import cache, cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from inspect import signature, unwrap
from types import ModuleType
from typing import Any

import torch

from finetune_kernels.mixers.tuning import compile_side_by_side, pin_norms
from finetune_kernels.planning.parts.mixer_shape import is_usable

DELTA_RULE, CONVOLUTION = "torch_chunk_gated_delta_rule", "causal_conv1d_fn"
RULES = {
    DELTA_RULE: ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "torch_recurrent_gated_delta_rule": ("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    "chunk_kimi_delta_attention": ("fla.ops.kda", "chunk_kda"),
    "recurrent_kimi_delta_attention": ("fla.ops.kda", "fused_recurrent_kda"),
}
"""Function of transformers' modelling files -> the module and name of fla's that computes the same."""
SILU = ("silu", "swish")


def use_kernels(causal: Any) -> None:
    """Makes the linear attention of a transformers model run fla's kernels on tensors of a GPU, and transformers' own
    loops on those of a CPU, in all models of the same modelling files. Changes nothing where fla is not installed; a
    second call changes nothing."""
    if find_spec("fla") is None:
        return

    for module in causal.modules():
        file = _file_of(module)
        for name, source in RULES.items():
            _replace(file, name, partial(_Rule, source))
        if hasattr(file, DELTA_RULE):
            _replace(file, CONVOLUTION, _Convolution)
            if type(module).__name__.endswith("RMSNormGated") and not isinstance(module.forward, _GatedNorm):
                module.forward = _GatedNorm(module)
                if torch.cuda.is_available() and is_usable("fla"):
                    pin_norms()
                    compile_side_by_side()


def takes_ends(mixer: Any, rows: torch.Tensor) -> bool:
    """True if a mixer keeps these rows' documents apart by their ends, `cu_seq_lens_q`."""
    function = getattr(_file_of(mixer), CONVOLUTION, None)
    return isinstance(function, _Convolution) and on_gpu(rows)


def on_gpu(tensor: torch.Tensor) -> bool:
    """True if fla's kernels can read a tensor, and this Triton compiles them rightly."""
    return tensor.is_cuda and _fla_is_usable()


@cache
def _fla_is_usable() -> bool:
    return is_usable("fla")


def _file_of(module: Any) -> ModuleType:
    return sys.modules[type(module).__module__]


def _replace(file: ModuleType, name: str, stand_in: Callable[[Any], Any]) -> None:
    function = getattr(file, name, None)
    if function is not None and not isinstance(function, _Rule | _Convolution):
        setattr(file, name, stand_in(function))


class _Rule:
    """Stands in for a function that transformers takes from fla where it can."""

    def __init__(self, source: tuple[str, str], function: Callable[..., Any]) -> None:
        self._source, self._reference = source, unwrap(function)

    def __call__(self, query: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """Computes what transformers' function does. Raises ImportError if fla is installed and cannot be imported."""
        if not on_gpu(query):
            _refuse_ends(options.get("cu_seqlens"))
            return self._reference(query, *arguments, **options)
        kernel, known = self._kernel
        return kernel(query, *arguments, **{name: value for name, value in options.items() if name in known})

    @cached_property
    def _kernel(self) -> tuple[Callable[..., Any], frozenset[str]]:
        """fla's function and its options: transformers hands everything on that a pass was given."""
        module, name = self._source
        kernel = getattr(import_module(module), name)  # only where there is a GPU: its import takes seconds
        return kernel, frozenset(signature(kernel).parameters)


class _Convolution:
    """Stands in for the short convolution before the gated delta rule."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self._reference = unwrap(function)

    def __call__(
        self, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
        activation: str | None = None, **options: Any,
    ) -> torch.Tensor:  # fmt: skip
        """hidden_states [B, width, T], weight [width, taps] -> [B, width, T]; B is 1 if documents are packed."""
        ends = options.get("cu_seq_lens_q")
        if not on_gpu(hidden_states) or activation not in (None, *SILU):
            _refuse_ends(ends)
            return self._reference(hidden_states, weight, bias, activation=activation)  # type: ignore[no-any-return]

        from fla.modules.causal_conv1d import causal_conv1d

        rows = hidden_states.transpose(1, 2)
        out, _ = causal_conv1d(rows, weight, bias, activation=activation, cu_seqlens=ends)
        return out.transpose(1, 2)  # type: ignore[no-any-return]


class _GatedNorm:
    """Stands in for the `forward` of the norm that the gated delta rule's output goes through: in PyTorch it reads and
    writes 54 bytes for each element, in one kernel 6."""

    def __init__(self, norm: Any) -> None:
        self._norm, self._reference = norm, norm.forward

    def __call__(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """hidden_states, gate [N, size] -> [N, size]: norm(hidden_states) times the gate's activation."""
        norm = self._norm
        if not on_gpu(hidden_states) or norm.activation not in SILU:
            return self._reference(hidden_states, gate)  # type: ignore[no-any-return]

        from fla.modules.norm.fused_norm_gate import rms_norm_gated

        return rms_norm_gated(  # type: ignore[no-any-return]
            hidden_states, gate, norm.weight, None, norm.activation, eps=norm.variance_epsilon
        )


def _refuse_ends(ends: torch.Tensor | None) -> None:
    """Raises ValueError for packed documents: the loops would let them see each other."""
    if ends is not None:
        raise ValueError("linear attention in plain PyTorch does not keep packed documents apart")
