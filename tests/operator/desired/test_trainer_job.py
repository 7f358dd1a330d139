"""The trainer's Job: the golden manifest, and its deadline."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.desired.trainer_job import build_trainer_job, remaining_deadline
from finetune_test_operator.snapshot_builder import (
    FULL_SECTIONS,
    INSTALLATION,
    METADATA,
    a_spec,
)

GOLDEN = Path(__file__).parent / "golden"


def _job(**sections: Any) -> dict[str, Any]:
    return build_trainer_job(METADATA, a_spec(**sections), INSTALLATION.trainer_image, "config")


@pytest.mark.parametrize(("name", "sections"), [("smallest", {}), ("full", FULL_SECTIONS)])
def test_the_job_is_the_golden_one(name: str, sections: dict[str, Any]) -> None:
    assert _job(**sections) == yaml.safe_load((GOLDEN / f"trainer_job_{name}.yaml").read_text())


REMAINING = {"no limit": (None, 50, None), "fresh": (100, 0, 100), "resumed": (100, 40, 60), "used up": (100, 140, 1)}


@pytest.mark.parametrize(("total", "active", "left"), REMAINING.values(), ids=REMAINING)
def test_what_is_left_of_a_deadline(total: int | None, active: int, left: int | None) -> None:
    assert remaining_deadline(total, active) == left
