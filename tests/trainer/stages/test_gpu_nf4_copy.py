"""On a GPU, a base model comes from its copy in NF4 in a third of the time that its shards take, and is the same."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import Precision
from finetune_test_models.random_model import LLAMA_8B, Size, make_random_base
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.nf4_copy import Nf4Copies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # a GPU's image has other versions than the lock, which warn of other things
]
PART_OF_70B = Size(8192, 28672, 12, 64, 8, 19264)
"""12 of the 80 layers of Llama 70B, and as much of its vocabulary: a copy takes as small a part as there."""
COMPARED = 60
"""Tensors that are compared: of the first layers."""


@pytest.mark.parametrize("size", [LLAMA_8B, PART_OF_70B], ids=["8B", "70B"])
def test_a_second_load_takes_a_third_of_the_time(size: Size, tmp_path: Path) -> None:
    """Shards and copy are both in the file cache, which is the harder case for the copy."""
    base = make_random_base(tmp_path / "base", size, torch.device("cuda"))
    copies = Nf4Copies(tmp_path / "nf4", "a" * 64)
    source = {"source": f"file://{base}", "maxSequenceLength": 128, "quantization": "NF4"}
    spec = ModelSpec.model_validate(source)

    def seconds(copies: Nf4Copies | None) -> tuple[float, Any]:
        torch.cuda.empty_cache()
        begin = time.monotonic()
        model = load_model(base, spec, Precision.BF16, gpus=1, copies=copies).model
        torch.cuda.synchronize()
        return time.monotonic() - begin, model

    seconds(None)  # CUDA's and transformers' own start
    fresh, model = seconds(None)
    expected = {name: value.clone() for name, value in list(model.state_dict().items())[:COMPARED]}
    del model
    seconds(copies)
    second, model = seconds(copies)
    shards, copy = (sum(file.stat().st_size for file in folder.iterdir()) / 2**30 for folder in (base, copies.folder))
    print(f"{fresh:.2f} s from shards of {shards:.2f} GiB, {second:.2f} s from the copy of {copy:.2f} GiB")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    shutil.rmtree(tmp_path)
    assert 3 * second <= fresh
