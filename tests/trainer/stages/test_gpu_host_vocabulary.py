"""On a GPU, a vocabulary that is to wait in host memory is never there whole, and the model works from there."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import Precision
from finetune_kernels.vocabulary.host_vocabulary import bring_back, move_to_host, waiting_bytes
from finetune_test_models.random_model import SMALL, make_random_base
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.streamed_loading import InHostMemory
from finetune_trainer.training.loaded_model import LoadedModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # a GPU's image has other versions than the lock, which warn of other things
]
GPU = torch.device("cuda", 0)
SIZE = replace(SMALL, vocabulary=200_000)
TABLE = SIZE.vocabulary * SIZE.hidden * 2
"""Bytes of embedding or head: 195 MiB; the layers take 6."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_base(tmp_path_factory.mktemp("model") / "base", SIZE, GPU)


def load(base: Path, placement: InHostMemory | None) -> tuple[LoadedModel, int]:
    """Returns the model, and the peak of GPU memory while it was loaded."""
    source = {"source": f"file://{base}", "maxSequenceLength": 128, "quantization": "NF4"}
    gc.collect()  # the model of the test before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = load_model(base, ModelSpec.model_validate(source), Precision.BF16, gpus=1, placement=placement)
    loaded.model.requires_grad_(False)
    return loaded, torch.cuda.max_memory_allocated() - before


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40, device=GPU).unsqueeze(0)).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("layers", [0, SIZE.layers])
def test_tables_are_pinned_and_the_gpu_holds_one_at_a_time(layers: int, base: Path) -> None:
    whole, peak = load(base, None)
    expected, left = logits(whole.model), waiting_bytes(whole.model, GPU)
    assert peak > 2 * TABLE
    assert left == 0
    del whole

    loaded, peak = load(base, InHostMemory(layers, vocabulary=True))
    assert peak < 1.1 * TABLE
    assert torch.cuda.memory_allocated() < 0.2 * TABLE, "the layers, and 15 MB of logits"
    assert waiting_bytes(loaded.model, GPU) == 2 * TABLE
    tables = [loaded.model.get_input_embeddings().weight, loaded.model.get_output_embeddings().weight]
    assert all(table.is_pinned() for table in tables)

    before = [table.data_ptr() for table in tables]
    move_to_host(loaded.model)
    assert [loaded.model.get_input_embeddings().weight.data_ptr()] == before[:1], "no second copy is made"
    assert waiting_bytes(loaded.model, GPU) == 0
    torch.cuda.reset_peak_memory_stats()
    found = logits(loaded.model)
    assert torch.cuda.max_memory_allocated() < 0.6 * TABLE, "blocks of the head, and logits twice"
    assert torch.allclose(found, expected, rtol=2e-2, atol=2e-2)  # bf16 products of another width


def test_a_plan_that_has_them_on_the_gpu_gets_them_back(base: Path) -> None:
    whole, _ = load(base, None)
    expected = logits(whole.model)
    del whole
    loaded, _ = load(base, InHostMemory(0, vocabulary=True))
    bring_back(loaded.model, GPU)
    assert torch.cuda.memory_allocated() > 2 * TABLE
    assert torch.equal(logits(loaded.model), expected)
