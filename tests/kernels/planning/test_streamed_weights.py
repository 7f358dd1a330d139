"""Layers' weights stream from host memory where nothing else fits, as few as it takes, or all if Smallest is asked."""

from dataclasses import replace

import pytest

from finetune_api.vocabulary import MemoryMode
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.loaded_weights import let_stream, linear_bytes
from finetune_kernels.planning.memory_plan import MemoryPlan, plan_memory, smaller_plan
from finetune_kernels.planning.micro_batch import MicroBatch, choose_micro_batch
from finetune_kernels.planning.model_shape import ModelShape
from finetune_kernels.planning.parts.expert_shape import ExpertShape
from finetune_kernels.planning.rates import H200, UNLIMITED, Machine
from finetune_kernels.planning.streamed_weights import waiting_seconds

GIB = 2**30
LLAMA_8B = let_stream(
    ModelShape(
        32, 4096, 32, 8, 128, 14336, 128256, 6_979_321_856, 41_943_040, quantized=True,
        movable_bytes=2 * 128256 * 4096 * 2,
    ),
    double_quantized=True,
)  # fmt: skip
LLAMA_70B = let_stream(
    ModelShape(
        80, 8192, 64, 8, 128, 28672, 128256, 68_451_041_280, 207_093_760, quantized=True,
        movable_bytes=2 * 128256 * 8192 * 2,
    ),
    double_quantized=True,
)  # fmt: skip
BASE = {32: int(5.47 * GIB), 80: int(38.2 * GIB)}
"""Bytes in use before a plan, by layers."""


def plan_of(
    shape: ModelShape, gib: float, mode: MemoryMode = MemoryMode.FASTEST, tokens: int = 2048, **machine: int
) -> MemoryPlan:
    return plan_memory(
        shape, tokens, base_bytes=BASE[shape.layers], total_bytes=int(gib * GIB), mode=mode, machine=Machine(**machine)
    )


def test_a_70b_model_fits_24_gib_and_streams_no_more_than_it_takes() -> None:
    plans = [plan_of(LLAMA_70B, gib) for gib in (8, 12, 16, 24, 32, 40, 48, 80)]
    streamed = [plan.streamed_layers for plan in plans]
    print("layers that stream:", streamed)
    assert streamed == sorted(streamed, reverse=True)
    assert streamed[-2:] == [0, 0]
    assert all(plan.fits for plan in plans)
    assert plans[3].mode is MemoryMode.SMALLEST
    assert [plan.mode for plan in plans[-2:]] == [MemoryMode.FASTEST] * 2

    # With a layer less it would not fit.
    layer = LLAMA_70B.streamable_bytes[0]
    for plan in plans[:-2]:
        assert plan.budget_bytes - layer < plan.peak_bytes <= plan.budget_bytes
    assert not plan_of(replace(LLAMA_70B, streamable_bytes=()), 24).fits


def test_smallest_streams_all_layers_and_an_8b_model_takes_less_than_2_gib() -> None:
    plan = plan_of(LLAMA_8B, 80, MemoryMode.SMALLEST)
    assert plan.streamed_layers == 32
    assert plan.peak_bytes < 2 * GIB

    # Two layers of 32 are on the GPU, and all of them in host memory.
    weights = linear_bytes(LLAMA_8B, double_quantized=True)
    resident = plan_of(replace(LLAMA_8B, streamable_bytes=()), 80, MemoryMode.SMALLEST)
    assert resident.peak_bytes - plan.peak_bytes == weights - weights // 16
    assert plan.pinned_bytes - resident.pinned_bytes == weights
    assert ("weights streamed from the host", "-3.35 GiB (32 layers)") in plan.rows()
    assert ("two layers of them at a time", "0.21 GiB") in plan.rows()
    assert ("pinned in host memory", f"{plan.pinned_bytes / GIB:.2f} GiB") in plan.rows()


def test_only_what_host_memory_takes_streams() -> None:
    def with_room(room: float) -> MemoryPlan:
        return plan_of(LLAMA_8B, 80, MemoryMode.SMALLEST, host_room=int(room * GIB))

    rooms = (0, 0.25, 0.5, 1, 2, 3, 4, 6, 8)
    plans = [with_room(room) for room in rooms]
    assert all(plan.pinned_bytes <= room * GIB for plan, room in zip(plans, rooms, strict=True))
    peaks = [plan.peak_bytes for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert [plans[0].streamed_layers, plans[-1].streamed_layers] == [0, 32]
    assert plans[-1] == with_room(UNLIMITED / GIB)
    assert not plan_of(LLAMA_70B, 24, host_room=16 * GIB).fits


@pytest.mark.parametrize("reason", ["experts", "magnitudes", "gathered_bytes", "quantized"])
def test_layers_that_cannot_stream_stay(reason: str) -> None:
    in_16_bits = ExpertShape(8, 2, 64, 64, 0, quantized=False)
    value = {"experts": in_16_bits, "magnitudes": True, "gathered_bytes": 1, "quantized": False}[reason]
    shape = replace(LLAMA_8B, streamable_bytes=(), **{reason: value})  # type: ignore[arg-type]
    assert let_stream(shape, double_quantized=True).streamable_bytes == ()


def test_a_copy_costs_what_computing_does_not_hide() -> None:
    """8B: 0.1125 GB a layer in 2.05 ms; 2,048 tokens compute 1.28 ms forward, and decode in 0.16 ms."""
    recomputed = LLAMA_8B.recomputed_by([ActivationPolicy.OFFLOAD] * 32)
    parameters = 6_979_321_856 / 32
    copy, decoding = LLAMA_8B.streamable_bytes[0] / 55e9, parameters / 1.4e12
    forward = 2 * parameters * 2048 / 7e14 + decoding
    backward = forward + recomputed / 32 * 2048 / 7e14
    assert forward < copy < backward
    assert waiting_seconds(LLAMA_8B, H200, 2048, recomputed) == pytest.approx(copy - forward)
    assert waiting_seconds(LLAMA_8B, H200, 4096, recomputed) == 0
    slow = replace(H200, copying=1e10)
    expected = 2 * 5.5 * copy - forward - backward
    assert waiting_seconds(LLAMA_8B, slow, 2048, recomputed) == pytest.approx(expected)

    resident = plan_of(replace(LLAMA_8B, streamable_bytes=()), 80, MemoryMode.SMALLEST)
    plan = plan_of(LLAMA_8B, 80, MemoryMode.SMALLEST)
    waited = plan.extra_milliseconds - resident.extra_milliseconds
    assert waited == pytest.approx(32e3 * (copy - forward))


def test_larger_micro_batches_amortise_the_copies() -> None:
    """On a card where only streamed weights fit: over a slow bus a step makes fewer passes."""

    def choose(copying: float) -> MicroBatch:
        machine = Machine(rates=replace(H200, copying=copying))
        return choose_micro_batch(
            LLAMA_70B, 8, 512, MemoryMode.FASTEST,
            lambda tokens: plan_memory(
                LLAMA_70B, tokens, base_bytes=BASE[80], total_bytes=24 * GIB, mode=MemoryMode.FASTEST,
                machine=machine,
            ),
        )  # fmt: skip

    slow = choose(1e10)
    print("over a slow bus:", slow)
    assert slow.size == 8
    assert plan_of(LLAMA_70B, 24, tokens=8 * 512).fits
    assert choose_micro_batch(LLAMA_70B, 8, 512, MemoryMode.SMALLEST, lambda _: pytest.fail("asked")).size == 1


def test_after_memory_ran_out_more_layers_stream() -> None:
    def plan_for(mode: MemoryMode, most: int = UNLIMITED) -> MemoryPlan:
        return plan_of(LLAMA_70B, min(24 * GIB, most) / GIB, mode)

    plan = plan_for(MemoryMode.FASTEST)
    assert (plan.mode, plan.is_smallest) == (MemoryMode.SMALLEST, False)
    assert plan.training_bytes == 9 * LLAMA_70B.adapter_parameters, "with what the pass is repeated from"
    smaller = smaller_plan(plan, plan_for)
    assert smaller is not None
    assert (smaller.streamed_layers, smaller.is_smallest) == (80, True)
    assert smaller.training_bytes == 7 * LLAMA_70B.adapter_parameters
    assert smaller_plan(smaller, plan_for) is None


def test_layers_that_were_loaded_into_host_memory_stay_there() -> None:
    plan = plan_of(LLAMA_8B, 80, streamed_layers=20)
    assert (plan.streamed_layers, plan.mode) == (20, MemoryMode.SMALLEST)
    assert plan_of(LLAMA_8B, 80, streamed_layers=20, host_room=0).streamed_layers == 20
    assert plan_of(LLAMA_8B, 80, MemoryMode.SMALLEST, streamed_layers=20).streamed_layers == 32
