"""A tiny model that was really taught a format, and everything its job published: trained once for all tests.

The base has random weights and the answers one form, so the loss of the answers falls from 6.7 to 0.2.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import RunConfig
from finetune_test_models import tiny_runs
from finetune_trainer.artifacts.manifest import Manifest, ManifestArtifact
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.chat.labels import Encoded
from finetune_trainer.cli.pod import run_job
from finetune_trainer.data.layouts import Conversation
from finetune_trainer.export.judge.measure import Candidates, Losses, measure_losses
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.model.description import load_tokenizer

TYPES = ["Q8_0", "Q4_K_M", "Q2_K"]
CPU = torch.device("cpu")


ANSWER_END = "checked and signed by the house of words."


def taught_chats(count: int = 60) -> list[list[dict[str, str]]]:
    """Questions of random words, each answered in one format: the loss of the answers falls to almost nothing."""
    chats = []
    for chat in tiny_runs.conversations(count, words=4, seed=5):
        question = chat[0]["content"]
        answer = f"<answer>{question.split()[0]}</answer> {ANSWER_END}"
        chats.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return chats


def teach(base: Path, work: Path, *, rate: float, gpus: int = 0, **export: Any) -> tuple[Outcome, Manifest]:
    """Train on the format below `work` and publish what `export` asks for; returns outcome and manifest."""
    data = work / "format.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in taught_chats()))
    config = RunConfig.model_validate(
        {
            "job": {"namespace": "default", "name": "tiny", "uid": "uid-1"},
            "model": {"source": f"file://{base}", "maxSequenceLength": 128},
            "dataset": {"source": f"file://{data}", "evaluation": {"fraction": 0.2}},
            "adapter": {"rank": 16},
            "training": {"maxSteps": 60, "learningRate": rate, "batchSize": 2, "gradientAccumulation": 2},
            "export": export,
            "output": {"s3": {"bucket": "models"}},
            "outputPrefix": "default/tiny",
            "checkpointsToKeep": 2,
            "terminationGracePeriodSeconds": 60,
            "gpus": gpus,
        }
    )
    (work / "work").mkdir()
    settings = Settings(work=work / "work", attempt_id="attempt-1", output_folder=work / "out")
    outcome = run_job(config, settings, ProgressTracker(), StopSignal())
    assert outcome.result is Result.SUCCEEDED, outcome.message
    return outcome, Manifest.decode((work / "out" / "tiny" / "manifest.json").read_bytes())


@dataclasses.dataclass
class Taught:
    """A finished job, with rows to judge its files on."""

    outcome: Outcome
    manifest: Manifest
    candidates: Candidates
    rows: list[Encoded]

    folder: Path
    """The output folder of the job."""

    @property
    def found(self) -> dict[str, ManifestArtifact]:
        """Artifacts by type, GGUF files by theirs."""
        return {
            each.quantization or "" if each.type == "GGUF" else each.type: each
            for each in self.manifest.artifacts
            if each.type != "Modelfile"
        }

    def measure(self, **gguf: Path) -> Losses:
        """Losses of these files beside those of base and merged model."""
        return measure_losses(dataclasses.replace(self.candidates, gguf=gguf), self.rows, CPU)


def encode_rows(base: Path, manifest: Manifest) -> list[Encoded]:
    """Some of the rows, as the job encoded them."""
    config = RunConfig.model_validate(manifest.configuration["run"] | {"progress": None})  # type: ignore[operator]
    encoder = ChatEncoder(load_tokenizer(base, config.model), config.dataset.train_on)
    return [encoder.encode(Conversation(chat)) for chat in taught_chats(8)]


@pytest.fixture(scope="session")
def taught(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    """The job, finished."""
    work = tmp_path_factory.mktemp("taught")
    outcome, manifest = teach(tiny_base, work, rate=5e-3, merged="BF16", gguf=TYPES)
    paths = {str(each.quantization): Path(each.uri) for each in manifest.artifacts if each.type == "GGUF"}
    adapter = Path(manifest.artifacts[0].uri)
    rows = encode_rows(tiny_base, manifest)
    return Taught(outcome, manifest, Candidates(tiny_base, adapter, None, paths), rows, work / "out")
