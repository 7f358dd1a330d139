"""Coverage: the share of the layers' weights that gets an adapter, and the share that is in NF4. Pure, and without
PyTorch: preflight asks of the files what the trainer asks of the loaded model."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from finetune_api.spec.training import ALL_LINEAR
from finetune_trainer.model.layer_weights import LayerWeight
from finetune_trainer.storage.sizes import format_size

ENOUGH = 0.5
"""Share of the weights below which coverage is worth a warning."""
BYTES = 2
"""Bytes of a weight that is not quantised."""


@dataclass(frozen=True)
class Coverage:
    """Parameters of the layers, embeddings and head apart."""

    parameters: int
    adapted: int
    """Parameters of layers with an adapter."""
    quantized: int
    """Parameters in NF4."""
    stacked: int
    """Parameters of experts in 3-D tensors that the kernels do not know: no adapter, and 16 bits."""
    experts: int = 0
    """Parameters of experts that the kernels know."""
    linears: int = 0
    """Parameters of linear layers: without experts, routers and filters of convolutions."""

    @property
    def adapted_share(self) -> float:
        """Share of the parameters with an adapter."""
        return self.adapted / max(1, self.parameters)

    @property
    def quantized_share(self) -> float:
        """Share of the parameters in NF4."""
        return self.quantized / max(1, self.parameters)

    @property
    def stacked_bytes(self) -> int:
        """Bytes of the stacked experts in 16 bits."""
        return BYTES * self.stacked

    def sentence(self) -> str:
        """The coverage for people."""
        text = f"adapters on {self.adapted_share:.1%} of the layers' weights, {self.quantized_share:.1%} in NF4"
        if self.experts:
            text += f"; experts are {self.experts / self.parameters:.1%} of them"
        if self.stacked:
            text += f"; {format_size(self.stacked_bytes)} are experts in 3-D tensors, which get neither"
        return text


def measure_coverage(weights: Iterable[LayerWeight], adapted: Collection[str]) -> Coverage:
    """The coverage of a model by the names of its layers with an adapter."""
    counts = {"parameters": 0, "adapted": 0, "quantized": 0, "stacked": 0, "experts": 0, "linears": 0}
    for weight in weights:
        counts["parameters"] += weight.parameters
        counts["adapted"] += weight.parameters if weight.name in adapted else 0
        counts["quantized"] += weight.parameters if weight.is_quantized else 0
        counts["stacked"] += weight.parameters if weight.is_stacked else 0
        counts["experts"] += weight.parameters if weight.expert_part else 0
        counts["linears"] += weight.parameters if weight.is_linear else 0
    return Coverage(**counts)


def adapted_layers(
    weights: Iterable[LayerWeight], targets: str | Collection[str], parts: Collection[str] = ()
) -> set[str]:
    """Names of the layers that get an adapter; `targets` as `choose_targets` gives them, `parts` those of experts."""
    return {
        weight.name
        for weight in weights
        if (weight.expert_part is not None and weight.expert_part in parts)
        or (weight.is_linear and (targets == ALL_LINEAR or weight.last_name in targets))
    }
