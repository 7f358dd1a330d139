"""A loss that explodes is told from one that is noisy, warms up, or is near zero."""

import random
from collections.abc import Iterable

import pytest

from finetune_trainer.training.divergence.loss_history import PATIENCE, PATIENCE_AT_THE_END, WINDOW, LossHistory


def feed(losses: Iterable[float], history: LossHistory | None = None) -> tuple[LossHistory, str | None]:
    """Adds losses from step 1 on, until one is one too many."""
    history = history or LossHistory()
    for step, loss in enumerate(losses, start=1):
        if (found := history.add(step, loss)) is not None:
            return history, found
    return history, None


CHANCE = random.Random(7)
LEARNING = [2.0 - step / 100 for step in range(100)]
QUIET = {
    "a loss that falls": LEARNING,
    "a loss that is noisy": [1.0 * CHANCE.lognormvariate(0, 0.5) for _ in range(3000)],
    "a loss that begins high": [11.0] * 15 + LEARNING,
    "a loss near zero that triples": [0.02] * 50 + [0.5] * 100,
    "a spike that passes": LEARNING + [12.0] * (PATIENCE - 1) + LEARNING,
    "spikes with good steps in between": LEARNING + [12.0, 12.0, 1.0] * 50,
    "a plateau at twice the best": LEARNING + [2.0] * 100,
    "a run that is high from its first step": [12.0] * 200,
}


@pytest.mark.parametrize("losses", QUIET.values(), ids=QUIET)
def test_a_run_that_may_get_on_is_left_alone(losses: list[float]) -> None:
    assert feed(losses)[1] is None


LOUD = {
    "it predicts by chance": LEARNING + [11.7] * 100,
    "it climbs": LEARNING + [1.0 * 1.05**step for step in range(200)],
    "from a loss near zero": [0.02] * 50 + [1.5] * 100,
}


@pytest.mark.parametrize("losses", LOUD.values(), ids=LOUD)
def test_a_loss_that_stays_far_above_its_best_is_found(losses: list[float]) -> None:
    history, found = feed(losses)
    assert found is not None
    assert f"since step {history.bad_since}" in found


def test_the_first_bad_step_is_named_and_found_after_the_patience() -> None:
    history, found = feed(LEARNING + [12.0] * 100)
    assert history.bad_since == len(LEARNING) + 1
    assert found == (
        f"the loss is 12 at step {len(LEARNING) + PATIENCE}, and has been far above the run's own best since step 101: "
        f"{WINDOW} steps before had a mean of 1.1"
    )


@pytest.mark.parametrize(("bad", "is_found"), [(PATIENCE_AT_THE_END - 1, False), (PATIENCE_AT_THE_END, True)])
def test_the_end_of_a_run_has_less_patience(bad: int, is_found: bool) -> None:
    history, _ = feed(LEARNING + [12.0] * bad)
    assert (history.judge_end(105) is not None) == is_found


@pytest.mark.parametrize("steps", [1, 5, 100])
def test_a_run_that_goes_on_knows_its_best(steps: int) -> None:
    history = LossHistory()
    history.restore(LEARNING[::steps], steps)
    assert feed([12.0] * PATIENCE, history)[1] is not None
    assert feed([12.0] * PATIENCE)[1] is None, "without its history, it would not"
