"""Base models as a newcomer brings them: without tokenizer files, without a chat template, with rows that they cannot
read. Each is refused or warned of by name before training."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune_api.run_config import RunConfig
from finetune_test_models.family_models import make_family_model
from finetune_trainer.job.settings import Settings
from finetune_trainer.preflight.checks import run_preflight
from finetune_trainer.preflight.report import Finding, Report

Build = Callable[..., RunConfig]
ANSWERS = ("yes, of course", "no, never")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A tiny Gemma 3 base model: the family's control tokens, no chat template."""
    folder = make_family_model("gemma-3", tmp_path_factory.mktemp("gemma"), texts)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture
def without_tokenizer(gemma: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "without"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(gemma / name, folder / name)
    return folder


def write(path: Path, *rows: dict[str, Any]) -> dict[str, str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": f"file://{path}"}


def exchanges(*answers: str) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]


def check(config: RunConfig, settings: Settings) -> tuple[Report, list[Finding]]:
    report, _ = run_preflight(config, settings)
    return report, list(report.errors())


@pytest.mark.parametrize("template", [{}, {"chatTemplateName": "Gemma"}], ids=["no template", "a named template"])
def test_a_folder_without_a_tokenizer_is_refused_by_name(
    run_config: Build, settings: Settings, without_tokenizer: Path, tmp_path: Path, template: dict[str, str]
) -> None:
    data = write(tmp_path / "rows.jsonl", *exchanges(*ANSWERS))
    config = run_config(model={"source": f"file://{without_tokenizer}", **template}, dataset=data)
    _, [error] = check(config, settings)
    assert (error.location, error.reason) == ("spec.model.source", "ModelNotFound")
    assert "has no tokenizer (tokenizer.json, tokenizer.model)" in error.message


def test_one_exchange_without_a_template_is_refused_and_the_fitting_template_named(
    run_config: Build, settings: Settings, gemma: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", *exchanges(*ANSWERS))
    source = {"source": f"file://{gemma}"}
    _, [error] = check(run_config(model=source, dataset=data), settings)
    assert (error.location, error.reason) == ("spec.model.chatTemplate", "ChatTemplateMissing")
    assert "set spec.model.chatTemplateName: Gemma, whose control tokens the tokenizer has" in error.message

    named = run_config(model={**source, "chatTemplateName": "Gemma"}, dataset=data)
    report, errors = check(named, settings)
    assert errors == []
    assert "<end_of_turn>" in "".join(span.text for span in report.samples[0].spans)


def test_a_prompt_and_its_completion_need_no_template(
    run_config: Build, settings: Settings, gemma: Path, tmp_path: Path
) -> None:
    data = write(
        tmp_path / "rows.jsonl", {"prompt": "Q: why?\nA:", "completion": " so"}, {"prompt": "a", "completion": "b"}
    )
    report, errors = check(run_config(model={"source": f"file://{gemma}"}, dataset=data), settings)
    assert errors == []
    assert [span.text for span in report.samples[0].spans if span.supervised] == [" so<eos>"]


@pytest.fixture
def of_few_words(tiny_base: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer knows English words only; all others are <unk>."""
    folder = shutil.copytree(tiny_base, tmp_path / "words")
    words = ["<unk>", "<end>", "<user>", "<assistant>", *["yes", "no", "why", "of", "course", "never"], ",", "?"]
    known = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    for path in folder.glob("*token*"):
        path.unlink()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # Hugging Face
        tokenizer_object=known,
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("answers", "severity", "part"),
    [
        (ANSWERS, None, ""),
        ([*ANSWERS, "yes, tomorrow"], "Warning", "3.6% of the rows' tokens are unknown"),
        (
            ["ja klar doch immer wieder gern sagte er und ging davon"] * 2,
            "Error",
            "100.0% of the encoded rows are mostly",
        ),
    ],
    ids=["known words", "one unknown word", "another language"],
)
def test_words_that_the_tokenizer_does_not_know(
    run_config: Build, settings: Settings, of_few_words: Path, tmp_path: Path,
    answers: list[str], severity: str | None, part: str,
) -> None:  # fmt: skip
    data = write(tmp_path / "rows.jsonl", *exchanges(*answers))
    report, _ = check(run_config(model={"source": f"file://{of_few_words}"}, dataset=data), settings)
    found = [finding for finding in report.findings if "know" in finding.message]
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    assert part in "".join(finding.message for finding in found)


@pytest.mark.parametrize(
    ("lost", "severity", "part"),
    [
        (0, None, ""),
        (1, "Warning", "50.0% of the rows to evaluate on are left out: no answer starts within 128 tokens"),
        (2, "Error", "no token with loss is left within 128 tokens in any of 2 rows to evaluate on"),
    ],
)
def test_rows_to_evaluate_on_that_lose_every_answer(
    run_config: Build, settings: Settings, tmp_path: Path, lost: int, severity: str | None, part: str
) -> None:
    long = {"messages": [{"role": "user", "content": "x " * 500}, {"role": "assistant", "content": "yes"}]}
    rows = [*[long] * lost, *exchanges("perhaps", "later")[lost:]]
    data = write(tmp_path / "rows.jsonl", *exchanges(*ANSWERS))
    evaluation = write(tmp_path / "held-out.jsonl", *rows)
    report, _ = check(run_config(dataset={**data, "evaluation": evaluation}), settings)
    found = [finding for finding in report.findings if finding.location == "spec.dataset.evaluation"]
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    assert part in "".join(finding.message for finding in found)
