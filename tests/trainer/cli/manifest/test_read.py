"""The job of a local run: from a manifest, from options, or from both; what people write as a source."""

import argparse
from pathlib import Path

import pytest

from finetune_trainer.cli.manifest import read
from finetune_trainer.cli.manifest.options import Change, add_field_options
from finetune_trainer.cli.manifest.read import InvalidManifestError, LocalJob, read_job
from finetune_trainer.cli.manifest.sources import complete_source

MANIFEST = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: mine}
spec:
  model: {source: org/model}
  dataset: {source: rows.jsonl}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "rows.jsonl").write_text("{}")
    return tmp_path


def changes(*words: str) -> list[Change]:
    parser = argparse.ArgumentParser()
    add_field_options(parser)
    return list(parser.parse_args(words).changes)


def from_options(*words: str, needs_bucket: bool = False) -> LocalJob:
    return read_job(None, changes(*words), needs_bucket=needs_bucket)


@pytest.mark.parametrize(
    ("text", "is_model", "uri"),
    [
        ("org/name", True, "hf://org/name"),
        ("org/name", False, "hf://org/name"),
        ("rows.jsonl", False, "file://{cwd}/rows.jsonl"),
        ("data/absent.jsonl.gz", False, "file://{cwd}/data/absent.jsonl.gz"),
        ("org/name.json", True, "hf://org/name.json"),
        ("./x", True, "file://{cwd}/x"),
        ("../x/", False, "file://{parent}/x/"),
        ("~/models/x", True, "file://{cwd}/home/models/x"),
        ("/models/x", True, "file:///models/x"),
        ("here/model", True, "file://{cwd}/here/model"),
        ("s3://bucket/x", True, "s3://bucket/x"),
        ("gpt2", True, "gpt2"),
    ],
)
def test_a_source_becomes_a_uri(folder: Path, text: str, is_model: bool, uri: str) -> None:
    (folder / "here/model").mkdir(parents=True)
    found = complete_source(text, folder, is_model=is_model)
    assert found == uri.format(cwd=folder, parent=folder.parent)


def test_options_alone_make_a_job(folder: Path) -> None:
    found = from_options(
        *("--model", "org/Base-0.6B", "--data", "rows.jsonl", "--max-steps", "5", "--learning-rate", "1e-3"),
        *("--gguf", "F16", "--gguf", "Q4_K_M", "--eval", "0.1", "--set", "spec.training.batchSize=4"),
    )
    spec = found.job.spec
    assert spec.model.source == "hf://org/Base-0.6B"
    assert spec.dataset.source == f"file://{folder}/rows.jsonl"
    assert (spec.training.max_steps, spec.training.learning_rate, spec.training.batch_size) == (5, 1e-3, 4)
    assert list(spec.export.gguf) == ["F16", "Q4_K_M"]
    assert spec.dataset.evaluation is not None
    assert found.job.metadata.name == "base-0-6b-rows"
    assert found.notes[0] == "the job's name is base-0-6b-rows; --name gives another"


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_job_of_options_takes_the_device_of_the_machine_and_says_so(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    monkeypatch.setattr(read, "has_nvidia_gpu", lambda: has_gpu)
    found = from_options("--model", "org/model", "--data", "rows.jsonl")
    assert found.job.spec.resources.gpus == int(has_gpu)
    assert ("this machine has no NVIDIA GPU, so the job trains on the CPU" in found.notes) is not has_gpu


def test_options_are_written_over_a_manifest(folder: Path) -> None:
    (folder / "job.yaml").write_text(MANIFEST)
    found = read_job(folder / "job.yaml", changes("--rank", "8"), needs_bucket=False)
    assert found.job.spec.adapter.rank == 8
    assert found.job.spec.resources.gpus == 1, "a manifest says itself where it trains"
    assert [note.partition(":")[0] for note in found.cluster_notes] == [
        "spec.model.source",
        "spec.dataset.source",
        "spec.output.s3.bucket",
    ]


def errors(text: str | bytes, *words: str, needs_bucket: bool = False) -> tuple[str, ...]:
    Path("job.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidManifestError) as found:
        read_job(Path("job.yaml"), changes(*words), needs_bucket=needs_bucket)
    return found.value.errors


def test_an_error_is_at_its_line_or_at_its_option() -> None:
    text = MANIFEST.replace("rows.jsonl", "absent.jsonl") + "  training:\n    batch_size: 2\n"
    absent = "found 'absent.jsonl': there is no such file or folder on this machine"
    assert errors(text, "--rank", "0") == (
        "--rank: spec.adapter.rank: found 0: it should be greater than or equal to 1",
        f"job.yaml:6: spec.dataset.source: {absent} ({Path.cwd()}/absent.jsonl)",
        "job.yaml:8: spec.training.batch_size: there is no such field; did you mean batchSize?",
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "job.yaml: the file is empty; `finetune init` writes one to begin with"),
        ("- a", "job.yaml: the file is no manifest; `finetune init` writes one to begin with"),
        (b"a: \xff", "job.yaml: byte 3 is not UTF-8: save the file as UTF-8"),
        (
            "a: 1\nb:\n\t- c",
            "job.yaml:3: while scanning for the next token found character '\\t' that cannot start any token",
        ),
        ("a: 1\n---\nb: 2", "job.yaml:2: expected a single document in the stream but found another document"),
    ],
    ids=["empty", "a list", "Latin-1", "a tab", "two documents"],
)
def test_a_file_that_is_no_manifest_is_explained(text: str | bytes, line: str) -> None:
    assert errors(text) == (line,)


def test_without_a_folder_for_the_results_a_bucket_is_needed() -> None:
    line = "job.yaml:4: spec.output.s3.bucket: is required: write the bucket, or give --output DIR for a folder"
    assert errors(MANIFEST, needs_bucket=True) == (line,)


@pytest.mark.parametrize("name", ["../elsewhere", "Mine", "a" * 64])
def test_a_name_that_a_cluster_refuses_is_refused_here(name: str) -> None:
    (line,) = errors(MANIFEST.replace("mine", name))
    assert line.startswith(f"job.yaml:3: metadata.name: found '{name}': write at most 63 lower-case letters")


def test_options_that_are_missing_are_named() -> None:
    with pytest.raises(InvalidManifestError) as found:
        from_options("--rank", "8")
    assert found.value.errors == ("--model: spec.model: is required", "--data: spec.dataset: is required")
