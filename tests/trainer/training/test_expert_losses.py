"""The loss of mixtures: the load-balancing part as the family's config.json has it, and the fused head."""

from typing import Any

import pytest
import torch

from finetune_kernels.experts.replacing import replace_experts
from finetune_kernels.experts.routers import keep_routers_in_fp32
from finetune_kernels.layers.supervised_loss import fused_supervised_loss, has_plain_head
from finetune_kernels.planning.expert_families import EXPERT_FAMILIES
from finetune_test_models.minimal_run import minimal_run
from finetune_test_models.tiny_architectures import tiny_mixture
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.training.engine import _modular_engine
from finetune_trainer.training.losses import supervised_loss
from finetune_trainer.training.memory.loaded_shape import model_shape
from finetune_trainer.training.memory.room import Room

IDS = torch.randint(3, 500, (1, 24), generator=torch.Generator().manual_seed(3))
ALL = torch.arange(IDS.shape[1] - 1)


def mixture(model_type: str, **changes: Any) -> Any:
    model = tiny_mixture(model_type, **changes).requires_grad_(False)
    replace_experts(model)
    keep_routers_in_fp32(model)
    return model.train()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe"])
def test_the_load_balancing_loss_is_added_as_transformers_adds_it(model_type: str) -> None:
    model = mixture(model_type, output_router_logits=True, router_aux_loss_coef=0.5)
    whole = model(input_ids=IDS, labels=IDS)
    assert supervised_loss(model, {"input_ids": IDS}, IDS, ALL, None).item() == pytest.approx(
        whole.loss.item(), rel=1e-5
    )
    assert whole.aux_loss > 0.1
    assert not has_plain_head(model), "the fused head would leave it out"

    model.config.output_router_logits = False
    alone = supervised_loss(model, {"input_ids": IDS}, IDS, ALL, None).item()
    assert alone == pytest.approx(whole.loss.item() - 0.5 * whole.aux_loss.item(), rel=1e-5)


def test_passes_of_a_step_add_up_to_one_load_balancing_loss() -> None:
    model = mixture("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.5)
    alone = mixture("qwen3_moe")
    once = [supervised_loss(each, {"input_ids": IDS}, IDS, ALL, None).item() for each in (model, alone)]
    twice = [supervised_loss(each, {"input_ids": IDS}, IDS, ALL, 2 * len(ALL)).item() for each in (model, alone)]
    assert 2 * (twice[0] - twice[1]) == pytest.approx(once[0] - once[1], rel=1e-4)
    model.eval()
    assert supervised_loss(model, {"input_ids": IDS}, IDS, ALL, None).item() == pytest.approx(once[1], rel=1e-5), (
        "an evaluation is the loss of the tokens alone"
    )


@pytest.mark.parametrize("room", [0, 1 << 40])
def test_the_smallest_memory_mode_takes_the_vocabulary_off_the_gpu(room: int) -> None:
    """If the host has room for it; the loss is the same."""
    config = minimal_run(training={"memory": "Smallest", "batchSize": 1})
    model = inject_adapter(mixture("qwen3_moe"), config.adapter, 0).model
    before = supervised_loss(model, {"input_ids": IDS}, IDS, ALL, None).item()
    engine = _modular_engine(model, config, fused_supervised_loss, Room(0, 1 << 40, room), model_shape(model))
    held = {name for name, _ in model.named_parameters() if "embed_tokens" in name or "lm_head" in name}
    assert engine.recompute_activations
    assert len(held) == (0 if room else 2)
    loss = engine.loss(model, {"input_ids": IDS}, IDS, ALL, None)
    assert loss.item() == pytest.approx(before, rel=1e-5)
    loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("family", EXPERT_FAMILIES, ids=lambda family: family.model_type)
def test_the_fused_head_computes_the_same(family: Any) -> None:
    model = mixture(family.model_type).eval()
    assert has_plain_head(model)
    found, expected = (
        compute(model, {"input_ids": IDS}, IDS, ALL, None).item()
        for compute in (fused_supervised_loss, supervised_loss)
    )
    assert found == pytest.approx(expected, rel=1e-5)
