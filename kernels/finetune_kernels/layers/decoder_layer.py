"""A whole decoder layer (norms, rotary attention, MLP) with LoRA as one autograd function.

    n1 = norm(x);  q, k, v = rope(n1 Wqkv);  h = x + attention(q, k, v) Wo
    n2 = norm(h);  y = h + (f(n2 Wgate) * n2 Wup) Wdown

One function instead of a hundred nodes decides what is saved between forward and backward (`ActivationPolicy`), saves
each tensor once, and recomputes the cheap ones (norms, the activation's product, rotated q and k under a head norm)
inside kernels that read their inputs anyway. Gemma norms the output of each block as well, OLMo 2 only the outputs
(`attention_block`, `mlp_block`). In a parallel layer (Cohere, Phi-2) both blocks read the norm of x:

    n = norm(x);  h = x + attention(n ...) Wo;  y = h + (f(n Wgate) * n Wup) Wdown

Latent attention has a block of its own (`latent_attention`). In a hybrid, some layers have a module of transformers in
attention's place (`module_mixer`); a mixture has experts in the MLP's (`mixture_block`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from finetune_kernels.layers.blocks.attention_block import (
    AttentionActivations,
    AttentionBlock,
    CosSin,
    LayerInputs,
    add_residual,
    pre_norm,
)
from finetune_kernels.layers.blocks.latent_attention import LatentActivations, LatentAttention
from finetune_kernels.layers.blocks.mixture_block import MixtureBlock
from finetune_kernels.layers.blocks.mlp_block import DownActivations, MlpBlock, SavedMlp
from finetune_kernels.layers.blocks.module_mixer import (
    MixerActivations,
    ModuleMixer,
    ParallelActivations,
    ParallelMixers,
)
from finetune_kernels.layers.blocks.tiled_mlp import backward_in_tiles, forward_in_tiles, needs_tiles
from finetune_kernels.layers.host_memory import HostMemory
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.primitives.adapter_dropout import new_dropout_seed
from finetune_kernels.primitives.attention_inputs import PackedSequences

FirstActivations = AttentionActivations | LatentActivations | MixerActivations | ParallelActivations


class LayerPass(NamedTuple):
    """The passes through both blocks; forward, recomputation and backward share it."""

    mixer: Any
    """As the block began it; so is the other."""
    mlp: Any


@dataclass
class DecoderLayer:
    """Weights and settings of one layer; only the adapters train."""

    index: int
    mixer: AttentionBlock | LatentAttention | ModuleMixer | ParallelMixers
    mlp: MlpBlock | MixtureBlock
    policy: ActivationPolicy
    host: HostMemory
    parallel: bool = False
    """True if the MLP reads the layer's input, through the attention block's norm, and not h."""

    def is_tiled(self, tokens: int) -> bool:
        """True if the MLP or the experts take `tokens` in several tiles."""
        return self.policy is not ActivationPolicy.SAVE_ALL and needs_tiles(tokens)

    @property
    def is_recordable(self) -> bool:
        """True if every pass of one shape launches the same kernels on the same weights: no copies to the host, no seed
        of its own, no module of transformers that decides as it runs."""
        is_ours = isinstance(self.mixer, AttentionBlock | LatentAttention)
        return is_ours and self.policy is not ActivationPolicy.OFFLOAD and not any(g.drops for g in self.groups)

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The groups of linear layers that our kernels run."""
        return *self.mixer.groups, *self.mlp.groups

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' weights: inputs of the function, so that they get gradients."""
        return [*self.mixer.parameters, *self.mlp.parameters]

    def begin(self) -> LayerPass:
        """Returns a new pass, with a dropout seed of its own if adapters drop a part of their inputs."""
        seed = new_dropout_seed() if any(group.drops for group in self.groups) else None
        return LayerPass(self.mixer.begin(seed), self.mlp.begin(seed))

    def __call__(self, x: torch.Tensor, cos_sin: CosSin, sequences: PackedSequences) -> torch.Tensor:
        """x [T, hidden] -> y [T, hidden]. Without gradients nothing is saved anywhere."""
        if not torch.is_grad_enabled():
            return _forward(self, LayerInputs(x, cos_sin, sequences), self.begin(), save_down=False).y
        return DecoderLayerFunction.apply(x, *cos_sin, self, sequences, *self.parameters)  # type: ignore[no-untyped-call, no-any-return]


class LayerActivations(NamedTuple):
    """Everything that a forward pass computes and backward could use."""

    mixer: FirstActivations
    h: torch.Tensor
    """Residual stream between the blocks [T, hidden]."""
    rstd: torch.Tensor
    """1 / root mean square of the MLP's input before its norm, which is h, or x in a parallel layer [T]."""
    gate_up: Any
    """As in `SavedMlp`."""
    down: DownActivations | None
    y: torch.Tensor


class SavedActivations(NamedTuple):
    """Tensors that backward works from, saved or recomputed."""

    inputs: LayerInputs
    mixer: Any
    """What the mixer's own `forward` returned."""
    mlp: SavedMlp
    """Its input is h, or x in a parallel layer [T, hidden]."""


def _mix(
    layer: DecoderLayer, inputs: LayerInputs, pass_ctx: LayerPass, *, again: bool = False
) -> tuple[FirstActivations, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the mixer's block; returns its activations, h [T, hidden], and the MLP's rstd [T] and input [T, hidden],
    normalised. `again`: for backward."""
    mixer, out = layer.mixer.forward(inputs, pass_ctx.mixer, again=again)
    if layer.parallel:
        # Made again, as it takes less than to keep it while attention runs.
        _, n2, rstd = pre_norm(layer.mlp.norm, inputs.x, dtype=layer.mlp.dtype)
        return mixer, add_residual(out, inputs.x), rstd, n2

    h, n2, rstd = pre_norm(layer.mlp.norm, inputs.x, out, layer.mlp.dtype)
    return mixer, h, rstd, n2


def _forward(layer: DecoderLayer, inputs: LayerInputs, pass_ctx: LayerPass, *, save_down: bool) -> LayerActivations:
    """Computes the module's formula. `save_down`: a tiled MLP returns its down activations, too."""
    mixer, h, rstd, n2 = _mix(layer, inputs, pass_ctx)

    if layer.is_tiled(inputs.x.shape[0]):
        down, y = forward_in_tiles(layer.mlp, h, n2, pass_ctx.mlp, save_down=save_down)
        return LayerActivations(mixer, h, rstd, None, down, y)

    gate_up: Any = layer.mlp.gate_up_projection(n2, pass_ctx.mlp)  # [T, 2 F]
    down, out = layer.mlp.down_projection(gate_up, pass_ctx.mlp, h.dtype)  # [T, hidden]
    y = add_residual(out, h)
    return LayerActivations(mixer, h, rstd, gate_up, down, y)


class DecoderLayerFunction(torch.autograd.Function):
    """Autograd around the layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        query_scale: torch.Tensor | None,
        layer: DecoderLayer,
        sequences: PackedSequences,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """Computes the module's formula; `parameters` are `layer.parameters`."""
        inputs, pass_ctx, policy = LayerInputs(x, CosSin(cos, sin, query_scale), sequences), layer.begin(), layer.policy
        made = _forward(layer, inputs, pass_ctx, save_down=policy is ActivationPolicy.RECOMPUTE_MLP)
        ctx.layer, ctx.sequences, ctx.pass_ctx = layer, sequences, pass_ctx

        # The order is that in which `_restore` takes them.
        saved: list[torch.Tensor | None] = [cos, sin, query_scale]
        if policy is ActivationPolicy.OFFLOAD:
            layer.host.put(layer.index, x)
        else:
            saved.append(x)
        if made.down is not None and policy in (ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_MLP):
            saved += () if layer.parallel else (made.h,)
            saved += [made.rstd, made.down.xa, *made.down.post_norm]
            saved += made.gate_up if policy is ActivationPolicy.SAVE_ALL and made.gate_up is not None else ()
            saved += made.mixer.flat()
        ctx.save_for_backward(*saved)
        return made.y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x [T, hidden] and of the adapters."""
        layer: DecoderLayer = ctx.layer
        pass_ctx: LayerPass = ctx.pass_ctx
        inputs, mixer, mlp = _restore(ctx, layer)
        dy = dy.contiguous()

        if mlp.gate_up is None:
            dh, d_mlp = backward_in_tiles(layer.mlp, dy, mlp, pass_ctx.mlp)
        else:
            dh, d_mlp = layer.mlp.backward(dy, mlp, pass_ctx.mlp, residual=dy)
        del mlp  # its memory is free for the mixer

        # In a parallel layer dy itself reaches the attention block, and dh only the layer's input.
        dx, d_mixer = layer.mixer.backward(
            dy if layer.parallel else dh, inputs, mixer, pass_ctx.mixer,
            residual=dh if ctx.needs_input_grad[0] else None,
        )  # fmt: skip
        return dx, None, None, None, None, None, *d_mixer, *d_mlp


def _restore(ctx: Any, layer: DecoderLayer) -> SavedActivations:
    """Takes what forward saved and recomputes the rest, but for the down activations: `MlpBlock.backward` recomputes
    as much of them as it needs."""
    cos, sin, query_scale, *rest = ctx.saved_tensors
    if layer.policy is ActivationPolicy.OFFLOAD:
        x = layer.host.take(layer.index)  # [T, hidden]
    else:
        x, *rest = rest
    inputs = LayerInputs(x, CosSin(cos, sin, query_scale), ctx.sequences)
    is_tiled = layer.is_tiled(x.shape[0])

    # RECOMPUTE_ALL and OFFLOAD saved nothing else: run forward again, up to gate and up.
    if not rest:
        mixer, h, rstd, n2 = _mix(layer, inputs, ctx.pass_ctx, again=True)
        gate_up = None if is_tiled else layer.mlp.gate_up_projection(n2, ctx.pass_ctx.mlp)
        return SavedActivations(inputs, mixer, SavedMlp(x if layer.parallel else h, rstd, gate_up, None))

    # Unpack in the order of `DecoderLayerFunction.forward`.
    h, *rest = [x, *rest] if layer.parallel else rest
    rstd, xa_down, *rest = rest
    end = 0 if layer.mlp.post_norm is None else 2
    down, rest = DownActivations(xa_down, tuple(rest[:end])), rest[end:]
    gate_up = None
    if layer.policy is ActivationPolicy.SAVE_ALL:
        gate_up, rest = layer.mlp.take(rest)
    mixer = layer.mixer.unflatten(rest)

    # RECOMPUTE_MLP: project gate and up again; a tiled MLP does so tile by tile.
    if gate_up is None and not is_tiled:
        _, n2, _ = pre_norm(layer.mlp.norm, h, dtype=layer.mlp.dtype)
        gate_up = layer.mlp.gate_up_projection(n2, ctx.pass_ctx.mlp)
    return SavedActivations(inputs, mixer, SavedMlp(h, rstd, gate_up, down))
