"""Trains by the default memory plan on emulated cards of many sizes: `python -P -m speed.cards.every_card`.

The model is loaded anew for each card and number of tokens, as a run would, and trains a few steps. A line of the CSV
file says whether the first plan held, how much of the card it took, and how fast it was; the status is 1 if a plan did
not hold, or left more than a fifth of a card unused with more to keep.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.provenance import current_commit, installed_versions
from benchmarks.rows_file import append_rows
from speed.rows import SEED, Row, model_folder

CARDS = (6, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 80)
"""Memory in GiB."""
TOKENS = (512, 2048, 8192)
"""Tokens of a micro-batch of one sequence."""
WARM_UP, STEPS = 3, 3
"""Steps before the timed ones, by which passes have been recorded as graphs where that is faster; timed steps."""
ACCUMULATION = 2
USED = 0.8
"""Share of a card that a plan takes at least, unless it keeps all that there is to keep."""


@dataclass(frozen=True)
class Outcome:
    """Result of one plan."""

    model: str
    card_gib: float
    tokens: int
    planned_gib: float
    peak_gib: float
    """Peak of tensors, while the model was loaded and trained, with what CUDA's context takes on a real card."""
    keeps_all: bool
    """True if nothing was left to keep."""
    fallbacks: int
    """Times that memory ran out and a smaller plan went on."""
    streamed_layers: int
    pinned_gib: float
    """Host memory that the plan pins."""
    tokens_per_second: float

    @property
    def used(self) -> float:
        """Share of the card."""
        return self.peak_gib / self.card_gib

    @property
    def is_good(self) -> bool:
        """True if the first plan held and left nothing unused."""
        return not self.fallbacks and (self.keeps_all or self.used >= USED)


Measure = Callable[[str, float, int], Outcome]
"""(model, GiB of the card, tokens) -> what came of it. Raises RuntimeError if no plan holds."""


def measure(model: str, card_gib: float, tokens: int) -> Outcome:
    """Loads the model on an emulated card, and trains by the plan that it chooses."""
    import torch

    from finetune_trainer.stages.adapter_injection import inject_adapter
    from finetune_trainer.training.engine import prepare_engine
    from speed.cards.emulated import CONTEXT_BYTES, GIB, limit_card, load_base
    from speed.step_times import make_watch, summarise
    from speed.systems import our_trainer, run_config
    from speed.token_rows import dataset

    gc.collect()  # the model of the card before
    limit_card(card_gib)
    torch.cuda.reset_peak_memory_stats()  # loading, too, has to do with the card
    row, steps = Row(model, tokens, 1, ACCUMULATION), WARM_UP + STEPS
    config = run_config("ours", row, model_folder(model), steps)
    loaded = load_base(row, config, model_folder(model))
    adapted = inject_adapter(loaded.model, config.adapter, SEED)
    engine = prepare_engine(adapted.model, loaded, config)
    plan = engine.plan
    assert plan is not None

    trainer, watch = our_trainer(adapted.model, loaded, engine, config, dataset(row, steps)), make_watch()
    trainer.add_callback(watch)
    trainer.train()

    found = summarise(watch.ends, trainer.state.log_history, row.tokens, warm_up=WARM_UP, steps=STEPS)
    return Outcome(
        model=model, card_gib=card_gib, tokens=tokens, planned_gib=round((plan.peak_bytes + CONTEXT_BYTES) / GIB, 2),
        peak_gib=round((torch.cuda.max_memory_allocated() + CONTEXT_BYTES) / GIB, 2),
        keeps_all=plan.extra_milliseconds == 0, fallbacks=len(engine.fallbacks),
        streamed_layers=plan.streamed_layers, pinned_gib=round(plan.pinned_bytes / GIB, 2),
        tokens_per_second=found["tokens_per_second"],
    )  # fmt: skip


def table(outcomes: Sequence[Outcome]) -> Table:
    """Returns a line for each card and number of tokens."""
    found = Table("card", "tokens", "planned GiB", "peak GiB", "used", "tokens/s", "pinned GiB", "")
    for card in dict.fromkeys(one.card_gib for one in outcomes):
        for one in (one for one in outcomes if one.card_gib == card):
            words = f"memory ran out {one.fallbacks} times" if one.fallbacks else "keeps all" if one.keeps_all else ""
            found.add_row(
                f"{card:g} GiB", f"{one.tokens:,}", f"{one.planned_gib:.2f}", f"{one.peak_gib:.2f}", f"{one.used:.0%}",
                f"{one.tokens_per_second:,.0f}", f"{one.pinned_gib:.2f}", words or ("" if one.is_good else "unused"),
            )  # fmt: skip
        found.add_section()
    return found


def conduct(
    pairs: Sequence[tuple[float, int]],
    measure: Callable[[float, int], Outcome],
    keep: Callable[[Outcome], None],
    left: Callable[[], float],
    console: Console,
) -> tuple[list[Outcome], list[str]]:
    """Measures card by card, as long as twice the time of the longest so far is `left`, and keeps each outcome at once;
    returns what came of it, and those that failed or were left out, in words."""
    found, missing, longest = [], [], 0.0
    for card, tokens in pairs:
        name = f"{card:g} GiB, {tokens:,} tokens"
        if left() < 2 * longest:
            missing.append(f"{name}: no time left")
            continue

        began = time.monotonic()
        try:
            found.append(measure(card, tokens))
        except RuntimeError as error:  # out of memory, too
            missing.append(f"{name}: {str(error).splitlines()[0]}")
            error.__traceback__ = None  # its frames hold the model
            console.print(missing[-1], style="red", markup=False, highlight=False)
            continue
        longest = max(longest, time.monotonic() - began)
        keep(found[-1])
        console.print(f"{name}: {found[-1].peak_gib:.2f} GiB, {time.monotonic() - began:.0f} s", highlight=False)
    return found, missing


def write(path: Path, outcome: Outcome, **provenance: str) -> None:
    """Adds the outcome to the CSV file."""
    names = [field.name for field in fields(Outcome)] + [*provenance]
    append_rows(path, names, [asdict(outcome) | provenance])


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llama-8b")
    parser.add_argument("--cards", default=",".join(map(str, CARDS)), help="GiB of memory")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="tokens of a micro-batch")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no card begins that would probably end later")
    parser.add_argument("--csv", type=Path, required=True, help="file to add to")
    parser.add_argument("--commit", default=None, help="commit that is measured (default: git's)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None, measure: Measure = measure) -> int:
    """Measures all cards; returns 0 if each plan held and left nothing unused."""
    began, options, console = time.monotonic(), parse_arguments(words), Console(width=120)
    pairs = [(float(card), int(tokens)) for card in options.cards.split(",") for tokens in options.tokens.split(",")]

    def left() -> float:
        return float(options.seconds) - (time.monotonic() - began)

    provenance = {"gpu": _gpu(), "versions": installed_versions(), "commit": options.commit or current_commit()}
    found, missing = conduct(
        pairs, partial(measure, options.model), lambda one: write(options.csv, one, **provenance), left, console
    )
    console.print(table(found))
    for one in missing:
        console.print(f"not measured: {one}", markup=False, highlight=False)
    return 0 if found and not missing and all(one.is_good for one in found) else 1


def _gpu() -> Any:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    from finetune_trainer.cli.machine import let_gpu_memory_grow
    from speed.models.checkpoint import prepare

    let_gpu_memory_grow()
    prepare(parse_arguments(None).model)
    sys.exit(main())
