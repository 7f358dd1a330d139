"""What is loaded is what was stored."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import Precision, Quantization
from finetune_kernels.primitives import nf4
from finetune_test_models.tiny_model import make_tiny_model
from finetune_trainer.errors import TrainerError
from finetune_trainer.stages import model_loading
from finetune_trainer.stages.model_loading import load_model, resolve_precision


def spec(folder: Path, quantization: Quantization) -> ModelSpec:
    return ModelSpec.model_validate(
        {"source": f"file://{folder}", "maxSequenceLength": 128, "quantization": quantization}
    )


@pytest.mark.parametrize("rows", [544, 576])
def test_rows_that_a_cpu_decodes_wrongly_are_refused(
    rows: int, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong as on a CPU with AVX512, whatever this one is: 544 is not a multiple of 64, 576 is."""
    if rows == 544:
        monkeypatch.setattr(model_loading, "dequantize_4bit", lambda packed, state: 1.4 * nf4.reference(packed, state))
    folder = make_tiny_model(tmp_path, texts=texts, num_hidden_layers=1, intermediate_size=rows)
    load_model(folder, spec(folder, Quantization.NONE), Precision.FP32, gpus=0)
    quantized = spec(folder, Quantization.NF4)
    if rows == 576:
        layer = load_model(folder, quantized, Precision.FP32, gpus=0).model.model.layers[0].mlp.down_proj
        state = layer.weight.quant_state
        eye = torch.eye(rows)
        assert torch.allclose(layer(eye).T, nf4.reference(layer.weight.data, state), rtol=1e-5)
    else:
        with pytest.raises(TrainerError, match="rows have 544 weights") as refusal:
            load_model(folder, quantized, Precision.FP32, gpus=0)
        assert refusal.value.reason == "InvalidConfiguration"


CUDA = torch.device("cuda")


def test_a_card_without_bfloat16_computes_in_fp16_and_an_older_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    found = {}
    for capability in ((8, 0), (7, 5)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, own=capability: own)
        found[capability] = resolve_precision(Precision.AUTO, CUDA)
    assert found == {(8, 0): Precision.BF16, (7, 5): Precision.FP16}
    with pytest.raises(TrainerError, match="this GPU has no BF16"):
        resolve_precision(Precision.BF16, CUDA)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    for precision in Precision:
        with pytest.raises(TrainerError, match="Tesla V100 is older than Turing"):
            resolve_precision(precision, CUDA)


@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_computes_in_bfloat16_if_it_multiplies_it(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(model_loading, "has_bfloat16", lambda: has)
    device = torch.device("cpu")
    assert resolve_precision(Precision.AUTO, device) is (Precision.BF16 if has else Precision.FP32)
    assert resolve_precision(Precision.FP32, device) is Precision.FP32, "what the job asks for stays"
    assert resolve_precision(Precision.BF16, device) is Precision.BF16


@pytest.mark.parametrize("quantization", list(Quantization))
def test_the_log_says_how_a_cpu_computes_and_what_would_be_faster(
    tiny_base: Path, quantization: Quantization, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    load_model(tiny_base, spec(tiny_base, quantization), Precision.BF16, gpus=0)
    said = [record.message for record in caplog.records if record.name == model_loading.__name__]
    assert said[0] == "computing on the CPU in bfloat16"
    advised = [
        line for line in said if line.startswith("this run could be faster: write spec.model.quantization: None")
    ]
    assert bool(advised) == (quantization is Quantization.NF4)


def test_a_shard_that_broke_off_has_a_reason(tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "cut")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(TrainerError, match=r"model\.safetensors broke off") as refusal:
        load_model(folder, spec(folder, Quantization.NONE), Precision.FP32, gpus=0)
    assert refusal.value.reason == "InvalidConfiguration"
