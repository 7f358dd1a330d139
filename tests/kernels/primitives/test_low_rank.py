"""Products of sorted rows with their groups' low-rank factors, by the formula: groups of many sizes, one or two
factors."""

import pytest
import torch

from finetune_kernels.primitives.grouped import low_rank
from finetune_kernels.primitives.grouped.low_rank import Factor
from finetune_test_kernels import grouped_checks
from finetune_test_kernels.grouped_checks import HIDDEN, SIZES, WIDE, ends_of, factors
from finetune_test_kernels.mutated_kernels import true_modules
from finetune_test_kernels.tensor_checks import DEVICE, normal, relative_error

TOLERANCE = 2e-6  # fp32; sums in another order: at most 4e-7 was measured


def test_products_are_those_of_each_group() -> None:
    assert max(relative_error(found, exact) for found, exact in grouped_checks.low_rank(true_modules)) < TOLERANCE


def test_rows_of_the_group_before_are_noticed() -> None:
    ends = ends_of(SIZES)
    early = torch.cat([(ends[:-1] - 1).clamp(min=0), ends[-1:]])
    exact = grouped_checks.products(low_rank, 2, 2, ends, by_kernel=False)
    shifted = grouped_checks.products(low_rank, 2, 2, early, by_kernel=True)
    assert all(relative_error(found, true) > 0.01 for found, true in zip(shifted, exact, strict=True))


def test_sums_of_rows_are_those_of_the_formula() -> None:
    assert max(relative_error(found, exact) for found, exact in grouped_checks.token_sums(true_modules)) < TOLERANCE


def test_the_references_are_matrices_of_groups() -> None:
    (a, _), ends, rows = factors(low_rank, 3, 1), ends_of(SIZES), sum(SIZES)
    x, groups = normal(rows, HIDDEN), torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES)).to(DEVICE)
    exact = torch.einsum("sk,sjk->sj", x, a[0].m[groups])
    assert relative_error(low_rank.reference(x, a, ends), exact) < TOLERANCE


def test_a_gradient_has_the_layout_of_its_factor_and_zeros_for_groups_without_rows() -> None:
    (a, b), ends = factors(low_rank, 4, 2), ends_of(SIZES)
    small, dy = normal(sum(SIZES), 8), normal(sum(SIZES), 2 * WIDE)
    for made, factor in zip(low_rank.launch_outer(small, dy, b, ends, None), b, strict=True):
        assert made.stride() == factor.m.stride()
        assert not made[0].any()
        assert not made[3].any()
    assert a[0].m.is_contiguous()


def test_factors_of_different_shapes_are_refused() -> None:
    (a, b), ends = factors(low_rank, 4, 1), ends_of(SIZES)
    with pytest.raises(ValueError, match="up to 2 factors of one shape"):
        low_rank.launch_shrink(normal(sum(SIZES), HIDDEN), [*a, *b], ends)


@pytest.mark.gpu
@pytest.mark.parametrize(("rank", "count"), [(2, 2), (16, 2), (64, 1)])
def test_products_on_a_gpu(rank: int, count: int) -> None:
    """Each error in bfloat16 at most 1.1 times that of products group by group."""
    generator = torch.Generator().manual_seed(rank)
    sizes = torch.randint(0, 300, (64,), generator=generator).tolist()
    ends, hidden, wide, kind = ends_of(tuple(sizes)), 2048, 768, torch.bfloat16
    a = [Factor(normal(64, rank, hidden, seed=n, dtype=kind), slice(None), 1.0) for n in range(count)]
    b = [normal(64, wide, rank, seed=9 + n, dtype=kind).transpose(1, 2) for n in range(count)]
    up = [Factor(m, slice(n * wide, (n + 1) * wide), 0.5 + n) for n, m in enumerate(b)]
    x, dy = normal(sum(sizes), hidden, seed=1, dtype=kind), normal(sum(sizes), count * wide, seed=2, dtype=kind)
    weights = normal(sum(sizes), seed=3).sigmoid()

    def run(part: str, exact: bool) -> list[torch.Tensor]:
        wider = (lambda value: value.double()) if exact else (lambda value: value)
        first, second = ([f._replace(m=wider(f.m)) for f in group] for group in (a, up))
        shrink = low_rank.reference if part == "loop" else low_rank.shrink
        outer = low_rank.reference_outer if part == "loop" else low_rank.outer
        expand = low_rank.reference_expand if part == "loop" else low_rank.expand
        y, dx = wider(dy).clone(), wider(x).clone()
        xa, d_xa = shrink(wider(x), first, ends), shrink(wider(dy), second, ends)
        expand(y, xa, second, ends)
        expand(dx, d_xa, first, ends)
        return [
            xa,
            d_xa,
            y,
            dx,
            *outer(d_xa, wider(x), first, ends, weights),
            *outer(xa, wider(dy), second, ends, None),
        ]

    ours, loop, exact = run("kernel", False), run("loop", False), run("loop", True)
    for index, (one, other, true) in enumerate(zip(ours, loop, exact, strict=True)):
        errors = [float((value.double() - true).norm() / true.norm()) for value in (one, other)]
        assert errors[0] <= 1.1 * errors[1], (index, errors)
