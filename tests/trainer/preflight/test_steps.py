"""The size of a run in steps and tokens, and that preflight counts it without PyTorch."""

import subprocess
import sys

from finetune_api.spec.inputs import DatasetSpec
from finetune_api.spec.training import TrainingSpec
from finetune_trainer.preflight.steps import TrainingSize, training_size


def test_the_size_of_a_run() -> None:
    packed = DatasetSpec.model_validate({"source": "file:///d"})
    alone = packed.model_copy(update={"packing": False})
    training = TrainingSpec.model_validate({"batchSize": 2, "gradientAccumulation": 2, "epochs": 3})
    size = training_size([50] * 10, 100, 60, packed, training, 100)
    assert size == TrainingSize(39, 100, 50, 3, tokens=3 * 100 * 50, longest_sequence=100)
    assert training_size([50] * 10, 100, 60, alone, training, 100) == TrainingSize(
        75, 100, 100, 3, tokens=15_000, longest_sequence=60
    )
    fixed = TrainingSpec.model_validate({"batchSize": 2, "gradientAccumulation": 2, "maxSteps": 7})
    assert training_size([50] * 10, 100, 60, alone, fixed, 100).tokens == 7 * 4 * 50


def test_the_estimate_needs_no_pytorch() -> None:
    code = """
import sys
from finetune_trainer.preflight.process_memory import block_torch_import
block_torch_import()
import finetune_trainer.cli.preflight, finetune_kernels.planning.model_shape
heavy = ("torch", "bitsandbytes", "triton")
sys.exit(", ".join(name for name in sys.modules if name.split(".")[0] in heavy and sys.modules[name]) or None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
