"""Layers' inputs come back from host memory in turn, pass after pass, and their pieces are kept."""

import pytest
import torch

from finetune_kernels.layers.host_memory import HostMemory
from finetune_kernels.primitives.pinned_memory import PIECE

LAYERS = 3
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def inputs(rows: int, device: str, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.randn(1, rows, 96, device=device).to(dtype) for _ in range(LAYERS)]


def passed(host: HostMemory, given: list[torch.Tensor]) -> list[torch.Tensor]:
    """What comes back of `given`, in the same order."""
    for index, x in enumerate(given):
        host.put(index, x)
    return [host.take(index) for index in reversed(range(LAYERS))][::-1]


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_inputs_come_back_pass_after_pass(device: str) -> None:
    host = HostMemory()
    for rows in (50, 7, 50, 90):  # shorter passes use the pieces of longer ones
        given = inputs(rows, device)
        found = passed(host, given)
        assert all(torch.equal(one, other) for one, other in zip(found, given, strict=True))
        assert {one.device.type for one in found} == {device}
    kept = host._pieces[0]
    passed(host, inputs(90, device))
    assert host._pieces[0] is kept
    strided = [x.transpose(1, 2) for x in inputs(90, device, torch.float32)]
    assert all(torch.equal(one, other) for one, other in zip(passed(host, strided), strided, strict=True))


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_a_pass_that_ended_early_leaves_nothing(device: str) -> None:
    host = HostMemory()
    for index, x in enumerate(inputs(50, device)):
        host.put(index, x)
    host.take(2)
    host.forget()
    with pytest.raises(KeyError):
        host.take(1)
    given = inputs(60, device)
    assert all(torch.equal(one, other) for one, other in zip(passed(host, given), given, strict=True))


@pytest.mark.gpu
def test_what_is_pinned_is_what_a_plan_counts() -> None:
    """33 MiB in one buffer would take 64."""
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    host, size = HostMemory(), 2 * PIECE + (1 << 20)
    x = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    host.put(0, x)
    torch.cuda.synchronize()
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] - before == size
    assert torch.equal(host.take(0), x)
