"""Pushing a result to a hub over HTTP: layout, visibility, outages, and a token that never shows."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import get_session

from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import RunConfig
from finetune_api.spec.output import HubOutput
from finetune_test_servers.hub import TOKEN, Hub, HubRepo
from finetune_trainer.artifacts.hub_push import HubTarget, open_hub
from finetune_trainer.cli.pod import run_job
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.preflight.checks import run_preflight
from finetune_trainer.storage.retry import RetryPolicy

Builder = Callable[..., RunConfig]
NAME = "acme/support-bot"
# huggingface_hub 1.33 sends Git LFS parts by an argument that httpx calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with Hub.start() as started:
        yield started


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    folder = tmp_path / "credentials/hub"
    folder.mkdir(parents=True)
    (folder / "HF_TOKEN").write_text(f"{TOKEN}\n")
    return folder


def output(**changes: object) -> HubOutput:
    return HubOutput.model_validate({"repository": NAME, "credentials": {"secretName": "hub"}} | changes)


def target(hub: Hub, token: str = TOKEN, retries: float = 5, **changes: object) -> HubTarget:
    return HubTarget(output(**changes), token, hub.url, RetryPolicy(outage_seconds=retries, first_wait=1))


def run(config: RunConfig, settings: Settings) -> Outcome:
    return run_job(config, settings, ProgressTracker(), StopSignal())


def test_a_whole_job_pushes_what_the_manifest_names(
    run_config: Builder,
    settings: Settings,
    secret: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.url)
    hub_spec = {"repository": NAME, "credentials": {"secretName": "hub"}}
    s3 = {"bucket": "models"}
    exported = {"merged": "BF16", "gguf": ["Q8_0"]}
    config = run_config(export=exported, output={"s3": s3, "hub": hub_spec})
    settings = Settings(settings.work, "attempt-1", credentials=secret.parent, output_folder=settings.output_folder)
    outcome = run(config, settings)
    assert outcome.result is Result.SUCCEEDED, outcome.message
    repo = hub.repos[f"models/{NAME}"]
    assert repo.private
    assert outcome.hub_url == f"{hub.url}/{NAME}/commit/{repo.revisions['main']}"
    wanted = {"README.md", "loss.svg", "resolved.yaml", "config.json", "model.safetensors", "tiny-Q8_0.gguf"}
    assert wanted | {"tiny-Q8_0.Modelfile", "adapter/adapter_model.safetensors"} <= repo.files.keys()
    gguf = next(artifact for artifact in outcome.artifacts if artifact.type == "GGUF")
    assert hashlib.sha256(repo.files["tiny-Q8_0.gguf"]).hexdigest() == gguf.sha256
    assert TOKEN not in caplog.text + outcome.encode()
    assert not [body for body in hub.bodies if TOKEN.encode() in body]

    hub.requests.clear()
    again = Settings(settings.work / "b", "attempt-2", credentials=secret.parent, output_folder=settings.output_folder)
    reused = run(config.model_copy(update={"job": config.job.model_copy(update={"uid": "uid-2"})}), again)
    assert reused.reused
    assert reused.hub_url is not None, "a result that was there already is pushed as well"
    assert not [request for request in hub.requests if request.startswith("PUT")], "the hub has the large files"


def test_a_public_repository_never_gets_what_is_to_be_private(hub: Hub) -> None:
    hub.repos[f"models/{NAME}"] = HubRepo({}, private=False)
    with pytest.raises(TrainerError, match=r"is public, but spec\.output\.hub says private") as refusal:
        target(hub).prepare()
    assert refusal.value.reason == "HubNotWritable"
    target(hub, private=False).prepare()


@pytest.mark.parametrize("exists", [True, False])
def test_a_token_that_may_not_write_is_refused_before_training(hub: Hub, exists: bool) -> None:
    if exists:
        hub.repos[f"models/{NAME}"] = HubRepo({}, private=True)
    with pytest.raises(TrainerError, match="does not let this token write") as refusal:
        target(hub, token="hf_reader_canary").prepare()
    assert refusal.value.reason == "HubNotWritable"
    assert "canary" not in refusal.value.message
    assert not [request for request in hub.requests if "/commit/" in request]


def test_without_the_mounted_secret_no_other_token_is_used(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(TrainerError, match="HF_TOKEN is not in the Secret hub"):
        open_hub(output(), tmp_path, hub.url)
    assert open_hub(None, None) is None
    assert not hub.requests


def test_preflight_names_the_field_of_a_hub_that_cannot_be_written(run_config: Builder, settings: Settings) -> None:
    sections = {"s3": {"bucket": "models"}, "hub": {"repository": NAME, "credentials": {"secretName": "hub"}}}
    report, _ = run_preflight(run_config(output=sections), settings)
    assert [finding.location for finding in report.errors()] == ["spec.output.hub"]
    assert run_preflight(run_config(), settings)[0].errors() == ()


def test_a_hub_that_is_away_for_a_while_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" * 100)
    place = target(hub)
    place.prepare()
    hub.failures = [500]
    address = place.push({"model.gguf": path, "b/README.md": path}, "a result")
    assert address.startswith(f"{hub.url}/{NAME}/commit/")
    assert hub.repos[f"models/{NAME}"].files == {"model.gguf": b"GGUF" * 100, "b/README.md": b"GGUF" * 100}


def test_a_hub_that_stays_away_ends_in_an_error_that_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    place = target(hub, retries=0)
    place.prepare()
    (tmp_path / "a").touch()
    hub.failures = [418]
    with pytest.raises(TrainerError, match="HTTP 418") as refused:
        place.push({"a": tmp_path / "a"}, "x")
    assert refused.value.reason == "HubNotWritable"
    hub.url, closed = "", HubTarget(output(), TOKEN, "http://127.0.0.1:9", RetryPolicy(outage_seconds=0))
    with pytest.raises(TrainerError, match="did not answer") as away:
        closed.prepare()
    assert away.value.reason == "HubUnavailable"
    assert "canary" not in refused.value.message + away.value.message


def test_no_request_to_the_hub_waits_for_ever(hub: Hub) -> None:
    target(hub)
    timeout = get_session().timeout
    assert all(seconds is not None for seconds in (timeout.connect, timeout.read, timeout.write, timeout.pool))
