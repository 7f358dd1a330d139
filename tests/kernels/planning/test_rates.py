"""What a plan keeps follows the machine's speeds: their ratios, and nothing else."""

from dataclasses import astuple, replace

from finetune_api.vocabulary import MemoryMode
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.memory_plan import MemoryPlan, plan_memory
from finetune_kernels.planning.micro_batch import MicroBatch, step_seconds
from finetune_kernels.planning.model_shape import ModelShape
from finetune_kernels.planning.rates import H200, H200_FP8, Machine, Rates

GIB = 2**30
LLAMA_8B = ModelShape(
    32, 4096, 32, 8, 128, 14336, 128256, 6_979_321_856, 41_943_040, quantized=True, movable_bytes=2 * 128256 * 4096 * 2
)


def plan(rates: Rates, gib: int = 16, tokens: int = 4096) -> MemoryPlan:
    base, mode = int(5.47 * GIB), MemoryMode.FASTEST
    return plan_memory(
        LLAMA_8B, tokens, base_bytes=base, total_bytes=gib * GIB, mode=mode, machine=Machine(rates=rates)
    )


def saved(found: MemoryPlan) -> int:
    return found.policies.count(ActivationPolicy.SAVE_ALL)


def test_a_machine_that_is_slower_in_everything_has_the_same_plan() -> None:
    usual, slow = plan(H200), plan(Rates(*(rate / 8 for rate in astuple(H200))))
    assert (slow.policies, slow.kept_layers, slow.pinned_bytes) == (
        usual.policies,
        usual.kept_layers,
        usual.pinned_bytes,
    )
    assert abs(slow.extra_milliseconds / usual.extra_milliseconds - 8) < 1e-9
    one = MicroBatch(1, 1)
    long = step_seconds(LLAMA_8B, one, 4096, slow)
    assert long > 7 * step_seconds(LLAMA_8B, one, 4096, usual), "the step takes the machine's time as well"


def test_weights_are_kept_where_decoding_is_slow_and_activations_where_products_are() -> None:
    usual = plan(H200)
    slow_decoding, slow_products = (
        plan(replace(H200, decoding=H200.decoding / 30)), plan(replace(H200, products=H200.products / 30)),
    )  # fmt: skip
    assert usual.kept_layers == slow_products.kept_layers == 0
    assert slow_decoding.kept_layers > 5
    assert saved(slow_decoding) < saved(usual) < saved(slow_products)


def test_in_fp8_recomputing_costs_less_and_no_byte_more() -> None:
    """With 32,768 tokens on 16 GiB layers are recomputed; on 80 GiB everything is saved."""
    wide, narrow = (plan(rates, tokens=32_768) for rates in (H200, H200_FP8))
    assert narrow.extra_milliseconds < 0.75 * wide.extra_milliseconds
    assert plan(H200_FP8, gib=80).peak_bytes == plan(H200, gib=80).peak_bytes


def test_over_a_slow_bus_goes_only_what_has_no_room() -> None:
    fast, slow = (plan(replace(H200, copying=rate), gib=8) for rate in (H200.copying, H200.copying / 20))
    assert fast.fits
    assert slow.fits
    assert fast.host_bytes > slow.host_bytes == 0
    assert 0 < slow.pinned_bytes < fast.pinned_bytes / 4, "some layers' inputs"
