"""An adapter is exported only if it holds numbers and training has changed it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError
from finetune_trainer.training.divergence.trained_adapter import check_trained_adapter


class Layers(nn.Module):
    """Two linear layers that get an adapter each."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)


@pytest.fixture(params=[False, True], ids=["LoRA", "DoRA"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    config = LoraConfig(r=2, target_modules=["up", "down"], use_dora=request.param)
    return get_peft_model(Layers(), config)  # type: ignore[arg-type]


def weights(model: nn.Module, part: str) -> list[nn.Parameter]:
    return [value for name, value in model.named_parameters() if value.requires_grad and part in name]


def test_an_adapter_as_it_began_has_learned_nothing(model: nn.Module) -> None:
    with pytest.raises(TrainerError, match="every B matrix of the adapter is zero after 7 steps") as raised:
        check_trained_adapter(model, 7)
    assert raised.value.reason is FailureReason.NOTHING_LEARNED


def test_other_weights_that_changed_do_not_make_a_result(model: nn.Module) -> None:
    for part in ("lora_A", "magnitude"):
        for value in weights(model, part):
            nn.init.normal_(value)
    with pytest.raises(TrainerError, match="every B matrix"):
        check_trained_adapter(model, 7)


def test_one_layer_that_learned_is_a_result_and_the_others_are_named(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    nn.init.normal_(weights(model, "up.lora_B")[0])
    check_trained_adapter(model, 7)
    assert "training left 1 of 2 layers unchanged: base_model.model.down.lora_B.default.weight" in caplog.text
    nn.init.constant_(weights(model, "down.lora_B")[0], 1e-30)
    caplog.clear()
    check_trained_adapter(model, 7)
    assert not caplog.text


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_found_wherever_it_is(model: nn.Module, part: str, value: float) -> None:
    for matrix in weights(model, "lora_B"):
        nn.init.normal_(matrix)
    with torch.no_grad():
        weights(model, part)[-1][1, 1] = value
    with pytest.raises(TrainerError, match=rf"NaN or infinity after 7 steps, in .*down.{part}") as raised:
        check_trained_adapter(model, 7)
    assert raised.value.reason is FailureReason.NON_FINITE_LOSS
