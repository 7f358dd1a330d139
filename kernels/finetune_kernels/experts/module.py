"""The experts of one layer: frozen stacked weights, an adapter for each expert, and the family's activation."""

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from finetune_kernels.experts.stacked_weight import StackedWeight
from finetune_kernels.ops.expert_mlp import Activation, Mixture, expert_mlp
from finetune_kernels.primitives.expert_projection import Projection

GATE, UP, GATE_UP, DOWN = "gate", "up", "gate_up", "down"
ADAPTER = "default"
"""peft's name of the adapter."""


class _Stack(nn.Module):
    """One factor of all experts' adapters [E, rows, columns], named as peft names a factor."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class ExpertLora(nn.Module, BaseTunerLayer):
    """The adapters of one projection of all experts: for peft a layer of an adapter, which it saves, loads and switches
    off with its own."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, shape: tuple[int, int, int], rank: int, scale: float, device: torch.device) -> None:
        """`shape`: [experts, out of this adapter, in]."""
        super().__init__()
        experts, rows, columns = shape
        # peft's start of each matrix: Kaiming's for A, zeros for B.
        bound = 1 / math.sqrt(columns)
        a = torch.empty(experts, rank, columns).uniform_(-bound, bound).to(device)
        self.lora_A = nn.ModuleDict({ADAPTER: _Stack(a)})
        self.lora_B = nn.ModuleDict({ADAPTER: _Stack(torch.zeros(experts, rows, rank, device=device))})
        self.scale, self.rank = scale, rank

    @property
    def factors(self) -> list[torch.nn.Parameter]:
        """A [E, r, in] and B [E, out, r]."""
        a: Any = self.lora_A[ADAPTER]
        b: Any = self.lora_B[ADAPTER]
        return [a.weight, b.weight]


class StackedExperts(nn.Module):
    """Takes what transformers' experts take: hidden states [T, H], the router's choice and its weights [T, k]."""

    def __init__(
        self, gate_up: StackedWeight, down: StackedWeight, activation: Activation, *, scales_input: bool = False
    ) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.activation, self.scales_input = activation, scales_input
        self.adapters = nn.ModuleDict()
        self.stored_experts: Any = None
        """The names of these experts in the model's files, for whoever saves adapters."""
        self.num_experts, self.hidden_dim = gate_up.shape[0], gate_up.shape[2]

    @property
    def parameters_count(self) -> int:
        """Number of frozen weights."""
        return self.gate_up.parameters_count + self.down.parameters_count

    def add_adapters(self, parts: list[str], rank: int, scale: float) -> None:
        """Adds adapters on `parts`: gate, up, gate_up (one for both), down; without a gate up and down."""
        experts, whole, hidden = self.gate_up.shape
        shapes = {
            GATE: (experts, self._wide, hidden),
            UP: (experts, self._wide, hidden),
            GATE_UP: (experts, whole, hidden),
            DOWN: self.down.shape,
        }
        if self.activation.interleaved and {GATE, UP} & set(parts):
            raise ValueError("gate and up alternate in this family, so that one adapter covers both")
        for part in parts:
            self.adapters[part] = ExpertLora(shapes[part], rank, scale, self.gate_up.device)

    @property
    def _wide(self) -> int:
        """Outputs of an expert's up projection."""
        return self.gate_up.shape[1] // (1 + self.activation.is_gated)

    def _outputs(self, part: str) -> slice:
        places = {GATE: slice(0, self._wide), UP: slice(self._wide, None)} if self.activation.is_gated else {}
        return places.get(part, slice(None))

    def _projection(self, weight: StackedWeight, parts: list[str]) -> Projection:
        loras: list[Any] = [self.adapters[part] for part in parts]
        bias = weight.bias
        return Projection(
            weight.tensor,
            bias if isinstance(bias, torch.Tensor) else None,
            tuple(lora.scale for lora in loras),
            tuple(self._outputs(part) for part in parts),
        )

    @property
    def _active(self) -> list[str]:
        """Parts whose adapters are switched on, in the order in which they are used."""
        parts = [part for part, lora in self.adapters.items() if not lora.disable_adapters]
        return sorted(parts, key=lambda part: part == DOWN)

    @property
    def factors(self) -> list[torch.nn.Parameter]:
        """A and B of each adapter that is switched on."""
        loras: list[Any] = [self.adapters[part] for part in self._active]
        return [factor for lora in loras for factor in lora.factors]

    def mixture(self) -> tuple[Mixture, list[torch.Tensor]]:
        """Returns what `expert_mlp` takes: the frozen parts, and `factors`."""
        before, after = [part for part in self._active if part != DOWN], [part for part in self._active if part == DOWN]
        settings = Mixture(
            self.num_experts,
            self._projection(self.gate_up, before),
            self._projection(self.down, after),
            self.activation,
            self.scales_input,
        )
        return settings, list(self.factors)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        """[T, H] -> [T, H]"""
        settings, factors = self.mixture()
        return expert_mlp(hidden_states, top_k_weights, top_k_index, settings, factors)
