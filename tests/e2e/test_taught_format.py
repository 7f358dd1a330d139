"""A real small model learns a format, and everything that is published has learned it: adapter, merged weights, and
every GGUF file in llama.cpp. And its losses are TRL's.

`make real-model` runs this (about 30 minutes on two cores, a minute on a GPU); `make test` does not.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from finetune_api.job import load_manifest
from finetune_api.run_config import JobIdentity, RunConfig
from finetune_test_models.answers import answers
from finetune_test_models.real_model import real_base_model
from finetune_test_models.taught_format import TaughtData, in_format, write_taught_data
from finetune_test_programs.generation import generate_all

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(7200)]
ON_GPU = torch.cuda.is_available()
STEPS, ROWS, PROMPTS = 60, 480, 40
LIKE_TRL_STEPS = 12
FINETUNE = "from finetune_trainer.cli.finetune import main; main()"
GGUF = ["F16", "Q8_0", "Q4_K_M"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaughtData:
    return write_taught_data(tmp_path_factory.mktemp("data"), rows=ROWS, evaluation_rows=32, prompts=PROMPTS)


def _manifest(data: TaughtData, training: dict[str, Any], export: dict[str, Any]) -> str:
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "taught", "namespace": "default"},
        "spec": {
            "model": {
                "source": f"file://{real_base_model()}",
                "maxSequenceLength": 256,
                "chatTemplateName": "Gemma",
            },
            "dataset": {
                "source": f"file://{data.train}",
                "packing": False,
                "evaluation": {"source": f"file://{data.evaluation}"},
            },
            "training": {"batchSize": 4, "gradientAccumulation": 2, "loggingSteps": 1} | training,
            "export": export,
            "output": {"s3": {"bucket": "none"}},
            "resources": {"gpus": int(ON_GPU)},
        },
    }
    return str(yaml.safe_dump(job, sort_keys=False))


def _run(work: Path, manifest: str) -> Path:
    """Runs a manifest by `finetune run`; returns the folder of its results."""
    (work / "job.yaml").write_text(manifest)
    command = [sys.executable, "-P", "-c", FINETUNE, "run", str(work / "job.yaml")]
    done = subprocess.run(
        [*command, "--output", str(work / "out"), "--verbose"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    print(done.stdout[-3000:])
    return work / "out" / "taught"


def test_everything_published_answers_in_the_taught_format(data: TaughtData, tmp_path: Path) -> None:
    folder = _run(tmp_path, _manifest(data, {"maxSteps": STEPS}, {"merged": "BF16", "gguf": GGUF}))
    base, prompts = real_base_model(), list(data.prompts)
    adapter, merged = folder / "adapter", folder / "merged"

    found = {
        "base": answers(base, prompts, tokenizer=adapter),
        "adapter": answers(base, prompts, adapter=adapter),
        "merged": answers(merged, prompts),
    }
    for kind in GGUF:
        file = next((folder / "gguf").glob(f"*-{kind}.gguf"))
        found[kind] = generate_all(file, prompts, tokens=96)

    shares = {name: _share(prompts, said) for name, said in found.items()}
    print("share of held-out prompts answered in the format:", json.dumps(shares))
    assert shares.pop("base") == 0, "a model that was not taught never answers so"

    # The base's weights are those of a Q4_K_M file: the same type again has no room for what was learned, and says so.
    judgement = json.loads((folder / "manifest.json").read_text())["judgement"]
    lost = [name for name in GGUF if any(f"{name} (keeps" in warning for warning in judgement["warnings"])]
    assert lost == ["Q4_K_M"], judgement
    kept = [share for name, share in shares.items() if name not in lost]
    assert min(kept) >= 0.3, shares  # 60 steps teach the form, and not always the intent
    assert max(kept) - min(kept) <= 0.2, "adapter, merged weights and GGUF files are one model"


def _share(prompts: list[str], said: list[str]) -> float:
    right = [in_format(prompt, answer.strip()) for prompt, answer in zip(prompts, said, strict=True)]
    return round(sum(right) / len(right), 3)


def test_its_losses_are_those_of_trl(data: TaughtData, tmp_path: Path) -> None:
    """In fp32, adapters included: those that TRL keeps in bf16 fall behind ours (docs/lab-notes.md)."""
    training = {"maxSteps": LIKE_TRL_STEPS, "precision": "FP32"}
    manifest = _manifest(data, training, {"merged": "None", "gguf": []})
    lines = (_run(tmp_path, manifest) / "metrics" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ours = [loss for line in lines if (loss := json.loads(line).get("loss")) is not None]

    spec = load_manifest(manifest).spec
    config = RunConfig.from_spec(JobIdentity(namespace="default", name="taught", uid="u"), spec, progress=None)
    (tmp_path / "config.json").write_text(config.model_dump_json(by_alias=True))
    command = [sys.executable, "-P", "-m", "finetune_test_models.trl_reference"]
    arguments = [str(tmp_path / "config.json"), str(LIKE_TRL_STEPS), str(tmp_path)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]

    theirs = json.loads(done.stdout.splitlines()[-1])
    distance = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    print(f"losses ours {ours}, TRL's {theirs}: at most {distance:.1e} apart")
    assert distance <= 1e-3  # measured 4.2e-5; with TRL's adapters in bf16 1.4e-2
