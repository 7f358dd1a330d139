"""What preflight says of weights that get no adapter, stay in 16 bits or do not fit, at borders of each judgement."""

from typing import Any

import pytest

from finetune_api.run_config import RunConfig
from finetune_test_models.minimal_run import minimal_run
from finetune_trainer.model.planned_weights import PlannedWeights, plan_weights
from finetune_trainer.model.safetensors_header import TensorHeader
from finetune_trainer.preflight.judgements.coverage import judge_coverage, judge_weight_memory

GIB = 1 << 30


def a_config(memory: int | None = None, **sections: Any) -> RunConfig:
    return minimal_run({"name": "card", "memoryBytes": memory} if memory else None, **sections)


def plan(config: RunConfig, **sizes: tuple[int, ...]) -> PlannedWeights:
    """A layer with weights of these shapes."""
    headers = [
        TensorHeader(f"model.layers.0.{name}.weight", "BF16", shape, "model.safetensors", 0, 0)
        for name, shape in {"norm": (64,), **sizes}.items()
    ]
    planned = plan_weights(
        [*headers, TensorHeader("lm_head.weight", "BF16", (999, 64), "x", 0, 0)], config, "llama", chosen=0
    )
    assert planned is not None
    return planned


def said(planned: PlannedWeights, config: RunConfig) -> list[tuple[str, str]]:
    return [(finding.location, finding.message) for finding in judge_coverage(planned, config)]


ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (64, 64))
MLP = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (64, 64))


def test_a_model_that_is_covered_says_nothing() -> None:
    assert said(plan(a_config(), **ATTENTION, **MLP), a_config()) == []


@pytest.mark.parametrize(("rows", "warns"), [(256, False), (257, True)])
def test_half_is_enough(rows: int, warns: bool) -> None:
    planned = plan(a_config(), **ATTENTION, dt_proj=(rows, 64))
    assert planned.coverage.adapted_share == pytest.approx(0.5, abs=0.001)
    assert bool(said(planned, a_config())) is warns


def test_the_warning_says_what_to_write() -> None:
    planned = plan(a_config(), **ATTENTION, dt_proj=(512, 64), x_proj=(64, 64))
    [(location, message)] = said(planned, a_config())
    assert location == "spec.adapter.targetModules"
    assert message == (
        "only 30.8% of the layers' weights get an adapter, none of them gate_proj, up_proj, down_proj: "
        "write [all-linear] for 100.0%, or add some of dt_proj, x_proj"
    )


def test_layers_that_the_user_names_are_counted_and_no_default_is_missing() -> None:
    config = a_config(adapter={"targetModules": ["q_proj"]})
    planned = plan(config, **ATTENTION, **MLP)
    [(_, message)] = said(planned, config)
    assert message.startswith("only 14.3% of the layers' weights get an adapter: write [all-linear] for 100.0%")


def test_experts_are_said_with_their_size() -> None:
    experts = {f"mlp.experts.{number}.up_proj": (4096, 16384) for number in range(8)}
    planned = plan(a_config(), **ATTENTION, **experts)
    assert planned.coverage.stacked_bytes == GIB
    adapter, nf4 = said(planned, a_config())
    assert adapter[1].endswith(
        "1.0 GiB are experts in 3-D tensors, which no adapter trains, so the model learns style and format rather than "
        "knowledge; for more, take a model without experts"
    )
    assert nf4[0] == "spec.model.quantization"
    assert "bitsandbytes leaves 1.0 GiB of experts in 3-D tensors in 16 bits; write None" in nf4[1]
    in_16_bits = a_config(model={"quantization": "None"})
    assert len(said(plan(in_16_bits, **ATTENTION, **experts), in_16_bits)) == 1


@pytest.mark.parametrize(
    ("memory", "severity"), [(GIB, "Error"), (int(1.05 * GIB), "Warning"), (2 * GIB, None), (None, None)]
)
def test_experts_in_16_bits_count_in_the_memory(memory: int | None, severity: str | None) -> None:
    experts = {f"mlp.experts.{number}.up_proj": (4096, 16384) for number in range(8)}
    planned = plan(a_config(), **ATTENTION, **experts)
    found = list(judge_weight_memory(planned, a_config(memory)))
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    if found:
        assert "the weights alone take 1.0 GiB, 1.0 GiB of them experts in 16 bits," in found[0].message


def test_nf4_weights_take_half_a_byte_and_their_scales() -> None:
    config = a_config(adapter={"targetModules": ["q_proj"], "rank": 8})
    planned = plan(config, q_proj=(4096, 4096))
    others = 2 * (64 + 999 * 64) + 4 * 8 * 2 * 4096
    assert (planned.loaded_bytes - others) * 8 / 4096**2 == pytest.approx(4.127, abs=0.001)
