"""Forward passes in numbers of each rank's own, over a base of which every rank keeps a part.

How many passes an answer takes, nobody knows before. So the ranks meet before each pass: as long as one of them makes
one, the others gather the layers along.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from finetune_kernels.streaming.layer_window import LayerWindow
from finetune_trainer.distributed.world import World
from finetune_trainer.signs_of_life import beat


@contextmanager
def passes_together(window: LayerWindow | None, world: World) -> Iterator[None]:
    """Lets this rank make forward passes inside, and gathers the layers for the others' at the end. All ranks enter it;
    without a window it does nothing."""
    if window is None:
        yield
        return

    def announce() -> None:
        world.gather_numbers(True)
        window.begin_pass()

    window.begin_pass()
    before, window.on_forward = window.on_forward, announce
    try:
        yield
    finally:
        window.on_forward = before
        if window.is_within_pass:
            window.finish_pass(trains=False)  # of one that ended early
        while any(makes_one for (makes_one,) in world.gather_numbers(False)):
            beat()
            window.begin_pass()
            window.finish_pass(trains=False)
