"""Work that goes through in chunks has the buffers of one chunk in memory, which is what the memory plan counts."""

import weakref
from collections.abc import Callable

import pytest
import torch

from finetune_kernels.ops import linear_cross_entropy
from finetune_kernels.planning.parts.vocabulary import loss_bytes
from finetune_test_kernels.tensor_checks import DEVICE, normal

CHUNKS, CHUNK_ROWS, HIDDEN, VOCABULARY = 3, 4, 16, 64
NEW = 5


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks of logits that are alive when each chunk has its own; filled while a loss is computed."""
    made: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []

    def counted(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def logits(*arguments: torch.Tensor) -> torch.Tensor:
            found = make(*arguments)
            made.append(weakref.ref(found))
            counts.append(sum(each() is not None for each in made))
            return found

        return logits

    monkeypatch.setattr(linear_cross_entropy, "CHUNK_ROWS", CHUNK_ROWS)
    monkeypatch.setattr(linear_cross_entropy, "aligned_logits", counted(linear_cross_entropy.aligned_logits))
    return counts


@pytest.mark.parametrize("trains_rows", [False, True])
def test_a_chunks_logits_are_gone_before_the_next_has_its_own(trains_rows: bool, alive: list[int]) -> None:
    rows = CHUNKS * CHUNK_ROWS
    hidden, weight = normal(rows, HIDDEN), normal(VOCABULARY, HIDDEN, seed=1)
    targets = torch.arange(rows, device=DEVICE) % VOCABULARY
    trained = linear_cross_entropy.TrainedRows(normal(NEW, HIDDEN, seed=2), VOCABULARY - NEW) if trains_rows else None

    linear_cross_entropy.forward(hidden, weight, targets, None, trained)
    assert alive == [1] * CHUNKS


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [262_144, 128_256])
def test_the_loss_takes_the_planned_memory(vocabulary: int) -> None:
    """Gemma's vocabulary and Llama's; a second chunk of logits is 0.25 to 0.5 GiB, which no plan had."""
    tokens, hidden_size = 4096, 2304
    hidden = normal(tokens, hidden_size).to(torch.bfloat16).requires_grad_()
    weight = torch.empty(vocabulary, hidden_size, dtype=torch.bfloat16, device=DEVICE).normal_(std=0.02)
    targets = torch.arange(tokens, device=DEVICE)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy.linear_cross_entropy(hidden, weight, targets).backward()  # type: ignore[no-untyped-call]
    used = torch.cuda.max_memory_allocated() - before
    planned = loss_bytes(tokens, hidden_size, vocabulary, stream=hidden_size)
    assert 0.8 * planned < used < 1.05 * planned
