"""The head by blocks of the vocabulary: as exact as the head in one, whatever the blocks are; on a GPU from pinned
memory."""

import pytest
import torch

from finetune_kernels.ops import blocked_cross_entropy as blocked
from finetune_kernels.ops import linear_cross_entropy as whole
from finetune_test_kernels.tensor_checks import normal, relative_error, root_error

EXACT = 5e-6  # fp32; 4e-7 was measured over these shapes
RATIO = 1.1
Found = tuple[torch.Tensor, torch.Tensor]


def loss_and_gradient(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None
) -> Found:
    leaf = hidden.clone().requires_grad_()
    loss = blocked.blocked_cross_entropy(leaf, weight, targets, softcap)
    return loss.detach(), torch.autograd.grad(0.5 * loss, leaf)[0] * 2


def exact(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None) -> Found:
    arguments = hidden.double(), weight.double(), targets, softcap
    return whole.reference(*arguments), whole.reference_gradient(*arguments)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of the vocabulary, the last not full, each in several turns; rows in two chunks."""
    monkeypatch.setattr(blocked, "VOCABULARY_BLOCK", 40)
    monkeypatch.setattr(blocked, "MAX_BLOCK", 16)
    monkeypatch.setattr(blocked, "HEAD_ROWS", 4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("rows", "width", "tokens"), [(1, 1, 1), (7, 24, 97), (4, 33, 80), (9, 16, 41)])
def test_loss_and_gradient_are_those_of_the_formula(rows: int, width: int, tokens: int, softcap: float | None) -> None:
    hidden, weight = normal(rows, width, device="cpu"), normal(tokens, width, seed=1, device="cpu")
    targets = torch.arange(rows) * 13 % tokens
    found, expected = (of(hidden, weight, targets, softcap) for of in (loss_and_gradient, exact))
    if tokens == 1:  # nothing to learn
        assert found[0].abs() < EXACT
        assert found[1].abs().max() < EXACT
        return
    assert relative_error(found[0], expected[0]) < EXACT
    assert relative_error(found[1], expected[1]) < EXACT
    other = loss_and_gradient(hidden, weight, targets.roll(1), softcap)
    assert rows == 1 or relative_error(other[1], expected[1]) > 1e-2


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("peak", [0, 50, 96])
def test_scores_that_grow_from_block_to_block_neither_overflow_nor_vanish(peak: int) -> None:
    """One token's score is 300 above the others; e^300 is beyond fp32."""
    hidden, weight = normal(6, 8, device="cpu"), 0.01 * normal(97, 8, seed=1, device="cpu")
    hidden[:, 0], weight[peak, 0] = 10.0, 30.0
    for targets in (torch.full((6,), peak), torch.tensor([0, 10, 39, 40, 80, 95])):
        found, expected = (of(hidden, weight, targets, None) for of in (loss_and_gradient, exact))
        assert (found[0] - expected[0]).abs() < 1e-4 * max(1.0, expected[0].item())
        assert (found[1] - expected[1]).abs().max() < 1e-4  # of gradients up to 30


def test_fp16_is_rounded_once_for_a_block(small_blocks: None) -> None:
    hidden, weight = normal(7, 24, dtype=torch.float16, device="cpu"), normal(97, 24, seed=1, device="cpu").half()
    targets = torch.arange(7) * 13
    found, expected = (of(hidden, weight, targets, None) for of in (loss_and_gradient, exact))
    assert found[1].dtype is torch.float16
    assert relative_error(found[0], expected[0]) < 2e-3  # 2e-4 was measured
    assert relative_error(found[1], expected[1]) < 4e-3  # 8e-4 was measured


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(("rows", "v"), [(1, 128_256), (300, 32_001), (300, 128_256), (4096, 128_256), (5000, 128_256)])
def test_from_pinned_memory_in_bfloat16(rows: int, v: int, softcap: float | None) -> None:
    """At the sizes of Llama 8B, against fp64, beside the head in one piece; twice, as buffers are used again."""
    n = 1024
    weight = (normal(v, n, seed=1) * 4 * n**-0.5).bfloat16()  # the likeliest token has a tenth
    host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True).copy_(weight)
    hidden, targets = normal(rows, n).bfloat16(), torch.arange(rows, device="cuda") * 7919 % v
    slices = [slice(first, first + 512) for first in range(0, rows, 512)]
    truth = [exact(hidden[at], weight, targets[at], softcap) for at in slices]  # fp64 logits of 512 rows: 0.5 GB
    loss, gradient = torch.stack([one for one, _ in truth]).sum(), torch.cat([one for _, one in truth])

    leaf = hidden.clone().requires_grad_()
    other = whole.linear_cross_entropy(leaf, weight, targets, softcap)
    (other_gradient,) = torch.autograd.grad(other, leaf)

    for _ in range(2):
        found, found_gradient = loss_and_gradient(hidden, host, targets, softcap)
        error, others = root_error(found_gradient, gradient), root_error(other_gradient, gradient)
        print(f"{rows} rows, softcap {softcap}: dh {error:.2e} of {others:.2e}, loss {found:.4f} of {loss:.4f}")
        assert error <= (RATIO * others if rows > 1 else 1e-2)  # of one row, one token's rounding decides
        assert relative_error(found, loss) < 1e-3
