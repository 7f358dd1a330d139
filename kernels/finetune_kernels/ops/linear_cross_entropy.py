"""The language model's head and its cross entropy in one, without the logits of all rows ever in memory.

    loss = sum over rows of  logsumexp(z) - z[target],     z = softcap(h W^T),     softcap(z) = c tanh(z / c)
    dh   = (softmax(z) - onehot(target)) * softcap'(z) W,  softcap'(z) = 1 - (z / c)^2

Shapes: hidden rows h [S, hidden], W [V, hidden] of the same float type, targets [S]; the loss is an fp32 scalar.

Rows go through in chunks: a GEMM makes the chunk's logits, one kernel turns them into losses and, in place, into their
own gradient, a second GEMM makes dh. The gradient is made in forward, while the logits exist; backward only scales it.
The head is frozen, but for rows of new tokens: their columns of z are h rows^T, and d rows = dz[:, columns]^T h.

Source: chunks of rows with the gradient made in forward as in Liger's fused_linear_cross_entropy (Hsu et al., 2024),
cf. Wijmans et al., "Cut Your Losses", 2024; the cap: Gemma Team, "Gemma 2", 2024.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn import functional

from finetune_kernels.planning.block_sizes import CHUNK_ROWS
from finetune_kernels.primitives.precision import widen

MAX_BLOCK = 16_384
"""Logits of a row that a program reads at once."""
ROW_BYTES = 16
"""Rows of logits begin at multiples of this, also where the vocabulary is odd, and large products take columns that
fill it: cuBLAS reads and writes so many bytes at once where all sizes allow it, and else element by element, at a ninth
of the speed."""


class TrainedRows(NamedTuple):
    """Rows of an embedding or head that train; those that the frozen weight has in their place are not used."""

    rows: torch.Tensor
    """[n, hidden]"""
    first: int
    """Token id of the first row; the others follow."""

    @property
    def columns(self) -> slice:
        """The tokens' columns among the logits."""
        return slice(self.first, self.first + self.rows.shape[0])


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None = None,
    trained: TrainedRows | None = None,
) -> torch.Tensor:
    """Returns the loss in fp32 or fp64: hidden [S, hidden], weight [V, hidden], targets [S]."""
    logits = widen(_with_trained(hidden @ weight.T, hidden, trained))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, targets, reduction="sum")


def reference_gradient(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """Returns the gradient of `hidden` by the formula."""
    z = widen(hidden @ weight.T)  # [S, V]
    slope: torch.Tensor | float = 1.0
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
        slope = 1 - (z / softcap) ** 2

    probabilities = torch.softmax(z, dim=-1)
    probabilities[torch.arange(targets.numel(), device=z.device), targets] -= 1
    return (probabilities * slope).to(hidden.dtype) @ weight


@triton.jit
def _softcap(z, softcap, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """c tanh(z / c), or z."""
    if HAS_SOFTCAP:
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z


@triton.jit
def _losses_and_gradients(  # type: ignore[no-untyped-def]
    logits_ptr, target_ptr, loss_ptr, v, stride, softcap, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr
):
    """One row a program: its logits [V] become their gradient in place, and its loss is written."""
    row = tl.program_id(0).to(tl.int64)
    start = logits_ptr + row * stride
    target = tl.load(target_ptr + row)
    columns = tl.arange(0, BLOCK_V)

    # online softmax: the largest logit and the sum of exponentials of the blocks so far
    largest = -float("inf")
    total = 0.0
    for first in range(0, v, BLOCK_V):
        offsets = first + columns
        z = _softcap(tl.load(start + offsets, mask=offsets < v, other=0.0).to(tl.float32), softcap, HAS_SOFTCAP)
        z = tl.where(offsets < v, z, -float("inf"))
        bigger = tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(largest - bigger) + tl.sum(tl.exp(z - bigger), axis=0)
        largest = bigger

    log_sum = largest + tl.log(total)
    tl.store(loss_ptr + row, log_sum - _softcap(tl.load(start + target).to(tl.float32), softcap, HAS_SOFTCAP))

    for first in range(0, v, BLOCK_V):
        offsets = first + columns
        z = _softcap(tl.load(start + offsets, mask=offsets < v, other=0.0).to(tl.float32), softcap, HAS_SOFTCAP)
        gradient = tl.exp(z - log_sum) - tl.where(offsets == target, 1.0, 0.0)
        if HAS_SOFTCAP:
            gradient *= 1.0 - (z / softcap) * (z / softcap)
        tl.store(start + offsets, gradient, mask=offsets < v)


def _with_trained(logits: torch.Tensor, hidden: torch.Tensor, trained: TrainedRows | None) -> torch.Tensor:
    """Returns `logits` [S, V] of `hidden` [S, hidden], with those of the trained rows in their place."""
    if trained is not None:
        logits[:, trained.columns] = hidden @ trained.rows.to(hidden.dtype).T
    return logits


def aligned_columns(weight: torch.Tensor) -> int:
    """Number of tokens of W [V, hidden] that one product takes; another takes the few that are left."""
    return weight.shape[0] - weight.shape[0] % (ROW_BYTES // weight.element_size())


def aligned_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns hidden W^T [S, V], whose rows begin at multiples of `ROW_BYTES`: a view of rows that may be longer."""
    v, step, middle = weight.shape[0], ROW_BYTES // hidden.element_size(), aligned_columns(weight)
    logits = hidden.new_empty(hidden.shape[0], triton.cdiv(v, step) * step)[:, :v]
    for columns in (slice(0, middle), slice(middle, v)):
        if columns.start < columns.stop:
            torch.mm(hidden, weight[columns].T, out=logits[:, columns])
    return logits


def _multiply(logits: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Writes logits [S, V] times W to `out` [S, hidden]. The few tokens that are left come first, so that the sum is
    rounded once."""
    middle = aligned_columns(weight)
    if middle < weight.shape[0]:
        torch.mm(logits[:, middle:], weight[middle:], out=out)
        out.addmm_(logits[:, :middle], weight[:middle])
    else:
        torch.mm(logits, weight, out=out)


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    trained: TrainedRows | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns the loss (fp32 scalar) and, for a loss gradient of 1, the gradients of `hidden` [S, hidden] and of the
    trained rows (fp32 [n, hidden]; None without any)."""
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    gradient, targets = torch.empty_like(hidden), targets.contiguous()
    of_rows = None if trained is None else torch.zeros_like(trained.rows, dtype=torch.float32)
    v = weight.shape[0]
    block = min(MAX_BLOCK, triton.next_power_of_2(v))

    def take(rows: slice) -> None:
        """Fills in what a chunk contributes. The end of the call frees its logits before the next chunk has its own."""
        logits = _with_trained(aligned_logits(hidden[rows], weight), hidden[rows], trained)  # [CHUNK_ROWS, V]
        _losses_and_gradients[(logits.shape[0],)](
            logits, targets[rows], losses[rows], v, logits.stride(0), softcap or 0.0,
            HAS_SOFTCAP=softcap is not None, BLOCK_V=block, num_warps=16)  # fmt: skip
        _multiply(logits, weight, gradient[rows])
        if trained is not None and of_rows is not None:
            own = logits[:, trained.columns]  # [CHUNK_ROWS, n]
            gradient[rows] += own @ (trained.rows.to(weight.dtype) - weight[trained.columns])
            of_rows.add_(own.T @ hidden[rows])

    for first in range(0, hidden.shape[0], CHUNK_ROWS):
        take(slice(first, first + CHUNK_ROWS))
    return losses.sum(), gradient, of_rows


def backward(scale: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of `hidden` for the loss gradient `scale` (scalar)."""
    return gradient * scale.to(gradient.dtype)


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Autograd around the chunks; saves the gradients of `hidden` and of the trained rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        softcap: float | None,
        rows: torch.Tensor | None = None,
        first: int = 0,
    ) -> torch.Tensor:
        """See `linear_cross_entropy`; `rows` and `first` are those of `TrainedRows`."""
        trained = None if rows is None else TrainedRows(rows, first)
        loss, *gradients = forward(hidden, weight, targets, softcap, trained)
        ctx.save_for_backward(*gradients)
        ctx.dtype = None if rows is None else rows.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of `hidden` and of the trained rows."""
        gradient, of_rows = ctx.saved_tensors
        scaled = None if of_rows is None else backward(scale, of_rows).to(ctx.dtype)
        return backward(scale, gradient), None, None, None, scaled, None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None = None,
    trained: TrainedRows | None = None,
) -> torch.Tensor:
    """Sum of the rows' losses (fp32 scalar) under a frozen head: hidden [S, hidden], weight [V, hidden], targets [S].

    `trained`: rows of the head that are not frozen. All targets are valid token ids. Triton on CUDA with a frozen
    weight, the reference elsewhere.
    """
    if not hidden.is_cuda or weight.requires_grad:
        return reference(hidden, weight, targets, softcap, trained)
    return LinearCrossEntropyFunction.apply(hidden, weight, targets, softcap, *(trained or ()))  # type: ignore[no-untyped-call, no-any-return]
