"""FP8 on a GPU: the quantising kernel equals its formula, products take about half the time, training ends where
bfloat16 ends, and a gradient that is wrong is noticed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_kernels.layers.frozen_weight import FrozenWeight
from finetune_kernels.primitives.byte_products.byte_rows import quantize_rows, reference
from finetune_kernels.primitives.byte_products.fp8 import MIN_CAPABILITY, Fp8Weight
from finetune_test_kernels.quantized_layers import linears_of, quantized_model
from finetune_test_kernels.tensor_checks import root_error
from finetune_trainer.training import fp8_gate
from finetune_trainer.training.engine import Engine, prepare_engine
from speed.loss_curve import Size, Variant, differences, make_model, make_rows, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < MIN_CAPABILITY,
        reason="needs a GPU with FP8",
    ),
    pytest.mark.filterwarnings("default"),  # a GPU's image has other versions than the lock, which warn of other things
]


@pytest.mark.parametrize("columns", [64, 1000, 4096, 28_672])
def test_the_kernel_is_its_formula(columns: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, columns, device="cuda") * torch.logspace(-20, 20, 300, device="cuda")[:, None]
    x[7] = 0
    for rows in (x, x.bfloat16(), x.bfloat16()[:, : columns // 2]):
        values, scales = quantize_rows(rows)
        expected, same = reference(rows)
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scales, same)


def test_products_cost_what_rounding_costs_and_half_the_time() -> None:
    torch.manual_seed(0)
    w = torch.randn(28_672, 4096, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    weight = Fp8Weight(w)
    assert root_error(weight.forward(x, None), x.float() @ w.float().T) < 0.045  # 0.0375 was measured
    dy = torch.randn(4096, 28_672, device="cuda", dtype=torch.bfloat16)
    assert root_error(weight.backward(dy), dy.float() @ w.float()) < 0.045
    assert _milliseconds(lambda: weight.forward(x, None)) < 0.7 * _milliseconds(lambda: x @ w.T)  # 0.56 was measured


@pytest.mark.parametrize("rows", [1, 7, 437, 2049])
def test_products_take_any_number_of_rows(rows: int) -> None:
    """Rows that are not packed to one length, as evaluations have them."""
    torch.manual_seed(0)
    w = torch.randn(640, 2048, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(rows, 640, device="cuda", dtype=torch.bfloat16)
    weight = Fp8Weight(w)
    assert root_error(weight.forward(x, None), x.float() @ w.float().T) < 0.045
    assert root_error(weight.backward(dy), dy.float() @ w.float()) < 0.045


def _milliseconds(call: Any) -> float:
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 10


def test_weights_that_are_decoded_in_each_pass_cost_what_rounding_costs() -> None:
    linears = linears_of(quantized_model(1, torch.bfloat16, hidden=1024).get_base_model().model.layers[0].mlp)[:2]
    exact, rounded = (FrozenWeight(linears, torch.bfloat16, keep_dequantized=False) for _ in range(2))
    rounded.use_fp8()
    assert rounded.is_fp8
    x, dy = (torch.randn(300, width, device="cuda", dtype=torch.bfloat16) for width in (1024, 4096))
    assert 0.03 < root_error(rounded.forward(x, None), exact.forward(x, None)) < 0.045
    assert 0.03 < root_error(rounded.backward(dy), exact.backward(dy)) < 0.045
    assert root_error(rounded.backward(dy.flip(1)), exact.backward(dy)) > 1, "the control"


@pytest.mark.parametrize("memory", ["Fastest", "Balanced", "Smallest"])
def test_training_ends_where_bfloat16_ends(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fastest keeps the weights in FP8, the others decode them in each pass, and Smallest streams them, too. Whatever
    the gate says: after 20 steps of this model, which learns fast, the gradients' cosine is 0.9885."""
    monkeypatch.setattr(fp8_gate, "LIMITS", fp8_gate.Limits(loss=math.inf, cosine=-1, norm=math.inf))
    size = Size(steps=100)
    model, rows = make_model(tmp_path / "model", size), make_rows(size)
    engines: list[Engine] = []

    def prepare(*arguments: Any) -> Engine:
        engines.append(prepare_engine(*arguments))
        return engines[-1]

    exact = train(
        model, rows, size, Variant(kernels=True, training={"precision": "BF16", "memory": memory}, prepare=prepare)
    )
    rounded = train(
        model, rows, size, Variant(kernels=True, training={"precision": "FP8", "memory": memory}, prepare=prepare)
    )
    found = differences(rounded, exact)
    print(f"mean {sum(found) / len(found):.2e}, largest {max(found):.2e}; {engines[1].fp8_decision}")
    assert engines[0].fp8_decision is None
    assert engines[1].fp8_decision is not None
    assert engines[1].fp8_decision.precision == "FP8"
    assert min(found) > 0, "not the same products"
    assert sum(found) / len(found) < 5e-3  # 2.2e-3 was measured over 200 steps, 6.8e-3 at most
    assert max(found) < 2e-2
    assert exact.losses[-1] < 0.9 * exact.losses[0]


@pytest.mark.parametrize("from_step", [None, 0, fp8_gate.EARLY_LOOK])
def test_a_wrong_gradient_ends_fp8_at_the_next_look(
    from_step: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dx of every frozen product is 5 % too long from a step on, and the loss of a batch knows nothing of it."""
    size = Size(steps=fp8_gate.EARLY_LOOK + 2)
    right, factors, engines = Fp8Weight.backward, [1.0], list[Engine]()
    monkeypatch.setattr(Fp8Weight, "backward", lambda weight, dy: right(weight, dy) * factors[0])

    def prepare(*arguments: Any) -> Engine:
        engine = prepare_engine(*arguments)
        look = engine.look_at_fp8

        def planted(step: int, measure: Any) -> None:
            factors[0] = 1.05 if from_step is not None and step >= from_step else 1.0
            look(step, measure)
            assert engine.fp8_decision is not None
            print(f"step {step}: {engine.fp8_decision.reason}")

        monkeypatch.setattr(engine, "look_at_fp8", planted)
        engines.append(engine)
        return engine

    variant = Variant(kernels=True, training={"precision": "FP8"}, prepare=prepare)
    train(make_model(tmp_path / "model", size), make_rows(size), size, variant)
    decision = engines[0].fp8_decision
    assert decision is not None
    assert decision.is_fp8 is (from_step is None)
    assert decision.reason.startswith(f"FP8 until step {from_step}: ") is bool(from_step)
    assert (engines[0].next_fp8_look is None) is (from_step is not None)
