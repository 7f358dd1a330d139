"""One of two processes that share a base out. Rank 0 writes what they found.

    python -P -m torch.distributed.run --standalone --nproc-per-node 2 -m finetune_test_models.ranks.sharded \\
        CONFIG.json FOLDER

FOLDER/found.json: "bits", how many decoded weights differ from those of a whole base, and how many there are;
"wrong_bits", the same where the ranks' parts come in the wrong order; "whole", "shared" and "wrong", what `run.run`
returns for a whole base, a shared one and one with a few bytes in the wrong place; "kept", bytes of each.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.nn.modules import Linear4bit

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Parallelism
from finetune_kernels.primitives import nf4
from finetune_kernels.streaming import sharded_tensors
from finetune_test_models.ranks.run import run
from finetune_trainer.distributed.launched import joined_world
from finetune_trainer.distributed.world import World
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.streamed_loading import Share
from finetune_trainer.training.qlora_trainer import QloraTrainer

FIRST_CODES = 2**15
"""Bytes of codes at the beginning of a layer. All parts in the wrong order give no numbers (NaN), and so no curve."""


@contextmanager
def in_wrong_order(size: int | None = None) -> Iterator[None]:
    """Lets every all-gather put the ranks' parts one place further than they belong; `size`: only that many bytes, at
    the beginning, by 256 bytes."""
    gather = sharded_tensors._all_gather

    def gather_shifted(whole: torch.Tensor, part: torch.Tensor, *, async_op: bool) -> Any:
        gather(whole, part)
        wrong = whole[:size]
        wrong.copy_(wrong.roll(part.numel() if size is None else 256))
        return _Done()

    sharded_tensors._all_gather = gather_shifted
    try:
        yield
    finally:
        sharded_tensors._all_gather = gather


class _Done:
    def wait(self) -> None:
        """Does nothing: it is done."""


def compare_bits(config: RunConfig, world: World) -> tuple[list[int], list[int]]:
    """Decodes all weights of a shared and a whole base, forward and backward through the layers; returns [weights that
    differ, weights], and the bytes that are kept of the two."""
    source = Path(config.model.source.removeprefix("file://"))
    whole, shared = (
        load_model(source, config.model, config.training.precision, gpus=0, placement=share)
        for share in (None, Share(world.rank, world.size))
    )
    assert shared.window is not None
    layers = [
        list(zip(*_linears(whole, index), *_linears(shared, index), strict=True)) for index in range(_count(whole))
    ]
    differing, total = 0, 0
    order = [
        *((index, False) for index in range(len(layers))),
        *((index, True) for index in reversed(range(len(layers)))),
    ]

    for index, backward in order:
        shared.window.use(index, trains=True, backward=backward)
        for expected, found in layers[index]:
            decoded = [nf4.reference(each.weight.data, each.weight.quant_state) for each in (expected, found)]
            differing += int((decoded[0].view(torch.int32) != decoded[1].view(torch.int32)).sum())
            total += decoded[0].numel()
    shared.window.close()
    return [differing, total], [whole.base_bytes, shared.base_bytes]


def _count(loaded: Any) -> int:
    return len(loaded.model.model.layers)


def _linears(loaded: Any, index: int) -> list[list[Any]]:
    return [[part for part in loaded.model.model.layers[index].modules() if isinstance(part, Linear4bit)]]


def main(arguments: list[str]) -> None:
    """Runs the process that the command line describes."""
    config = RunConfig.model_validate_json(Path(arguments[0]).read_text(encoding="utf-8"))
    folder = Path(arguments[1])
    found: dict[str, Any] = {}
    sharded = config.training.model_copy(update={"parallelism": Parallelism.SHARDED})
    shared = config.model_copy(update={"training": sharded})

    with joined_world() as world:
        found["bits"], found["kept"] = compare_bits(config, world)
        with in_wrong_order():
            found["wrong_bits"], _ = compare_bits(config, world)
        for name, each in (("whole", config), ("shared", shared)):
            found[name] = run(each, _folder(folder, name, world), world, QloraTrainer)
        with in_wrong_order(FIRST_CODES):
            found["wrong"] = run(shared, _folder(folder, "wrong", world), world, QloraTrainer)
        dist.barrier()

    if world.rank == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def _folder(folder: Path, name: str, world: World) -> Path:
    own = folder / name / str(world.rank)
    own.mkdir(parents=True)
    return own


if __name__ == "__main__":
    main(sys.argv[1:])
