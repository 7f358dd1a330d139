"""Searches the longest sequence that trains on a smaller card, in a step after another one.

The card is emulated: PyTorch's allocator refuses to go beyond its memory. The model is loaded once, and the real
trainer tries every length with batch size 1. Of two steps the first is short: it makes what stays in memory, the
optimiser's state, and kernels are compiled. Memory grows linearly with the length, so two short sequences predict the
longest one, and further attempts close in on it. Bisecting from scratch would take too long: one attempt on 80k tokens
takes most of a minute, as attention is quadratic.
"""

import gc
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speed.rows import SEED, Row

GRAIN = 1024
"""Lengths are multiples of this."""
CLOSE_ENOUGH = 0.02
"""The search ends once the next length would be longer by less than this share."""
MAX_ATTEMPTS = 9
CROSSOVER = 37_000
"""Tokens at which attention takes as long as everything else (8B on an H200: 126 us a token at 24,576, 243 at
81,920)."""
STEPS = 2
FIRST_TOKENS = 1024
"""Tokens of the first step."""


@dataclass(frozen=True)
class Attempt:
    """Result of training on one length."""

    tokens: int
    peak: int | None
    """Peak of allocated bytes; None: out of memory."""
    seconds: float
    result: dict[str, Any]


def next_length(attempts: Sequence[Attempt], limit: int, first: int, max_length: int) -> int | None:
    """Returns the length to try next on a card of `limit` bytes; None if the search is over. Pure.

    The search begins with `first` tokens. After running out of memory at a predicted length, it steps down from there,
    twice as far each time.
    """
    fitting = sorted((attempt for attempt in attempts if attempt.peak is not None), key=lambda one: one.tokens)
    failed = [attempt.tokens for attempt in attempts if attempt.peak is None]
    if len(attempts) >= MAX_ATTEMPTS:
        return None

    if len(fitting) < 2:
        wanted = first if not fitting else min(3 * first, max_length)
        if failed:
            wanted = min(wanted, min(failed) // 2 // GRAIN * GRAIN)
        return None if wanted < GRAIN or any(one.tokens == wanted for one in attempts) else wanted

    # The line through the two longest sequences that fit: its slope is bytes per token.
    below, best = fitting[-2:]
    assert below.peak is not None
    assert best.peak is not None
    slope = max(1.0, (best.peak - below.peak) / (best.tokens - below.tokens))
    wanted = min(max_length, int(best.tokens + (limit - best.peak) / slope) // GRAIN * GRAIN)
    if failed and wanted >= min(failed):
        wanted = (min(failed) - (min(failed) * 3 // 200 << (len(failed) - 1))) // GRAIN * GRAIN
        wanted = max(wanted, (best.tokens + min(failed)) // 2 // GRAIN * GRAIN if wanted <= best.tokens else 0)
    return wanted if wanted >= best.tokens * (1 + CLOSE_ENOUGH) else None


def affordable(attempts: Sequence[Attempt], tokens: int, left: float) -> bool:
    """True if an attempt on `tokens` should end within `left` seconds, judging by the longest so far. Pure."""
    if not attempts:
        return True
    longest = max(attempts, key=lambda one: (one.peak is not None, one.tokens))
    return longest.seconds * _work(tokens) / _work(longest.tokens) < left


def _work(tokens: int) -> float:
    """Relative time of a step: linear in the tokens, plus attention."""
    return tokens * (1 + tokens / CROSSOVER)


def search(system: str, row: Row, folder: Path, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns the figures of the longest sequence. Raises RuntimeError if not even the shortest trains."""
    from speed.cards.emulated import limit_card

    assert row.card_gib is not None
    limit = limit_card(row.card_gib)
    end = time.monotonic() + seconds
    attempt = _Trainings(system, row, folder)
    attempts: list[Attempt] = []

    say("TRAINING")
    while (tokens := next_length(attempts, limit, row.length, row.planned)) is not None:
        if not affordable(attempts, tokens, end - time.monotonic()):
            say(f"PROGRESS {tokens} tokens were not tried: no time left")
            break
        attempts.append(attempt(tokens))
        peak = attempts[-1].peak
        outcome = "out of memory" if peak is None else f"{peak / 2**30:.2f} of {limit / 2**30:.2f} GiB"
        say(f"PROGRESS {tokens} tokens: {outcome}, {attempts[-1].seconds:.0f} s")

    fitting = [one for one in attempts if one.peak is not None]
    if not fitting:
        raise RuntimeError(f"no sequence fits {row.card_gib:g} GiB")
    return max(fitting, key=lambda one: one.tokens).result


class _Trainings:
    """Trains on sequences of any length, with one loaded model."""

    def __init__(self, system: str, row: Row, folder: Path) -> None:
        from finetune_trainer.stages.adapter_injection import inject_adapter
        from finetune_trainer.training.engine import prepare_engine
        from speed.cards.emulated import load_base
        from speed.systems import run_config

        self._system, self._row, self._folder = system, row, folder
        config = run_config(system, replace(row, length=row.planned), folder, STEPS)
        self._loaded = load_base(row, config, folder)
        self._model = inject_adapter(self._loaded.model, config.adapter, SEED).model
        self._engine = prepare_engine(self._model, self._loaded, config)

    def __call__(self, tokens: int) -> Attempt:
        """Trains on one length; running out of memory is a result, too."""
        import torch

        torch.cuda.reset_peak_memory_stats()
        began, result = time.monotonic(), None

        try:
            result = self._train(tokens)
        except torch.OutOfMemoryError as error:
            error.__traceback__ = None  # its frames hold the pass's tensors
            for layer in self._engine.layers.layers if self._engine.layers else ():
                layer.host.forget()
            if self._loaded.streamed is not None:
                self._loaded.streamed.stream(len(self._loaded.streamed))

        # Everything of this attempt is released before the next one.
        peak = torch.cuda.max_memory_allocated()
        for parameter in self._model.parameters():
            parameter.grad = None
        gc.collect()
        torch.cuda.empty_cache()

        if result is None:
            return Attempt(tokens, None, time.monotonic() - began, {})
        result["peak_gib"] = round(peak / 2**30, 2)
        result["host_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
        return Attempt(tokens, peak, time.monotonic() - began, result)

    def _train(self, tokens: int) -> dict[str, Any]:
        from finetune_trainer.training.batching.rank_share import shuffled
        from speed.step_times import make_watch, summarise
        from speed.systems import our_trainer, run_config
        from speed.token_rows import dataset

        row = replace(self._row, length=tokens)
        config = run_config(self._system, row, self._folder, STEPS)
        rows = dataset(row, STEPS)
        first = next(iter(shuffled(rows, config.training.seed)))
        cut = {name: [each[: FIRST_TOKENS if index == first else tokens] for index, each in enumerate(rows[name])]
               for name in rows.column_names}  # fmt: skip
        trainer = our_trainer(self._model, self._loaded, self._engine, config, type(rows).from_dict(cut))
        drawn = next(iter(trainer.get_train_dataloader()))["input_ids"].numel()
        if drawn != FIRST_TOKENS:
            raise RuntimeError(f"the first step has {drawn} tokens, not {FIRST_TOKENS}")

        watch = make_watch()
        trainer.add_callback(watch)
        trainer.train()
        return summarise(watch.ends, trainer.state.log_history, row.tokens, warm_up=1, steps=1) | {"max_tokens": tokens}
