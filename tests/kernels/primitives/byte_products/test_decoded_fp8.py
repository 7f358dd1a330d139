"""Frozen NF4 weights that are decoded to FP8 in each pass: what rounding costs, that nothing stays, and that 16 bits
come back unchanged. Beside weights that are kept in FP8: test_fp8.py."""

import itertools
from typing import Any

import pytest
import torch

from finetune_api.vocabulary import MemoryMode
from finetune_kernels.layers import decoded_fp8
from finetune_kernels.layers.decoded_fp8 import DecodedFp8
from finetune_kernels.layers.frozen_weight import FrozenWeight
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.loaded_weights import let_stream
from finetune_kernels.planning.memory_plan import MemoryPlan, plan_memory
from finetune_kernels.planning.micro_batch import MicroBatch
from finetune_kernels.streaming.host_layers import HostLayers
from finetune_test_kernels.quantized_layers import linears_of, quantized_model, stream
from finetune_test_kernels.tensor_checks import DEVICE, normal, root_error
from finetune_trainer.training.engine import Engine
from finetune_trainer.training.fp8_gate import Measured
from finetune_trainer.training.memory.loaded_shape import model_shape

COST = 0.045
"""Error of a product, as for weights that are kept (test_fp8.py)."""


def results(model: Any) -> dict[str, torch.Tensor]:
    logits = model(input_ids=torch.arange(3, 23, device=DEVICE).unsqueeze(0), use_cache=False).logits
    (logits * normal(*logits.shape, seed=5)).sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()  # the next backward pass adds to none of these
    return {"logits": logits.detach()} | gradients


def fused(model: Any, policy: ActivationPolicy, layers: int = 1) -> FusedLayers:
    return FusedLayers(model.get_base_model(), [policy] * layers, torch.float32, keep_dequantized=False)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("policy", [ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_ALL])
def test_layers_change_by_rounding_only_and_back_by_nothing(policy: ActivationPolicy) -> None:
    model = quantized_model(1).train()
    layers = fused(model, policy)
    exact = results(model)
    assert layers.use_fp8() == 1
    rounded = results(model)
    rows, columns = (
        64 + 32 + 32 + 64 + 128 + 128 + 64,
        3 * 64 + 128,
    )  # of q, k, v, o, gate, up, down; of the four groups
    assert layers.dequantized_bytes == 4 * (2 * rows + columns), "scales only"

    errors = sorted(root_error(rounded[name], value) for name, value in exact.items())
    assert errors[0] > 0.01
    assert errors[len(errors) // 2] < 0.15, "0.11 was measured with weights that are kept"
    assert errors[-1] < 0.35, "of products in a row, and softmax"
    layers.use_compute_dtype()
    assert layers.dequantized_bytes == 0
    assert same(results(model), exact)


def test_kept_layers_are_released_to_the_same_precision() -> None:
    model = quantized_model(2).train()
    layers = fused(model, ActivationPolicy.SAVE_ALL, 2)
    exact = results(model)
    layers.use_fp8()
    decoded = results(model)
    layers.use_compute_dtype()

    layers.keep_weights(1)
    assert layers.use_fp8() == 1
    kept = results(model)
    assert not same(kept, decoded), "the last layer's columns have scales of their own"
    layers.keep_weights(0)
    assert same(results(model), decoded)
    assert not same(decoded, exact)


def test_streamed_layers_compute_what_resident_ones_do() -> None:
    found = []
    for count in (0, 3):
        model = quantized_model(3).train()
        layers = fused(model, ActivationPolicy.SAVE_ALL, 3)
        stream(model, count)
        layers.use_fp8()
        found.append(results(model))
    assert same(*found)


def test_the_gate_and_smaller_plans_leave_decoded_weights_in_fp8() -> None:
    """The trainer's engine over real layers, down to the plan that streams all of them; then a look that refuses. What
    the looks measure is given."""
    model = quantized_model(3).train()
    shape = let_stream(model_shape(model), double_quantized=True)

    def plan_for(mode: MemoryMode, most: int = 8 << 30) -> MemoryPlan:
        return plan_memory(shape, 32, base_bytes=1 << 30, total_bytes=min(8 << 30, most), mode=mode)

    layers, streamed = fused(model, ActivationPolicy.SAVE_ALL, 3), HostLayers(model.get_base_model().model.layers)
    loss: Any = None  # the looks bring their own
    engine = Engine(False, loss, MicroBatch(1, 1), plan_for(MemoryMode.FASTEST), layers, plan_for, next_fp8_look=0)
    engine.streamed = streamed
    exact = results(model)

    measured = itertools.chain(itertools.repeat(Measured(1.0, torch.ones(2)), 3), [Measured(2.0, torch.ones(2))])
    engine.look_at_fp8(0, lambda: next(measured))
    assert engine.fp8_decision is not None
    assert engine.fp8_decision.is_fp8
    rounded = results(model)
    assert not same(rounded, exact)

    while engine.can_step_down:
        assert engine.step_down(1)
    assert len(streamed) == 3
    assert same(results(model), rounded)

    engine.look_at_fp8(20, lambda: next(measured))
    assert engine.fp8_decision.reason.startswith("FP8 until step 20")
    assert same(results(model), exact)


def test_products_inside_a_pass_share_one_decoding_of_each_order(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def counted(*arguments: Any, transposed: bool) -> torch.Tensor:
        calls.append(transposed)
        return decode(*arguments, transposed=transposed)

    decode = decoded_fp8.decode
    monkeypatch.setattr(decoded_fp8, "decode", counted)
    model = quantized_model(1)
    attention = model.get_base_model().model.layers[0].self_attn
    frozen = FrozenWeight(linears_of(attention)[:3], torch.float32, keep_dequantized=False)
    x, dy = normal(20, 64), normal(20, 128, seed=1)
    exact = frozen.forward(x, None), frozen.backward(dy)
    frozen.use_fp8()
    with frozen.dequantized():
        for _ in range(2):
            assert root_error(frozen.forward(x, None), exact[0]) < COST
            assert root_error(frozen.backward(dy), exact[1]) < COST
    assert calls == [False] * 3 + [True] * 3, "three layers side by side"

    frozen.forward(x, None)
    assert len(calls) == 9, "nothing was held outside"
    part = slice(0, 64)
    assert root_error(frozen.forward(x, None)[:, part], exact[0].flip(1)[:, part]) > 10 * COST, "the control"


def test_weights_that_do_not_suit_stay_in_16_bits() -> None:
    linear = torch.nn.Linear(64, 96, bias=False, device=DEVICE)
    assert DecodedFp8.of([linear], torch.float32) is None
    x, frozen = normal(5, 64), FrozenWeight([linear], torch.float32, keep_dequantized=False)
    frozen.use_fp8()
    assert not frozen.is_fp8
    assert torch.equal(frozen.forward(x, None), linear(x))
