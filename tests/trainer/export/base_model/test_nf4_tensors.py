"""A base that exists in bitsandbytes' NF4 only is exported by decoding it, and the user is told."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.export import DEQUANTISED, ExportRequest, export

TENSORS = "model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module", params=[True, False], ids=["double quantisation", "single"])
def nf4_base(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4")
    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request.param,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16, quantization_config=wanted)
    model.save_pretrained(folder)
    for path in tiny_base.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_weights_are_those_that_bitsandbytes_decodes(nf4_base: Path, tiny_base: Path, tmp_path: Path) -> None:
    notices: list[str] = []
    request = ExportRequest(base=nf4_base, adapter=None, output=tmp_path, merged="BF16", gguf=("F16",), name="m")
    export(request, device=torch.device("cpu"), on_progress=lambda done, total: None, on_notice=notices.append)
    assert notices == [DEQUANTISED]

    merged, original = load_file(tmp_path / "merged" / TENSORS), load_file(tiny_base / TENSORS)
    assert merged.keys() == original.keys()
    loaded = AutoModelForCausalLM.from_pretrained(nf4_base, dtype=torch.bfloat16)
    checked = 0
    for name, module in loaded.named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = module.weight
            assert torch.equal(merged[f"{name}.weight"], dequantize_4bit(weight.data, weight.quant_state)), name
            assert not torch.equal(merged[f"{name}.weight"], original[f"{name}.weight"])
            checked += 1

    assert checked == 14
    assert torch.equal(merged["model.norm.weight"], original["model.norm.weight"])
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)


def test_the_command_says_so(
    finetune_here: Callable[..., subprocess.CompletedProcess[str]], nf4_base: Path, tmp_path: Path
) -> None:
    done = finetune_here("export", "--base", nf4_base, "--output", tmp_path / "out", "--merged", "BF16", "--name", "m")
    assert done.returncode == 0, done.stderr
    assert f"note: {DEQUANTISED}" in " ".join(done.stderr.split())


def damage(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, target / TENSORS, metadata={"format": "pt"})
    return target


STATE = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"
LIES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "no state": (lambda tensors: tensors.pop(STATE), "is stored as U8; only F32"),
    "no codes": (lambda tensors: tensors.pop(Q_PROJ), "no codes"),
    "no scales": (lambda tensors: tensors.pop(f"{Q_PROJ}.absmax"), "do not fit"),
    "fewer codes": (lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ][:-32].clone()}), "do not fit"),
    "a state that is no JSON": (
        lambda tensors: tensors.update({STATE: torch.zeros(8, dtype=torch.uint8)}),
        "cannot be read",
    ),
}


@pytest.mark.parametrize(("change", "reason"), LIES.values(), ids=LIES)
def test_damaged_parts_are_refused(
    nf4_base: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], reason: str
) -> None:
    folder = damage(nf4_base, tmp_path / "damaged", change)
    request = ExportRequest(base=folder, adapter=None, output=tmp_path, merged="BF16", gguf=(), name="m")
    with pytest.raises(InvalidBaseError, match=reason):
        export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
