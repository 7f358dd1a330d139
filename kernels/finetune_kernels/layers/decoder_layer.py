"""A whole decoder layer (norms, rotary attention, MLP) with LoRA as one autograd function.

    n1 = norm(x);  q, k, v = rope(n1 Wqkv);  h = x + attention(q, k, v) Wo
    n2 = norm(h);  y = h + (f(n2 Wgate) * n2 Wup) Wdown

One function instead of a hundred nodes decides what is saved between forward and backward (`ActivationPolicy`), saves
each tensor once, and recomputes the cheap ones (norms, the activation's product, rotated q and k under a head norm)
inside kernels that read their inputs anyway. Gemma norms the blocks' outputs as well, OLMo 2 these alone. In a
parallel layer (Cohere, Phi-2) both blocks read one norm:

    n = norm(x);  h = x + attention(n ...) Wo;  y = h + (f(n Wgate) * n Wup) Wdown

Latent attention has a block of its own (`latent_attention`). In a hybrid, some layers have a module of transformers in
attention's place (`module_mixer`); a mixture has experts in the MLP's (`mixture_block`). Gemma 4's layers may have an
input of their own, for a third block (`layer_input_block`), and hand on keys and values, whose gradients autograd adds.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from finetune_kernels.layers.blocks.attention_block import (
    AttentionActivations,
    AttentionBlock,
    LayerInputs,
    add_residual,
    pre_norm,
)
from finetune_kernels.layers.blocks.latent_attention import LatentActivations, LatentAttention
from finetune_kernels.layers.blocks.layer_input_block import LayerInputBlock, LayerInputPass
from finetune_kernels.layers.blocks.mixture_block import MixtureBlock
from finetune_kernels.layers.blocks.mlp_beside_experts import MlpBesideExperts
from finetune_kernels.layers.blocks.mlp_block import DownActivations, MlpBlock, SavedMlp
from finetune_kernels.layers.blocks.module_mixer import (
    MixerActivations,
    ModuleMixer,
    ParallelActivations,
    ParallelMixers,
)
from finetune_kernels.layers.blocks.tiled_mlp import backward_in_tiles, forward_in_tiles, needs_tiles
from finetune_kernels.layers.host_memory import HostMemory, save_inputs, take_inputs
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.primitives.adapter_dropout import new_dropout_seed

FirstActivations = AttentionActivations | LatentActivations | MixerActivations | ParallelActivations


class LayerPass(NamedTuple):
    """The passes through both blocks; forward, recomputation and backward share it."""

    mixer: Any
    """As the block began it; so is the other."""
    mlp: Any
    third: LayerInputPass | None


@dataclass
class DecoderLayer:
    """Weights and settings of one layer; only the adapters train."""

    index: int
    mixer: AttentionBlock | LatentAttention | ModuleMixer | ParallelMixers
    mlp: MlpBlock | MixtureBlock | MlpBesideExperts
    policy: ActivationPolicy
    host: HostMemory
    parallel: bool = False
    """True if the MLP reads the layer's input, through the attention block's norm, and not h."""
    third: LayerInputBlock | None = None
    scalar: float = 1.0
    """Factor of the layer's output, the residual stream in it (Gemma 4)."""

    def is_tiled(self, tokens: int) -> bool:
        """True if the MLP or the experts take `tokens` in several tiles."""
        return self.policy is not ActivationPolicy.SAVE_ALL and needs_tiles(tokens)

    @property
    def is_recordable(self) -> bool:
        """True if every pass of one shape launches the same kernels on the same weights: no copies to the host, no seed
        of its own, no module of transformers that decides as it runs. Nor has it inputs or outputs beside the residual
        stream, which recordings do not carry."""
        is_ours = isinstance(self.mixer, AttentionBlock | LatentAttention)
        is_ours = is_ours and self.third is None and getattr(self.mixer, "sharing", None) is None
        return is_ours and self.policy is not ActivationPolicy.OFFLOAD and not any(g.drops for g in self.groups)

    @property
    def reuses(self) -> bool:
        """True if the layer's keys and values are those of an earlier one."""
        return isinstance(self.mixer, AttentionBlock) and self.mixer.sharing == "reuses"

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The groups of linear layers that our kernels run."""
        return *self.mixer.groups, *self.mlp.groups, *(() if self.third is None else self.third.groups)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' weights: inputs of the function, so that they get gradients."""
        third = [] if self.third is None else self.third.parameters
        return [*self.mixer.parameters, *self.mlp.parameters, *third]

    @property
    def function(self) -> type[torch.autograd.Function]:
        """The layer's autograd function."""
        return DecoderLayerFunction

    def arguments(self, inputs: LayerInputs) -> tuple[Any, ...]:
        """Returns what the function takes between x and the parameters."""
        return inputs.own, inputs.kv, inputs, self

    def begin(self) -> LayerPass:
        """Returns a new pass, with a dropout seed of its own if adapters drop a part of their inputs."""
        seed = new_dropout_seed() if any(group.drops for group in self.groups) else None
        third = None if self.third is None else self.third.begin(seed)
        return LayerPass(self.mixer.begin(seed), self.mlp.begin(seed), third)

    def __call__(self, inputs: LayerInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [T, hidden] -> y [T, hidden], and keys and values [T, 2 H_kv D] if the layer stores them for others.
        Without gradients nothing is saved anywhere."""
        if not torch.is_grad_enabled():
            made = _forward(self, inputs, self.begin(), save_down=False)
            return made.y, made.kv
        found = DecoderLayerFunction.apply(inputs.x, *self.arguments(inputs), *self.parameters)  # type: ignore[no-untyped-call]
        return found if isinstance(found, tuple) else (found, None)


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

    @property
    def kv(self) -> torch.Tensor | None:
        """Keys and values for other layers [T, 2 H_kv D], if the layer stores them."""
        return self.mixer.kv if isinstance(self.mixer, AttentionActivations) else None


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
        return LayerActivations(mixer, h, rstd, None, down, _finish(layer, y, inputs, pass_ctx))

    gate_up: Any = layer.mlp.gate_up_projection(n2, pass_ctx.mlp)  # [T, 2 F]
    down, out = layer.mlp.down_projection(gate_up, pass_ctx.mlp, h.dtype)  # [T, hidden]
    y = _finish(layer, add_residual(out, h), inputs, pass_ctx)
    return LayerActivations(mixer, h, rstd, gate_up, down, y)


def _finish(layer: DecoderLayer, y: torch.Tensor, inputs: LayerInputs, pass_ctx: LayerPass) -> torch.Tensor:
    """Returns the layer's output [T, hidden] for that of its MLP, which may be overwritten."""
    if layer.third is not None and inputs.own is not None and pass_ctx.third is not None:
        y = layer.third.forward(y, inputs.own, pass_ctx.third)
    return y if layer.scalar == 1 else y.mul_(layer.scalar)


class DecoderLayerFunction(torch.autograd.Function):
    """Autograd around the layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        own: torch.Tensor | None,
        kv: torch.Tensor | None,
        inputs: LayerInputs,
        layer: DecoderLayer,
        *parameters: torch.Tensor,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Computes the module's formula; `parameters` are `layer.parameters`. x, `own` and `kv`, which may have
        gradients, replace those of `inputs`. A layer that stores keys and values returns them beside y."""
        inputs = inputs._replace(x=x, own=own, kv=kv)
        pass_ctx, policy = layer.begin(), layer.policy
        if isinstance(layer.mixer, ModuleMixer):
            pass_ctx.mixer.keeps = policy is ActivationPolicy.SAVE_ALL
        made = _forward(layer, inputs, pass_ctx, save_down=policy is ActivationPolicy.RECOMPUTE_MLP)
        ctx.layer, ctx.sequences, ctx.pass_ctx = layer, inputs.sequences, pass_ctx

        # The order is that in which `_restore` takes them.
        saved = save_inputs(layer, inputs)
        if made.down is not None and policy in (ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_MLP):
            saved += () if layer.parallel else (made.h,)
            saved += [made.rstd, made.down.xa, *made.down.post_norm]
            ctx.norm_tensors = len(made.down.post_norm)
            saved += made.gate_up if policy is ActivationPolicy.SAVE_ALL and made.gate_up is not None else ()
            saved += made.mixer.flat()
        ctx.save_for_backward(*saved)
        return made.y if made.kv is None else (made.y, made.kv)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, d_kv: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x [T, hidden], of the layer's own input, of the keys and values that it reuses, and of the
        adapters."""
        layer: DecoderLayer = ctx.layer
        pass_ctx: LayerPass = ctx.pass_ctx
        inputs, mixer, mlp = _restore(ctx, layer)
        inputs = inputs._replace(d_kv=d_kv)
        dy = dy.contiguous() if layer.scalar == 1 else dy * layer.scalar
        dy, d_own, d_third, mlp = _finish_backward(layer, dy, inputs, mlp, pass_ctx)

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
        d_reused = d_mixer.pop(0) if inputs.kv is not None else None
        return dx, d_own, d_reused, None, None, *d_mixer, *d_mlp, *d_third


def _finish_backward(
    layer: DecoderLayer, dy: torch.Tensor, inputs: LayerInputs, mlp: SavedMlp, pass_ctx: LayerPass
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor], SavedMlp]:
    """Returns the gradients of the third block's input [T, hidden], of the layer's own and of the adapters, and `mlp`
    with what was made again on the way."""
    if layer.third is None or inputs.own is None or pass_ctx.third is None:
        return dy, None, [], mlp

    # The stream behind the MLP: what the second norm saved is enough, or the MLP runs again.
    h, down = mlp.h, mlp.down
    if down is not None and not isinstance(layer.mlp, MixtureBlock):
        y = add_residual(layer.mlp.finish(down, h.dtype), h)
    elif mlp.gate_up is not None:
        down, out = layer.mlp.down_projection(mlp.gate_up, pass_ctx.mlp, h.dtype)
        y = add_residual(out, h)
    else:
        n2 = pre_norm(layer.mlp.norm, h, dtype=layer.mlp.dtype)[1]
        down, y = forward_in_tiles(layer.mlp, h, n2, pass_ctx.mlp, save_down=True)

    dy, d_own, d_third = layer.third.backward(dy, y, inputs.own, pass_ctx.third)
    return dy, d_own, d_third, mlp._replace(down=down)


def _restore(ctx: Any, layer: DecoderLayer) -> SavedActivations:
    """Takes what forward saved and recomputes the rest, but for the down activations: `MlpBlock.backward` recomputes
    as much of them as it needs."""
    inputs, rest = take_inputs(layer, ctx.saved_tensors, ctx.sequences)
    x, is_tiled = inputs.x, layer.is_tiled(inputs.x.shape[0])

    # RECOMPUTE_ALL and OFFLOAD saved nothing else: run forward again, up to gate and up.
    if not rest:
        mixer, h, rstd, n2 = _mix(layer, inputs, ctx.pass_ctx, again=True)
        gate_up = None if is_tiled else layer.mlp.gate_up_projection(n2, ctx.pass_ctx.mlp)
        return SavedActivations(inputs, mixer, SavedMlp(x if layer.parallel else h, rstd, gate_up, None))

    # Unpack in the order of `DecoderLayerFunction.forward`.
    h, *rest = [x, *rest] if layer.parallel else rest
    rstd, xa_down, *rest = rest
    down, rest = DownActivations(xa_down, tuple(rest[: ctx.norm_tensors])), rest[ctx.norm_tensors :]
    gate_up = None
    if layer.policy is ActivationPolicy.SAVE_ALL:
        gate_up, rest = layer.mlp.take(rest)
    mixer = layer.mixer.unflatten(rest)

    # RECOMPUTE_MLP: project gate and up again; a tiled MLP does so tile by tile.
    if gate_up is None and not is_tiled:
        _, n2, _ = pre_norm(layer.mlp.norm, h, dtype=layer.mlp.dtype)
        gate_up = layer.mlp.gate_up_projection(n2, ctx.pass_ctx.mlp)
    return SavedActivations(inputs, mixer, SavedMlp(h, rstd, gate_up, down))
