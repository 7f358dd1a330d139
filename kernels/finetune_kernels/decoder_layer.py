"""A whole decoder layer (pre-norm, gated MLP, rotary attention) with LoRA as one autograd function.

    n1 = norm(x);  q, k, v = rotate(n1 Wqkv);  h = x + attention(q, k, v) Wo
    n2 = norm(h);  y = h + (f(n2 Wgate) * n2 Wup) Wdown

One function instead of a hundred nodes decides what is kept between forward and backward (`Keep`), keeps each tensor
once, and makes the cheap ones (norms, the activation's product, rotated q and k under a head norm) again inside
kernels that read their inputs anyway.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch

from finetune_kernels import adapted_activation, attention, rms_norm
from finetune_kernels.attention import Documents
from finetune_kernels.gated_activation import Activation
from finetune_kernels.host_memory import HostMemory
from finetune_kernels.linear_group import LinearGroup
from finetune_kernels.rotary_embedding import HeadNorm, Heads, rotate, rotate_back


class Keep(Enum):
    """What a layer keeps for its backward pass; each costs less memory and more time than the one before."""

    EVERYTHING = "everything"
    ATTENTION = "attention"
    """All but gate and up, which are projected again."""
    INPUT = "input"
    """Its input; the forward pass is made again."""
    HOST = "host"
    """Its input, in pinned host memory."""


@dataclass
class DecoderLayer:
    """Everything the function needs of a layer; only the adapters train."""

    index: int
    qkv: LinearGroup
    o: LinearGroup
    gate_up: LinearGroup
    down: LinearGroup
    norm1: torch.Tensor
    norm2: torch.Tensor
    eps: float
    heads: Heads
    head_norm: HeadNorm | None
    scale: float
    activation: Activation
    keep: Keep
    host: HostMemory

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """In the order of `parameters`."""
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' weights: inputs of the function, so that they get gradients."""
        return [parameter for group in self.groups for parameter in group.parameters]

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, documents: Documents) -> torch.Tensor:
        """x [T, hidden], cos and sin [T, D] -> [T, hidden]."""
        return DecoderLayerFunction.apply(x, cos, sin, self, documents, *self.parameters)  # type: ignore[no-untyped-call, no-any-return]


class _Attended(NamedTuple):
    """Results of the attention half, as far as backward needs them."""

    r1: torch.Tensor
    qkv: torch.Tensor
    inner_qkv: torch.Tensor
    out: torch.Tensor
    inner_o: torch.Tensor
    h: torch.Tensor
    r2: torch.Tensor
    saved: tuple[torch.Tensor, ...]


class _Projected(NamedTuple):
    """Results of the MLP's first projection; the adapters' shares are added where gate and up are used."""

    gate_up: torch.Tensor
    inner: torch.Tensor


def _project(layer: DecoderLayer, n2: torch.Tensor) -> _Projected:
    return _Projected(layer.gate_up.base(n2), layer.gate_up.inner(n2))


def _attend(
    layer: DecoderLayer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, documents: Documents
) -> tuple[_Attended, torch.Tensor]:
    """The attention half, and the normalised h."""
    _, n1, r1 = rms_norm.forward(x, layer.norm1, layer.eps)
    qkv, inner_qkv = layer.qkv.forward(n1)
    q, k, v = layer.heads.split(rotate(qkv, cos, sin, layer.heads, layer.head_norm))
    out, saved = attention.forward(q, k, v, documents, layer.scale)
    added, inner_o = layer.o.forward(out.flatten(1))
    h, n2, r2 = rms_norm.forward(x, layer.norm2, layer.eps, delta=added)
    return _Attended(r1, qkv, inner_qkv, out, inner_o, h, r2, saved), n2


class DecoderLayerFunction(torch.autograd.Function):
    """Autograd around the layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layer: DecoderLayer,
        documents: Documents,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """See the module's formula; `parameters` are `layer.parameters`."""
        attended, n2 = _attend(layer, x, cos, sin, documents)
        projected = _project(layer, n2)
        del n2
        shares = layer.gate_up.shares(projected.inner)
        activated = adapted_activation.forward(projected.gate_up, layer.activation, shares)
        added, inner_down = layer.down.forward(activated)
        del activated
        ctx.layer, ctx.documents = layer, documents
        kept: list[torch.Tensor] = [cos, sin]
        if layer.keep is Keep.HOST:
            layer.host.put(layer.index, x)
        else:
            kept.append(x)
        if layer.keep in (Keep.EVERYTHING, Keep.ATTENTION):
            kept += [inner_down, *attended[:-1], *attended.saved]
        if layer.keep is Keep.EVERYTHING:
            kept += projected
        ctx.save_for_backward(*kept)
        return added.add_(attended.h)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of the adapters."""
        layer: DecoderLayer = ctx.layer
        x, cos, sin, attended, projected, inner_down = _restore(ctx, layer)
        dh, of_mlp = _mlp_backward(layer, dy.contiguous(), attended, projected, inner_down)
        del projected
        d_out, d_inner = layer.o.backward(dh)
        of_o = layer.o.gradients(dh, attended.out.flatten(1), attended.inner_o, d_inner)
        rotated = attended.qkv
        if layer.head_norm is not None:
            rotated = rotate(attended.qkv, cos, sin, layer.heads, layer.head_norm)
        three = attention.backward(
            d_out.view_as(attended.out), *layer.heads.split(rotated), attended.out, attended.saved, ctx.documents,
            layer.scale,
        )  # fmt: skip
        d_qkv = rotate_back(three, attended.qkv, cos, sin, layer.heads, layer.head_norm)
        if ctx.needs_input_grad[0]:
            dn1, d_inner = layer.qkv.backward(d_qkv)
            dx, n1 = rms_norm.backward(dn1, x, layer.norm1, attended.r1, residual=dh, again=True)
        else:
            dx, d_inner = None, layer.qkv.d_inner(d_qkv)
            _, n1, _ = rms_norm.forward(x, layer.norm1, layer.eps)
        of_qkv = layer.qkv.gradients(d_qkv, n1, attended.inner_qkv, d_inner)
        return dx, None, None, None, None, *of_qkv, *of_o, *of_mlp


def _restore(
    ctx: Any, layer: DecoderLayer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, _Attended, _Projected, torch.Tensor | None]:
    """What forward had, kept or made again; the down adapter's x A^T only where it was kept."""
    cos, sin, *rest = ctx.saved_tensors
    if layer.keep is Keep.HOST:
        x = layer.host.take(layer.index)
    else:
        x, *rest = rest
    if not rest:
        attended, n2 = _attend(layer, x, cos, sin, ctx.documents)
        return x, cos, sin, attended, _project(layer, n2), None
    inner_down, *rest = rest
    end = len(rest) - 2 if layer.keep is Keep.EVERYTHING else len(rest)
    r1, qkv, inner_qkv, out, inner_o, h, r2, *saved = rest[:end]
    attended = _Attended(r1, qkv, inner_qkv, out, inner_o, h, r2, tuple(saved))
    if layer.keep is Keep.EVERYTHING:
        return x, cos, sin, attended, _Projected(*rest[end:]), inner_down
    _, n2, _ = rms_norm.forward(attended.h, layer.norm2, layer.eps)
    return x, cos, sin, attended, _project(layer, n2), inner_down


def _mlp_backward(
    layer: DecoderLayer,
    dy: torch.Tensor,
    attended: _Attended,
    projected: _Projected,
    inner_down: torch.Tensor | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradient of h through both ways, and of the MLP's adapters."""
    d_activated, d_inner_down = layer.down.backward_base(dy)
    shares = layer.gate_up.shares(projected.inner)
    after = (d_inner_down, layer.down.a()) if layer.down.parameters else None
    d_gate_up = adapted_activation.backward(d_activated, projected.gate_up, layer.activation, shares, after)
    activated = d_activated
    if inner_down is None:
        inner_down = layer.down.inner(activated)
    of_down = layer.down.gradients(dy, activated, inner_down, d_inner_down)
    del activated, d_activated
    dn2, d_inner = layer.gate_up.backward(d_gate_up)
    dh, n2 = rms_norm.backward(dn2, attended.h, layer.norm2, attended.r2, residual=dy, again=True)
    return dh, [*layer.gate_up.gradients(d_gate_up, n2, projected.inner, d_inner), *of_down]
