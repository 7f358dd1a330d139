"""MXFP4 for experts: a base published in it keeps its blocks bit by bit where nothing was trained, as llama.cpp's
converter does; what an adapter changed is encoded anew; and llama.cpp computes with the file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from finetune_test_models.published.packed_models import write_mxfp4
from finetune_test_programs.generation import banned_tokens, complete, log_probabilities
from finetune_test_programs.llama_cpp_converter import Conversion, convert
from finetune_test_programs.reference_quantizer import quantize_rows
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.export import ExportRequest, plan_outputs, stream
from finetune_trainer.export.gguf import files
from finetune_trainer.export.quantization.dequantize import dequantize
from finetune_trainer.export.tensor_io.file_writer import FileWriters

TRAINED = "model.layers.0.mlp.experts.gate_up_proj"
MXFP4, Q8_0 = GGMLQuantizationType.MXFP4, GGMLQuantizationType.Q8_0
EXPERTS = {f"blk.{layer}.ffn_{part}_exps.weight" for layer in range(2) for part in ("gate", "up", "down")}
PROMPTS = [[3 + (7 * number + 13 * place) % 400 for place in range(20)] for number in range(6)]
Tensors = dict[str, tuple[GGMLQuantizationType, np.ndarray]]
ExportGguf = Callable[..., dict[str, Path]]


class ExpertsOfOneLayer:
    """An adapter that has changed the gates of layer 0."""

    def merge(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        return weights.float() * 1.3 if name == TRAINED else weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return write_mxfp4(tmp_path_factory.mktemp("mxfp4") / "base", texts)


@pytest.fixture(scope="module")
def ours(base: Path, export_gguf: ExportGguf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return export_gguf(base, tmp_path_factory.mktemp("ours"), "MXFP4_MOE", "F32")


def tensors_of(path: Path) -> Tensors:
    return {tensor.name: (tensor.tensor_type, tensor.data) for tensor in GGUFReader(path).tensors}


def differing(ours: Tensors, theirs: Tensors) -> set[str]:
    assert ours.keys() == theirs.keys()
    return {name for name in EXPERTS if not np.array_equal(ours[name][1], theirs[name][1])}


def test_experts_keep_the_blocks_that_the_converter_writes(base: Path, ours: dict[str, Path], tmp_path: Path) -> None:
    convert([Conversion(str(base), str(tmp_path / "theirs.gguf"), "f16", "tiny", "gpt-2")])
    theirs, found = tensors_of(tmp_path / "theirs.gguf"), tensors_of(ours["MXFP4_MOE"])
    assert {name for name, (kind, _) in found.items() if kind is MXFP4} == EXPERTS
    assert {name for name, (kind, _) in theirs.items() if kind is MXFP4} == EXPERTS
    assert differing(found, theirs) == set()
    assert found["blk.0.attn_q.weight"][0] is found["output.weight"][0] is Q8_0


def test_encoding_decoded_blocks_again_would_change_their_bits(
    base: Path, ours: dict[str, Path], export_gguf: ExportGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "find_mxfp4", lambda tensors: {})
    again = tensors_of(export_gguf(base, tmp_path, "MXFP4_MOE")["MXFP4_MOE"])
    kept = tensors_of(ours["MXFP4_MOE"])
    assert differing(again, kept) == EXPERTS
    for name in EXPERTS:  # the same values, though
        values = [dequantize(torch.tensor(each[name][1]).flatten(), MXFP4, torch.float32) for each in (again, kept)]
        assert torch.equal(*values)


def test_trained_experts_are_encoded_as_llama_cpp_does_and_all_others_kept(
    base: Path, ours: dict[str, Path], tmp_path: Path
) -> None:
    request = ExportRequest(base, None, tmp_path, merged=None, gguf=("MXFP4_MOE",), name="tiny")
    opened = open_base_model(base)
    with FileWriters(torch.device("cpu")) as writers:
        stream(
            opened,
            ExpertsOfOneLayer(),
            plan_outputs(request, opened, tmp_path),
            writers,
            on_progress=lambda done, total: None,
            on_tensor=lambda name: None,
        )
    found = tensors_of(tmp_path / "gguf" / "tiny-MXFP4_MOE.gguf")
    trained = {"blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"}
    assert differing(found, tensors_of(ours["MXFP4_MOE"])) == trained

    plain = tensors_of(ours["F32"])
    for name in trained:
        rows = plain[name][1].astype(np.float32) * np.float32(1.3)
        expected = quantize_rows(rows.reshape(-1, rows.shape[-1]), MXFP4)
        assert np.array_equal(found[name][1].reshape(expected.shape), expected)


def test_llama_cpp_answers_from_the_file_as_from_the_decoded_one(
    base: Path, ours: dict[str, Path], monkeypatch: pytest.MonkeyPatch, export_gguf: ExportGguf, tmp_path: Path
) -> None:
    banned = banned_tokens(base)

    def said(path: Path) -> torch.Tensor:
        return torch.tensor(log_probabilities(path, PROMPTS, size=512, banned=banned, context=512))

    exact, small = said(ours["F32"]), said(ours["MXFP4_MOE"])
    assert len({tuple(answer) for answer in complete(ours["MXFP4_MOE"], PROMPTS, tokens=4, banned=banned)}) > 1
    read = files.read_blocks
    monkeypatch.setattr(files, "read_blocks", lambda tensor: read(tensor).flip(0))  # experts in the wrong order
    wrong = said(export_gguf(base, tmp_path, "MXFP4_MOE")["MXFP4_MOE"])
    assert (small - exact).abs().mean() < 0.2 * (wrong - exact).abs().mean()
