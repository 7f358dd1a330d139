"""One small step before training: what fails there has a reason, and what works leaves no trace."""

from typing import Any

import pytest
import torch

from finetune_api.failures import FailureReason
from finetune_api.vocabulary import Batching, Precision
from finetune_test_models.tiny_architectures import tiny_architecture
from finetune_trainer.errors import TrainerError
from finetune_trainer.training.batching.trial import try_step
from finetune_trainer.training.loaded_model import LoadedModel
from finetune_trainer.training.losses import supervised_loss


def attempt(model: Any, kind: Batching = Batching.PACKED) -> None:
    loaded = LoadedModel(model, None, type(model).__name__, Precision.FP32, torch.device("cpu"))
    try_step(model, loaded, supervised_loss, kind)


def fail_in_training(module: Any, _: Any) -> None:
    if module.training:
        raise RuntimeError("result type Float can't be cast to the desired output type unsigned char")


@pytest.mark.parametrize("is_quantized", [False, True])
def test_what_fails_only_in_training_has_a_reason(is_quantized: bool) -> None:
    model = tiny_architecture("llama")
    model.is_loaded_in_4bit = is_quantized
    model.model.layers[1].mlp.register_forward_pre_hook(fail_in_training)
    with pytest.raises(TrainerError, match="LlamaForCausalLM cannot be trained here: RuntimeError: result") as failure:
        attempt(model)
    assert failure.value.reason is FailureReason.UNSUPPORTED_ARCHITECTURE
    assert ("quantization: None" in failure.value.message) is is_quantized


def test_what_fails_only_in_the_backward_pass_has_a_reason() -> None:
    model = tiny_architecture("llama")

    def refuse(_: torch.Tensor) -> None:
        raise RuntimeError("no gradient")

    model.lm_head.weight.register_hook(refuse)
    with pytest.raises(TrainerError, match="no gradient"):
        attempt(model)


@pytest.mark.parametrize("kind", list(Batching))
def test_a_step_leaves_no_trace(kind: Batching) -> None:
    model = tiny_architecture("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    attempt(model, kind)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
