"""The losses of a few steps in Triton's interpreter, in fp32, against those of plain transformers, peft and
bitsandbytes; a whole run in bfloat16 is in test_gpu_loss_curve.py."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.supervised_loss import fused_supervised_loss
from finetune_kernels.ops.linear_cross_entropy import LinearCrossEntropyFunction
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.micro_batch import MicroBatch
from finetune_trainer.training.engine import Engine
from speed.loss_curve import Size, Variant, differences, make_model, make_rows, train, write


def in_the_interpreter(model: Any, loaded: Any, config: Any) -> Engine:
    """The engine as on a GPU, in fp32: whole layers and the fused head."""
    causal = model.get_base_model()
    FusedLayers(
        causal, [ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_ALL], torch.float32, keep_dequantized=True
    )

    def head(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None) -> Any:
        return LinearCrossEntropyFunction.apply(hidden, weight, targets, softcap)

    def loss(*arguments: Any) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("finetune_kernels.layers.supervised_loss.linear_cross_entropy", head)
            return fused_supervised_loss(*arguments)

    return Engine(False, loss, MicroBatch(1, 1))


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
# Rows of whole blocks of 64: test_nf4.py says what bitsandbytes makes of others on a CPU.
SIZES: dict[str, Any] = {"hidden": 64, "feed_forward": 128, "layers": 2, "heads": 4, "vocabulary": 64, "length": 48}


def test_a_few_steps_in_the_interpreter(tmp_path: Path) -> None:
    size = Size(**SIZES, batch=1, accumulation=1, steps=8, gpus=0)
    model, rows = make_model(tmp_path / "model", size), make_rows(size)
    plain = train(model, rows, size, Variant(kernels=False))
    ours = train(model, rows, size, Variant(kernels=True, prepare=in_the_interpreter))
    assert len(ours.losses) == size.steps
    assert min(*plain.norms, *ours.norms) > 0

    assert max(differences(ours, plain)) < 5e-6  # fp32; 3e-7 was measured
    wrong = train(model, rows, size, Variant(kernels=False, scale=1.02))
    assert max(differences(wrong, plain)) > 5e-5
    write(tmp_path / "curve.csv", ours, plain)
    lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert lines[0].startswith("step,plain_loss,our_loss")
    assert len(lines) == size.steps + 1


def test_a_few_steps_with_magnitudes(tmp_path: Path) -> None:
    size = Size(**SIZES, batch=1, accumulation=1, steps=4, gpus=0)
    model, rows = make_model(tmp_path / "model", size), make_rows(size)
    options: dict[str, Any] = {"adapter": {"variant": "DoRA"}, "training": {"learningRate": 1e-2}}
    plain = train(model, rows, size, Variant(kernels=False, **options))
    ours = train(model, rows, size, Variant(kernels=True, prepare=in_the_interpreter, **options))
    assert max(differences(ours, plain)) < 5e-6  # fp32; 1.2e-6 was measured over six steps
    lora = train(model, rows, size, Variant(kernels=False, training=options["training"]))
    assert max(differences(lora, plain)) > 5e-5  # 1e-2: magnitudes have moved


def test_a_run_with_dropout_is_the_same_twice(tmp_path: Path) -> None:
    size = Size(**SIZES, batch=1, accumulation=1, steps=2, gpus=0)
    model, rows = make_model(tmp_path / "model", size), make_rows(size)
    first, second, without = (
        train(model, rows, size, Variant(kernels=True, adapter={"dropout": p}, prepare=in_the_interpreter))
        for p in (0.2, 0.2, 0.0)
    )
    assert first == second
    assert max(differences(without, first)) > 5e-5
