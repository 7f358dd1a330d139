"""GGUF files of an adapter are called after the job that made it."""

import argparse
from pathlib import Path

import pytest

from finetune_trainer.cli.export_arguments import add_export_arguments, check_export_arguments


def name_of(*words: str) -> str:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_export_arguments(parser)
    options, unknown = parser.parse_known_args([*words, "--output", "out", "--gguf", "F16"])
    return check_export_arguments(options, unknown).name


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        ("s3://models/team/support-bot/attempts/3f2a/adapter/", "support-bot"),
        ("results/support-bot/attempts/3f2a/adapter", "support-bot"),
        ("hf://acme/adapter", "base"),
        ("elsewhere/adapter", "base"),
    ],
)
def test_a_result_gives_its_jobs_name_and_anything_else_the_bases(
    adapter: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "://" not in adapter:
        Path(adapter).mkdir(parents=True)
    assert name_of("--base", "hf://acme/base", "--adapter", adapter) == name
    assert name_of("--base", "hf://acme/base", "--adapter", adapter, "--name", "mine") == "mine"


def test_the_link_in_a_jobs_folder_counts_as_well(tmp_path: Path) -> None:
    job = tmp_path / "support-bot"
    (job / "attempts/3f2a/adapter").mkdir(parents=True)
    (job / "manifest.json").touch()
    (job / "adapter").symlink_to("attempts/3f2a/adapter")
    assert name_of("--base", "hf://acme/base", "--adapter", str(job / "adapter")) == "support-bot"
