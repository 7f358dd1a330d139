"""A result that is there already is taken before anything is checked, if it was made of the same model and data."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from finetune_api.outcome import Outcome
from finetune_api.progress import Resolved
from finetune_api.run_config import JobIdentity, RunConfig
from finetune_api.vocabulary import ArtifactType
from finetune_trainer.artifacts.store import LocalArtifact, Provenance, open_store
from finetune_trainer.cli.preflight import preflight_attempt
from finetune_trainer.job.inputs import read_inputs
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal

Build = Callable[..., RunConfig]
OTHER = JobIdentity(namespace="default", name="tiny", uid="uid-2")


def test_a_result_that_is_there_needs_no_checks(run_config: Build, settings: Settings, tmp_path: Path) -> None:
    config, mounted, message = run_config(), tmp_path / "run_config.yaml", tmp_path / "termination"
    mounted.write_text(config.to_yaml())
    place = replace(settings, config=mounted, termination_log=message)
    store = open_store(config, "attempt-0", None, settings.output_folder)
    weights = tmp_path / "adapter.safetensors"
    weights.write_bytes(b"weights")
    artifact = LocalArtifact(ArtifactType.ADAPTER, weights, "safetensors")
    inputs = read_inputs(config, settings)
    resolved = Resolved(dataset_digest=inputs.dataset_digest)
    provenance = Provenance(resolved, {"loss": 1.5}, model_version=inputs.model_version)
    store.publish([artifact], provenance, lambda count: None)
    mounted.write_text(config.model_copy(update={"job": OTHER}).to_yaml())
    assert preflight_attempt(place, StopSignal()) == 0
    outcome = Outcome.decode(message.read_text())
    assert (outcome.reused, outcome.stage, outcome.loss, outcome.preflight) == (True, "Preflight", 1.5, None)
    assert [each.type for each in outcome.artifacts] == ["Adapter"]
    mounted.write_text(run_config(adapter={"rank": 8}).model_copy(update={"job": OTHER}).to_yaml())
    assert preflight_attempt(place, StopSignal()) == 15
    other = Outcome.decode(message.read_text())
    assert (other.reused, other.reason) == (False, "OutputExists")


def test_a_result_of_older_data_is_no_result(run_config: Build, settings: Settings, tmp_path: Path) -> None:
    """The specification is the same word for word: only the file behind it has changed."""
    data, mounted, message = tmp_path / "chat.jsonl", tmp_path / "run_config.yaml", tmp_path / "termination"
    row = {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]}
    data.write_text(json.dumps(row) + "\n")
    config = run_config(dataset={"source": f"file://{data}"})
    inputs = read_inputs(config, settings)
    provenance = Provenance(Resolved(dataset_digest=inputs.dataset_digest), model_version=inputs.model_version)
    weights = tmp_path / "adapter.safetensors"
    weights.write_bytes(b"weights")
    store = open_store(config, "attempt-0", None, settings.output_folder)
    store.publish([LocalArtifact(ArtifactType.ADAPTER, weights, "safetensors")], provenance, lambda count: None)

    mounted.write_text(config.model_copy(update={"job": OTHER}).to_yaml())
    place = replace(settings, config=mounted, termination_log=message)
    assert preflight_attempt(place, StopSignal()) == 0
    assert Outcome.decode(message.read_text()).reused
    data.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert preflight_attempt(place, StopSignal()) == 15
    refused = Outcome.decode(message.read_text())
    assert (refused.reused, refused.reason) == (False, "OutputExists")
    assert "the data have changed since it was made" in refused.message
