"""Where a base lies is settled by the card and the host's memory, before it is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from finetune_api.vocabulary import MemoryMode, Parallelism, Precision
from finetune_test_models.minimal_run import minimal_run
from finetune_test_models.tiny_architectures import make_mixture
from finetune_trainer.model.description import load_configuration
from finetune_trainer.stages import placement
from finetune_trainer.stages.placement import placement_of
from finetune_trainer.stages.streamed_loading import InHostMemory, Placement, Share

GIB = 2**30


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a 70B model; no weights are read."""
    folder = tmp_path_factory.mktemp("base")
    kind: Any = LlamaConfig
    kind(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672,
        vocab_size=128256, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def settle(base: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Settles a job's placement on a machine of a card and a host of so many GiB."""
    monkeypatch.setattr(placement, "choose_device", lambda gpus: torch.device("cuda" if gpus else "cpu"))
    monkeypatch.setattr(
        placement, "resolve_precision", lambda asked, _: asked if asked is not Precision.AUTO else Precision.BF16
    )

    def on(card: int, host: int = 64, *, gpus: int = 1, **sections: Any) -> Placement | None:
        monkeypatch.setattr(placement, "available_bytes", lambda device: card * GIB)
        monkeypatch.setattr(placement, "free_memory", lambda: host * GIB)
        shape: dict[str, Any] = {"training": {"batchSize": 1}, "model": {"maxSequenceLength": 2048}}
        fields = {name: shape.get(name, {}) | sections.get(name, {}) for name in shape | sections}
        config = minimal_run(None, **fields).model_copy(update={"gpus": gpus})
        return placement_of(config, base, 1, 2)

    return on


def test_a_base_that_does_not_fit_streams_as_far_as_it_must(settle: Any) -> None:
    layers = [settle(card).layers for card in (12, 24, 32)]
    print("layers in host memory:", layers)
    assert layers == sorted(layers, reverse=True)
    assert layers[1] > 30
    assert settle(80) is None
    assert settle(80, training={"memory": "Smallest"}) == InHostMemory(80, vocabulary=True)
    assert settle(80, host=6, training={"memory": "Smallest"}) is None, "layers' inputs save more"


@pytest.mark.parametrize(
    "options",
    [{"gpus": 0}, {"training": {"precision": "FP32"}}, {"adapter": {"variant": "DoRA", "dropout": 0.1}}],
    ids=str,
)
def test_without_a_plan_by_layers_a_base_stays_whole(settle: Any, options: dict[str, Any]) -> None:
    assert settle(24, **options) is None


def test_layers_with_magnitudes_do_not_stream(settle: Any) -> None:
    assert settle(24, adapter={"variant": "DoRA"}) == InHostMemory(0, vocabulary=True)


def test_a_vocabulary_that_is_to_wait_in_host_memory_is_loaded_there(settle: Any) -> None:
    """In Balanced and Fastest as well, where the card has no room for it."""
    placed = {card: settle(card) for card in range(30, 60, 2)}
    print(placed)
    assert InHostMemory(0, vocabulary=True) in placed.values(), "it fits without the vocabulary"
    assert settle(80) is None


def test_a_mixture_that_does_not_fit_streams_with_its_experts(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plan is the one that preflight made, from the names and shapes in the model's files."""
    folder = make_mixture(tmp_path, "qwen3_moe", texts)
    monkeypatch.setattr(placement, "choose_device", lambda gpus: torch.device("cuda"))
    monkeypatch.setattr(placement, "resolve_precision", lambda *_: Precision.BF16)
    monkeypatch.setattr(placement, "free_memory", lambda: 64 * GIB)
    config = minimal_run(None, training={"batchSize": 1}, model={"maxSequenceLength": 64})

    def settled(card: int, **training: Any) -> Placement | None:
        monkeypatch.setattr(placement, "available_bytes", lambda device: card)
        job = config.model_copy(update={"training": config.training.model_copy(update=training), "gpus": 1})
        return placement_of(job, folder, 0, 1)

    whole = load_configuration(folder).num_hidden_layers
    assert settled(80 * GIB) is None
    only_tables = InHostMemory(0, vocabulary=True)
    assert settled(80 * GIB, memory=MemoryMode.SMALLEST) == only_tables, "two layers are on the GPU in any case"
    assert whole == 2

    def deeper(folder: Path) -> Any:
        config = load_configuration(folder)
        config.num_hidden_layers = 4
        return config

    monkeypatch.setattr(placement, "read_language_model_config", deeper)
    assert settled(80 * GIB, memory=MemoryMode.SMALLEST) == InHostMemory(4, vocabulary=True)


def test_a_base_that_is_shared_out_does_not_stream(settle: Any) -> None:
    assert settle(24, training={"parallelism": Parallelism.SHARDED}) == Share(1, 2)
