"""One pass for which memory may run out, here or on another rank.

Ranks that each keep the whole base repeat a pass on their own. Ranks that share it out gather its layers together: one
that runs out of memory gathers the rest of the pass along with the others, who compute it, and then all repeat it.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch

from finetune_kernels.streaming.layer_window import LayerWindow
from finetune_trainer.distributed.world import World


def try_pass(attempt: Callable[[], Any], window: LayerWindow | None, world: World, *, trains: bool) -> tuple[Any, bool]:
    """Returns the result of `attempt` and True, or None and False if the pass is to be repeated in less memory.

    `window`: the base that the ranks share, or None. `trains`: the pass has a backward pass.
    """
    result, ran_out = None, False
    if window is not None:
        window.begin_pass()
    try:
        result = attempt()
    except torch.OutOfMemoryError as error:
        error.__traceback__ = None  # its frames hold the tensors of the pass
        ran_out = True
    if window is None:
        return result, not ran_out

    if ran_out:
        gc.collect()  # cycles of frames may hold tensors of the interrupted pass
        window.finish_pass(trains=trains)
    fits = not any(elsewhere for (elsewhere,) in world.gather_numbers(ran_out))
    return (result if fits else None), fits
