"""Weights in FP8 and MXFP4 are decoded as their formats say: by formulas in fp32, and by transformers' decoders."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from finetune_test_models.published.packed_models import WEIGHTS, Tensors, write_fp8, write_mxfp4
from finetune_trainer.export.base_model.causal_model import load_causal_model
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.base_model.packed_tensors import decode_fp8, decode_mxfp4
from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.export import ExportRequest, export

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 43).unsqueeze(0)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def ours(folder: Path) -> Any:
    model, missing = load_causal_model(open_base_model(folder), CPU, torch.float32)
    assert not missing
    return model


def merge(folder: Path, output: Path) -> Path:
    request = ExportRequest(folder, None, output, merged="BF16", gguf=(), name="t")
    export(request, device=CPU, on_progress=lambda done, total: None)
    return output / "merged"


@pytest.mark.parametrize("block", [128, 96, None])
def test_fp8_weights_are_codes_times_scales(block: int | None, tiny_base: Path, tmp_path: Path) -> None:
    """96 does not divide the sizes: the last blocks are cut off."""
    expected = write_fp8(tiny_base, tmp_path / "fp8", block=block)
    base = open_base_model(tmp_path / "fp8")
    assert base.packed_formats == ["FP8"]
    found = {tensor.name: tensor.read() for tensor in base.tensors}
    assert found.keys() == load_file(tiny_base / WEIGHTS).keys(), "scales are no tensors of the model"
    assert len(expected) == 14
    for name, weights in expected.items():
        assert found[name].dtype is torch.float32
        assert torch.equal(found[name], weights), name


def test_fp8_models_compute_what_transformers_decodes(tiny_base: Path, tmp_path: Path) -> None:
    write_fp8(tiny_base, tmp_path / "fp8", block=128)
    decoder = FineGrainedFP8Config(dequantize=True, weight_block_size=(128, 128))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32, quantization_config=decoder)
    print({name: weight.dtype for name, weight in theirs.named_parameters()})
    found = logits(ours(tmp_path / "fp8"))
    torch.testing.assert_close(found, logits(theirs.float()), atol=1e-5, rtol=1e-5)


def test_a_wrong_scale_is_seen(tiny_base: Path, tmp_path: Path) -> None:
    expected = write_fp8(tiny_base, tmp_path / "fp8", block=128)
    name = "model.layers.0.mlp.up_proj.weight"
    change(tmp_path / "fp8", {f"{name}_scale_inv": lambda scale: scale * torch.tensor([[1.0], [1.01], [1.0], [1.0]])})
    found = {tensor.name: tensor.read() for tensor in open_base_model(tmp_path / "fp8").tensors}
    wrong = found[name] != expected[name]
    assert wrong[128:256].float().mean() > 0.99
    assert not wrong[:128].any()


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_scales_of_another_shape_are_refused(method: str, tiny_base: Path, tmp_path: Path, texts: list[str]) -> None:
    if method == "fp8":
        write_fp8(tiny_base, tmp_path / "m", block=128)
        name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    else:
        write_mxfp4(tmp_path / "m", texts)
        name = "model.layers.0.mlp.experts.down_proj_scales"
    change(tmp_path / "m", {name: lambda scale: scale[:-1]})
    with pytest.raises(InvalidBaseError, match=r"is damaged, or its config\.json is of another model: the scales"):
        open_base_model(tmp_path / "m")


def test_an_fp8_weight_without_a_scale_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    write_fp8(tiny_base, tmp_path / "m", block=128)
    change(tmp_path / "m", {"model.layers.0.mlp.up_proj.weight_scale_inv": None})
    with pytest.raises(InvalidBaseError, match=r"up_proj\.weight .* is stored as F8_E4M3; only .* FP8 with its scales"):
        open_base_model(tmp_path / "m")


@pytest.mark.parametrize("block", [128, None])
def test_merged_weights_have_16_bits_and_no_quantisation(block: int | None, tiny_base: Path, tmp_path: Path) -> None:
    expected = write_fp8(tiny_base, tmp_path / "fp8", block=block)
    merged = merge(tmp_path / "fp8", tmp_path / "out")
    found = load_file(merged / WEIGHTS)
    assert found.keys() == load_file(tiny_base / WEIGHTS).keys()
    assert all(torch.equal(found[name], weights.bfloat16()) for name, weights in expected.items())
    assert "quantization_config" not in (merged / "config.json").read_text()
    assert type(AutoModelForCausalLM.from_pretrained(merged).get_submodule("lm_head")) is torch.nn.Linear


def test_exponents_alone_are_powers_of_two() -> None:
    """DeepSeek V3.1 and later publish scales without a fraction (E8M0)."""
    codes = torch.randn(128, 256).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[120, 130]], dtype=torch.uint8)
    expected = codes.float() * torch.tensor([2.0**-7, 2.0**3]).repeat_interleave(128)
    for scale in (exponents, exponents.view(torch.float8_e8m0fnu)):
        assert torch.equal(decode_fp8(codes, scale, (128, 128)), expected)


def test_stacked_experts_in_fp8_have_a_grid_each() -> None:
    codes, scale = torch.randn(3, 100, 200).to(torch.float8_e4m3fn), torch.rand(3, 2, 4)
    alone = torch.stack([decode_fp8(codes[each], scale[each], (64, 64)) for each in range(3)])
    assert torch.equal(decode_fp8(codes, scale, (64, 64)), alone)


def test_mxfp4_is_what_transformers_decodes() -> None:
    """All codes, and exponents from the smallest to the largest of a published model."""
    blocks = torch.arange(256, dtype=torch.uint8).repeat(2 * 48 * 4 * 16 // 256).reshape(2, 48, 4, 16)
    scales = torch.randint(90, 150, (2, 48, 4), dtype=torch.uint8)
    found = decode_mxfp4(blocks, scales)
    assert found.shape == (2, 128, 48)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))
    scales[1, 5, 2] += 1
    other = found != convert_moe_packed_tensors(blocks, scales)
    assert other[1, 64:96, 5].sum() == (found[1, 64:96, 5] != 0).sum() == other.sum()


def test_gpt_oss_loads_and_merges_as_transformers_decodes_it(tmp_path: Path, texts: list[str]) -> None:
    folder = write_mxfp4(tmp_path / "oss", texts)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    expected = logits(theirs)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(ours(folder)), expected, atol=1e-5, rtol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(merge(folder, tmp_path / "out"), dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def change(folder: Path, changes: dict[str, Any]) -> Tensors:
    """Change tensors of a folder, or remove those whose change is None."""
    stored = load_file(folder / WEIGHTS)
    shutil.copyfile(folder / WEIGHTS, folder / "before")
    for name, edit in changes.items():
        tensor = stored.pop(name)
        if edit is not None:
            stored[name] = edit(tensor).contiguous()
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "before").unlink()
    return stored
