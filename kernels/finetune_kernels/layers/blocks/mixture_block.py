"""The second block of a layer whose MLP is a mixture of experts: norm, router, experts, and an expert that all tokens
share.

    n = norm(h);  w, e = router(n);  m = sum over e of w_e expert_e(n) + sigmoid(n Wg) * shared(n)

The shared expert is an `MlpBlock` without a norm of its own; Granite's has no gate. The router is transformers' module,
which is frozen and makes two small products: backward runs it again under autograd, as its weights depend on n. It is
deterministic and reads the same n, so it chooses the same experts.

Saved are the order of the rows by expert, gate and up of the experts and of the shared one, and the gate's value. The
shared expert's output is made again where its gate needs it: its product is a small part of the layer's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from finetune_kernels.experts.module import StackedExperts
from finetune_kernels.experts.routers import choose, choose_backward
from finetune_kernels.layers.blocks.attention_block import pre_norm, pre_norm_backward
from finetune_kernels.layers.blocks.mlp_block import DownActivations, GateUpActivations, MlpBlock, MlpPass, SavedMlp
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.layers.lora_pass import LoraPass
from finetune_kernels.ops import expert_mlp
from finetune_kernels.ops.expert_mlp import Routes
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.primitives.adapter_dropout import DropoutSeed
from finetune_kernels.primitives.expert_projection import Rows


class MixturePass(NamedTuple):
    """The passes through the linear layers that all tokens share; None for those that the family has not."""

    shared: MlpPass | None
    gate: LoraPass | None

    def from_row(self, row: int) -> "MixturePass":
        """The same pass for a tile that begins at `row`."""
        shared = None if self.shared is None else self.shared.from_row(row)
        return MixturePass(shared, None if self.gate is None else self.gate.from_row(row))


class MixtureActivations(NamedTuple):
    """Results of the block's first products; None where the family has no such part."""

    weights: torch.Tensor
    """The router's weights [T, k]."""
    order: torch.Tensor
    ends: torch.Tensor
    experts: torch.Tensor
    places: torch.Tensor
    """`Rows` of the experts, one field after the other."""
    y: torch.Tensor
    """gate and up of the experts [T k, 2 F]."""
    shared_y: torch.Tensor | None
    shared_xa: torch.Tensor | None
    """`GateUpActivations` of the shared expert."""
    gate: torch.Tensor | None
    """sigmoid(n Wg) [T, 1]."""

    @property
    def routes(self) -> Routes:
        """The way of each token to its experts."""
        return Routes(self.weights, Rows(self.order, self.ends, self.experts, self.places))

    @property
    def shared(self) -> GateUpActivations | None:
        """gate and up of the shared expert."""
        if self.shared_y is None or self.shared_xa is None:
            return None
        return GateUpActivations(self.shared_y, self.shared_xa)


@dataclass
class MixtureBlock:
    """Weights and settings of the block; only the adapters train."""

    norm: Norm | None
    router: Any
    """transformers' module, of whose outputs `choose` takes weights and numbers of experts."""
    experts: StackedExperts
    shared: MlpBlock | None
    shared_gate: LinearGroup | None
    multiplier: float = 1.0
    """Factor of the block's output (Granite)."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Compute type, which the norm before the block writes; None: that of the residual stream."""
        return None

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The groups of linear layers."""
        shared = () if self.shared is None else self.shared.groups
        return shared if self.shared_gate is None else (*shared, self.shared_gate)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' weights, in the order of `backward`."""
        return [*(part for group in self.groups for part in group.parameters), *self.experts.factors]

    @contextmanager
    def dequantized(self) -> Iterator[None]:
        """Dequantises all weights once for what is computed inside."""
        shared = nullcontext() if self.shared is None else self.shared.dequantized()
        with self.experts.gate_up.dequantized(), self.experts.down.dequantized(), shared:
            yield

    def take(self, tensors: Sequence[Any]) -> tuple[MixtureActivations, list[Any]]:
        """Returns the activations, which begin saved `tensors`, and the tensors behind them."""
        end = len(MixtureActivations._fields)
        return MixtureActivations(*tensors[:end]), list(tensors[end:])

    def begin(self, seed: DropoutSeed | None) -> MixturePass:
        """Returns a new pass, with dropout masks of `seed` in the layers that all tokens share."""
        return MixturePass(
            None if self.shared is None else self.shared.begin(seed),
            None if self.shared_gate is None else self.shared_gate.begin(seed),
        )

    def gate_up_projection(self, n2: torch.Tensor, pass_ctx: MixturePass) -> MixtureActivations:
        """Normalised h [T, hidden] -> gate and up of every expert that a token goes to."""
        weights, index = choose(self.router, n2)  # [T, k] each
        settings, factors = self.experts.mixture()
        routes = Routes(weights.detach(), Rows.sort(index, settings.experts))
        y = expert_mlp.widen(n2, routes, settings, factors)

        shared_y = shared_xa = gate = None
        if self.shared is not None and pass_ctx.shared is not None:
            shared_y, shared_xa = self.shared.gate_up_projection(n2, pass_ctx.shared)
        if self.shared_gate is not None and pass_ctx.gate is not None:
            gate = self.shared_gate.forward(n2, pass_ctx.gate)[0].sigmoid()
        return MixtureActivations(routes.weights, *routes.rows, y, shared_y, shared_xa, gate)

    def down_projection(
        self, gate_up: MixtureActivations, pass_ctx: MixturePass, stream: torch.dtype | None = None
    ) -> tuple[DownActivations, torch.Tensor]:
        """Activation and down projection of all experts; returns what backward needs of the shared one and the block's
        output [T, hidden], which the caller may overwrite. `stream` is for blocks with a second norm."""
        out = expert_mlp.narrow(gate_up.y, gate_up.routes, *self.experts.mixture())  # [T, hidden]

        down = DownActivations(out.new_empty(0), ())
        if self.shared is not None and pass_ctx.shared is not None and gate_up.shared is not None:
            down, common = self.shared.down_projection(gate_up.shared, pass_ctx.shared)
            out.add_(common if gate_up.gate is None else common.mul_(gate_up.gate))
        return down, out if self.multiplier == 1 else out.mul_(self.multiplier)

    def backward(
        self, dy: torch.Tensor, saved: SavedMlp, pass_ctx: MixturePass, *, residual: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Takes dy [T, hidden], the gradient of the output; returns the gradient of h and those of the adapters, the
        shared expert's first. `residual` is the gradient of h past the block."""
        made: MixtureActivations = saved.gate_up
        _, n2, _ = pre_norm(self.norm, saved.h)  # [T, hidden]
        dm = dy if self.multiplier == 1 else dy * self.multiplier

        # The experts, and the router, whose weights are multiplied by what they make.
        dn2, d_weights, d_experts = expert_mlp.backward(dm, n2, made.routes, made.y, *self.experts.mixture())
        dn2 += choose_backward(self.router, n2, d_weights)

        # The shared expert and its gate.
        dn2, d_shared = self._shared_backward(dm, dn2, saved._replace(h=n2), pass_ctx)

        dh, _ = pre_norm_backward(self.norm, dn2, saved.h, saved.rstd, residual)
        return dh, [*d_shared, *d_experts]

    def _shared_backward(
        self, dm: torch.Tensor, dn2: torch.Tensor, saved: SavedMlp, pass_ctx: MixturePass
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Takes dm and dn2 [T, hidden], the gradients of the block's output and, as far as it is known, of n2, which is
        the `h` of `saved`; returns that of n2 and those of the adapters."""
        made: MixtureActivations = saved.gate_up
        if self.shared is None or pass_ctx.shared is None or made.shared is None:
            return dn2, []

        down, d_common, d_gate = saved.down, dm, list[torch.Tensor]()
        if self.shared_gate is not None and pass_ctx.gate is not None and made.gate is not None:
            # The gradient of the gate is <dm, shared(n)>, for which that is made again.
            down, common = self.shared.down_projection(made.shared, pass_ctx.shared)
            d_logit = (dm * common).sum(1, keepdim=True, dtype=torch.float32) * (made.gate * (1 - made.gate))
            dn2, d_gate = self._gate_backward(d_logit.to(dm.dtype), dn2, saved.h, pass_ctx.gate)
            d_common = dm * made.gate

        whole = SavedMlp(saved.h, saved.rstd, made.shared, down)
        dn2, d_shared = self.shared.backward(d_common, whole, pass_ctx.shared, residual=dn2)
        return dn2, [*d_shared, *d_gate]

    def _gate_backward(
        self, d_logit: torch.Tensor, dn2: torch.Tensor, n2: torch.Tensor, pass_ctx: LoraPass
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """d_logit [T, 1] -> the gradient of n2 [T, hidden], with dn2 in it, and those of the gate's adapter."""
        assert self.shared_gate is not None
        through, d_xa = self.shared_gate.backward(d_logit, pass_ctx)
        xa = self.shared_gate.xa(n2, pass_ctx)
        return dn2.add_(through), self.shared_gate.gradients(d_logit, n2, xa, d_xa, pass_ctx)
