"""The streamed loss is that of transformers, for every family; a GGUF file has the loss of its decoded weights.

Apertus is left out: its GGUF files have numbers of its layers as metadata, where they are not read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_test_models.family_models import family_params
from finetune_test_models.references.whole_losses import load_in_fp32, make_rows, whole_loss
from finetune_trainer.export.adapter import open_adapter
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.judge.parameters import Parameters
from finetune_trainer.export.judge.streamed_model import StreamedModel
from finetune_trainer.export.judge.weights import Weights

CPU = torch.device("cpu")
MIXTURES = ("qwen3-moe", "gpt-oss", "glm-4.5")
"""Files with a matrix for each expert, with stacks, and with biases that choose experts."""


ROWS = make_rows(40, 7, 301)


@pytest.mark.parametrize("name", family_params(also=(*MIXTURES, "qwen3-next", "lfm-2"), without=("apertus",)))
def test_layer_by_layer_is_the_same_as_all_at_once(
    name: str, family_base: Any, export_gguf: Any, tmp_path: Path
) -> None:
    folder = family_base(name)
    base = open_base_model(folder)
    streamed = StreamedModel(base, CPU, torch.float32)
    expected = whole_loss(load_in_fp32(folder), ROWS)
    assert streamed.loss(Weights.of_model(base), ROWS) == pytest.approx(expected, rel=1e-5)

    exact, coarse = export_gguf(folder, tmp_path, "F32", "Q4_K_M").values()
    assert streamed.loss(Weights.of_gguf(exact, base, torch.float32), ROWS) == pytest.approx(expected, rel=1e-5)
    found = streamed.loss(Weights.of_gguf(coarse, base, torch.float32), ROWS)
    assert abs(found - expected) > 1e-5
    assert found == pytest.approx(expected, rel=0.2)


def test_an_adapter_is_merged_on_the_way(family_base: Any, make_adapter: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = family_base("qwen3")
    adapter = make_adapter(folder, tmp_path / "adapter")
    base = open_base_model(folder)
    expected = whole_loss(PeftModel.from_pretrained(load_in_fp32(folder), adapter), ROWS)
    weights = Weights.of_model(base, open_adapter(adapter, base))
    assert StreamedModel(base, CPU, torch.float32).loss(weights, ROWS) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(whole_loss(load_in_fp32(folder), ROWS), rel=5e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_in_another_order_are_another_model(
    name: str, family_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: random experts are told apart."""
    base = open_base_model(family_base(name))
    streamed = StreamedModel(base, CPU, torch.float32)
    expected = streamed.loss(Weights.of_model(base), ROWS)
    made = Parameters.make

    def reversed_experts(self: Parameters, parameter: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
        found = made(self, parameter, values)
        return found.flip(0) if parameter.endswith("experts.down_proj") else found

    monkeypatch.setattr(Parameters, "make", reversed_experts)
    assert abs(streamed.loss(Weights.of_model(base), ROWS) - expected) > 1e-3


def test_a_model_whose_files_lack_a_parameter_is_not_computed(family_base: Any) -> None:
    model = load_in_fp32(family_base("qwen3-moe"))
    names = [tensor.name for tensor in open_base_model(family_base("qwen3-moe")).tensors]
    Parameters(model, names)
    with pytest.raises(
        InvalidBaseError, match=r"no tensor of the files becomes model\.layers\.1\.mlp\.experts\.down_proj"
    ):
        Parameters(model, [name for name in names if not (".1.mlp.experts" in name and "down_proj" in name)])
