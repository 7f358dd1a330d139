"""The first block of a hybrid's layer whose mixer is transformers' own module: norm, then linear attention, Mamba or a
short convolution.

    out = mixer(norm(x)), document by document;     in Falcon H1 attention(norm(x)) + mixer(norm(x))

The module's adapters are peft's, its kernels those that transformers finds installed. Where fla's run and the layer
saves all, autograd's graph of the module is kept from forward to backward. Else nothing inside it is saved: backward
runs it a second time, under autograd, as what plain PyTorch would keep is several times as large.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from finetune_kernels.layers.blocks.attention_block import (
    AttentionActivations,
    AttentionBlock,
    AttentionPass,
    LayerInputs,
    pre_norm,
    pre_norm_backward,
)
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.mixers.documents import BatchesOfPass
from finetune_kernels.mixers.linear_attention import takes_ends
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.primitives.adapter_dropout import DropoutSeed


class MixerGraph(NamedTuple):
    """The module's run as autograd recorded it."""

    n1: torch.Tensor
    """The module's input [T, hidden]."""
    out: GradientEdge
    """Where autograd begins: at the module's output [T, hidden], whose values nobody needs."""


@dataclass
class MixerPass:
    """The state of PyTorch in which the module ran, for a second run that equals the first, and the run's graph."""

    device: torch.device
    autocast: torch.dtype | None
    """Compute type of the surrounding autocast; None if there is none."""
    random: tuple[torch.Tensor, ...]
    """States of the generators, of the CPU and of a GPU; empty if nothing in the module is drawn."""
    keeps: bool = False
    """True if forward may keep the graph for backward."""
    graph: MixerGraph | None = None

    def take_graph(self) -> MixerGraph | None:
        """Returns the graph, and holds it no longer."""
        graph, self.graph = self.graph, None
        return graph

    @contextmanager
    def again(self) -> Iterator[None]:
        """Restores the state, under autograd, for the time of the block."""
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.enable_grad(),
            torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
            torch.random.fork_rng(devices=devices, enabled=bool(self.random)),
        ):
            if self.random:
                torch.set_rng_state(self.random[0])
            if self.random and devices:
                torch.cuda.set_rng_state(self.random[1], self.device)
            yield


class MixerActivations(NamedTuple):
    """Tensors that the block's backward needs beside its input."""

    rstd: torch.Tensor
    """1 / root mean square of x [T]."""

    def flat(self) -> list[torch.Tensor]:
        """All tensors to save, in the order that `ModuleMixer.unflatten` takes."""
        return [self.rstd]


@dataclass
class ModuleMixer:
    """The norm, and transformers' module, of which only adapters train."""

    norm: Norm | None
    module: Any
    batches: BatchesOfPass
    multiplier: float = 1.0
    """Factor of the block's output (Granite)."""
    groups: tuple[LinearGroup, ...] = ()
    """The module's linear layers are run by itself."""

    @cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' weights, in the order of `backward`."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @cached_property
    def _dropouts(self) -> list[torch.nn.Dropout]:
        return [part for part in self.module.modules() if isinstance(part, torch.nn.Dropout)]

    def unflatten(self, tensors: list[torch.Tensor]) -> MixerActivations:
        """Returns what `MixerActivations.flat` took apart."""
        (rstd,) = tensors
        return MixerActivations(rstd)

    def begin(self, seed: DropoutSeed | None) -> MixerPass:
        """Returns a new pass; the module's adapters draw from PyTorch's generators, and not from `seed`."""
        device = next(self.module.parameters()).device
        kind = device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

        if not any(part.p and part.training for part in self._dropouts):
            return MixerPass(device, autocast, ())
        of_gpu = (torch.cuda.get_rng_state(device),) if kind == "cuda" else ()
        return MixerPass(device, autocast, (torch.get_rng_state(), *of_gpu))

    def forward(
        self, inputs: LayerInputs, pass_ctx: MixerPass, *, again: bool = False
    ) -> tuple[MixerActivations, torch.Tensor]:
        """Returns what backward needs and the block's output [T, hidden], which the caller may overwrite. `again`: for
        backward. A run whose graph backward gets leaves it in `pass_ctx`."""
        _, n1, rstd = pre_norm(self.norm, inputs.x)  # [T, hidden], [T]
        if again or (pass_ctx.keeps and takes_ends(self.module, n1)):
            # The module may have saved its output.
            out = self._run_for_backward(n1, inputs, pass_ctx, again=again).clone()
        else:
            out = self._run(n1, inputs)
        return MixerActivations(rstd), self._scale(out)

    def backward(
        self, dh: torch.Tensor, inputs: LayerInputs, saved: MixerActivations, pass_ctx: MixerPass,
        *, residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:  # fmt: skip
        """Takes dh [T, hidden], the gradient of the output; returns the gradient of x and those of the adapters.
        `residual` is the gradient of x past the block; without it, dx is not wanted and is None."""
        if pass_ctx.graph is None:
            self._run_for_backward(pre_norm(self.norm, inputs.x)[1], inputs, pass_ctx, again=True)
        graph = pass_ctx.take_graph()
        assert graph is not None

        d_out = dh if self.multiplier == 1 else dh * self.multiplier
        dn1, *gradients = torch.autograd.grad([graph.out], [graph.n1, *self.parameters], [d_out.to(graph.n1.dtype)])
        if residual is None:
            return None, gradients
        dx, _ = pre_norm_backward(self.norm, dn1.contiguous(), inputs.x, saved.rstd, residual)
        return dx, gradients

    def _run_for_backward(
        self, n1: torch.Tensor, inputs: LayerInputs, pass_ctx: MixerPass, *, again: bool
    ) -> torch.Tensor:
        """n1 [T, hidden] -> the module's output [T, hidden], to be read only; leaves the graph in the pass. `again`: as
        it ran before."""
        with pass_ctx.again() if again else torch.enable_grad():
            n1 = n1.detach().requires_grad_()
            out = self._run(n1, inputs)
        pass_ctx.graph = MixerGraph(n1, get_gradient_edge(out))
        return out.detach()

    def _run(self, n1: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """n1 [T, hidden] -> the module's output [T, hidden], in the type of n1."""
        sequences = inputs.sequences
        if not sequences.is_batch and takes_ends(self.module, n1):
            return self.module(n1[None], cu_seq_lens_q=sequences.cu_seqlens)[0].to(n1.dtype)  # type: ignore[no-any-return]
        return self.batches.of(sequences).run(self.module, n1).to(n1.dtype)

    def _scale(self, out: torch.Tensor) -> torch.Tensor:
        return out if self.multiplier == 1 else out.mul_(self.multiplier)


class ParallelPass(NamedTuple):
    """The passes through both mixers."""

    attention: AttentionPass
    mixer: MixerPass


class ParallelActivations(NamedTuple):
    """Tensors that the backward of both mixers needs beside the layer's input."""

    rstd: torch.Tensor
    """1 / root mean square of x [T]."""
    attention: AttentionActivations
    mixer: MixerActivations

    def flat(self) -> list[torch.Tensor]:
        """All tensors to save, in the order that `ParallelMixers.unflatten` takes."""
        return [self.rstd, *self.mixer.flat(), *self.attention.flat()]


@dataclass
class ParallelMixers:
    """A norm, and attention and transformers' module, which both read its output and have no norm of their own."""

    norm: Norm | None
    attention: AttentionBlock
    mixer: ModuleMixer

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The groups of linear layers that our kernels run."""
        return self.attention.groups

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' weights, in the order of `backward`."""
        return [*self.attention.parameters, *self.mixer.parameters]

    def unflatten(self, tensors: list[torch.Tensor]) -> ParallelActivations:
        """Returns what `ParallelActivations.flat` took apart."""
        rstd, of_mixer, *rest = tensors
        return ParallelActivations(rstd, self.attention.unflatten(rest), self.mixer.unflatten([of_mixer]))

    def begin(self, seed: DropoutSeed | None) -> ParallelPass:
        """Returns a new pass, with dropout masks of `seed` in attention."""
        return ParallelPass(self.attention.begin(seed), self.mixer.begin(seed))

    def forward(
        self, inputs: LayerInputs, pass_ctx: ParallelPass, *, again: bool = False
    ) -> tuple[ParallelActivations, torch.Tensor]:
        """Returns what backward needs and the sum of both outputs [T, hidden], which the caller may overwrite."""
        _, n1, rstd = pre_norm(self.norm, inputs.x)  # [T, hidden], [T]
        normed = inputs._replace(x=n1)
        mixer, out = self.mixer.forward(normed, pass_ctx.mixer, again=again)
        attention, attended = self.attention.forward(normed, pass_ctx.attention, again=again)
        return ParallelActivations(rstd, attention, mixer), out.add_(attended)

    def backward(
        self, dh: torch.Tensor, inputs: LayerInputs, saved: ParallelActivations, pass_ctx: ParallelPass,
        *, residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:  # fmt: skip
        """Takes dh [T, hidden], the gradient of the output; returns the gradient of x and those of the adapters, as
        `ModuleMixer.backward` does."""
        normed = inputs._replace(x=pre_norm(self.norm, inputs.x)[1])
        nothing = None if residual is None else torch.zeros_like(dh)
        dn1, d_mixer = self.mixer.backward(dh, normed, saved.mixer, pass_ctx.mixer, residual=nothing)
        dn1, d_attention = self.attention.backward(dh, normed, saved.attention, pass_ctx.attention, residual=dn1)

        gradients = [*d_attention, *d_mixer]
        if residual is None or dn1 is None:
            return None, gradients
        return pre_norm_backward(self.norm, dn1, inputs.x, saved.rstd, residual)[0], gradients
