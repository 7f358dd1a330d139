"""The losses of a whole run by our engine against those of plain transformers, peft and bitsandbytes: same weights,
adapter, batches and seed, within 1e-3 at every step. An adapter's factor that is wrong by 2 % must be noticed.

For the curves as a file: `python kernels/benchmarks/loss_curve.py --csv curve.csv`.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from finetune_kernels.decoder_layer import Keep
from finetune_kernels.fused_layers import FusedLayers
from finetune_kernels.linear_cross_entropy import LinearCrossEntropyFunction
from finetune_kernels.micro_batch import MicroBatch
from finetune_kernels.supervised_loss import supervised_loss
from finetune_trainer.engine import Engine

SCRIPT = Path(__file__).parents[2] / "kernels/benchmarks/loss_curve.py"
BOUND = 1e-3
"""Two ways of rounding in bfloat16 differ by 3e-4 over 150 steps of 512 tokens (2 cores, 2 layers of 256), a factor
wrong by 2 % by 4e-3."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("loss_curve", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["loss_curve"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("default")  # a GPU's image has other versions than the lock, which warn of other things
def test_two_hundred_steps_on_a_gpu(script: ModuleType, tmp_path: Path) -> None:
    size = script.Size()
    model, rows = script.make_model(tmp_path / "model", size), script.make_rows(size)
    plain = script.train(model, rows, size, kernels=False)
    ours = script.train(model, rows, size, kernels=True)
    script.write(tmp_path / "curve.csv", ours, plain)
    worst = max(script.differences(ours, plain))
    print((tmp_path / "curve.csv").read_text())
    print(f"loss {plain.losses[0]:.4f} -> {plain.losses[-1]:.4f}, largest difference {worst:.2e}")
    assert len(plain.losses) == len(ours.losses) == size.steps
    assert min(*plain.norms, *ours.norms) > 0
    assert plain.losses[-1] < 0.9 * plain.losses[0], "nothing was learned, so nothing was compared"
    assert worst < BOUND
    short = script.Size(steps=60)
    wrong = script.train(model, rows, short, kernels=True, scale=1.02)
    right = script.train(model, rows, short, kernels=False)
    assert max(script.differences(wrong, right)) > BOUND


def in_the_interpreter(model: Any, loaded: Any, config: Any) -> Engine:
    """The engine as on a GPU, in fp32: whole layers and the fused head."""
    causal = model.get_base_model()
    FusedLayers(causal, [Keep.EVERYTHING, Keep.INPUT], torch.float32, resident=True)

    def head(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None) -> Any:
        return LinearCrossEntropyFunction.apply(hidden, weight, targets, softcap)

    def loss(*arguments: Any) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("finetune_kernels.supervised_loss.linear_cross_entropy", head)
            return supervised_loss(*arguments)

    return Engine(False, loss, MicroBatch(1, 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
def test_a_few_steps_in_the_interpreter(script: ModuleType, tmp_path: Path) -> None:
    # Rows of whole blocks of 64: test_nf4.py says what bitsandbytes makes of others on a CPU.
    sizes = {"hidden": 64, "feed_forward": 128, "layers": 2, "heads": 4, "vocabulary": 64, "length": 48}
    size = script.Size(**sizes, batch=1, accumulation=1, steps=12, gpus=0)
    model, rows = script.make_model(tmp_path / "model", size), script.make_rows(size)
    plain = script.train(model, rows, size, kernels=False)
    ours = script.train(model, rows, size, kernels=True, prepare=in_the_interpreter)
    assert len(ours.losses) == size.steps
    assert min(*plain.norms, *ours.norms) > 0
    assert max(script.differences(ours, plain)) < 5e-6  # fp32; 3e-7 was measured
    wrong = script.train(model, rows, size, kernels=False, scale=1.02)
    assert max(script.differences(wrong, plain)) > 5e-5
    script.write(tmp_path / "curve.csv", ours, plain)
    lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert lines[0].startswith("step,plain_loss,our_loss")
    assert len(lines) == size.steps + 1
