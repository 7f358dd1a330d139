"""`finetune export` as a user calls it: from folders and from S3, every error at once, nothing left behind."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune_test_models.taught_runs import Taught, taught_chats
from finetune_test_servers.s3_server import S3Server
from finetune_trainer.cli import export as command
from finetune_trainer.cli.export_arguments import ExportArguments
from finetune_trainer.export.export import ExportRequest, export

Finetune = Callable[..., subprocess.CompletedProcess[str]]
MakeAdapter = Callable[..., Path]


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_folders_give_the_same_bytes_as_the_jobs_own_stage(
    finetune: Finetune, make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    adapter, output = make_adapter(tiny_base, tmp_path / "adapter"), tmp_path / "out"
    done = finetune(
        *("export", "--base", tiny_base, "--adapter", adapter, "--output", output, "--name", "mine"),
        *("--merged", "BF16", "--gguf", "Q8_0", "--gguf", "F16", "--device", "cpu"),
    )
    assert done.returncode == 0, done.stderr
    for part in ("merged/", "gguf/mine-Q8_0.gguf", "gguf/mine-F16.gguf", "GB/s"):
        assert part in done.stdout
    request = ExportRequest(tiny_base, adapter, tmp_path / "stage", "BF16", ("Q8_0", "F16"), "mine")
    stage = export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
    assert files_below(output) == files_below(tmp_path / "stage")
    for file in stage:
        assert (output / file.path.relative_to(tmp_path / "stage")).read_bytes() == file.path.read_bytes()
    merged = load_file(output / "merged/model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    base = load_file(tiny_base / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(merged, base), "the adapter changed nothing: the comparison above would prove little"


def test_sources_in_s3_are_read_with_the_named_credentials(
    finetune_here: Finetune, make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, s3_server: S3Server
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter")
    client, secret = s3_server.client(), tmp_path / "secret"
    client.create_bucket(Bucket="exported")
    for folder, prefix in ((tiny_base, "base"), (adapter, "adapter")):
        for path in folder.iterdir():
            client.upload_file(str(path), "exported", f"{prefix}/{path.name}")
    secret.mkdir()
    (secret / "AWS_ACCESS_KEY_ID").write_text(s3_server.access_key)
    (secret / "AWS_SECRET_ACCESS_KEY").write_text(s3_server.secret_key)
    words = ("export", "--base", "s3://exported/base/", "--adapter", "s3://exported/adapter/", "--gguf", "Q8_0")
    place = ("--endpoint-url", s3_server.endpoint_url, "--credentials", secret, "--output", tmp_path / "out")
    done = finetune_here(*words, *place)
    assert done.returncode == 0, done.stderr
    assert "gguf/base-Q8_0.gguf" in files_below(tmp_path / "out")
    assert not [name for name in files_below(tmp_path / "out") if not name.startswith("gguf/")], "downloads stayed"
    assert s3_server.secret_key not in done.stdout + done.stderr

    absent = finetune_here("export", "--base", "s3://exported/no-such/", "--gguf", "Q8_0", *place)
    assert absent.returncode == 12
    assert "ModelNotFound: s3://exported/no-such/ holds no files" in absent.stderr


def test_every_wrong_argument_is_named_at_once(finetune: Finetune, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = finetune(
        *("export", "--base", tmp_path / "absent", "--adapter", "pvc://claim/adapter", "--merged", "INT3"),
        *("--gguf", "Q9_9", "--gguf", "F16", "--gguf", "F16", "--output", tmp_path / "file", "--name", "a/b"),
        *("--device", "tpu", "--credentials", tmp_path / "none", "--revision", "v1", "--typo", "--region"),
    )
    assert done.returncode == 10
    for part in (
        "--base: ",
        "--adapter: found 'pvc://claim/adapter'",
        "--merged: found 'INT3': choose BF16 or FP16",
        "--gguf: found 'Q9_9'",
        "--gguf: F16 is given twice",
        "--output: ",
        "--name: found 'a/b'",
        "--device: found 'tpu'",
        "--credentials: ",
        "--typo: no such argument",
        "--region: needs a value",
    ):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    nothing = finetune("export")
    assert "--base is required" in nothing.stderr
    assert "nothing to export" in nothing.stderr


def test_a_base_that_cannot_be_exported_leaves_nothing(
    finetune_here: Finetune, make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", use_dora=True)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": true', '"use_dora": false'))
    words = ("export", "--base", tiny_base, "--output", tmp_path / "out", "--gguf", "F16")
    done = finetune_here(*words, "--adapter", adapter)
    assert done.returncode == 10
    assert "InvalidConfiguration" in done.stderr
    assert not files_below(tmp_path / "out")
    assert finetune_here(*words).returncode == 0, "the base alone can be exported"


def test_rows_measure_what_each_file_keeps_of_the_training(
    taught: Taught, finetune: Finetune, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in taught_chats(8)))
    words = ("--base", tiny_base, "--adapter", taught.found["Adapter"].uri, "--output", tmp_path / "out")
    done = finetune("export", *words, "--gguf", "Q8_0", "--gguf", "Q2_K", "--device", "cpu", "--rows", rows)
    assert done.returncode == 0, done.stderr
    losses = taught.measure()
    assert f"loss of the base {losses.base:.4f}, of the merged model {losses.merged:.4f}" in done.stderr
    found = dict(re.findall(r"-(Q\w+)\.gguf .*│ +(\d+)% │", done.stdout))
    assert found["Q8_0"] == "100"
    assert 90 < int(found["Q2_K"]) < 100
    assert "warning" not in done.stderr


def test_files_that_nobody_judged_are_said_and_bad_rows_are_refused_before_the_work(
    finetune_here: Finetune, tiny_base: Path, tmp_path: Path
) -> None:
    words = ("export", "--base", tiny_base, "--output", tmp_path / "out", "--gguf", "Q8_0", "--device", "cpu")
    assert "--rows" in finetune_here(*words).stderr
    (tmp_path / "bad.jsonl").write_text('{"messages": 7}\n')
    (tmp_path / "out" / "gguf").rename(tmp_path / "before")
    done = finetune_here(*words, "--rows", tmp_path / "bad.jsonl")
    assert done.returncode != 0
    assert "bad.jsonl:1" in done.stderr
    assert not list((tmp_path / "out").rglob("*.gguf"))


@pytest.mark.parametrize(("at", "says"), [("judge_files", "written and complete: "), ("export", "nothing was written")])
def test_ctrl_c_says_what_is_there(
    at: str,
    says: str,
    tiny_base: Path,
    chat_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, at, press)
    arguments = ExportArguments(
        base=f"file://{tiny_base}",
        revision=None,
        adapter=None,
        output=tmp_path / "out",
        merged="BF16",
        gguf=("F16",),
        name="mine",
        device="cpu",
        credentials=None,
        endpoint_url=None,
        region=None,
        rows=chat_file,
    )
    gguf, old = tmp_path / "out/gguf/mine-F16.gguf", tmp_path / "out/gguf/mine-Q8_0.gguf"
    old.parent.mkdir(parents=True)
    old.touch()
    assert command.export_here(arguments) == 130
    printed = capsys.readouterr().err
    assert says in printed
    assert (str(gguf) in printed) == gguf.exists() == (at == "judge_files")
    assert (str(tmp_path / "out/merged") in printed) == (at == "judge_files")
    assert str(old) not in printed, "an older file is none of its outputs"
