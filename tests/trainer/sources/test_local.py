"""pvc:// and file:// sources: used in place, and only inside their claim."""

from pathlib import Path

import pytest

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError
from finetune_trainer.sources import SourceAccess, fetch_dataset, fetch_model
from finetune_trainer.storage.object_store import ignore_bytes


@pytest.fixture
def claim(tmp_path: Path) -> Path:
    folder = tmp_path / "claim"
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text("{}")
    (folder / "base" / "model.safetensors").write_bytes(b"weights")
    (folder / "chat.jsonl").write_text("{}\n")
    return folder


def test_a_claim_is_read_where_it_is_mounted(claim: Path, tmp_path: Path) -> None:
    access = SourceAccess(mount=claim)
    model = fetch_model("pvc://data/base", None, tmp_path / "base", access, ignore_bytes)
    data = fetch_dataset("pvc://data/chat.jsonl", "train", tmp_path / "data", access, ignore_bytes)
    assert model.folder == claim / "base"
    assert data.files == (claim / "chat.jsonl",)
    assert list((tmp_path / "base").iterdir()) == []


def test_a_path_of_this_machine_and_a_claim_have_the_same_digest(claim: Path, tmp_path: Path) -> None:
    there = fetch_model("pvc://data/base", None, tmp_path / "a", SourceAccess(mount=claim), ignore_bytes)
    here = fetch_model(f"file://{claim}/base", None, tmp_path / "b", SourceAccess(), ignore_bytes)
    assert here.digest == there.digest


@pytest.mark.parametrize("leads_by", ["a file", "a folder", "a link to a link", "a relative path"])
def test_a_link_out_of_the_claim_is_refused_with_its_name(claim: Path, tmp_path: Path, leads_by: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/rows.jsonl").write_text("token\n")
    (claim / "data").mkdir()
    (claim / "data/own.jsonl").write_text("{}\n")
    name, target = "link.jsonl", tmp_path / "outside/rows.jsonl"
    if leads_by == "a folder":
        name, target = "link", tmp_path / "outside"
    if leads_by == "a link to a link":
        (claim / "hop.jsonl").symlink_to(target)
        target = claim / "hop.jsonl"
    if leads_by == "a relative path":
        target = Path("../../outside/rows.jsonl")
    (claim / "data" / name).symlink_to(target)
    source = "pvc://data/data" if leads_by != "a folder" else "pvc://data/data/link/rows.jsonl"
    with pytest.raises(TrainerError, match=r"(link|rows)\.jsonl is a link that leads out of the claim") as refusal:
        fetch_dataset(source, "train", tmp_path / "work", SourceAccess(mount=claim), ignore_bytes)
    assert refusal.value.reason is FailureReason.DATASET_NOT_FOUND
    here = fetch_dataset(f"file://{claim}/data", "train", tmp_path / "here", SourceAccess(), ignore_bytes)
    assert claim / "data/own.jsonl" in here.files, "a user's own machine has no claim to lead out of"


def test_a_link_out_of_the_claim_that_nothing_uses_does_no_harm(claim: Path, tmp_path: Path) -> None:
    (claim / "notes.txt").symlink_to("/etc/hostname")
    (claim / "more").mkdir()
    (claim / "more/rows.jsonl").write_text("{}\n")
    (claim / "more/python").symlink_to("/usr/bin/env")
    found = fetch_dataset("pvc://data/more", "train", tmp_path / "work", SourceAccess(mount=claim), ignore_bytes)
    assert [path.name for path in found.files] == ["rows.jsonl"]


def test_a_link_inside_the_claim_is_followed(claim: Path, tmp_path: Path) -> None:
    """The Hugging Face cache is built of such links."""
    (claim / "cached").mkdir()
    for name in ("config.json", "model.safetensors"):
        (claim / "cached" / name).symlink_to(claim / "base" / name)
    found = fetch_model("pvc://data/cached", None, tmp_path / "base", SourceAccess(mount=claim), ignore_bytes)
    assert [path.name for path in found.files] == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("uri", ["pvc://data/nothing", "file:///no/such/folder"])
def test_what_is_missing_is_named(claim: Path, tmp_path: Path, uri: str) -> None:
    with pytest.raises(TrainerError, match=f"{uri} does not exist") as refusal:
        fetch_model(uri, None, tmp_path / "base", SourceAccess(mount=claim), ignore_bytes)
    assert refusal.value.reason is FailureReason.MODEL_NOT_FOUND


def test_a_claim_needs_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="use file://") as refusal:
        fetch_model("pvc://data/base", None, tmp_path / "base", SourceAccess(), ignore_bytes)
    assert refusal.value.reason is FailureReason.INVALID_CONFIGURATION
