"""Times linear attention of Qwen 3.5 9B on a machine with a GPU and fla-core: fla's kernels beside transformers' loops,
and how long the first pass takes, in which each of fla's kernels tries its configurations.

    TRITON_CACHE_DIR=$(mktemp -d) python -m benchmarks.linear_attention

The configurations that were chosen come last. About five minutes, most of them for the first passes.
"""

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.qwen3_5 import modeling_qwen3_5
from triton.runtime.autotuner import Autotuner
from triton.testing import do_bench

from finetune_kernels.mixers import linear_attention
from finetune_kernels.mixers.documents import BatchesOfPass
from finetune_kernels.mixers.linear_attention import use_kernels
from finetune_kernels.primitives.attention.inputs import PackedSequences

HIDDEN, DTYPE = 4096, torch.bfloat16
Pass = Callable[[], Any]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[900, 40, 500, 200, 408], help="their tokens")
    lengths = parser.parse_args().documents
    say = Console(width=160, highlight=False).print

    kind: Any = CONFIG_MAPPING["qwen3_5_text"]
    config = kind(hidden_size=HIDDEN, num_hidden_layers=1, layer_types=["linear_attention"])
    mixer: Any = modeling_qwen3_5.Qwen3_5GatedDeltaNet(config, 0).to("cuda", DTYPE).requires_grad_(False)
    use_kernels(mixer)
    rows = torch.randn(sum(lengths), HIDDEN, device="cuda", dtype=DTYPE, requires_grad=True)
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    sequences, batches = PackedSequences(ends, max(lengths), sum(lengths)), BatchesOfPass()
    say(f"{torch.cuda.get_device_name()}, {len(lengths)} documents of {sum(lengths):,} tokens, {HIDDEN} wide")

    def packed() -> torch.Tensor:
        return mixer(rows[None], cu_seq_lens_q=ends)  # type: ignore[no-any-return]

    def alone() -> torch.Tensor:
        return mixer(rows[None])  # type: ignore[no-any-return]

    for name, forward in (("packed", packed), ("one document", alone)):
        say(f"fla, {name}: {_first_seconds(forward, rows):.1f} s the first time, {_milliseconds(forward, rows)}")
    _say_choices(say)

    linear_attention.on_gpu = lambda tensor: False
    say(f"loops, packed: {_milliseconds(lambda: batches.of(sequences).run(mixer, rows), rows)}")
    say(f"loops, one document: {_milliseconds(alone, rows)}")


def _first_seconds(forward: Pass, rows: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.autograd.grad(forward().sum(), rows)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _milliseconds(forward: Pass, rows: torch.Tensor) -> str:
    """Times of a forward pass, and of forward and backward."""
    with torch.no_grad():
        one = do_bench(forward)
    both = do_bench(lambda: torch.autograd.grad(forward().sum(), rows))
    return f"{one:.2f} ms forward, {both:.2f} ms with backward"


def _say_choices(say: Callable[[str], None]) -> None:
    """The configurations that fla's kernels have chosen."""
    for tuner in [found for found in gc.get_objects() if isinstance(found, Autotuner) and found.cache]:
        name, module = tuner.base_fn.__name__, tuner.base_fn.__module__
        for key, chosen in tuner.cache.items():
            say(f"{module} {name} {key}: {chosen}, of {len(tuner.configs)}")


if __name__ == "__main__":
    main()
