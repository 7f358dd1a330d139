"""Measures data parallel training: one GPU, then all of a machine, with the same global batch and with the same work a
GPU.

    python -P -m torch.distributed.run --standalone --nproc-per-node 4 trainer_image/benchmarks/several_gpus.py CSV

The first two runs show that the curve is the same; the last two, which follow each other, give the ratio. Models have
random weights (`speed.models`), and are made if they are missing.
"""

import csv
import gc
import statistics
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune_trainer.distributed.launched import joined_world
from finetune_trainer.distributed.world import ALONE, World
from speed.models import checkpoint
from speed.rows import ROWS, SEED, WARM_UP, Row, model_folder
from speed.step_times import make_watch
from speed.systems import dataset, import_libraries, our_trainer, run_config

COLUMNS = ("row", "gpus", "tokens_per_step", "tokens_per_second", "peak_gib", "last_loss", "curve_difference", "gpu")
MEASURED = ("1b-2048-bs4-ga2", "8b-2048-bs2-ga4")
CURVE_STEPS, STEPS = 6, 9
"""Steps of the runs that compare curves, and of those that are timed."""


def main(path: Path) -> None:
    """Measures every row; rank 0 appends to the CSV."""
    with joined_world() as world:
        import_libraries("ours")
        rows = [found for name in MEASURED for found in _measure(name, world)]
    if world.rank > 0:
        return

    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def _measure(name: str, world: World) -> list[dict[str, Any]]:
    """Returns four rows: one GPU and all with the same step, all and one with the same work a GPU."""
    import torch.distributed as dist

    row = ROWS[name]
    wide = replace(row, accumulation=row.accumulation * world.size)
    if world.rank == 0:
        checkpoint.prepare(row.model)
    dist.barrier()

    found: list[dict[str, Any]] = []
    for shape, of, steps in (
        (row, ALONE, CURVE_STEPS),
        (row, world, CURVE_STEPS),
        (wide, world, STEPS),
        (row, ALONE, STEPS),
    ):
        if of is world or world.rank == 0:
            found.append({"row": name} | _train(shape, of, steps, world.rank))
            print(f"[{world.rank}]", found[-1], flush=True)
        dist.barrier()

    if world.rank == 0:
        one, two = (each.pop("losses") for each in found[:2])
        found[1]["curve_difference"] = f"{max(abs(a - b) / a for a, b in zip(one, two, strict=True)):.1e}"
        for each in found[2:]:
            del each["losses"]
    return found


def _train(row: Row, world: World, steps: int, rank: int) -> dict[str, Any]:
    import torch

    from finetune_trainer.stages.adapter_injection import inject_adapter
    from finetune_trainer.stages.model_loading import load_model
    from finetune_trainer.training.engine import prepare_engine

    folder = model_folder(row.model)
    config = run_config("ours", row, folder, steps)
    loaded = load_model(folder, config.model, config.training.precision, gpus=1)
    adapted = inject_adapter(loaded.model, config.adapter, SEED + (rank if world.size > 1 else 0))  # made equal later
    engine = prepare_engine(adapted.model, loaded, config)
    engine.use_world(world)

    trainer, watch = our_trainer(adapted.model, loaded, engine, config, dataset(row, steps)), make_watch()
    trainer.add_callback(watch)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()

    times = [later - earlier for earlier, later in pairwise(watch.ends)][WARM_UP:]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = torch.cuda.max_memory_allocated() / 2**30
    del trainer, engine, adapted, loaded
    gc.collect()
    torch.cuda.empty_cache()

    return {
        "gpus": world.size,
        "tokens_per_step": row.tokens,
        "tokens_per_second": round(row.tokens / statistics.median(times), 1),
        "peak_gib": round(peak, 2),
        "last_loss": round(losses[-1], 4),
        "losses": losses,
        "gpu": torch.cuda.get_device_name(),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
