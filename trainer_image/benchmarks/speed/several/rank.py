"""One process of a launch: `python -P -m speed.several.rank OPTIONS ROW ...`, which `several_gpus.py` starts.

Rank 0 prints `ROW` with a JSON object for each row as soon as it is measured. A row that takes too long ends the
process, with the stacks of its threads: a collective that nobody answers must not use up the machine's time.
"""

import argparse
import faulthandler
import gc
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from finetune_api.vocabulary import Parallelism
from finetune_trainer.distributed.cards import see_one_card
from finetune_trainer.distributed.launched import joined_world
from finetune_trainer.distributed.world import ALONE, World
from speed.rows import SEED, SHAPES, model_folder, working_folder
from speed.several.cases import CHECKPOINT_STEP, SHARDED, WARM_UP, Case, Machine, cases, streamed_cases
from speed.several.exchange import Exchange, summarise_exchange
from speed.several.slow_network import SlowWorld
from speed.step_times import make_watch

GIB = 2**30
OVERDUE = 3
"""Exit code of a process whose row took too long."""


def main() -> None:
    """Measures the rows of the command line."""
    arguments = parse_arguments()
    machine = Machine(**json.loads(arguments.machine))
    known = cases(machine) | streamed_cases(machine)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        see_one_card(0)  # on a machine of several, transformers would use them all
    with joined_world() as world:
        from speed.systems import import_libraries

        import_libraries("ours")
        for name in arguments.rows:
            with _limited(arguments.seconds, name):
                found = measure(known[name], world)
            if world.rank == 0:
                sys.stdout.write("ROW " + json.dumps(found) + "\n")
                sys.stdout.flush()


def parse_arguments() -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--machine", required=True, help="fields of Machine, as JSON")
    parser.add_argument("--seconds", type=float, required=True, help="time limit of a row")
    return parser.parse_args()


@contextmanager
def _limited(seconds: float, name: str) -> Iterator[None]:
    done = threading.Event()

    def watch() -> None:
        if not done.wait(seconds):
            sys.stderr.write(f"{name} took longer than {seconds:.0f} s\n")
            faulthandler.dump_traceback(all_threads=True)
            os._exit(OVERDUE)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def measure(case: Case, world: World) -> dict[str, Any]:
    """Trains the case, on rank 0 alone if it has one process; returns its row on rank 0."""
    found: dict[str, Any] = {}
    of = world if case.processes == world.size else ALONE
    if of is world and case.gigabits is not None:
        of = SlowWorld(world.rank, world.size, world.nodes, case.gigabits)
    if of is not ALONE or world.rank == 0:
        found = _train(case, of)
    if not world.is_alone:
        dist.barrier()
    return found


def _train(case: Case, world: World) -> dict[str, Any]:
    from finetune_trainer.stages.adapter_injection import inject_adapter
    from finetune_trainer.training.engine import prepare_engine
    from speed.several.random_base import random_base
    from speed.systems import our_trainer, run_config
    from speed.token_rows import dataset

    began, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _limit_card(case.row.card_gib)
    config = _config(run_config("ours", case.row, model_folder(case.row.model), case.steps), case, world, device)
    loaded = random_base(SHAPES[case.row.model], device, _placement(case, config, world, device))
    adapted = inject_adapter(loaded.model, config.adapter, SEED + world.rank)  # made equal later
    kept, ready = loaded.base_bytes, time.monotonic() - began
    engine = prepare_engine(adapted.model, loaded, config, world)
    engine.use_world(world)

    output = working_folder() / "several" / str(world.rank)
    data = dataset(case.row, case.steps + 2 * case.profiled)
    trainer, watch = our_trainer(adapted.model, loaded, engine, config, data, output), make_watch()
    trainer.args.save_strategy, trainer.args.save_total_limit = ("steps" if case.saves else "no"), None
    trainer.add_callback(watch)
    profiler = _profiler(case) if case.profiled else None
    if profiler is not None:
        trainer.add_callback(profiler)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train(resume_from_checkpoint=str(_checkpoint()) if case.resumes else None)

    found = _figures(case, world, trainer, watch, engine, profiler)
    found |= {"base_gib": round(kept / GIB, 2), "ready_s": round(ready, 1), "all_s": round(time.monotonic() - began, 1)}
    if loaded.window is not None:
        loaded.window.close()
    del trainer, engine, adapted, loaded, profiler, watch
    gc.collect()
    _limit_card(None)
    return found


def _placement(case: Case, config: Any, world: World, device: torch.device) -> Any:
    """Returns where the base lies, as a run would settle it; on a CPU no plan streams."""
    from finetune_trainer.stages.streamed_loading import Share
    from speed.several.random_base import streaming_placement

    if case.parallelism is SHARDED:
        return Share(world.rank, world.size)
    if device.type != "cuda":
        return None
    return streaming_placement(config, SHAPES[case.row.model], device, processes=world.size)


def _limit_card(gib: float | None) -> None:
    """Lets this process have so much of its card; None: all."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else min(1.0, gib * GIB / total))


def _config(config: Any, case: Case, world: World, device: torch.device) -> Any:
    """The run's configuration with what is the row's own."""
    training = config.training.model_copy(
        update={
            "parallelism": case.parallelism if world.size > 1 else Parallelism.REPLICATED,
            "checkpoint_steps": CHECKPOINT_STEP if case.saves else 100_000,
            "max_steps": case.steps + 2 * case.profiled,
            "memory": case.memory,
        }
    )
    gpus = world.size if device.type == "cuda" else 0
    return config.model_copy(update={"training": training, "gpus": gpus})


def _checkpoint() -> Path:
    """The checkpoint that the row with `saves` leaves."""
    return working_folder() / "several" / "0" / f"checkpoint-{CHECKPOINT_STEP}"


def _profiler(case: Case) -> Any:
    from speed.step_profile import make_profiler

    return make_profiler(first=case.steps) if torch.cuda.is_available() else None


def _figures(
    case: Case, world: World, trainer: Any, watch: Any, engine: Any, profiler: Any
) -> dict[str, Any]:  # fmt: skip
    times = [last - first for first, last in pairwise(watch.ends)][: case.steps]
    timed = times[WARM_UP:] if len(times) > WARM_UP else times
    on_gpu = torch.cuda.is_available()
    peaks = world.gather_numbers(torch.cuda.max_memory_allocated() if on_gpu else 0)
    rate = case.row.tokens / statistics.median(timed)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    found = {
        "row": case.name, "model": case.row.model, "gpus": world.size, "parallelism": str(case.parallelism),
        "card_gib": case.row.card_gib, "tokens_per_step": case.row.tokens, "tokens_per_second": round(rate, 1),
        "per_gpu": round(rate / world.size, 1), "step_ms": round(1e3 * statistics.median(timed), 1),
        "spread": round((max(timed) - min(timed)) / statistics.median(timed), 3),
        "peak_gib": round(max(peak for (peak,) in peaks) / GIB, 2),
        "planned_gib": round(engine.plan.peak_bytes / GIB, 2) if engine.plan else None,
        "memory_mode": str(engine.plan.mode) if engine.plan else None, "fallbacks": len(engine.fallbacks),
        "streamed_layers": len(engine.streamed),
        "micro_batch": engine.batch.size, "losses": losses, "gpu": torch.cuda.get_device_name() if on_gpu else "CPU",
    }  # fmt: skip
    if profiler is not None:
        own = Exchange.of(profiler.spans())
        every = [Exchange(*numbers) for numbers in world.gather_numbers(*own)]
        found |= summarise_exchange(every)
    return found


if __name__ == "__main__":
    main()
