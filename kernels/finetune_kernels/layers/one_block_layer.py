"""A decoder layer of one block, with LoRA, as one autograd function: attention, a module of transformers, an MLP or
experts.

    y = x + block(norm(x))

Policies mean what they mean in `decoder_layer`. What a layer saves beside x depends on its block, so layers of a model
differ: attention saves what it made, a module only its norm's sums, and an MLP gate and up under SAVE_ALL alone.
"""

from dataclasses import dataclass
from typing import Any

import torch

from finetune_kernels.layers.blocks.attention_block import AttentionBlock, LayerInputs, add_residual, pre_norm
from finetune_kernels.layers.blocks.latent_attention import LatentAttention
from finetune_kernels.layers.blocks.mixture_block import MixtureBlock
from finetune_kernels.layers.blocks.mlp_block import DownActivations, MlpBlock, SavedMlp
from finetune_kernels.layers.blocks.module_mixer import ModuleMixer, ParallelMixers
from finetune_kernels.layers.blocks.tiled_mlp import backward_in_tiles, forward_in_tiles, needs_tiles
from finetune_kernels.layers.host_memory import HostMemory, save_inputs, take_inputs
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.primitives.adapter_dropout import new_dropout_seed

MlpLike = MlpBlock | MixtureBlock
"""Blocks that widen each row by itself, in two steps of which the first is worth saving."""
SAVING = (ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_MLP)
"""Policies that save more than the layer's input."""


@dataclass
class OneBlockLayer:
    """Weights and settings of one layer; only the adapters train."""

    index: int
    block: AttentionBlock | LatentAttention | ModuleMixer | ParallelMixers | MlpLike
    policy: ActivationPolicy
    host: HostMemory
    reuses: bool = False
    """Never: keys and values do not cross these layers."""

    @property
    def is_mlp(self) -> bool:
        """True if no row depends on another: transformers gives such a layer no mask."""
        return isinstance(self.block, MlpLike)

    def is_tiled(self, tokens: int) -> bool:
        """True if the MLP takes `tokens` in several tiles."""
        return self.is_mlp and self.policy is not ActivationPolicy.SAVE_ALL and needs_tiles(tokens)

    @property
    def is_recordable(self) -> bool:
        """True if every pass of one shape launches the same kernels on the same weights; see `DecoderLayer`."""
        is_ours = not isinstance(self.block, ModuleMixer | ParallelMixers)
        return is_ours and self.policy is not ActivationPolicy.OFFLOAD and not any(g.drops for g in self.groups)

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The groups of linear layers that our kernels run."""
        return self.block.groups

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' weights: inputs of the function, so that they get gradients."""
        return self.block.parameters

    @property
    def function(self) -> type[torch.autograd.Function]:
        """The layer's autograd function."""
        return OneBlockFunction

    def arguments(self, inputs: LayerInputs) -> tuple[Any, ...]:
        """Returns what the function takes between x and the parameters."""
        return inputs, self

    def begin(self) -> Any:
        """Returns a new pass of the block, with a dropout seed of its own if adapters drop a part of their inputs."""
        return self.block.begin(new_dropout_seed() if any(group.drops for group in self.groups) else None)

    def __call__(self, inputs: LayerInputs) -> tuple[torch.Tensor, None]:
        """x [T, hidden] -> y [T, hidden], and no keys and values for others. Without gradients nothing is saved."""
        if not torch.is_grad_enabled():
            return _forward(self, inputs, self.begin(), saves=False)[0], None
        y = OneBlockFunction.apply(inputs.x, *self.arguments(inputs), *self.parameters)  # type: ignore[no-untyped-call]
        return y, None


def _forward(
    layer: OneBlockLayer, inputs: LayerInputs, pass_ctx: Any, *, saves: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Computes the module's formula; returns y [T, hidden] and, if `saves`, what backward needs beside x."""
    x, block = inputs.x, layer.block
    if not isinstance(block, MlpLike):
        made, out = block.forward(inputs, pass_ctx)
        return add_residual(out, x), made.flat() if saves else []

    _, n, rstd = pre_norm(block.norm, x, dtype=block.dtype)  # [T, hidden], [T]
    if layer.is_tiled(x.shape[0]):
        down, y = forward_in_tiles(block, x, n, pass_ctx, save_down=saves)
        return y, [] if down is None else [rstd, down.xa]

    gate_up: Any = block.gate_up_projection(n, pass_ctx)  # [T, 2 F] or [T, F]
    down, out = block.down_projection(gate_up, pass_ctx, x.dtype)
    wide = gate_up if layer.policy is ActivationPolicy.SAVE_ALL else ()
    return add_residual(out, x), [rstd, down.xa, *wide] if saves else []


class OneBlockFunction(torch.autograd.Function):
    """Autograd around the layer."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, inputs: LayerInputs, layer: OneBlockLayer, *parameters: torch.Tensor
    ) -> torch.Tensor:
        """Computes the module's formula; `parameters` are `layer.parameters`. x, which may have a gradient, replaces
        that of `inputs`."""
        inputs, pass_ctx = inputs._replace(x=x), layer.begin()
        y, made = _forward(layer, inputs, pass_ctx, saves=layer.policy in SAVING)

        ctx.layer, ctx.sequences, ctx.pass_ctx = layer, inputs.sequences, pass_ctx
        ctx.save_for_backward(*save_inputs(layer, inputs), *made)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x [T, hidden] and of the adapters."""
        layer: OneBlockLayer = ctx.layer
        inputs, made = take_inputs(layer, ctx.saved_tensors, ctx.sequences)
        dy, block = dy.contiguous(), layer.block

        if isinstance(block, MlpLike):
            d_rows, gradients = _mlp_backward(layer, dy, inputs.x, made, ctx.pass_ctx)
            return d_rows, None, None, *gradients

        # Under policies that save nothing else the block runs again.
        saved: Any = block.unflatten(made) if made else block.forward(inputs, ctx.pass_ctx, again=True)[0]
        residual = dy if ctx.needs_input_grad[0] else None

        dx, gradients = block.backward(dy, inputs, saved, ctx.pass_ctx, residual=residual)
        return dx, None, None, *gradients


def _mlp_backward(
    layer: OneBlockLayer, dy: torch.Tensor, x: torch.Tensor, made: list[torch.Tensor], pass_ctx: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Takes dy [T, hidden] and what forward saved beside x; returns the gradients of x [T, hidden] and of the adapters.
    What was not saved is made again, by a tiled MLP tile by tile."""
    block = layer.block
    assert isinstance(block, MlpLike)

    down = DownActivations(made[1], ()) if made else None
    if layer.policy is ActivationPolicy.SAVE_ALL:
        gate_up, _ = block.take(made[2:])
        return block.backward(dy, SavedMlp(x, made[0], gate_up, down), pass_ctx, residual=dy)

    _, n, rstd = pre_norm(block.norm, x, dtype=block.dtype)
    if layer.is_tiled(x.shape[0]):
        del n  # of all rows, where tiles need their own
        return backward_in_tiles(block, dy, SavedMlp(x, rstd, None, down), pass_ctx)
    return block.backward(dy, SavedMlp(x, rstd, block.gate_up_projection(n, pass_ctx), down), pass_ctx, residual=dy)
