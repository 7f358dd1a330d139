"""hf:// sources, against a hub over HTTP."""

import hashlib
import time
from pathlib import Path

import pytest

from finetune_api.failures import FailureReason
from finetune_test_servers.hub import COMMIT, OLD_COMMIT, TOKEN, Hub, HubRepo
from finetune_trainer.errors import TrainerError
from finetune_trainer.sources import FetchedSource, SourceAccess, fetch_dataset, fetch_model
from finetune_trainer.storage.object_store import ignore_bytes
from finetune_trainer.storage.retry import RetryPolicy

MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 100,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "modeling_custom.py": b"raise SystemExit",
    "original/consolidated.00.pth": b"pickle",
    "README.md": b"# model",
}


NO_RETRIES = RetryPolicy(outage_seconds=0)
PATIENT = RetryPolicy(outage_seconds=20, first_wait=0.01)


def _access(hub: Hub, credentials: Path | None = None, retries: RetryPolicy = NO_RETRIES) -> SourceAccess:
    return SourceAccess(credentials=credentials, hub_endpoint=hub.url, hub_retries=retries)


def _model(hub: Hub, folder: Path, revision: str | None = None, credentials: Path | None = None) -> FetchedSource:
    return fetch_model("hf://acme/tiny", revision, folder, _access(hub, credentials), ignore_bytes)


def _secret(folder: Path, token: str) -> Path:
    folder.mkdir()
    (folder / "HF_TOKEN").write_text(f"{token}\n")
    return folder


def test_only_weights_and_configuration_of_the_pinned_commit_arrive(hub: Hub, tmp_path: Path) -> None:
    hub.repos["models/acme/tiny"] = HubRepo(MODEL)
    found = _model(hub, tmp_path / "base")
    wanted = {"config.json", "model.safetensors", "tokenizer.json"}
    assert found.revision == COMMIT
    assert {path.name for path in found.files} == wanted
    assert hub.fetched() == wanted | {"README.md"}, "the card, for the licence"
    assert all(f"/resolve/{COMMIT}/" in path for path in hub.requests if "/resolve/" in path)
    lines = "".join(f"{hashlib.sha256(MODEL[name]).hexdigest()}  {name}\n" for name in sorted(wanted))
    assert found.digest == hashlib.sha256(lines.encode()).hexdigest()


def test_the_hubs_own_cache_is_filled_once_and_used_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.repos["models/acme/tiny"] = HubRepo(MODEL)
    access = SourceAccess(hub_endpoint=hub.url, hub_retries=NO_RETRIES, hub_cache=True)

    def fetch(name: str) -> FetchedSource:
        return fetch_model("hf://acme/tiny", None, tmp_path / name, access, ignore_bytes)

    first = fetch("first")
    assert first.folder.is_relative_to(tmp_path / "cache")
    assert first.digest == _model(hub, tmp_path / "copied").digest

    fetched = len([path for path in hub.requests if "/resolve/" in path])
    assert fetch("second") == first
    assert len([path for path in hub.requests if "/resolve/" in path]) == fetched, "nothing is downloaded again"


def test_a_tag_is_resolved_to_its_commit(hub: Hub, tmp_path: Path) -> None:
    hub.repos["models/acme/tiny"] = HubRepo(MODEL)
    assert _model(hub, tmp_path / "base", revision="v1").revision == OLD_COMMIT


class MovingBranch(dict[str, str]):
    """A branch that someone pushes to after it was looked at once."""

    def get(self, revision: str, default: str | None = None) -> str | None:  # type: ignore[override]
        found = super().get(revision, default)
        self["main"] = OLD_COMMIT
        return found


def test_a_branch_that_moves_meanwhile_changes_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.repos["models/acme/tiny"] = HubRepo(MODEL, revisions=MovingBranch(main=COMMIT, pushed=OLD_COMMIT, old=COMMIT))
    found = _model(hub, tmp_path / "base")
    commits = {path.split("/resolve/")[1].split("/")[0] for path in hub.requests if "/resolve/" in path}
    assert commits == {found.revision} == {COMMIT}


def test_a_gated_model_comes_with_the_token_of_the_secret(hub: Hub, tmp_path: Path) -> None:
    hub.repos["models/acme/tiny"] = HubRepo(MODEL, gated=True)
    assert _model(hub, tmp_path / "base", credentials=_secret(tmp_path / "secret", TOKEN)).revision == COMMIT


REFUSALS = {
    "gated, without a token": (HubRepo(MODEL, gated=True), None, None, FailureReason.MODEL_ACCESS_DENIED, "gated"),
    "gated, with a wrong token": (HubRepo(MODEL, gated=True), None, "hf_other", FailureReason.MODEL_ACCESS_DENIED, ""),
    "missing": (None, None, None, FailureReason.MODEL_NOT_FOUND, "does not exist, or is private"),
    "no such revision": (HubRepo(MODEL), "v9", None, FailureReason.MODEL_NOT_FOUND, "no revision v9"),
    "no weights": (HubRepo({"config.json": b"{}"}), None, None, FailureReason.MODEL_NOT_FOUND, "not a model"),
    "pickled weights only": (
        HubRepo({"config.json": b"{}", "pytorch_model.bin": b"pickle"}),
        None,
        None,
        FailureReason.UNSAFE_MODEL,
        "pickled",
    ),
}


@pytest.mark.parametrize(("repo", "revision", "token", "reason", "part"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_used_has_a_reason_and_nothing_is_fetched(
    hub: Hub,
    tmp_path: Path,
    repo: HubRepo | None,
    revision: str | None,
    token: str | None,
    reason: FailureReason,
    part: str,
) -> None:
    if repo is not None:
        hub.repos["models/acme/tiny"] = repo
    credentials = _secret(tmp_path / "secret", token) if token else None
    with pytest.raises(TrainerError) as refusal:
        _model(hub, tmp_path / "base", revision, credentials)
    assert refusal.value.reason is reason
    assert part in refusal.value.message
    assert "hf://acme/tiny" in refusal.value.message
    assert not hub.fetched()


def test_no_token_and_no_answer_of_the_hub_reaches_the_message(hub: Hub, tmp_path: Path) -> None:
    hub.failures = [403]
    with pytest.raises(TrainerError) as refusal:
        _model(hub, tmp_path / "base", credentials=_secret(tmp_path / "secret", TOKEN))
    assert refusal.value.reason is FailureReason.MODEL_ACCESS_DENIED
    assert "canary" not in refusal.value.message
    assert refusal.value.__suppress_context__


def test_a_hub_that_stumbles_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.repos["models/acme/tiny"] = HubRepo(MODEL)
    hub.failures = [503, 500]
    access = _access(hub, retries=RetryPolicy(outage_seconds=20, first_wait=0.01))
    assert fetch_model("hf://acme/tiny", None, tmp_path / "base", access, ignore_bytes).revision == COMMIT


def test_a_hub_that_stays_away_is_unavailable(hub: Hub, tmp_path: Path) -> None:
    hub.failures = [503]
    with pytest.raises(TrainerError) as refusal:
        _model(hub, tmp_path / "base")
    assert refusal.value.reason is FailureReason.HUB_UNAVAILABLE
    nobody = SourceAccess(hub_endpoint="http://127.0.0.1:9", hub_retries=NO_RETRIES)
    with pytest.raises(TrainerError) as refusal:
        fetch_model("hf://acme/tiny", None, tmp_path / "base", nobody, ignore_bytes)
    assert refusal.value.reason is FailureReason.HUB_UNAVAILABLE


def test_weights_that_are_not_those_the_hub_lists_are_not_used(hub: Hub, tmp_path: Path) -> None:
    other = b"WEIGHTS" * 100
    hub.repos["models/acme/tiny"] = HubRepo(MODEL, damaged={"model.safetensors": other})
    with pytest.raises(
        TrainerError, match=r"model.safetensors is not the file .* " + hashlib.sha256(other).hexdigest()
    ):
        _model(hub, tmp_path / "base")


def test_of_a_dataset_only_the_split_is_fetched(hub: Hub, tmp_path: Path) -> None:
    files = {"data/train-00000-of-00001.jsonl": b"{}\n", "data/test-00000-of-00001.jsonl": b"{}\n", "loader.py": b"x"}
    hub.repos["datasets/acme/chat"] = HubRepo(files)
    found = fetch_dataset("hf://acme/chat", "train", tmp_path / "data", _access(hub), ignore_bytes)
    assert hub.fetched() == {"data/train-00000-of-00001.jsonl"}
    assert [path.name for path in found.files] == ["train-00000-of-00001.jsonl"]
    with pytest.raises(TrainerError) as refusal:
        fetch_dataset("hf://acme/chat", "validation", tmp_path / "data", _access(hub), ignore_bytes)
    assert refusal.value.reason is FailureReason.DATASET_NOT_FOUND
    assert "split validation" in refusal.value.message


def test_a_page_of_a_proxy_is_not_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.page = b"<html><body>canary: please log in</body></html>"
    with pytest.raises(TrainerError, match=r"the answer is not the hub's.*HF_ENDPOINT") as refusal:
        _model(hub, tmp_path / "base")
    assert refusal.value.reason is FailureReason.HUB_UNAVAILABLE
    assert "canary" not in refusal.value.message
    assert len(hub.requests) == 1, "asking again would show the same page"


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("token", [None, "hf_other"])
def test_a_file_that_the_hub_refuses_is_a_question_of_access(
    hub: Hub, tmp_path: Path, status: int, token: str | None
) -> None:
    hub.repos["models/acme/tiny"] = HubRepo(MODEL, refused={"model.safetensors": status})
    secret = _secret(tmp_path / "secret", token) if token else None
    with pytest.raises(TrainerError, match=f"hub refused .*HTTP {status}") as refusal:
        fetch_model("hf://acme/tiny", None, tmp_path / "base", _access(hub, secret, PATIENT), ignore_bytes)
    assert refusal.value.reason is FailureReason.MODEL_ACCESS_DENIED
    assert ("without a token" in refusal.value.message) == (token is None)


def test_a_small_file_that_was_cut_is_seen(hub: Hub, tmp_path: Path) -> None:
    hub.repos["models/acme/tiny"] = HubRepo(MODEL | {"config.json": b'{"a": 1}'}, damaged={"config.json": b"{}"})
    with pytest.raises(TrainerError, match=r"config.json arrived with 2 bytes, but its source lists 8") as refusal:
        _model(hub, tmp_path / "base")
    assert refusal.value.reason is FailureReason.HUB_UNAVAILABLE


def test_the_hub_says_how_long_to_wait(hub: Hub, tmp_path: Path) -> None:
    hub.repos["models/acme/tiny"] = HubRepo(MODEL)
    hub.failures, hub.retry_after = [429], "1"
    begun = time.monotonic()
    fetch_model("hf://acme/tiny", None, tmp_path / "base", _access(hub, None, PATIENT), ignore_bytes)
    assert time.monotonic() - begun >= 1

    hub.failures, hub.retry_after = [429], "3600"
    with pytest.raises(TrainerError, match="HTTP 429"):
        fetch_model("hf://acme/tiny", None, tmp_path / "base", _access(hub, None, PATIENT), ignore_bytes)
