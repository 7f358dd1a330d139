"""One system, one row, one process: `measure.py ours 8b-2048-bs2-ga4`.

A step's time is taken with the GPU idle at both ends. Prints `TRAINING` when the first step is about to begin and
`RESULT` with a JSON object at the end: tokens per second (median of the steps after warm-up), their spread, peak
memory, first step, gradient norm. With `--wait` the libraries are imported, and then a line on stdin is waited for.
A row on several GPUs runs by torchrun (ranks.py); its memory is that of the fullest GPU.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from finetune_trainer.distributed.cards import see_one_card
from speed.ranks import await_go, is_first, largest, launch
from speed.rows import ROWS, STEPS, SYSTEMS, WARM_UP, Row, model_folder
from speed.step_times import make_watch, summarise
from speed.systems import build, import_libraries
from speed.token_rows import CountedTokens


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps")
    parser.add_argument("--wait", action="store_true", help="import, then wait for a line on stdin")
    parser.add_argument("--seconds", type=float, default=600.0, help="for the search of the longest sequence")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="profile two more steps; tables as CSV there")
    arguments = parser.parse_args()
    row, folder = ROWS[arguments.row], model_folder(ROWS[arguments.row].model)
    if row.gpus > 1:
        launch("speed.measure", row.gpus)
    else:
        see_one_card(0)  # on a machine of several, transformers would use them all

    import_libraries(arguments.system)
    if arguments.wait:
        await_go()
    if row.card_gib is None:
        found = measure(arguments.system, row, folder, arguments.steps, arguments.profile)
    else:
        from speed.cards.longest import search

        found = search(arguments.system, row, folder, arguments.seconds, _say)
    import torch

    gpu = torch.cuda.get_device_name() if row.gpus == 1 else f"{row.gpus} x {torch.cuda.get_device_name()}"
    found = {"row": arguments.row, "system": arguments.system, "gpu": gpu} | found
    _say("RESULT " + json.dumps(found))


def measure(system: str, row: Row, folder: Path, steps: int, profile: Path | None) -> dict[str, Any]:
    """Train, and time each step."""
    import torch

    trainer = build(system, row, folder, WARM_UP + steps + (0 if profile is None else 2))
    watch, counted = make_watch(), CountedTokens(trainer)
    trainer.add_callback(watch)
    if profile is not None:
        from speed.step_profile import make_profiler

        profiler = make_profiler(first=WARM_UP + steps)
        trainer.add_callback(profiler)
    torch.cuda.reset_peak_memory_stats()
    _say("TRAINING")
    trainer.train()
    _check_precision(system, trainer)
    tokens = counted.per_batch * row.accumulation * row.gpus
    found = summarise(watch.ends, trainer.state.log_history, tokens, WARM_UP, steps)
    found["peak_gib"] = round(largest(torch.cuda.max_memory_allocated()) / 2**30, 2)
    planned = getattr(trainer, "planned", None)
    found["planned_gib"] = round(planned / 2**30, 2) if planned else None
    if profile is not None:
        launching = statistics.median(watch.launched[WARM_UP : WARM_UP + steps])
        profiler.write(profile, f"{system}-{row.model}-{row.length}", launching)
    return found


def _check_precision(system: str, trainer: Any) -> None:
    """Raises RuntimeError if FP8 was asked for and not computed in: what was measured would have another's name."""
    decision = trainer.engine.fp8_decision if system.endswith("-fp8") else None
    if decision is not None and not decision.is_fp8:
        raise RuntimeError(f"{system} was computed in {decision.precision}: {decision.reason}")


def _say(line: str) -> None:
    if is_first():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
