"""Preflight answers for layers that stream from host memory: whether they do, what they need, and what it costs."""

import re
from typing import Any

import pytest

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import MemoryMode, Parallelism
from finetune_test_models.minimal_run import LLAMA_70B, minimal_run
from finetune_trainer.preflight.gpu import estimate_gpu, judge_gpu
from finetune_trainer.preflight.memory.parallelism import choose_parallelism
from finetune_trainer.preflight.memory.plans import Plans, plan_of_job
from finetune_trainer.preflight.report import Finding, GpuEstimate, Severity

GIB = 2**30


def a_job(gib: int, memory_gib: int = 64, gpus: int = 1, **sections: Any) -> RunConfig:
    shape = {"training": {"batchSize": gpus}, "model": {"maxSequenceLength": 2048}}
    fields = {name: shape.get(name, {}) | sections.get(name, {}) for name in shape | sections}
    run = minimal_run({"name": "card", "memoryBytes": gib * GIB, "teraflops": 121.0}, **fields)
    return run.model_copy(update={"gpus": gpus, "memory_bytes": memory_gib * GIB})


def judged(job: RunConfig) -> tuple[GpuEstimate, list[Finding]]:
    estimate = estimate_gpu(job, LLAMA_70B, None)
    assert estimate is not None
    return estimate, judge_gpu(job, LLAMA_70B, None, estimate)


def test_a_70b_model_on_one_24_gib_card_streams_and_the_report_says_so() -> None:
    estimate, findings = judged(a_job(24))
    assert findings == []
    assert (estimate.mode, estimate.parallelism) == (MemoryMode.SMALLEST, Parallelism.REPLICATED)
    rows = {row.name: row.value for row in estimate.plan}
    print(rows)
    assert re.fullmatch(r"-1\d\.\d\d GiB \(\d\d layers\)", rows["weights streamed from the host"])

    # What products hide is free: an L4 copies a layer in 8 ms, and computes it in 60.
    resident, _ = judged(a_job(80))
    assert estimate.tokens_per_second is not None
    assert resident.tokens_per_second is not None
    assert 0.6 * resident.tokens_per_second < estimate.tokens_per_second < resident.tokens_per_second


def test_the_host_memory_that_streaming_lacks_is_named() -> None:
    _, (finding,) = judged(a_job(24, 16))
    assert finding.severity is Severity.ERROR
    (needed,) = map(int, re.findall(r"spec.resources.memory: (\d+)Gi", finding.message))
    assert 16 < needed < 40
    assert judged(a_job(24, needed))[1] == []
    assert judged(a_job(24, needed - 1))[1] != []


def streamed(job: RunConfig, plans: Plans | None, card: int) -> int:
    """Layers that stream on a card of so many GiB."""
    plan = plan_of_job(job, plans, card * GIB, 60 * GIB)
    assert plan is not None
    return plan.streamed_layers


def test_what_the_loader_streams_is_what_the_plan_streams() -> None:
    job = a_job(24)
    plans = Plans.of(job, LLAMA_70B, Parallelism.REPLICATED)
    assert plans is not None
    layers = streamed(job, plans, 24)
    assert layers == plans.at(2048, MemoryMode.FASTEST, 24 * GIB, 60 * GIB).streamed_layers
    assert 30 < layers < 50
    assert streamed(job, plans, 80) == 0
    assert streamed(a_job(80, training={"memory": "Smallest"}), plans, 80) == 80
    assert plan_of_job(job, None, 24 * GIB, 60 * GIB) is None


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"quantization": "None"}},
        {"adapter": {"variant": "DoRA"}},
        {"adapter": {"variant": "DoRA", "dropout": 0.1}},
        {"training": {"precision": "FP32"}},
    ],
    ids=str,
)
def test_jobs_whose_layers_cannot_stream_do_not_fit(sections: dict[str, Any]) -> None:
    job = a_job(24, **sections)
    plans = Plans.of(job, LLAMA_70B, Parallelism.REPLICATED)
    assert streamed(job, plans, 24) == 0
    assert any(finding.severity is Severity.ERROR for finding in judged(job)[1])


@pytest.mark.parametrize(
    ("gib", "gpus", "expected"),
    [
        (24, 2, Parallelism.SHARDED),  # each of two keeps a half, and nothing has to cross the bus
        (12, 2, Parallelism.REPLICATED),  # a half does not fit either
        (48, 2, Parallelism.REPLICATED),
    ],
)
def test_several_gpus_stream_only_if_sharing_does_not_do(gib: int, gpus: int, expected: Parallelism) -> None:
    job = a_job(gib, 128, gpus)
    assert choose_parallelism(job, LLAMA_70B, gib * GIB) is expected
    assert judged(job)[1] == []
