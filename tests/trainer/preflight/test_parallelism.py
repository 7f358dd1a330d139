"""Auto shares the base out only where no plan fits a GPU that keeps all of it; a job that cannot share is told."""

from typing import Any

import pytest

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Parallelism
from finetune_test_models.minimal_run import LLAMA_70B, minimal_run
from finetune_trainer.preflight.gpu import estimate_gpu, judge_gpu
from finetune_trainer.preflight.memory.parallelism import choose_parallelism, judge_parallelism
from finetune_trainer.preflight.memory.plans import Plans
from finetune_trainer.preflight.report import Severity

GIB = 2**30


def a_job(gib: int | None, gpus: int, **sections: Any) -> RunConfig:
    shape = {"training": {"batchSize": 2 * gpus}, "model": {"maxSequenceLength": 2048}}
    fields = {name: shape.get(name, {}) | sections.get(name, {}) for name in shape | sections}
    run = minimal_run({"name": "card", "memoryBytes": gib and gib * GIB}, **fields)
    return run.model_copy(update={"gpus": gpus})


@pytest.mark.parametrize(
    ("gib", "gpus", "expected"),
    [
        (80, 4, Parallelism.REPLICATED),
        (48, 4, Parallelism.REPLICATED),
        (40, 2, Parallelism.SHARDED),
        (24, 4, Parallelism.SHARDED),
        (24, 1, Parallelism.REPLICATED),  # nobody to share with
        (None, 4, Parallelism.REPLICATED),  # no card is known
    ],
)
def test_a_base_is_shared_out_where_it_does_not_fit_whole(gib: int | None, gpus: int, expected: Parallelism) -> None:
    job = a_job(gib, gpus)
    total = gib and gib * GIB
    assert choose_parallelism(job, LLAMA_70B, total) is expected

    estimate = estimate_gpu(job, LLAMA_70B, None)
    assert estimate is not None
    assert estimate.parallelism is expected
    findings = judge_gpu(job, LLAMA_70B, None, estimate)
    assert findings == []  # one of 24 GiB streams its weights from host memory


def test_a_rank_is_reckoned_with_its_part_and_the_layers_that_are_whole() -> None:
    job = a_job(24, 4)
    whole, part = (Plans.of(job, LLAMA_70B, each) for each in (Parallelism.REPLICATED, Parallelism.SHARDED))
    assert whole is not None
    assert part is not None

    layers = 68_451_041_280  # weights of the linear layers
    nf4 = layers // 2 + layers // 64 + 4 * (layers // 64 // 256)
    assert whole.base_bytes - part.base_bytes == pytest.approx(0.75 * nf4, rel=1e-6)
    assert part.shape.gathered_bytes == pytest.approx(nf4 / 40, rel=1e-6)

    plan = part.smallest(4096, 24 * GIB)
    assert plan.peak_bytes - part.shape.gathered_bytes > part.base_bytes - plan.host_bytes
    assert ("layers gathered from the ranks", "0.82 GiB") in plan.rows()
    assert part.at(4096, job.training.memory, 1000 * GIB).keep_dequantized, "from their first use on"
    assert part.at(4096, job.training.memory, 40 * GIB).kept_layers == 0


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"model": {"quantization": "None"}}, "only weights in NF4"),
        ({"adapter": {"variant": "DoRA"}}, "DoRA's magnitudes"),
        ({}, None),
    ],
)
def test_a_job_that_cannot_share_is_told_and_auto_leaves_it_whole(sections: dict[str, Any], reason: str | None) -> None:
    asked = a_job(24, 4, **sections | {"training": {"parallelism": "Sharded"}})
    findings = judge_parallelism(asked, LLAMA_70B, None)
    assert [finding.severity for finding in findings] == [Severity.ERROR] * bool(reason)
    assert all(str(reason) in finding.message for finding in findings)

    auto = a_job(24, 4, **sections)
    expected = Parallelism.REPLICATED if reason else Parallelism.SHARDED
    assert choose_parallelism(auto, LLAMA_70B, 24 * GIB) is expected


def test_a_base_that_has_to_be_shared_costs_fp8_and_that_is_said() -> None:
    findings = judge_parallelism(a_job(24, 4, training={"precision": "FP8"}), LLAMA_70B, None)
    assert [finding.severity for finding in findings] == [Severity.WARNING]
    assert judge_parallelism(a_job(80, 4, training={"precision": "FP8"}), LLAMA_70B, None) == []
