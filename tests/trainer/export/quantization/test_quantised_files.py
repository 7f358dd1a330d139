"""Whole files of every type beside those that `llama_model_quantize` makes of our F32 file: the same types, for the
simple ones the same bytes, and for K-quants no larger an error; and llama.cpp speaks from each."""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor

from finetune_api.vocabulary import GgufType
from finetune_test_models.tiny_model import make_tiny_model
from finetune_test_programs.generation import banned_tokens, complete
from finetune_test_programs.reference_quantizer import quantize_files
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.export.quantization.floats import FLOAT_DTYPES

TYPES = [kind.value for kind in GgufType if kind is not GgufType.MXFP4_MOE]  # which is for experts
SPOKEN = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_S", "Q6_K", "Q5_1", "IQ4_NL", "IQ4_XS")  # they hold every type
# Nine layers, so that _S, _M and _L differ in some; feed-forward rows of 352 fit no super-block.
MODELS = {
    "llama": {"num_hidden_layers": 9, "num_key_value_heads": 1},
    "qwen2": {"num_hidden_layers": 3, "intermediate_size": 352},
    "phi3": {"num_hidden_layers": 2},
}
PROMPTS = [[5, 9, 13, 40], [300, 7, 7, 21, 90]]


@dataclass(frozen=True)
class Exported:
    base: Path
    ours: dict[str, Path]
    theirs: dict[str, Path]


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    base = make_tiny_model(folder / "base", family=request.param, texts=texts, **MODELS[request.param])
    wanted = ExportRequest(base=base, adapter=None, output=folder, merged=None, gguf=tuple(TYPES), name="model")
    files = export(wanted, device=torch.device("cpu"), on_progress=lambda done, total: None)
    ours = {file.type: file.path for file in files}
    theirs = {kind: folder / f"theirs-{kind}.gguf" for kind in TYPES if kind != "F32"}
    quantize_files(ours["F32"], theirs)
    return Exported(base, ours, theirs)


def tensors_of(path: Path) -> dict[str, ReaderTensor]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def error(tensor: ReaderTensor, weights: np.ndarray) -> float:
    """Root mean square, each weight counting by its size: between the ways in which llama.cpp weights the types."""
    difference = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(weights.shape) - weights
    return float(np.sqrt((np.abs(weights) * difference**2).sum() / np.abs(weights).sum()))


def test_every_tensor_is_of_llama_cpps_type_and_as_close_to_the_weights(exported: Exported) -> None:
    weights = {
        name: tensor.data.reshape(tuple(tensor.shape)[::-1])
        for name, tensor in tensors_of(exported.ours["F32"]).items()
    }
    for kind, path in exported.theirs.items():
        ours, theirs = tensors_of(exported.ours[kind]), tensors_of(path)
        assert {name: tensor.tensor_type.name for name, tensor in ours.items()} == {
            name: tensor.tensor_type.name for name, tensor in theirs.items()
        }, kind
        for name, tensor in theirs.items():
            if tensor.tensor_type in FLOAT_DTYPES or not tensor.tensor_type.name.endswith("K"):
                assert np.array_equal(ours[name].data, tensor.data), (kind, name, tensor.tensor_type.name)
        assert quantised_error(ours, weights) <= quantised_error(theirs, weights), kind


def quantised_error(tensors: dict[str, ReaderTensor], weights: dict[str, np.ndarray]) -> float:
    """Mean error of all matrices of a file."""
    matrices = [name for name in weights if weights[name].ndim == 2]
    return float(np.mean([error(tensors[name], weights[name]) for name in matrices]))


def test_an_exchanged_scale_is_seen(exported: Exported) -> None:
    """The comparison above is not blind: the file one type smaller is further from the weights."""
    weights = {
        name: tensor.data.reshape(tuple(tensor.shape)[::-1])
        for name, tensor in tensors_of(exported.ours["F32"]).items()
    }
    errors = [
        quantised_error(tensors_of(exported.ours[kind]), weights)
        for kind in ("Q8_0", "Q6_K", "Q5_K_S", "Q4_K_S", "Q3_K_S", "Q2_K")
    ]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1] / 5


def test_llama_cpp_speaks_from_every_k_quant(exported: Exported) -> None:
    """Answers of random weights may turn at a near tie; Q6_K keeps the first token of at least one of F32's."""
    banned = banned_tokens(exported.base)
    expected = complete(exported.ours["F32"], PROMPTS, tokens=4, banned=banned)
    for kind in SPOKEN:
        found = complete(exported.ours[kind], PROMPTS, tokens=4, banned=banned)
        assert [len(answer) for answer in found] == [4] * len(PROMPTS), kind
        assert found[0] != found[1], kind
        if kind == "Q6_K":
            assert any(ours[0] == theirs[0] for ours, theirs in zip(found, expected, strict=True))


def test_types_are_told_to_loaders(exported: Exported) -> None:
    for kind, path in exported.theirs.items():
        ours = GGUFReader(exported.ours[kind]).fields["general.file_type"].contents()
        assert ours == GGUFReader(path).fields["general.file_type"].contents()
        assert GGMLQuantizationType.F32 in {tensor.tensor_type for tensor in GGUFReader(path).tensors}
