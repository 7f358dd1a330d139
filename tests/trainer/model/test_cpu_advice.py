"""When a run on a CPU is advised to leave NF4 out."""

import pytest

from finetune_api.vocabulary import Quantization
from finetune_trainer.model.cpu_advice import advise_on_cpu
from finetune_trainer.model.safetensors_header import TensorHeader

GIB = 1 << 30


def weights(dtype: str = "BF16") -> list[TensorHeader]:
    """A gibibyte in 16 bits."""
    return [TensorHeader("layer.weight", dtype, (1 << 15, 1 << 14), "model.safetensors", 0, GIB)]


@pytest.mark.parametrize(
    ("free", "each", "advised"), [(2 * GIB, 2, True), (2 * GIB - 1, 2, False), (2 * GIB, 4, False)]
)
def test_only_where_the_weights_fit_twice(free: int, each: int, advised: bool) -> None:
    advice = advise_on_cpu(weights(), Quantization.NF4, each=each, free=free)
    assert (advice is not None) is advised
    if advice is not None:
        assert advice.startswith("write spec.model.quantization: None;")
        assert advice.endswith("take 1.0 GiB of the 2.0 GiB that are free")


def test_nothing_is_advised_where_nothing_can_be_changed() -> None:
    assert advise_on_cpu(weights(), Quantization.NONE, each=2, free=99 * GIB) is None
    assert advise_on_cpu(weights("U8"), Quantization.NF4, each=2, free=99 * GIB) is None
    assert advise_on_cpu(weights(), Quantization.NF4, each=2, free=None) is None
