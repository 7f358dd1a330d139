"""A whole run of a mixture in NF4: adapters on experts survive a stop, and the merged model keeps what was learnt."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import RunConfig
from finetune_test_models.stopped_runs import run_and_stop
from finetune_test_models.tiny_architectures import make_mixture
from finetune_trainer.job.settings import Settings

Builder = Callable[..., RunConfig]
STEPS, STOP_AFTER = 6, 3


@pytest.fixture(scope="module")
def mixture(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("mixture"), "qwen3_moe", texts)


def run(
    config: RunConfig, settings: Settings, name: str, stop_after: int | None = None
) -> tuple[dict[int, float], Outcome]:
    """Runs an attempt of this name."""
    work = Settings(work=settings.work / name, attempt_id=name, output_folder=settings.output_folder)
    return run_and_stop(config, work, stop_after)


def job(run_config: Builder, mixture: Path, name: str) -> RunConfig:
    return run_config(
        job={"name": name},
        model={"source": f"file://{mixture}", "maxSequenceLength": 128},
        training={"maxSteps": STEPS, "learningRate": 5e-3, "precision": "FP32"},
        export={"merged": "BF16", "gguf": ["F16"]},
    ).model_copy(update={"output_prefix": f"default/{name}"})


def test_a_stopped_run_goes_on_where_it_was(run_config: Builder, mixture: Path, settings: Settings) -> None:
    whole, expected = run(job(run_config, mixture, "whole"), settings, "whole")
    assert expected.result is Result.SUCCEEDED, expected
    before, stopped = run(job(run_config, mixture, "stopped"), settings, "first", STOP_AFTER)
    assert stopped.result is Result.INTERRUPTED
    after, found = run(job(run_config, mixture, "stopped"), settings, "second")
    assert found.result is Result.SUCCEEDED, found
    assert before | after == whole

    adapters = [load_file(Path(each.artifacts[0].uri) / "adapter_model.safetensors") for each in (expected, found)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    experts = [name for name in adapters[0] if ".experts.3.down_proj.lora_B" in name]
    assert len(experts) == 2
    assert all(adapters[0][name].abs().max() > 0 for name in experts), "experts trained"

    judgement = found.judgement
    assert judgement is not None
    assert judgement.adapter_loss < judgement.base_loss - 0.05
    file = next(each for each in found.artifacts if each.type.value == "GGUF")
    assert file.loss == pytest.approx(judgement.merged_loss, abs=1e-3)

    merged = next(Path(each.uri) for each in found.artifacts if each.type.value == "Merged")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert model(input_ids=torch.arange(3, 20)[None]).logits.isfinite().all()
