"""Numbers as a line of blocks, in the height of one line of text. Pure."""

from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"


def draw_sparkline(values: Sequence[float], width: int) -> str:
    """Returns at most `width` blocks; of more values than that, each block is the mean of its share."""
    if not values or width < 1:
        return ""

    count = min(width, len(values))
    edges = [index * len(values) // count for index in range(count + 1)]
    means = [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(edges)]

    low, span = min(means), max(means) - min(means)
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round((mean - low) / span * top) if span else 0] for mean in means)
