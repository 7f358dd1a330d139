"""A whole decoder layer (pre-norm, gated MLP, rotary attention) with LoRA as one autograd function.

    n1 = norm(x);  q, k, v = rotate(n1 Wqkv);  h = x + attention(q, k, v) Wo
    n2 = norm(h);  y = h + (f(n2 Wgate) * n2 Wup) Wdown

One function instead of a hundred nodes decides what is kept between forward and backward (`Keep`), keeps each tensor
once, and makes the cheap ones (norms, the activation's product, rotated q and k under a head norm) again inside
kernels that read their inputs anyway. Gemma norms what each half adds once more (`attention_half`, `mlp_half`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from finetune_kernels.layers.attention_block import Angles, Attended, AttentionHalf, AttentionPass
from finetune_kernels.layers.host_memory import HostMemory
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.layers.mlp_block import Finished, MlpHalf, MlpPass, Projected
from finetune_kernels.layers.tiled_mlp import backward_in_tiles, forward_in_tiles, needs_tiles
from finetune_kernels.ops import rms_norm
from finetune_kernels.ops.attention import Documents
from finetune_kernels.planning.activation_policy import Keep as Keep
from finetune_kernels.primitives.adapter_dropout import new_draw


@dataclass
class DecoderLayer:
    """Everything the function needs of a layer; only the adapters train."""

    index: int
    attention: AttentionHalf
    mlp: MlpHalf
    keep: Keep
    host: HostMemory

    def in_tiles(self, tokens: int) -> bool:
        """Whether the MLP takes `tokens` in several tiles."""
        return self.keep is not Keep.EVERYTHING and needs_tiles(tokens)

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """In the order of `parameters`."""
        return self.attention.qkv, self.attention.o, self.mlp.gate_up, self.mlp.down

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' weights: inputs of the function, so that they get gradients."""
        return [parameter for group in self.groups for parameter in group.parameters]

    def begin(self) -> "LayerPass":
        """A new pass, with masks of its own where adapters drop a part of their inputs."""
        draw = new_draw() if any(group.drops for group in self.groups) else None
        return LayerPass(self.attention.begin(draw), self.mlp.begin(draw))

    def __call__(self, x: torch.Tensor, angles: Angles, documents: Documents) -> torch.Tensor:
        """x [T, hidden], angles of the tokens -> [T, hidden]; without gradients nothing is kept anywhere."""
        if not torch.is_grad_enabled():
            return _pass(self, x, angles, documents, self.begin(), finish=False).y
        return DecoderLayerFunction.apply(x, *angles, self, documents, *self.parameters)  # type: ignore[no-untyped-call, no-any-return]


class _Passed(NamedTuple):
    """What a forward pass made."""

    attended: Attended
    h: torch.Tensor
    r2: torch.Tensor
    projected: Projected | None
    """None: in tiles."""
    finished: Finished | None
    y: torch.Tensor


class LayerPass(NamedTuple):
    """What one pass through a layer is made with, forward, again and backward."""

    attention: AttentionPass
    mlp: MlpPass


class _State(NamedTuple):
    """What backward works from, kept or made again."""

    x: torch.Tensor
    angles: Angles
    attended: Attended
    h: torch.Tensor
    r2: torch.Tensor
    projected: Projected | None
    """None: in tiles."""
    finished: Finished | None


def _attend(
    layer: DecoderLayer, x: torch.Tensor, angles: Angles, documents: Documents, now: LayerPass
) -> tuple[Attended, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The attention half; h, its scales and the normalised h."""
    attended, added = layer.attention.forward(x, angles, documents, now.attention)
    h, n2, r2 = rms_norm.forward(x, layer.mlp.norm.weight, layer.mlp.norm.eps, delta=added)
    return attended, h, r2, n2


def _pass(
    layer: DecoderLayer, x: torch.Tensor, angles: Angles, documents: Documents, now: LayerPass, *, finish: bool
) -> _Passed:
    """The module's formula; `finish`: where the MLP goes in tiles, its second projection's part is wanted, too."""
    attended, h, r2, n2 = _attend(layer, x, angles, documents, now)
    projected, finished = None, None
    if layer.in_tiles(x.shape[0]):
        finished, y = forward_in_tiles(layer.mlp, h, n2, now.mlp, finish=finish)
    else:
        projected = layer.mlp.project(n2, now.mlp)
        finished, added = layer.mlp.finish(projected, now.mlp)
        y = added.add_(h)
    return _Passed(attended, h, r2, projected, finished, y)


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
        now = layer.begin()
        attended, h, r2, projected, finished, y = _pass(
            layer, x, Angles(cos, sin), documents, now, finish=layer.keep is Keep.ATTENTION
        )
        ctx.layer, ctx.documents, ctx.now = layer, documents, now
        kept: list[torch.Tensor] = [cos, sin]
        if layer.keep is Keep.HOST:
            layer.host.put(layer.index, x)
        else:
            kept.append(x)
        if finished is not None and layer.keep in (Keep.EVERYTHING, Keep.ATTENTION):
            kept += [h, r2, finished.inner_down, *finished.post]
            kept += projected if layer.keep is Keep.EVERYTHING and projected is not None else ()
            kept += attended.flat()
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of the adapters."""
        layer: DecoderLayer = ctx.layer
        now: LayerPass = ctx.now
        x, angles, attended, h, r2, projected, finished = _restore(ctx, layer)
        if projected is None:
            dh, of_mlp = backward_in_tiles(layer.mlp, dy.contiguous(), h, r2, finished, now.mlp)
        else:
            dh, of_mlp = layer.mlp.backward(dy.contiguous(), h, r2, projected, finished, now.mlp)
        del projected, finished, h
        wants_dx = ctx.needs_input_grad[0]
        dx, of_attention = layer.attention.backward(
            dh, x, angles, ctx.documents, attended, now.attention, wants_dx=wants_dx
        )
        return dx, None, None, None, None, *of_attention, *of_mlp


def _restore(ctx: Any, layer: DecoderLayer) -> _State:
    """What forward had; the second projection only where it was kept."""
    cos, sin, *rest = ctx.saved_tensors
    angles = Angles(cos, sin)
    if layer.keep is Keep.HOST:
        x = layer.host.take(layer.index)
    else:
        x, *rest = rest
    if not rest:
        attended, h, r2, n2 = _attend(layer, x, angles, ctx.documents, ctx.now)
        projected = None if layer.in_tiles(x.shape[0]) else layer.mlp.project(n2, ctx.now.mlp)
        return _State(x, angles, attended, h, r2, projected, None)
    h, r2, inner_down, *rest = rest
    end = 0 if layer.mlp.post_norm is None else 2
    finished, rest = Finished(inner_down, tuple(rest[:end])), rest[end:]
    projected = None
    if layer.keep is Keep.EVERYTHING:
        projected, rest = Projected(*rest[:2]), rest[2:]
    attended = Attended.unflatten(rest, post=layer.attention.post_norm is not None)
    if projected is None and not layer.in_tiles(x.shape[0]):
        _, n2, _ = rms_norm.forward(h, layer.mlp.norm.weight, layer.mlp.norm.eps)
        projected = layer.mlp.project(n2, ctx.now.mlp)
    return _State(x, angles, attended, h, r2, projected, finished)
