"""Thresholds of the warnings about the training, on both sides; docs/warnings.md has the messages."""

from typing import Any

import pytest

from finetune_api.run_config import JobIdentity, RunConfig
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.vocabulary import DatasetFormat
from finetune_trainer.preflight.judgements.training import EvaluationOverlap, PlannedTraining, judge_training
from finetune_trainer.preflight.steps import run_length

TRAINING, HELD_OUT = "spec.training", {"evaluation": {"fraction": 0.1}}


def plan(rows: int = 800, sequences: int | None = None, **changes: Any) -> PlannedTraining:
    """A plan that nothing is to be said about: 800 rows, unpacked, 100 steps. `changes`: training, dataset, others."""
    dataset = {"source": "file:///rows.jsonl", "packing": sequences is not None} | changes.pop("dataset", {})
    spec = {"model": {"source": "file:///model"}, "output": {"s3": {"bucket": "models"}}, "dataset": dataset}
    parsed = FineTuneJobSpec.model_validate(spec | {"training": changes.pop("training", {})})
    config = RunConfig.from_spec(JobIdentity(namespace="default", name="tiny", uid="uid-1"), parsed, None)
    size = run_length(rows, sequences or rows, config.training)
    options: dict[str, Any] = {"layout": DatasetFormat.MESSAGES, "has_template": True}
    return PlannedTraining(config, size, **(options | changes))


BOTH_SIDES: dict[str, tuple[PlannedTraining, PlannedTraining, str]] = {
    "steps by epochs": (plan(rows=232), plan(rows=233), f"{TRAINING}.epochs"),
    "steps by maxSteps": (plan(training={"maxSteps": 29}), plan(training={"maxSteps": 30}), f"{TRAINING}.maxSteps"),
    "rows": (plan(rows=99), plan(rows=100), "spec.dataset.source"),
    "texts are not counted in rows": (plan(rows=99), plan(rows=99, layout=DatasetFormat.TEXT), "spec.dataset.source"),
    "sequences of a step": (plan(sequences=7), plan(sequences=8), f"{TRAINING}.gradientAccumulation"),
    "epochs of maxSteps": (
        plan(training={"maxSteps": 501}),
        plan(training={"maxSteps": 500}),
        f"{TRAINING}.maxSteps",
    ),
    "epochs that are written are meant": (
        plan(training={"maxSteps": 1000}),
        plan(training={"epochs": 10}),
        f"{TRAINING}.maxSteps",
    ),
    "repeated rows": (
        plan(dataset=HELD_OUT, overlap=EvaluationOverlap(200, 3)),
        plan(dataset=HELD_OUT, overlap=EvaluationOverlap(200, 2)),
        "spec.dataset.evaluation",
    ),
    "a high rate": (
        plan(training={"learningRate": 1.1e-3}),
        plan(training={"learningRate": 1e-3}),
        f"{TRAINING}.learningRate",
    ),
    "a low rate": (
        plan(training={"learningRate": 0.9e-5}),
        plan(training={"learningRate": 1e-5}),
        f"{TRAINING}.learningRate",
    ),
    "warm-up": (plan(training={"warmupSteps": 51}), plan(training={"warmupSteps": 50}), f"{TRAINING}.warmupSteps"),
    "logging": (plan(training={"loggingSteps": 101}), plan(training={"loggingSteps": 100}), f"{TRAINING}.loggingSteps"),
    "early stopping": (
        plan(dataset=HELD_OUT, training={"earlyStopping": {"patience": 3}, "evaluationSteps": 26}),
        plan(dataset=HELD_OUT, training={"earlyStopping": {"patience": 3}, "evaluationSteps": 25}),
        f"{TRAINING}.earlyStopping",
    ),
    "chat on a base model": (plan(base_model="by its name"), plan(base_model=None), "spec.model.source"),
    "chat whose markers train": (
        plan(base_model="by its name"),
        plan(base_model="by its name", trains_markers=True),
        "spec.model.source",
    ),
    "no chat template at all": (
        plan(base_model="by its name"),
        plan(base_model="by its name", has_template=False),
        "spec.model.source",
    ),
    "texts on a base model": (
        plan(base_model="by its name"),
        plan(base_model="by its name", layout=DatasetFormat.TEXT),
        "spec.model.source",
    ),
}


@pytest.mark.parametrize(("unusual", "usual", "place"), BOTH_SIDES.values(), ids=BOTH_SIDES)
def test_thresholds_hold_on_both_sides(unusual: PlannedTraining, usual: PlannedTraining, place: str) -> None:
    assert place in [found.location for found in judge_training(unusual)]
    assert place not in [found.location for found in judge_training(usual)]


def test_a_usual_plan_is_not_commented_on() -> None:
    assert list(judge_training(plan())) == []


@pytest.mark.parametrize(("rows", "sequences"), [(80, 3), (200, None), (30, None), (6, None), (500, 20), (3, 1)])
def test_what_is_advised_mends_the_number_of_steps(rows: int, sequences: int | None) -> None:
    first = next(judge_training(plan(rows=rows, sequences=sequences)))
    advice = first.message.rpartition("write ")[2]
    assert first.location == f"{TRAINING}.epochs"
    if "add rows" in advice:
        assert rows * 5 < 30
        return

    written = dict(part.split(": ") for part in advice.partition(", which")[0].split(", "))
    training = {name: int(value) for name, value in written.items() if "packing" not in name}
    unpacked = "spec.dataset.packing" in written
    mended = plan(rows=rows, sequences=None if unpacked else sequences, training=training)
    assert mended.size.steps >= 30
    assert advice.endswith(f"which makes {mended.size.steps} steps")
