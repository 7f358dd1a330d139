"""GPU time, cost and energy in preflight's table, page and sentence; what is not known says what to write."""

from typing import Any

import pytest

from finetune_api.gpus import expected_gpu
from finetune_api.run_config import GpuHourPrice
from finetune_api.spec.run import ResourcesSpec
from finetune_api.vocabulary import MemoryMode
from finetune_trainer.preflight.html import render_html
from finetune_trainer.preflight.report import GpuEstimate, Report
from finetune_trainer.preflight.table import facts, to_sentence

PRICE = GpuHourPrice(currency="EUR", per_hour=2.5)
KNOWN = {"hours": 4.0, "tokens_per_second": 15_800.0, "price": PRICE, "watts": 700}
TIME = ("GPU time", "about 4.0 hours at 15,800 tokens/s")
COST = ("cost", "about 10.00 EUR at 2.50 an hour")
ENERGY = ("energy", "at most about 2.80 kWh, at the card's limit of 700 W")
NO_TIME = "unknown without the GPU time"
ESTIMATES: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "all is known": (KNOWN, [TIME, COST, ENERGY]),
    "no price": (
        KNOWN | {"price": None},
        [
            TIME,
            ("cost", "unknown, as there is no price for this GPU (pricing.gpus in the values of the operator's chart)"),
            ENERGY,
        ],
    ),
    "another card": (KNOWN | {"watts": None}, [TIME, COST, ("energy", "unknown, as the power of this GPU is")]),
    "no speed": (
        KNOWN | {"hours": None, "tokens_per_second": None, "why_no_speed": "spec.resources names no GPU"},
        [
            ("GPU time", "unknown, as spec.resources names no GPU"),
            ("cost", NO_TIME),
            ("energy", NO_TIME),
        ],
    ),
}


def a_report(**gpu: Any) -> Report:
    estimate = GpuEstimate(name="GPU", mode=MemoryMode.SMALLEST, peak_bytes=1, smallest_bytes=1, **gpu)
    return Report(
        job="n/j", model_source="hf://a/b", dataset_source="s3://d/c.jsonl", max_sequence_length=64, gpu=estimate
    )


@pytest.mark.parametrize(("known", "expected"), ESTIMATES.values(), ids=ESTIMATES)
def test_the_report_says_what_training_will_cost(known: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    report = a_report(**known)
    assert facts(report)[-3:] == expected
    page = render_html(report).replace("&#39;", "'")
    for name, value in expected:
        assert f"<th>{name}</th><td>{value}</td>" in page
        assert f"{name}: {value}" in to_sentence(report)


def test_the_power_is_that_of_a_whole_card() -> None:
    def watts(product: str, **resources: Any) -> int | None:
        spec = ResourcesSpec.model_validate(
            {"gpus": 1, "nodeSelector": {"nvidia.com/gpu.product": product}} | resources
        )
        gpu = expected_gpu(spec)
        return gpu.watts if gpu else None

    assert watts("NVIDIA-H100-80GB-HBM3") == 700
    assert watts("NVIDIA-H100-80GB-HBM3-SHARED") is None
    assert watts("NVIDIA-H100-80GB-HBM3-MIG-3g.40gb") is None
    assert watts("NVIDIA-H100-80GB-HBM3", gpuResourceName="nvidia.com/mig-3g.40gb") is None
    assert watts("A-Card") is None
