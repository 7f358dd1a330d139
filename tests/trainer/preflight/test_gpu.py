"""The GPU estimate: the memory plan asked early, and what would make a job fit."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Qwen3_5TextConfig

from finetune_api.gpus import ExpectedGpu
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import MemoryMode
from finetune_kernels.planning.described_shape import shape_from_config
from finetune_kernels.planning.loaded_weights import let_stream, loaded_bytes
from finetune_kernels.planning.memory_plan import MARGIN, plan_memory
from finetune_kernels.planning.parts import mixer_shape
from finetune_test_models.minimal_run import minimal_run
from finetune_trainer.distributed.driver import CudaNeed
from finetune_trainer.preflight.gpu import LENGTH_STEP, estimate_gpu, judge_count, judge_driver, judge_gpu
from finetune_trainer.preflight.report import Finding, GpuEstimate, Severity
from finetune_trainer.preflight.steps import TrainingSize

GIB = 2**30
LLAMA_8B = SimpleNamespace(
    model_type="llama",
    hidden_act="silu",
    num_hidden_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    vocab_size=128_256,
    tie_word_embeddings=False,
)
BIG = TrainingSize(100, 800, 800, 1.0, tokens=10_000_000, longest_sequence=1_048_576)


def a_config(
    memory: int | None, *, batch: int = 2, length: int = 2048, teraflops: float | None = None, **sections: Any
) -> RunConfig:
    shape = {"training": {"batchSize": batch}, "model": {"maxSequenceLength": length}}
    fields = {name: shape.get(name, {}) | sections.get(name, {}) for name in shape | sections}
    gpu = {"name": "card", "memoryBytes": memory, "teraflops": teraflops} | fields.pop("gpu", {})
    return minimal_run(gpu, **fields)


def judged(config: RunConfig, size: TrainingSize | None = BIG) -> tuple[GpuEstimate, list[Finding]]:
    estimate = estimate_gpu(config, LLAMA_8B, size)
    assert estimate is not None
    return estimate, judge_gpu(config, LLAMA_8B, size, estimate)


def test_the_shape_of_llama_8b() -> None:
    # With these the plan gives what it gave on the GPU: 31.09 and 6.79 GiB, of which 30.74 and 6.50 were measured.
    config = a_config(None)
    shape = shape_from_config(LLAMA_8B, config.adapter.target_modules, config.adapter.rank, quantized=True)
    assert shape is not None
    assert (shape.linear_parameters, shape.adapter_parameters) == (6_979_321_856, 41_943_040)
    assert loaded_bytes(LLAMA_8B, shape, double_quantized=True) / GIB == pytest.approx(5.467, abs=0.001)


def test_kernels_that_a_hybrid_lacks_are_said_before_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixer_shape, "find_spec", lambda name: None)
    hybrid = Qwen3_5TextConfig()
    [finding] = judge_gpu(a_config(80 * GIB), hybrid, None, None)
    assert (finding.severity, finding.location) == (Severity.WARNING, "spec.model.source")
    assert finding.message.startswith(
        "24 of 32 layers have linear attention, which runs in transformers' plain PyTorch"
    )
    assert judge_gpu(a_config(80 * GIB), LLAMA_8B, None, None) == []
    monkeypatch.setattr(mixer_shape, "find_spec", lambda name: object())
    assert judge_gpu(a_config(80 * GIB), hybrid, None, None) == []


def test_a_job_that_fits_says_nothing() -> None:
    assert judged(a_config(80 * GIB))[1] == []
    assert judged(a_config(None, batch=1024))[1] == []


@pytest.mark.parametrize(("batch", "length"), [(64, 8192), (1, 1_048_576), (16, 262_144)])
def test_what_is_proposed_fits_and_one_more_does_not(batch: int, length: int) -> None:
    config = a_config(24 * GIB, batch=batch, length=length)
    _, (finding,) = judged(config)
    assert (finding.severity, finding.reason) == (Severity.ERROR, "CudaOutOfMemory")
    shape = shape_from_config(LLAMA_8B, config.adapter.target_modules, 16, quantized=True)
    assert shape is not None
    base = loaded_bytes(LLAMA_8B, shape, double_quantized=True)
    shape = let_stream(shape, double_quantized=True)

    def fits(rows: int, tokens: int) -> bool:
        plan = plan_memory(shape, rows * tokens, base_bytes=base, total_bytes=24 * GIB, mode=MemoryMode.SMALLEST)
        return plan.fits

    batches = [int(each) for each in re.findall(r"batchSize: (\d+)", finding.message)]
    lengths = [int(each) for each in re.findall(r"maxSequenceLength: (\d+)", finding.message)]
    assert batches or lengths
    assert not fits(batch, length)
    if batches and "and spec.model" not in finding.message:
        assert fits(batches[0], length)
        assert not fits(batches[0] + 1, length)
    if lengths:
        rows = batches[0] if "and spec.model" in finding.message else batch
        assert fits(rows, lengths[0])
        assert not fits(rows, lengths[0] + LENGTH_STEP)


def test_a_batch_that_is_left_to_the_plan_is_the_one_that_it_will_take() -> None:
    def with_room(memory: int) -> GpuEstimate:
        config = a_config(memory, length=512, training={"batchSize": None, "gradientAccumulation": 8})
        estimate, findings = judged(config)
        assert findings == []
        return estimate

    alone = judged(a_config(80 * GIB, batch=1, length=512))[0]
    assert with_room(80 * GIB).peak_bytes > alone.peak_bytes
    config = a_config(24 * GIB, length=1_048_576, training={"batchSize": None})
    _, (finding,) = judged(config)
    assert "batchSize" not in finding.message
    assert "spec.model.maxSequenceLength: " in finding.message


def test_a_step_of_the_same_size_is_proposed() -> None:
    steps = [
        re.findall(r"batchSize: (\d+) \(with gradientAccumulation: (\d+)", judged(config)[1][0].message)
        for config in (a_config(memory * GIB, batch=64, length=8192) for memory in range(8, 24))
    ]
    told = [pair for (pair,) in filter(None, steps)]
    assert told
    assert all(int(rows) * int(accumulated) == 64 * 4 for rows, accumulated in told)


LONG: dict[str, Any] = {"batch": 1, "length": 131_072, "training": {"memory": "Smallest"}}
"""A step with 32 GiB of layers' inputs, and 2 GiB of vocabulary, for host memory."""


def with_host_memory(gpu: int, host: int, gpus: int = 1) -> tuple[GpuEstimate, list[Finding]]:
    config = a_config(gpu * GIB, **LONG)
    return judged(config.model_copy(update={"memory_bytes": host * GIB, "gpus": gpus}))


def test_host_memory_is_part_of_the_plan() -> None:
    estimate, findings = with_host_memory(24, 64)
    assert findings == []

    # The pod of the default size would be killed for its memory at the first step: what it cannot take stays.
    kept, findings = with_host_memory(80, 32)
    assert findings == []
    assert kept.peak_bytes > estimate.peak_bytes + 8 * GIB
    pinned = next(float(row.value.split()[0]) for row in kept.plan if row.name == "pinned in host memory")
    assert pinned < 32

    # Where that does not fit either, the first remedy is the memory with which it does.
    _, (finding,) = with_host_memory(24, 32)
    (needed,) = re.findall(r"makes it fit: spec.resources.memory: (\d+)Gi", finding.message)
    assert with_host_memory(24, int(needed))[1] == []
    assert 32 < int(needed) < 64
    assert with_host_memory(24, int(needed) - 1)[1] != []


def test_the_processes_of_several_gpus_share_the_pods_memory() -> None:
    (needed,) = re.findall(r"spec.resources.memory: (\d+)Gi", with_host_memory(24, 64, gpus=2)[1][0].message)
    assert int(needed) > 2 * 34
    assert with_host_memory(24, int(needed), gpus=2)[1] == []


def test_more_host_memory_is_no_remedy_for_a_card_that_is_too_small() -> None:
    _, (finding,) = with_host_memory(2, 32)
    assert "spec.resources.memory" not in finding.message


def test_a_model_that_is_too_large_needs_another_card_or_four_bits() -> None:
    _, (finding,) = judged(a_config(1 * GIB))
    needed = float(re.findall(r"a GPU with at least ([\d.]+) GiB", finding.message)[0])
    assert judged(a_config(int((needed + 0.1) * GIB)))[1] == []
    assert needed < 2
    _, (finding,) = judged(a_config(12 * GIB, model={"quantization": "None"}))
    assert "spec.model.quantization: NF4" in finding.message
    assert judged(a_config(12 * GIB))[1] == []


def test_between_margin_and_card_it_is_a_warning() -> None:
    need = judged(a_config(None))[0].smallest_bytes
    _, (finding,) = judged(a_config(int(need / MARGIN) - 1))
    assert finding.severity is Severity.WARNING
    assert judged(a_config(int(need / MARGIN) + 2))[1] == []
    assert judged(a_config(need - 1))[1][0].severity is Severity.ERROR


def test_short_rows_need_less_than_the_longest_sequence_allows() -> None:
    config = a_config(24 * GIB, batch=64, length=32_768)
    assert judged(config, None)[1][0].severity is Severity.ERROR
    assert judged(config, TrainingSize(1, 1, 1, 1.0, tokens=9000, longest_sequence=200))[1] == []


def test_time_follows_the_cards_speed() -> None:
    estimate, _ = judged(a_config(143_771 * 2**20, teraflops=989))
    # docs/lab-notes.md: 15,800 tokens/s on an H200; the estimate's efficiency was taken from there.
    assert estimate.tokens_per_second == pytest.approx(15_800, rel=0.05)
    assert estimate.hours == pytest.approx(10_000_000 / estimate.tokens_per_second / 3600)
    assert judged(a_config(143_771 * 2**20))[0].hours is None


@pytest.mark.parametrize("usable", [True, False], ids=["fla's kernels", "loops"])
def test_linear_attention_has_the_speed_that_was_measured_by_flas_kernels(
    usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixer_shape, "is_usable", lambda name: usable)
    gpu = estimate_gpu(a_config(143_771 * 2**20, teraflops=989), Qwen3_5TextConfig(), BIG)
    assert gpu is not None
    # docs/lab-notes.md: 12,213, 11,989 and, packed, 12,538 tokens/s on an H200.
    assert gpu.tokens_per_second == (pytest.approx(12_200, rel=0.03) if usable else None)
    said = None if usable else "of models that have other layers than attention"
    assert (gpu.why_no_speed and gpu.why_no_speed.split(",")[0]) == said


def test_no_estimate_without_a_gpu_or_for_layers_that_the_plan_does_not_know() -> None:
    config = a_config(80 * GIB).model_copy(update={"gpu": None})
    assert estimate_gpu(config, LLAMA_8B, BIG) is None
    experts = SimpleNamespace(**vars(LLAMA_8B), num_local_experts=8)
    assert estimate_gpu(a_config(80 * GIB), experts, BIG) is None
    assert estimate_gpu(a_config(80 * GIB), SimpleNamespace(hidden_size=8), BIG) is None


def test_layers_that_run_module_by_module_are_told() -> None:
    for sections in (
        {"adapter": {"variant": "DoRA", "dropout": 0.1}},
        {"training": {"precision": "FP32"}},
    ):
        warnings = judged(a_config(80 * GIB, **sections))[1]
        assert [finding.severity for finding in warnings] == [Severity.WARNING]
    for adapter in ({"dropout": 0.1}, {"variant": "DoRA"}):
        assert judged(a_config(80 * GIB, adapter=adapter))[1] == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gemma3n_text"}, "layers are not fused (layers of Gemma 3n have inputs of their own"),
        ({"model_type": "nobody"}, "layers are not fused (the kernels do not know the layers of model type nobody)"),
        ({"attention_dropout": 0.1}, "layers are not fused (attention_dropout = 0.1 in the configuration"),
        ({"model_type": "arcee", "hidden_act": "relu2"}, None),
    ],
    ids=str,
)
def test_a_model_whose_layers_are_not_fused_is_told_with_the_reason(change: dict[str, Any], reason: str | None) -> None:
    model, config = SimpleNamespace(**(vars(LLAMA_8B) | change)), a_config(80 * GIB)
    warnings = [finding.message for finding in judge_gpu(config, model, BIG, estimate_gpu(config, model, BIG))]
    assert [message.startswith(reason or "") for message in warnings] == ([True] if reason else [])


@pytest.mark.parametrize("adapter", [{"dropout": 0.1}, {"variant": "DoRA"}])
def test_adapters_that_need_more_memory_while_a_layer_works_are_given_it(adapter: dict[str, Any]) -> None:
    plain, more = (judged(a_config(80 * GIB, teraflops=989, **sections))[0] for sections in ({}, {"adapter": adapter}))
    width = 2 * 2048 * LLAMA_8B.intermediate_size * 2  # one row of the activation's width at every token, in 16 bits
    magnitudes = 32 * (6144 + 4096 + 2 * 14336 + 4096) * (4 + 9) if "variant" in adapter else 0
    assert more.peak_bytes - plain.peak_bytes == width + magnitudes
    assert plain.tokens_per_second is not None
    assert more.tokens_per_second is not None
    assert (more.tokens_per_second < plain.tokens_per_second) == bool(magnitudes)


@pytest.mark.parametrize(("double", "bits"), [(True, 4.127), (False, 4.5)])
def test_four_bit_weights_take_four_bits_and_their_scales(double: bool, bits: float) -> None:
    shape = shape_from_config(LLAMA_8B, (), 1, quantized=True)
    assert shape is not None
    others = 2 * (2 * 128_256 + 65) * 4096
    found = (loaded_bytes(LLAMA_8B, shape, double_quantized=double) - others) * 8 / shape.linear_parameters
    assert found == pytest.approx(bits, abs=0.001)


def test_an_expected_gpu_travels_in_the_run_config() -> None:
    config = a_config(5, teraflops=2.5)
    assert RunConfig.from_yaml(config.to_yaml()).gpu == ExpectedGpu(name="card", memory_bytes=5, teraflops=2.5)


@pytest.mark.parametrize(("gpus", "node", "found"), [(4, 8, 0), (8, 8, 0), (8, 4, 1), (4, None, 0)])
def test_more_gpus_than_a_node_has_are_an_error(gpus: int, node: int | None, found: int) -> None:
    config = a_config(80 * GIB, training={"gradientAccumulation": 8}, gpu={"nodeCount": node})
    findings = judge_count(config.model_copy(update={"gpus": gpus}))
    assert len(findings) == found
    for finding in findings:
        assert (finding.severity, finding.location) == (Severity.ERROR, "spec.resources.gpus")
        assert "8 GPUs of one node are asked for" in finding.message
        assert "write gpus: 4" in finding.message


@pytest.mark.parametrize(("asked", "found"), [(None, 0), (580, 0), (595, 0), (570, 1)])
def test_a_driver_that_the_node_selector_names_is_judged_before_a_gpu(asked: int | None, found: int) -> None:
    config = a_config(80 * GIB)
    config = config.model_copy(update={"gpu": ExpectedGpu(name="card", driver=asked)})
    findings = judge_driver(config, CudaNeed("13.0", 580))
    assert len(findings) == found
    for finding in findings:
        assert finding.location == "spec.resources.nodeSelector"
        assert "NVIDIA's driver 570" in finding.message
        assert "needs driver 580 or newer" in finding.message


def test_gpus_share_a_step_and_its_time() -> None:
    one, _ = judged(a_config(80 * GIB, batch=2, teraflops=989.0))
    four, _ = judged(a_config(80 * GIB, batch=2, teraflops=989.0).model_copy(update={"gpus": 4}))
    assert one.hours is not None
    assert four.hours is not None
    assert four.hours == pytest.approx(one.hours / 4)
    assert (four.gpus, four.peak_bytes) == (4, one.peak_bytes)

    # A pass of 8 rows becomes one of 2 on each of four GPUs.
    wide, _ = judged(a_config(80 * GIB, batch=8, training={"gradientAccumulation": 1}))
    shared, _ = judged(a_config(80 * GIB, batch=8, training={"gradientAccumulation": 1}).model_copy(update={"gpus": 4}))
    assert shared.peak_bytes < wide.peak_bytes

    # Two nodes of two GPUs each share it as four GPUs of one do.
    apart, _ = judged(a_config(80 * GIB, batch=2, teraflops=989.0).model_copy(update={"gpus": 2, "nodes": 2}))
    assert (apart.gpus, apart.hours) == (4, four.hours)
