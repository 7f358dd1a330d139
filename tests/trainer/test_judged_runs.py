"""A job says of every file it publishes what that kept of the training, and warns of one that lost it."""

import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.torch import load_file, save_file

from finetune_test_models.taught_runs import CPU, TYPES, Taught, teach
from finetune_trainer import stopping
from finetune_trainer.errors import InterruptedRunError
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.export.gguf import tensors
from finetune_trainer.export.judge import streamed_model
from finetune_trainer.export.judge.measure import measure_losses
from finetune_trainer.export.judge.verdict import improvement_kept, warn_of_files
from finetune_trainer.export.quantization.dequantize import dequantize
from finetune_trainer.export.quantization.quantize import quantize


def test_every_file_has_its_loss_in_manifest_outcome_and_card(taught: Taught) -> None:
    judgement, found = taught.manifest.judgement, taught.found
    assert judgement is not None
    assert judgement == taught.outcome.judgement
    assert (judgement.data, judgement.rows, judgement.warnings) == ("Evaluation", 12, ())
    assert judgement.base_loss > 6
    assert judgement.adapter_loss == pytest.approx(taught.manifest.metrics["evalLoss"], abs=2e-3)
    assert judgement.merged_loss == pytest.approx(judgement.adapter_loss, abs=0.05)

    losses = [found[kind].loss for kind in ("Adapter", "Merged", *TYPES)]
    assert losses[:2] == [judgement.adapter_loss, judgement.merged_loss]
    assert found["Q8_0"].loss < found["Q4_K_M"].loss < found["Q2_K"].loss < 1
    assert all(1.01 > found[kind].improvement_kept > 0.9 for kind in TYPES)
    assert [each.loss for each in taught.outcome.artifacts] == [each.loss for each in taught.manifest.artifacts]

    card = (Path(found["ModelCard"].uri) / "README.md").read_text()
    assert f"| base | {judgement.base_loss:.4f} |" in card
    for kind in TYPES:
        assert f"| {kind} | {found[kind].loss:.4f} | {found[kind].improvement_kept:.0%} |" in card
    assert "Warning" not in card


def test_one_corrupted_tensor_is_seen(taught: Taught, tmp_path: Path) -> None:
    assert taught.candidates.gguf is not None
    path = shutil.copy(taught.candidates.gguf["Q8_0"], tmp_path / "bad.gguf")
    (tensor,) = [each for each in GGUFReader(path).tensors if each.name == "blk.1.ffn_down.weight"]
    with path.open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(bytes(tensor.data[::-1].tobytes()))  # its rows in reverse order
    losses = taught.measure(Q8_0=taught.candidates.gguf["Q8_0"], bad=path)
    assert losses.files["bad"] > losses.files["Q8_0"] + 0.2 * (losses.base - losses.merged)
    warning = warn_of_files(losses.base, losses.merged, losses.files, "8 rows")
    assert warning is not None
    assert "bad (keeps" in warning
    assert "Q8_0 (keeps" not in warning


def test_heads_in_another_order_are_seen(taught: Taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = taught.candidates
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "interleave_heads", lambda weights, heads: weights)
        request = ExportRequest(candidates.base, candidates.adapter, tmp_path, None, ("F16",), "bad")
        (file,) = export(request, device=CPU, on_progress=lambda done, total: None)
    losses = taught.measure(F16=file.path)
    assert warn_of_files(losses.base, losses.merged, losses.files, "8 rows") is not None


def test_a_file_that_ends_early_is_a_file_without_a_loss(taught: Taught, tmp_path: Path) -> None:
    assert taught.candidates.gguf is not None
    path = tmp_path / "short.gguf"
    whole = taught.candidates.gguf["Q8_0"].read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    losses = taught.measure(Q8_0=path)
    assert "Q8_0 (loss is not a number)" in str(warn_of_files(losses.base, losses.merged, losses.files, "8 rows"))


def test_a_signal_is_answered_between_layers(taught: Taught, monkeypatch: pytest.MonkeyPatch) -> None:
    layers: list[int] = []

    def stop() -> None:
        layers.append(1)
        if len(layers) == 3:
            stopping.request_stop("SIGTERM")
        stopping.raise_if_requested()

    monkeypatch.setattr(streamed_model, "raise_if_requested", stop)
    try:
        with pytest.raises(InterruptedRunError):
            measure_losses(taught.candidates, taught.rows, CPU)
    finally:
        stopping.reset()
    assert len(layers) == 3, "two layers of the base, one of the merged model"


def test_a_base_that_was_quantised_before_loses_the_training_in_the_same_type_and_says_so(
    tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    kind = GGMLQuantizationType.Q4_K
    for name, values in weights.items():
        if values.dim() == 2:
            decoded = dequantize(quantize(values.flatten(), kind), kind, torch.float32)
            weights[name] = decoded.view(values.shape).to(values.dtype)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})

    _, manifest = teach(base, tmp_path, rate=2e-4, merged="None", gguf=["Q8_0", "Q4_K_M"])
    judgement = manifest.judgement
    assert judgement is not None
    kept = {each.quantization: each.improvement_kept for each in manifest.artifacts if each.type == "GGUF"}
    assert kept["Q8_0"] > 0.9
    assert kept["Q4_K_M"] < 0.8
    (warning,) = judgement.warnings
    assert "Q4_K_M (keeps" in warning
    assert "Q8_0 (keeps" not in warning
    card = next(Path(each.uri) / "README.md" for each in manifest.artifacts if each.type == "ModelCard")
    assert f"> **Warning:** {warning}" in card.read_text()


@pytest.mark.parametrize(
    ("base", "trained", "found", "kept"),
    [(3.0, 1.0, 1.0, 1.0), (3.0, 1.0, 2.0, 0.5), (3.0, 1.0, 3.5, -0.25), (3.0, 2.995, 3.0, None)],
)
def test_the_share_of_the_improvement(base: float, trained: float, found: float, kept: float | None) -> None:
    assert improvement_kept(base, trained, found) == kept
