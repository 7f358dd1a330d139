"""`finetune chat` answers with every form in which a job publishes its model, alone and beside the base."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_test_models.taught_runs import ANSWER_END, Taught, taught_chats
from finetune_trainer.cli.chat.command import chat_here
from finetune_trainer.cli.chat.find_model import BaseSource, Kind, find_model
from finetune_trainer.cli.finetune import parse

QUESTION = taught_chats(1)[0][0]["content"]


def chat(*words: str | Path) -> int:
    return chat_here(parse(["chat", "--device", "cpu", "--max-tokens", "80", *map(str, words)])[1])


@pytest.fixture(params=["output folder", "job's folder", "merged", "adapter", "GGUF", "downloaded"])
def result(request: pytest.FixtureRequest, taught: Taught, tmp_path: Path) -> Path:
    found = taught.found
    if request.param == "downloaded":
        shutil.copytree(Path(found["Adapter"].uri).parent, tmp_path / "got")
        shutil.rmtree(tmp_path / "got" / "adapter")
        return tmp_path / "got"
    return {
        "output folder": taught.folder,
        "job's folder": taught.folder / "tiny",
        "merged": Path(found["Merged"].uri),
        "adapter": Path(found["Adapter"].uri),
        "GGUF": Path(found["Q4_K_M"].uri),
    }[request.param]


def test_every_form_answers_in_the_taught_format_and_stops(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(result, "--prompt", QUESTION) == 0
    answer = capsys.readouterr().out.strip()
    assert answer.startswith("<answer>")
    assert answer.endswith(ANSWER_END)


def test_a_lone_gguf_file_needs_nothing_else(
    taught: Taught, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copy(taught.found["Q8_0"].uri, tmp_path / "alone.gguf")
    assert chat(path, "--prompt", QUESTION) == 0
    assert capsys.readouterr().out.strip().endswith(ANSWER_END)


@pytest.mark.parametrize("kind", ["job's folder", "GGUF"])
def test_before_and_after_are_side_by_side(
    taught: Taught, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.cli.chat.command.answers._width", 200)
    result = taught.folder if kind == "job's folder" else taught.found["Q8_0"].uri
    assert chat(result, "--prompt", QUESTION, "--compare", "--max-tokens", "30") == 0
    shown = capsys.readouterr().out
    head, *rows = [line for line in shown.splitlines() if "┃" in line or "│" in line]
    assert "base" in head
    assert "fine-tuned" in head
    before = "".join(row.split("│")[1].strip() for row in rows)
    after = "".join(row.split("│")[2].strip() for row in rows)
    assert after.startswith("<answer>")
    assert not before.startswith("<answer>")


def test_the_console_script_answers_piped_text(taught: Taught) -> None:
    program = Path(sys.executable).parent / "finetune"
    words = [program, "chat", taught.folder, "--device", "cpu", "--max-tokens", "80"]
    done = subprocess.run(
        words, input=QUESTION + "\n", capture_output=True, text=True, check=False, timeout=120, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(ANSWER_END)
    assert "model folder" in done.stderr, "what it talks to is said, beside the answer"


def test_a_conversation_goes_on_and_can_begin_anew(
    taught: Taught, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter([QUESTION, "/new", QUESTION])
    seen: list[int] = []

    def ask(_: str) -> str:
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None

    from finetune_trainer.cli.chat.speaker import Speaker

    whole = Speaker._encode
    monkeypatch.setattr(Speaker, "_encode", lambda self, messages: seen.append(len(messages)) or whole(self, messages))
    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert chat(taught.folder, "--system", "Be brief.") == 0
    assert capsys.readouterr().out.count("<answer>") == 2
    assert seen == [2, 2], "system and question; /new forgets the first question and its answer"


def test_what_cannot_be_talked_to_is_said_with_what_to_give(
    taught: Taught, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert chat(tmp_path / "empty", "--prompt", "x") != 0
    assert "manifest.json" in capsys.readouterr().err
    assert chat(tmp_path / "nothing", "--prompt", "x") != 0
    assert "there is no" in capsys.readouterr().err
    assert chat("s3://bucket/job/", "--prompt", "x") != 0
    assert "finetune artifacts s3://bucket/job/ --download" in capsys.readouterr().err

    adapter = tmp_path / "adapter"
    shutil.copytree(taught.found["Adapter"].uri, adapter)
    config = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(config.replace('"base_model_name_or_path": "', '"x": "'))
    assert chat(adapter, "--prompt", "x") != 0
    assert "--base" in capsys.readouterr().err
    found = find_model(str(adapter), "org/name", compare=False)
    assert (found.kind, found.base) == (Kind.ADAPTER, BaseSource("hf://org/name"))
