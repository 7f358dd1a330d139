"""The second block of a layer in which an MLP and experts stand side by side (Gemma 4 26B-A4B).

    m = norm1(mlp(norm(h)));   w, e = router(h);   x = norm2(sum over e of w_e expert_e(norm0(h)));   out = norm3(m + x)

In other mixtures an MLP that all tokens share reads what router and experts read. Here each has the residual stream h
itself, as the MLP and the experts norm it by weights of their own and the router by none: no norm stands before the
block, and its "normalised" input is h.

Saved with the down activations is what norm1 and norm2 read; their sum, which norm3 reads, is made of it again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from finetune_kernels.experts.module import StackedExperts
from finetune_kernels.experts.routers import choose, choose_backward
from finetune_kernels.layers.blocks.attention_block import add_residual, normalize, normalize_backward, pre_norm
from finetune_kernels.layers.blocks.mixture_block import MixtureActivations
from finetune_kernels.layers.blocks.mlp_block import DownActivations, MlpBlock, MlpPass, SavedMlp
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.ops import expert_mlp, rms_norm
from finetune_kernels.ops.expert_mlp import Routes
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.primitives.adapter_dropout import DropoutSeed
from finetune_kernels.primitives.expert_projection import Rows


@dataclass
class MlpBesideExperts:
    """Weights and settings of the block; only the adapters train."""

    mlp: MlpBlock
    """With the norms before and behind it."""
    router: Any
    """transformers' module, which norms its input."""
    experts: StackedExperts
    expert_norm: Norm
    """Before the experts; it adds to the mean square what the MLP's adds."""
    expert_post_norm: Norm
    post_norm: Norm
    """Of the sum."""
    norm: None = None
    """The layer gives the block its residual stream."""
    dtype: None = None
    """In the type it has."""

    def __post_init__(self) -> None:
        """Raises ValueError for norms that would need a root mean square each."""
        if self.mlp.norm is None or self.mlp.norm.eps != self.expert_norm.eps:
            raise ValueError("the MLP and the experts norm the same rows by different formulas")

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The groups of linear layers."""
        return self.mlp.groups

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' weights, in the order of `backward`."""
        return [*self.mlp.parameters, *self.experts.factors]

    @contextmanager
    def dequantized(self) -> Iterator[None]:
        """Dequantises all weights once for what is computed inside."""
        with self.experts.gate_up.dequantized(), self.experts.down.dequantized(), self.mlp.dequantized():
            yield

    def take(self, tensors: Sequence[Any]) -> tuple[MixtureActivations, list[Any]]:
        """Returns the activations, which begin saved `tensors`, and the tensors behind them."""
        end = len(MixtureActivations._fields)
        return MixtureActivations(*tensors[:end]), list(tensors[end:])

    def begin(self, seed: DropoutSeed | None) -> MlpPass:
        """Returns a new pass, with dropout masks of `seed` in the MLP."""
        return self.mlp.begin(seed)

    def gate_up_projection(self, h: torch.Tensor, pass_ctx: MlpPass) -> MixtureActivations:
        """h [T, hidden] -> gate and up of the MLP, and of every expert that a token goes to."""
        _, n, _ = pre_norm(self.mlp.norm, h, dtype=self.mlp.dtype)  # [T, hidden]
        wide = self.mlp.gate_up_projection(n, pass_ctx)

        weights, index = choose(self.router, h)  # [T, k] each
        settings, factors = self.experts.mixture()
        routes = Routes(weights.detach(), Rows.sort(index, settings.experts))
        _, n, _ = pre_norm(self.expert_norm, h, dtype=self.mlp.dtype)
        y = expert_mlp.widen(n, routes, settings, factors)
        return MixtureActivations(routes.weights, *routes.rows, y, *wide, None)

    def down_projection(
        self, gate_up: MixtureActivations, pass_ctx: MlpPass, stream: torch.dtype | None = None
    ) -> tuple[DownActivations, torch.Tensor]:
        """Activations and down projections; returns what backward needs and the block's output [T, hidden], which the
        caller may overwrite. `stream`: type of the residual stream, which the norms write; None: their input's."""
        assert gate_up.shared is not None
        down, m = self.mlp.down_projection(gate_up.shared, pass_ctx, stream)  # [T, hidden]
        out = expert_mlp.narrow(gate_up.y, gate_up.routes, *self.experts.mixture())
        x, saved = normalize(self.expert_post_norm, out, stream)

        out, _ = normalize(self.post_norm, m.add_(x), stream)
        return DownActivations(down.xa, (*down.post_norm, *saved)), out

    def finish(self, down: DownActivations, stream: torch.dtype) -> torch.Tensor:
        """Returns the block's output [T, hidden] of saved activations."""
        return normalize(self.post_norm, self._sum(down, stream), stream)[0]

    def _sum(self, down: DownActivations, stream: torch.dtype) -> torch.Tensor:
        """Returns what the last norm reads [T, hidden]."""
        rows, _, expert_rows, _ = down.post_norm
        m, _ = normalize(self.mlp.post_norm, rows, stream)
        return m.add_(normalize(self.expert_post_norm, expert_rows, stream)[0])

    def backward(
        self, dy: torch.Tensor, saved: SavedMlp, pass_ctx: MlpPass, *, residual: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Takes dy [T, hidden], the gradient of the output; returns the gradient of h and those of the adapters, the
        MLP's first. `residual` is the gradient of h past the block."""
        made: MixtureActivations = saved.gate_up
        h, down = saved.h, saved.down
        if down is None:
            down, _ = self.down_projection(made, pass_ctx, h.dtype)
        _, last = normalize(self.post_norm, self._sum(down, h.dtype), h.dtype)
        d_sum = normalize_backward(self.post_norm, dy, last, h.dtype)  # [T, hidden]
        del last

        # The experts, and the router, whose weights are multiplied by what they make.
        _, n, rstd = pre_norm(self.expert_norm, h, dtype=self.mlp.dtype)
        dm = normalize_backward(self.expert_post_norm, d_sum, down.post_norm[2:], n.dtype)
        dn, d_weights, d_experts = expert_mlp.backward(dm, n, made.routes, made.y, *self.experts.mixture())
        del dm, n
        dh, _ = rms_norm.backward(dn, h, self.expert_norm, rstd, residual)
        dh = add_residual(choose_backward(self.router, h, d_weights), dh)

        # The MLP, whose norm divides by the same root mean square.
        whole = SavedMlp(h, rstd, made.shared, DownActivations(down.xa, down.post_norm[:2]))
        dh, d_mlp = self.mlp.backward(d_sum, whole, pass_ctx, residual=dh)
        return dh, [*d_mlp, *d_experts]
