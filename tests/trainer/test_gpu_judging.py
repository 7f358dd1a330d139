"""On a GPU, in bfloat16 and beside a 4-bit model in memory, files are judged as on a CPU."""

from pathlib import Path

import pytest
import torch

from finetune_test_models import taught_runs, tiny_runs
from finetune_trainer.export.judge.measure import Candidates, measure_losses

texts, tiny_base = tiny_runs.texts, tiny_runs.tiny_base


@pytest.mark.gpu
def test_a_gpu_judges_what_it_trained(tiny_base: Path, tmp_path: Path) -> None:
    outcome, manifest = taught_runs.teach(
        tiny_base, tmp_path, rate=5e-3, gpus=1, merged="BF16", gguf=["Q8_0", "Q4_K_M"]
    )
    judgement = manifest.judgement
    assert judgement is not None
    assert outcome.judgement == judgement
    print(judgement, {each.quantization: (each.loss, each.improvement_kept) for each in manifest.artifacts})
    assert judgement.adapter_loss == pytest.approx(manifest.metrics["evalLoss"], abs=0.02)
    assert judgement.merged_loss == pytest.approx(judgement.adapter_loss, abs=0.1)
    assert judgement.base_loss > judgement.merged_loss + 3

    files = {str(each.quantization): Path(each.uri) for each in manifest.artifacts if each.type == "GGUF"}
    rows = taught_runs.encode_rows(tiny_base, manifest)
    candidates = Candidates(tiny_base, Path(manifest.artifacts[0].uri), None, files)
    found, expected = (measure_losses(candidates, rows, torch.device(name)) for name in ("cuda", "cpu"))
    for kind in files:
        assert found.files[kind] == pytest.approx(expected.files[kind], abs=0.02)
