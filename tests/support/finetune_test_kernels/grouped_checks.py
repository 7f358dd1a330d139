"""What kernels of sorted rows and their formulas make of the same values, for tests and for mutants."""

from collections.abc import Iterator
from typing import Any

import torch

from finetune_test_kernels.mutated_kernels import Load, true_modules
from finetune_test_kernels.norm_checks import Pairs
from finetune_test_kernels.tensor_checks import DEVICE, normal

SIZES = (0, 70, 1, 0, 129, 64)
"""Rows of each group: none, more than a tile, one, exactly a tile."""
HIDDEN, WIDE = 40, 150
"""The wide side of A, and that of each B."""


def ends_of(sizes: tuple[int, ...]) -> torch.Tensor:
    """Returns the row behind the last one of each group, int32."""
    return torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)


def factors(module: Any, rank: int, count: int) -> tuple[list[Any], list[Any]]:
    """Returns A's and B's factors of `count` adapters: all read the same columns, each writes its own."""
    groups = len(SIZES)
    a = [module.Factor(normal(groups, rank, HIDDEN, seed=n) / 6, slice(None), 1.0) for n in range(count)]
    b = [normal(groups, WIDE, rank, seed=9 + n).transpose(1, 2) for n in range(count)]
    return a, [module.Factor(m, slice(n * WIDE, (n + 1) * WIDE), 0.5 + n) for n, m in enumerate(b)]


def products(module: Any, rank: int, count: int, ends: torch.Tensor, *, by_kernel: bool) -> list[torch.Tensor]:
    """Returns all products that a layer of experts makes of its adapters."""
    (a, b), rows = factors(module, rank, count), int(ends[-1])
    x, dy = normal(rows, HIDDEN, seed=1), normal(rows, count * WIDE, seed=2)
    weights = normal(rows, seed=3)
    shrink = module.launch_shrink if by_kernel else module.reference
    expand = module.launch_expand if by_kernel else module.reference_expand
    outer = module.launch_outer if by_kernel else module.reference_outer

    xa, d_xa, y, dx = shrink(x, a, ends), shrink(dy, b, ends), dy.clone(), x.clone()
    expand(y, xa, b, ends)
    expand(dx, d_xa, a, ends)
    return [xa, d_xa, y, dx, *outer(d_xa, x, a, ends, weights), *outer(xa, dy, b, ends, None)]


def low_rank(load: Load) -> Pairs:
    """Products of two adapters of a rank that takes two tiles, and of one of a small rank."""
    ours, true, ends = load("low_rank"), true_modules("low_rank"), ends_of(SIZES)
    for rank, count in ((2, 2), (65, 2), (16, 1)):
        found = products(ours, rank, count, ends, by_kernel=True)
        yield from zip(found, products(true, rank, count, ends, by_kernel=False), strict=True)


def token_sums(load: Load) -> Pairs:
    """Sums of each token's rows, and the gradient of the router's weights, with a bias and without."""
    ours, true = load("token_sums"), true_modules("token_sums")
    vars(ours).update(MAX_BLOCK=8)  # several blocks, the last one not full
    weights, experts = normal(5, 3), torch.randint(0, 4, (15,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    z, places = normal(15, 21, seed=1), order.view(5, 3)
    for one in (weights, None):
        yield ours.combine(z, places, one), true.reference(z, places, one)

    bias: tuple[torch.Tensor, ...]
    for bias in ((), (normal(15, 11, seed=4), normal(4, 11, seed=5), experts)):
        yield from _weighed(ours.weigh, true.reference_weigh, weights, order, bias)


def _weighed(
    weigh: Any, reference: Any, weights: torch.Tensor, order: torch.Tensor, bias: tuple[torch.Tensor, ...]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    mine, theirs, act = normal(15, 21, seed=2), normal(15, 21, seed=2), normal(15, 21, seed=3)
    yield weigh(mine, act, weights, order, bias), reference(theirs, act, weights, order, bias)
    yield mine, theirs
