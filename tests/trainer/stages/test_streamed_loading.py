"""A base whose layers go to host memory while it is loaded: never whole on its device, and to the bit the same."""

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import modeling_utils

from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import Precision
from finetune_kernels.primitives import nf4, pinned_memory
from finetune_kernels.streaming.host_tensors import HostTensors
from finetune_kernels.streaming.sharded_tensors import ShardedTensors
from finetune_kernels.vocabulary.host_vocabulary import bring_back, waiting_bytes
from finetune_test_models.tiny_model import make_tiny_model
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.tensor_io.checked_tensors import CheckedTensor
from finetune_trainer.stages import model_loading, streamed_loading
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.nf4_copy import Nf4Copies
from finetune_trainer.stages.streamed_loading import READS_ALONG, InHostMemory, Placement, Share, TakenLayers
from finetune_trainer.training.loaded_model import LoadedModel

LAYERS = 5
TOKENS = torch.arange(3, 40).unsqueeze(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"), texts=texts, num_hidden_layers=LAYERS)


def load(base: Path, streams: int | InHostMemory, copies: Nf4Copies | None = None, **fields: Any) -> LoadedModel:
    spec = ModelSpec.model_validate({"source": f"file://{base}", "maxSequenceLength": 128} | fields)
    placement = (InHostMemory(streams) if streams else None) if isinstance(streams, int) else streams
    return load_model(base, spec, Precision.FP32, gpus=0, placement=placement, copies=copies)


def linears(loaded: LoadedModel) -> list[Any]:
    return [module for module in loaded.model.modules() if isinstance(module, Linear4bit)]


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(TOKENS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("layers", [3, LAYERS])
def test_a_streamed_base_is_the_same_and_is_never_whole_on_its_device(
    layers: int, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = load(base, 0)
    expected, whole = logits(resident), resident.base_bytes
    found: list[tuple[str | None, bool]] = []
    take_over, warm_up = HostTensors.__init__, modeling_utils.caching_allocator_warmup

    def counting(self: HostTensors, tensors: Sequence[torch.Tensor]) -> None:
        found.append((os.environ.get(READS_ALONG), modeling_utils.caching_allocator_warmup is not warm_up))
        take_over(self, tensors)
        assert not any(tensor.untyped_storage().nbytes() for tensor in tensors)

    monkeypatch.setattr(HostTensors, "__init__", counting)
    streamed = load(base, layers)
    assert len(streamed.streamed) == len(found) == layers
    assert {*found} == {("1", True)}, "nothing is read ahead, and no memory reserved"
    assert modeling_utils.caching_allocator_warmup is warm_up
    assert READS_ALONG not in os.environ

    # Each of the 21 tensors of a layer begins at a multiple of 256 bytes.
    assert whole <= streamed.base_bytes < whole + 256 * 21 * layers
    on_device = sum(linear.weight.untyped_storage().nbytes() > 0 for linear in linears(streamed))
    assert on_device == 7 * (LAYERS - layers)
    assert torch.equal(logits(streamed), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layers", [0, 3])
def test_embedding_and_head_go_to_host_memory_before_the_layers_come(
    layers: int, tied: bool, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_model(tmp_path / "base", texts=texts, num_hidden_layers=LAYERS, tie_word_embeddings=tied)
    expected = logits(load(base, 0))
    taken: list[torch.Tensor] = []
    order: list[str] = []
    put, note = streamed_loading.in_host_memory, TakenLayers._take_from_layer

    def putting(weight: torch.Tensor) -> torch.Tensor:
        order.append("table")
        taken.append(put(weight))
        return taken[-1]

    def noting(self: TakenLayers, module: Any, name: str, parameter: Any) -> None:
        if type(module) is Linear4bit and parameter is not None and not parameter.is_meta:
            order.append("layer")
        note(self, module, name, parameter)

    monkeypatch.setattr(streamed_loading, "in_host_memory", putting)
    monkeypatch.setattr(TakenLayers, "_take_from_layer", noting)
    loaded = load(base, InHostMemory(layers, vocabulary=True))
    model, tables = loaded.model, 1 if tied else 2
    assert order[:tables] == ["table"] * tables
    assert set(order[tables:]) == {"layer"}
    assert len(loaded.streamed) == layers

    # What the modules have is what was put there, which their first weights are not.
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert {weight.data_ptr() for weight in weights} == {weight.data_ptr() for weight in taken}
    assert (weights[0] is weights[1]) == tied == model.config.tie_word_embeddings
    assert torch.equal(logits(loaded), expected)

    model.requires_grad_(False)  # as an adapter does
    gpu, bytes_of_tables = torch.device("cuda"), sum(weight.nbytes for weight in taken)
    assert (waiting_bytes(model, gpu), waiting_bytes(model, torch.device("cpu"))) == (bytes_of_tables, 0)
    bring_back(model, torch.device("meta"))
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert all(weight.is_meta and isinstance(weight, nn.Parameter) for weight in weights)
    assert (weights[0] is weights[1]) == tied


def test_a_vocabulary_stays_on_the_device_unless_the_plan_moves_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_loading, "in_host_memory", lambda weight: pytest.fail("a table is moved"))
    load(base, LAYERS)


def test_a_streamed_base_makes_the_copy_in_nf4_and_comes_from_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned_memory, "PIECE", 1 << 14)  # smaller than a weight, which then lies in several
    copies, others = (Nf4Copies(tmp_path / name, "digest") for name in ("streamed", "resident"))
    load(base, LAYERS, copies)
    resident = load(base, 0, others)
    (made,), (expected,) = copies.folder.iterdir(), others.folder.iterdir()
    assert made.read_bytes() == expected.read_bytes()

    monkeypatch.setattr(model_loading._Weights, "_load_files", lambda self: pytest.fail("the shards are read"))
    streamed = load(base, LAYERS, copies)
    assert len(streamed.streamed) == LAYERS
    for index, (one, other) in enumerate(zip(linears(streamed), linears(resident), strict=True)):
        streamed.streamed._window.use(index // 7, trains=False)
        decoded = [nf4.reference(each.weight.data, each.weight.quant_state) for each in (one, other)]
        assert torch.equal(*decoded)


@pytest.mark.parametrize("placement", [InHostMemory(LAYERS), Share(1, 2)], ids=lambda value: type(value).__name__)
def test_no_layer_of_a_copy_is_read_before_the_one_before_is_taken_away(
    placement: Placement, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that read ahead would bring much of a base to each GPU before its first layer has left."""
    copies = Nf4Copies(tmp_path / "copies", "digest")
    load(base, 0, copies)
    read: list[int] = []
    latest: list[int] = []
    values = CheckedTensor.__getitem__

    def reading(self: CheckedTensor, which: object) -> torch.Tensor:
        read.extend(map(int, re.findall(r"layers\.(\d+)\.", self.stored.name)))
        return values(self, which)

    monkeypatch.setattr(CheckedTensor, "__getitem__", reading)
    for kind in (HostTensors, ShardedTensors):
        take_over: Any = kind.__init__

        def slowly(self: Any, *arguments: Any, take_over: Any = take_over) -> None:
            time.sleep(0.1)  # in which threads would read all that is left of this base
            latest.append(max(read))
            take_over(self, *arguments)

        monkeypatch.setattr(kind, "__init__", slowly)
    spec = ModelSpec.model_validate({"source": f"file://{base}", "maxSequenceLength": 128})
    load_model(base, spec, Precision.FP32, gpus=0, placement=placement, copies=copies)
    assert latest == list(range(LAYERS))


def test_layers_without_weights_in_nf4_are_refused(base: Path) -> None:
    with pytest.raises(TrainerError, match="needs linear layers in NF4, and layer 0 of LlamaForCausalLM has none"):
        load(base, LAYERS, quantization="None")


def test_more_layers_than_the_model_has_are_refused(base: Path) -> None:
    with pytest.raises(ValueError, match="6 layers are to stream, and 5 are known"):
        load(base, 0).streamed.stream(6)
