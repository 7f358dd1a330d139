"""On a GPU, a base model comes from its copy in NF4 in a third of the time that its shards take, and is the same."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import Precision
from finetune_test_models.random_model import LLAMA_8B, make_random_base
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.nf4_copy import Nf4Copies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # a GPU's image has other versions than the lock, which warn of other things
]
COMPARED = 60
"""Tensors that are compared: of the first layers."""


def test_a_second_load_takes_a_third_of_the_time(tmp_path: Path) -> None:
    """Llama 8B's shape, random: 16 GB of shards. Both are in the file cache, which is the harder case for the copy."""
    base = make_random_base(tmp_path / "base", LLAMA_8B, torch.device("cuda"))
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
    size = next(copies.folder.iterdir()).stat().st_size / 2**30
    print(f"8B: {fresh:.1f} s from the shards, {second:.1f} s from the copy of {size:.2f} GiB")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert 3 * second <= fresh
