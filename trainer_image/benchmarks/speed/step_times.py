"""Times of a run's steps, and the figures made of them."""

import statistics
import time
from itertools import pairwise
from typing import Any


def make_watch() -> Any:
    """Returns a callback that keeps when steps ended and how long the CPU needed to launch each.

    `ends` holds the beginning of the first step and the end of every step; `launched` holds seconds.
    """
    import torch
    from transformers import TrainerCallback

    def settle() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.launched: list[float] = []

        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            if not self.ends:
                settle()
                self.ends.append(time.perf_counter())

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            self.launched.append(time.perf_counter() - self.ends[-1])
            settle()
            self.ends.append(time.perf_counter())

    return Watch()


def summarise(
    ends: list[float], history: list[dict[str, float]], tokens: float, warm_up: int, steps: int
) -> dict[str, Any]:
    """Returns the figures of a run from its steps' ends and its log, `tokens` a step: `warm_up` steps are left out,
    then `steps` count.

    Raises RuntimeError if a gradient norm is zero or a step is missing: such a run does not train.
    """
    norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if len(norms) < warm_up + steps or not min(norms) > 0:
        raise RuntimeError(f"the run did not train: {len(norms)} steps, gradient norms {norms}")

    times = [last - first for first, last in pairwise(ends)]
    rates = [tokens / seconds for seconds in times[warm_up : warm_up + steps]]

    return {
        "tokens_per_second": round(statistics.median(rates), 1),
        "spread": round((max(rates) - min(rates)) / statistics.median(rates), 4),
        "first_step_s": round(times[0], 2), "grad_norm": round(statistics.median(norms), 4),
        "loss": round(losses[-1], 4),
    }  # fmt: skip
