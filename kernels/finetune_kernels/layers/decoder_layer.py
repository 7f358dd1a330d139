"""A whole decoder layer (pre-norm, gated MLP, rotary attention) with LoRA as one autograd function.

    n1 = norm(x);  q, k, v = rotate(n1 Wqkv);  h = x + attention(q, k, v) Wo
    n2 = norm(h);  y = h + (f(n2 Wgate) * n2 Wup) Wdown

One function instead of a hundred nodes decides what is saved between forward and backward (`ActivationPolicy`), saves
each tensor once, and recomputes the cheap ones (norms, the activation's product, rotated q and k under a head norm)
inside kernels that read their inputs anyway. Gemma norms what each block adds once more (`attention_block`,
`mlp_block`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from finetune_kernels.layers.attention_block import AttentionActivations, AttentionBlock, AttentionPass, CosSin
from finetune_kernels.layers.host_memory import HostMemory
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.layers.mlp_block import DownActivations, GateUpActivations, MlpBlock, MlpPass
from finetune_kernels.layers.tiled_mlp import backward_in_tiles, forward_in_tiles, needs_tiles
from finetune_kernels.ops import rms_norm
from finetune_kernels.ops.attention import PackedSequences
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.primitives.adapter_dropout import new_dropout_seed


@dataclass
class DecoderLayer:
    """Everything the function needs of a layer; only the adapters train."""

    index: int
    attention: AttentionBlock
    mlp: MlpBlock
    policy: ActivationPolicy
    host: HostMemory

    def is_tiled(self, tokens: int) -> bool:
        """Whether the MLP takes `tokens` in several tiles."""
        return self.policy is not ActivationPolicy.SAVE_ALL and needs_tiles(tokens)

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
        seed = new_dropout_seed() if any(group.drops for group in self.groups) else None
        return LayerPass(self.attention.begin(seed), self.mlp.begin(seed))

    def __call__(self, x: torch.Tensor, cos_sin: CosSin, documents: PackedSequences) -> torch.Tensor:
        """x [T, hidden], cos_sin of the tokens -> [T, hidden]; without gradients nothing is kept anywhere."""
        if not torch.is_grad_enabled():
            return _pass(self, x, cos_sin, documents, self.begin(), finish=False).y
        return DecoderLayerFunction.apply(x, *cos_sin, self, documents, *self.parameters)  # type: ignore[no-untyped-call, no-any-return]


class LayerActivations(NamedTuple):
    """What a forward pass made."""

    attended: AttentionActivations
    h: torch.Tensor
    r2: torch.Tensor
    projected: GateUpActivations | None
    """None: in tiles."""
    finished: DownActivations | None
    y: torch.Tensor


class LayerPass(NamedTuple):
    """What one pass through a layer is made with, forward, again and backward."""

    attention: AttentionPass
    mlp: MlpPass


class SavedActivations(NamedTuple):
    """What backward works from, kept or made again."""

    x: torch.Tensor
    cos_sin: CosSin
    attended: AttentionActivations
    h: torch.Tensor
    r2: torch.Tensor
    projected: GateUpActivations | None
    """None: in tiles."""
    finished: DownActivations | None


def _attend(
    layer: DecoderLayer, x: torch.Tensor, cos_sin: CosSin, documents: PackedSequences, pass_ctx: LayerPass
) -> tuple[AttentionActivations, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The attention half; h, its scales and the normalised h."""
    attended, added = layer.attention.forward(x, cos_sin, documents, pass_ctx.attention)
    h, n2, r2 = rms_norm.forward(x, layer.mlp.norm.weight, layer.mlp.norm.eps, delta=added)
    return attended, h, r2, n2


def _pass(
    layer: DecoderLayer,
    x: torch.Tensor,
    cos_sin: CosSin,
    documents: PackedSequences,
    pass_ctx: LayerPass,
    *,
    finish: bool,
) -> LayerActivations:
    """The module's formula; `finish`: where the MLP goes in tiles, its second projection's part is wanted, too."""
    attended, h, r2, n2 = _attend(layer, x, cos_sin, documents, pass_ctx)
    projected, finished = None, None
    if layer.is_tiled(x.shape[0]):
        finished, y = forward_in_tiles(layer.mlp, h, n2, pass_ctx.mlp, finish=finish)
    else:
        projected = layer.mlp.project(n2, pass_ctx.mlp)
        finished, added = layer.mlp.finish(projected, pass_ctx.mlp)
        y = added.add_(h)
    return LayerActivations(attended, h, r2, projected, finished, y)


class DecoderLayerFunction(torch.autograd.Function):
    """Autograd around the layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layer: DecoderLayer,
        documents: PackedSequences,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """See the module's formula; `parameters` are `layer.parameters`."""
        pass_ctx = layer.begin()
        attended, h, r2, projected, finished, y = _pass(
            layer, x, CosSin(cos, sin), documents, pass_ctx, finish=layer.policy is ActivationPolicy.RECOMPUTE_MLP
        )
        ctx.layer, ctx.documents, ctx.pass_ctx = layer, documents, pass_ctx
        kept: list[torch.Tensor] = [cos, sin]
        if layer.policy is ActivationPolicy.OFFLOAD:
            layer.host.put(layer.index, x)
        else:
            kept.append(x)
        if finished is not None and layer.policy in (ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_MLP):
            kept += [h, r2, finished.xa_down, *finished.post]
            kept += projected if layer.policy is ActivationPolicy.SAVE_ALL and projected is not None else ()
            kept += attended.flat()
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of the adapters."""
        layer: DecoderLayer = ctx.layer
        pass_ctx: LayerPass = ctx.pass_ctx
        x, cos_sin, attended, h, r2, projected, finished = _restore(ctx, layer)
        if projected is None:
            dh, of_mlp = backward_in_tiles(layer.mlp, dy.contiguous(), h, r2, finished, pass_ctx.mlp)
        else:
            dh, of_mlp = layer.mlp.backward(dy.contiguous(), h, r2, projected, finished, pass_ctx.mlp)
        del projected, finished, h
        wants_dx = ctx.needs_input_grad[0]
        dx, of_attention = layer.attention.backward(
            dh, x, cos_sin, ctx.documents, attended, pass_ctx.attention, wants_dx=wants_dx
        )
        return dx, None, None, None, None, *of_attention, *of_mlp


def _restore(ctx: Any, layer: DecoderLayer) -> SavedActivations:
    """What forward had; the second projection only where it was kept."""
    cos, sin, *rest = ctx.saved_tensors
    cos_sin = CosSin(cos, sin)
    if layer.policy is ActivationPolicy.OFFLOAD:
        x = layer.host.take(layer.index)
    else:
        x, *rest = rest
    if not rest:
        attended, h, r2, n2 = _attend(layer, x, cos_sin, ctx.documents, ctx.pass_ctx)
        projected = None if layer.is_tiled(x.shape[0]) else layer.mlp.project(n2, ctx.pass_ctx.mlp)
        return SavedActivations(x, cos_sin, attended, h, r2, projected, None)
    h, r2, xa_down, *rest = rest
    end = 0 if layer.mlp.post_norm is None else 2
    finished, rest = DownActivations(xa_down, tuple(rest[:end])), rest[end:]
    projected = None
    if layer.policy is ActivationPolicy.SAVE_ALL:
        projected, rest = GateUpActivations(*rest[:2]), rest[2:]
    attended = AttentionActivations.unflatten(rest, post=layer.attention.post_norm is not None)
    if projected is None and not layer.is_tiled(x.shape[0]):
        _, n2, _ = rms_norm.forward(h, layer.mlp.norm.weight, layer.mlp.norm.eps)
        projected = layer.mlp.project(n2, ctx.pass_ctx.mlp)
    return SavedActivations(x, cos_sin, attended, h, r2, projected, finished)
