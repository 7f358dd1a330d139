"""Disk that a job needs: a table of jobs, and the sentence where it is too little."""

from collections.abc import Callable
from typing import Any

import pytest

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import GgufType
from finetune_trainer.job.disk_needs import BITS, JobSize, describe_lack, plan_disk

GIBIBYTE = 1 << 30
Builder = Callable[..., RunConfig]
SIZE = JobSize(parameters=8 * GIBIBYTE, trained=GIBIBYTE // 64, base_bytes=16 * GIBIBYTE, tokens=GIBIBYTE // 8)

TABLE: dict[str, tuple[dict[str, Any], float]] = {
    "the adapter alone": ({}, 16 + 1 + 0.5 + 0.0625),
    "with merged weights": ({"merged": "BF16"}, 16 + 1 + 0.5 + 0.0625 + 16),
    "with two GGUF files": ({"gguf": ["Q8_0", "F16"]}, 16 + 1 + 0.5 + 0.0625 + 8.5 + 16),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_output_counts(name: str, run_config: Builder) -> None:
    export, gibibytes = TABLE[name]
    needs = plan_disk(run_config(export=export), SIZE)
    assert sum(need.bytes for need in needs) == gibibytes * GIBIBYTE


def test_what_is_there_already_does_not_count(run_config: Builder) -> None:
    needs = plan_disk(run_config(), JobSize(SIZE.parameters, SIZE.trained))
    assert [need.name for need in needs] == ["checkpoints", "adapter"]


def test_too_little_is_told_item_by_item(run_config: Builder) -> None:
    needs = plan_disk(run_config(export={"merged": "FP16"}), JobSize(SIZE.parameters, SIZE.trained))
    total = sum(need.bytes for need in needs)
    assert describe_lack(needs, total) is None
    assert describe_lack(needs, 10 * GIBIBYTE) == (
        "the job needs 16.6 GiB of disk (merged FP16 16.0 GiB, checkpoints 0.5 GiB, adapter 64.0 MiB), but has 10.0 GiB"
    )


def test_every_gguf_type_has_a_size() -> None:
    assert BITS.keys() == set(GgufType)
