"""Cards without bfloat16 are planned for in fp16; older ones are refused by name, before a GPU is asked for."""

from types import SimpleNamespace
from typing import Any

import pytest

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import MemoryMode, Parallelism
from finetune_kernels.planning.rates import H200, H200_FP8, Rates
from finetune_test_models.minimal_run import minimal_run
from finetune_trainer.preflight.gpu import estimate_gpu, judge_card, judge_gpu
from finetune_trainer.preflight.memory.plans import Plans
from finetune_trainer.preflight.report import Severity

GIB = 2**30
LLAMA = {
    "model_type": "llama", "hidden_act": "silu", "num_hidden_layers": 32, "hidden_size": 4096,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128_256,
    "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = LLAMA | {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}
T4 = {"capability": 7.5, "oldest": "Tesla-T4"}


def a_config(precision: str, gpu: dict[str, Any]) -> RunConfig:
    training = {"precision": precision, "memory": "Smallest", "batchSize": 2}
    card = {"name": "card", "memoryBytes": 80 * GIB} | gpu
    return minimal_run(card, training=training, model={"maxSequenceLength": 2048})


def peak(model: dict[str, Any], precision: str, **gpu: Any) -> int:
    config, described = a_config(precision, gpu), SimpleNamespace(**model)
    estimate = estimate_gpu(config, described, None)
    assert estimate is not None
    assert judge_gpu(config, described, None, estimate) == [], "layers are fused"
    return estimate.peak_bytes


def test_fp16_keeps_adapters_and_the_residual_stream_of_a_family_that_overflows_in_fp32() -> None:
    adapters = 41_943_040
    assert peak(LLAMA, "FP16") - peak(LLAMA, "BF16") == 2 * adapters
    stream = 2 * 2048 * 4096 * 2  # tokens, hidden; two bytes more each
    assert peak(GEMMA, "FP16") - peak(GEMMA, "BF16") >= 2 * adapters + 3 * stream


def test_a_job_in_fp8_is_planned_by_the_speeds_of_fp8() -> None:
    def rates(precision: str, parallelism: Parallelism = Parallelism.REPLICATED) -> Rates:
        plans = Plans.of(a_config(precision, {}), SimpleNamespace(**LLAMA), parallelism)
        assert plans is not None
        return plans.at(4096, MemoryMode.SMALLEST, 24 * GIB).rates

    assert rates("FP8") == H200_FP8
    assert rates("BF16") == rates("FP8", Parallelism.SHARDED) == H200, "a base that is shared out is multiplied in BF16"


def test_a_card_without_bfloat16_is_planned_for_in_fp16() -> None:
    assert peak(LLAMA, "Auto") < peak(LLAMA, "Auto", **T4) == peak(LLAMA, "FP16")


@pytest.mark.parametrize(
    ("gpu", "precision", "location", "words"),
    [
        ({"capability": 7.0, "oldest": "Tesla-V100"}, "Auto", "spec.resources", "Tesla-V100 is older than Turing"),
        ({"capability": 6.0, "oldest": "Tesla-P40"}, "FP32", "spec.resources", "choose a T4 or RTX 20 (FP16)"),
        (T4, "BF16", "spec.training.precision", "Tesla-T4 has no BF16; write Auto"),
        (T4, "FP8", "spec.training.precision", "Tesla-T4 has no FP8"),
        (T4, "Auto", None, ""),
        (T4, "FP16", None, ""),
        ({"capability": 8.0, "oldest": "a GPU of compute capability 8.0"}, "BF16", None, ""),
        ({}, "BF16", None, ""),
    ],
)
def test_a_card_that_is_too_old_is_refused_by_name_before_a_gpu(
    gpu: dict[str, Any], precision: str, location: str | None, words: str
) -> None:
    findings = judge_card(a_config(precision, gpu))
    assert [finding.location for finding in findings] == ([location] if location else [])
    assert all(finding.severity is Severity.ERROR and words in finding.message for finding in findings)
