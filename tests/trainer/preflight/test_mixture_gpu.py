"""GPU memory of mixtures: the parts of the estimate, its remedies, and the shape that the loaded model has."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import MemoryMode, Parallelism, Precision
from finetune_kernels.planning.memory_plan import MARGIN, plan_unfused_layers, unfused_bytes
from finetune_kernels.planning.model_shape import ParameterCounts, build_shape
from finetune_kernels.planning.parts.expert_shape import expert_shape
from finetune_test_models.minimal_run import minimal_run
from finetune_test_models.tiny_architectures import make_mixture
from finetune_test_models.tiny_runs import texts
from finetune_trainer.model.description import load_configuration
from finetune_trainer.model.planned_weights import PlannedWeights, plan_weights
from finetune_trainer.model.safetensors_header import TensorHeader
from finetune_trainer.model.weight_files import list_weights_below
from finetune_trainer.preflight.memory.plans import Plans
from finetune_trainer.preflight.memory.speed import tokens_per_second
from finetune_trainer.preflight.mixture_gpu import _shape, estimate_mixture, judge_mixture, mixture_plans
from finetune_trainer.preflight.report import Finding, GpuEstimate
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.training.memory.loaded_shape import model_shape

__all__ = ["texts"]
GIB = 1 << 30
QWEN = SimpleNamespace(
    model_type="qwen3_moe", num_hidden_layers=48, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4,
    head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
    vocab_size=151936, hidden_act="silu", decoder_sparse_step=1, mlp_only_layers=[],
)  # fmt: skip
"""Qwen3-30B-A3B's published config.json."""
GPT_OSS = CONFIG_MAPPING["gpt_oss"](num_hidden_layers=24, num_local_experts=32)
PLAIN = SimpleNamespace(**vars(QWEN), output_router_logits=True)
"""The same with the routers' loss, which fused layers do not know: it runs module by module."""


def job(memory: int = 80 * GIB, **sections: dict[str, Any]) -> RunConfig:
    shape: dict[str, dict[str, Any]] = {
        "training": {"batchSize": 1},
        "adapter": {"rank": 4, "expertRank": 4},
        "model": {"maxSequenceLength": 2048},
    }
    fields = {name: shape.get(name, {}) | sections.get(name, {}) for name in shape | sections}
    return minimal_run({"name": "card", "memoryBytes": memory, "teraflops": 989}, **fields)


@cache
def headers() -> list[TensorHeader]:
    """The tensors of Qwen3-30B-A3B."""
    shapes = {"model.embed_tokens": (151936, 2048), "lm_head": (151936, 2048)}
    for layer in range(48):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.q_proj": (4096, 2048), f"{block}.self_attn.o_proj": (2048, 4096)}
        shapes |= {f"{block}.self_attn.{name}_proj": (512, 2048) for name in "kv"}
        shapes[f"{block}.mlp.gate"] = (128, 2048)
        for expert in range(128):
            shapes |= {f"{block}.mlp.experts.{expert}.{name}_proj": (768, 2048) for name in ("gate", "up")}
            shapes[f"{block}.mlp.experts.{expert}.down_proj"] = (2048, 768)
    return [TensorHeader(f"{name}.weight", "BF16", shape, "x", 0, 0) for name, shape in shapes.items()]


@cache
def gpt_oss_headers() -> list[TensorHeader]:
    """The tensors of gpt-oss-20b in 16 bits, without biases."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (201088, 2880))
    for layer in range(24):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (512, 2880) for name in "kv"}
        shapes |= {f"{block}.self_attn.q_proj.weight": (4096, 2880), f"{block}.self_attn.o_proj.weight": (2880, 4096)}
        shapes |= {f"{block}.mlp.experts.gate_up_proj": (32, 2880, 5760), f"{block}.mlp.router.weight": (32, 2880)}
        shapes[f"{block}.mlp.experts.down_proj"] = (32, 2880, 2880)
    return [TensorHeader(name, "BF16", shape, "x", 0, 0) for name, shape in shapes.items()]


def plan(config: RunConfig, model: Any = QWEN) -> PlannedWeights:
    tensors = gpt_oss_headers() if model is GPT_OSS else headers()
    planned = plan_weights(tensors, config, model.model_type, chosen=model.num_experts_per_tok)
    assert planned is not None
    return planned


def test_qwen3_30b_on_a_card_of_20_gib() -> None:
    """The arithmetic of the row in docs/sizing: 15.5 GiB of weights, adapters of rank 4 on all experts, one layer."""
    config = job(20 * GIB)
    planned = plan(config)
    estimate = estimate_mixture(config, PLAIN, planned, None)
    assert estimate is not None
    assert planned.coverage.adapted_share > 0.999
    assert estimate.why_no_speed == "the speed of mixtures without fused layers is not measured"
    assert planned.adapter_parameters == 48 * (128 * 3 * 4 * (768 + 2048) + 4 * (2 * 6144 + 2 * 2560))
    parts = {row.name: float(row.value.split()[0]) for row in estimate.plan}
    assert parts["weights as loaded"] == pytest.approx(15.5, abs=0.2)
    assert estimate.mode is MemoryMode.BALANCED
    assert estimate.peak_bytes < 20 * GIB
    assert sum(parts.values()) == pytest.approx(2 * parts["predicted peak"], abs=0.05)


def test_rank_16_fits_20_gib_with_a_rank_of_experts_that_follows_from_it() -> None:
    """A token goes through 8 experts, so each has an adapter of rank 2."""
    config = job(20 * GIB, adapter={"rank": 16, "expertRank": None})
    planned = plan(config)
    assert planned.expert_rank == 2
    assert planned.adapter_parameters == 48 * (128 * 3 * 2 * (768 + 2048) + 16 * (2 * 6144 + 2 * 2560))
    assert planned.published_parameters == 48 * (128 * 3 * 16 * (768 + 2048) + 16 * (2 * 6144 + 2 * 2560))
    estimate = estimate_mixture(config, PLAIN, planned, None)
    assert estimate is not None
    assert estimate.peak_bytes < 19 * GIB
    assert "adapters, on experts of rank 2" in {row.name for row in estimate.plan}

    whole = job(20 * GIB, adapter={"rank": 16, "expertRank": 16})
    same = estimate_mixture(whole, PLAIN, plan(whole), None)
    assert same is not None
    assert same.peak_bytes > 26 * GIB


def test_a_job_that_asks_for_less_memory_saves_no_activations() -> None:
    fastest, balanced = (
        estimate_mixture(config, PLAIN, plan(config), None)
        for config in (job(), job(training={"batchSize": 1, "memory": "Balanced"}))
    )
    assert fastest is not None
    assert balanced is not None
    assert (fastest.mode, balanced.mode) == (MemoryMode.FASTEST, MemoryMode.BALANCED)
    assert balanced.peak_bytes == balanced.smallest_bytes == fastest.smallest_bytes < fastest.peak_bytes

    config = job(training={"batchSize": 1, "memory": "Smallest"})
    smallest = estimate_mixture(config, PLAIN, plan(config), None)
    assert smallest is not None
    assert smallest.mode is MemoryMode.SMALLEST
    assert balanced.peak_bytes - smallest.peak_bytes == 2 * 151936 * 2048 * 2, "embedding and head, 16 bits"
    assert "embedding and head, moved to the host" in {row.name for row in smallest.plan}


def test_a_card_that_is_too_small_is_refused_with_what_makes_it_fit() -> None:
    config = job(16 * GIB, adapter={"rank": 16, "expertRank": 16})
    planned = plan(config)
    [finding] = judge_mixture(config, PLAIN, planned, None, estimate_mixture(config, PLAIN, planned, None))
    assert finding.severity == "Error"
    assert "but card has 16.0 GiB" in finding.message
    assert "a lower spec.adapter.expertRank (adapters and their optimiser take 8.6 GiB)" in finding.message
    plenty = job()
    assert judge_mixture(plenty, PLAIN, planned, None, estimate_mixture(plenty, PLAIN, planned, None)) == []


def test_fused_layers_fit_smaller_cards_and_leave_nothing_unused() -> None:
    """Qwen3-30B-A3B at rank 16: adapters, gate and up of its experts are kept where there is room."""

    def peak(memory: int, mode: str = "Fastest") -> float:
        config = job(memory, adapter={"rank": 16, "expertRank": None}, training={"batchSize": 1, "memory": mode})
        estimate = estimate_mixture(config, QWEN, plan(config), None)
        assert estimate is not None
        assert estimate.mode == mode
        return estimate.peak_bytes / GIB

    assert [peak(gib * GIB) for gib in (80, 24, 20)] == pytest.approx([24.5, 22.1, 18.4], abs=0.1)
    assert peak(20 * GIB, "Smallest") == pytest.approx(2.96, abs=0.02), "all layers stream"


@pytest.mark.parametrize(
    ("card", "layers", "peak", "pinned"), [(8, 35, 7.07, 12.9), (12, 22, 10.96, 9.0), (16, 10, 14.55, 5.4)]
)
def test_experts_of_qwen3_30b_stream_on_small_cards(card: int, layers: int, peak: float, pinned: float) -> None:
    """As many layers as it takes, and no more; with too little host memory, preflight names what it takes."""

    def judged(memory: int) -> tuple[GpuEstimate, list[Finding]]:
        config = job(card * GIB, adapter={"rank": 16, "expertRank": None})
        config = config.model_copy(update={"memory_bytes": memory * GIB})
        estimate = estimate_mixture(config, QWEN, plan(config), None)
        assert estimate is not None
        return estimate, judge_mixture(config, QWEN, plan(config), None, estimate)

    estimate, findings = judged(32)
    rows = {row.name: row.value for row in estimate.plan}
    assert findings == []
    assert estimate.mode is MemoryMode.SMALLEST
    assert rows["weights streamed from the host"].endswith(f"({layers} layers)")
    assert rows["two layers of them at a time"] == "0.60 GiB"
    assert float(rows["pinned in host memory"].split()[0]) == pytest.approx(pinned, abs=0.1)
    assert estimate.peak_bytes / GIB == pytest.approx(peak, abs=0.02)
    assert MARGIN * card * GIB - 0.31 * GIB < estimate.peak_bytes <= MARGIN * card * GIB, "one layer less does not fit"

    _, (finding,) = judged(6)
    (needed,) = map(int, re.findall(r"spec.resources.memory: (\d+)Gi", finding.message))
    assert judged(needed)[1] == []
    assert judged(needed - 1)[1] != []


def test_gpt_oss_20b_fits_14_gib() -> None:
    """Its attention has sinks, which fused layers compute without the scores of all pairs of tokens."""

    def peak(memory: int, mode: str = "Fastest") -> float:
        config = job(memory, adapter={"rank": 16, "expertRank": None}, training={"batchSize": 1, "memory": mode})
        estimate = estimate_mixture(config, GPT_OSS, plan(config, GPT_OSS), None)
        assert estimate is not None
        assert estimate.mode == mode
        return estimate.peak_bytes / GIB

    assert [peak(gib * GIB) for gib in (80, 14)] == pytest.approx([18.4, 12.9], abs=0.1)
    assert peak(14 * GIB, "Smallest") == pytest.approx(2.77, abs=0.02), "all layers stream"


def speed(model: Any, rows: int, memory: int, dropout: float = 0.0) -> float:
    """Tokens per second on an H200 of which `memory` bytes are there."""
    config = job(memory, adapter={"rank": 16, "expertRank": None, "dropout": dropout})
    plans = mixture_plans(config, model, plan(config, model))
    assert plans is not None
    chosen = plans.at(rows * 2048, config.training.memory, memory)
    found = tokens_per_second(plans.shape, chosen, (rows * 2048, 2048), 989)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("model", "rows", "measured", "rel"),
    # As graphs, of equal lengths (of packs 11,294); kernel by kernel, as the GPU is the slower one; as graphs.
    [(QWEN, 1, 11_620, 0.15), (QWEN, 4, 18_217, 0.1), (GPT_OSS, 1, 11_817, 0.15)],
    ids=str,
)
def test_the_speed_is_what_was_measured_on_an_h200(model: Any, rows: int, measured: int, rel: float) -> None:
    assert speed(model, rows, 141 * GIB) == pytest.approx(measured, rel=rel)


@pytest.mark.parametrize(("memory", "dropout"), [(141, 0.05), (26, 0.0)], ids=["dropout", "no room for graphs"])
def test_without_graphs_the_host_decides(memory: int, dropout: float) -> None:
    assert speed(QWEN, 1, memory * GIB, dropout) == pytest.approx(5646, rel=0.1)


def test_models_without_known_experts_have_no_such_estimate() -> None:
    config = job()
    assert estimate_mixture(config, SimpleNamespace(model_type="llama"), plan(config), None) is None
    assert expert_shape(SimpleNamespace(intermediate_size=8, hidden_size=8), quantized=True) is None


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "glm4_moe"])
def test_the_engine_plans_with_the_shape_that_preflight_planned_with(
    model_type: str, texts: list[str], tmp_path: Path
) -> None:
    folder = make_mixture(tmp_path, model_type, texts)
    config = job(model={"source": f"file://{folder}"})
    planned = plan_weights(list_weights_below(folder), config, model_type, chosen=2)
    assert planned is not None
    expected = _shape(config, load_configuration(folder), planned)
    loaded = load_model(folder, config.model, Precision.FP32, gpus=0)
    real = model_shape(inject_adapter(loaded.model, config.adapter, 0).model)
    assert expected is not None
    assert real.experts == expected.experts is not None
    assert real.experts.quantized
    assert real.adapter_parameters == expected.adapter_parameters
    assert [unfused_bytes(real, 64, saves=saves) for saves in (True, False)] == [
        unfused_bytes(expected, 64, saves=saves) for saves in (True, False)
    ]


@pytest.mark.parametrize(
    "model_type", ["qwen3_5_moe_text", "gpt_oss", "glm4_moe", "lfm2_moe", "deepseek_v3", "gemma4_text"]
)
def test_fused_mixtures_are_planned_layer_by_layer(model_type: str, texts: list[str], tmp_path: Path) -> None:
    folder = make_mixture(tmp_path, model_type, texts)
    config, description = job(model={"source": f"file://{folder}"}), load_configuration(folder)
    planned = plan_weights(list_weights_below(folder), config, model_type, chosen=2)
    assert planned is not None
    estimate, expected = estimate_mixture(config, description, planned, None), _shape(config, description, planned)
    loaded = load_model(folder, config.model, Precision.BF16, gpus=0)
    adapted = inject_adapter(loaded.model, config.adapter, 0)
    real = model_shape(adapted.model)
    assert adapted.coverage == planned.coverage
    assert real == expected, "routers, filters of convolutions and biases of experts are no linear layers"

    assert estimate is not None
    layers = next(row.value for row in estimate.plan if row.name == "layers")
    assert (estimate.mode, layers) == (MemoryMode.FASTEST, "2 save all")
    has_other_layers = model_type in ("qwen3_5_moe_text", "lfm2_moe")
    assert (estimate.tokens_per_second is None) == has_other_layers, "of which no speed was measured"
    said = "of models that have other layers than attention" if has_other_layers else None
    assert (estimate.why_no_speed and estimate.why_no_speed.split(",")[0]) == said
    plan = Plans(config, real, planned.loaded_bytes, Parallelism.REPLICATED).at(2048, config.training.memory, 80 * GIB)
    assert estimate.peak_bytes == pytest.approx(plan.peak_bytes, rel=0.01)


def test_plain_attention_keeps_its_scores() -> None:
    """Of every head, in every layer whose activations are saved."""
    shape = build_shape(CONFIG_MAPPING["gptj"](), ParameterCounts(0, 0, True, 0))
    scores = 16 * 2048 * 2048 * 2
    without = replace(shape, score_heads=0)
    kept, recomputed = (
        unfused_bytes(shape, 2048, saves=saves) - unfused_bytes(without, 2048, saves=saves) for saves in (True, False)
    )
    assert (kept, recomputed) == (shape.layers * scores + 2 * scores, 3 * scores)
    assert unfused_bytes(shape, 4096, saves=False, length=2048) < unfused_bytes(shape, 4096, saves=False)
    assert build_shape(CONFIG_MAPPING["qwen3_moe"](), ParameterCounts(0, 0, True, 0)).score_heads == 0


def test_experts_take_memory_while_a_layer_works() -> None:
    shape = _shape(job(), QWEN, plan(job()))
    assert shape is not None
    assert shape.experts is not None
    decoded = 128 * 2 * 768 * 2048 * 2
    assert shape.experts.working_bytes(2048) - decoded == 2048 * 8 * (5 * 768 + 3 * 2048) * 2
    assert plan_unfused_layers(shape, 2048, base_bytes=16 * GIB, total_bytes=80 * GIB)[0]
    assert not plan_unfused_layers(shape, 2048, base_bytes=16 * GIB, total_bytes=20 * GIB)[0]
