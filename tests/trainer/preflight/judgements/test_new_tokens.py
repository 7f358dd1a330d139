"""What preflight says of new tokens: what they make of the model, what is refused, and which learn nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from finetune_api.run_config import RunConfig
from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import Parallelism
from finetune_test_models.family_models import make_family_model
from finetune_test_models.minimal_run import minimal_run
from finetune_test_models.tiny_model import make_tiny_model
from finetune_trainer.chat.new_tokens import add_new_tokens, check_growable, grown_rows
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.settings import Settings
from finetune_trainer.preflight.checks import run_preflight
from finetune_trainer.preflight.memory.plans import Plans
from finetune_trainer.preflight.report import Report

Build = Callable[..., RunConfig]
FIELD = "spec.model.newTokens"


def rows(tmp_path: Path, *answers: str) -> dict[str, Any]:
    path = tmp_path / "rows.jsonl"
    chats = [[{"role": "user", "content": "and?"}, {"role": "assistant", "content": text}] for text in answers]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return {"source": f"file://{path}"}


def said(report: Report) -> list[tuple[str, str]]:
    return [(each.location, each.message) for each in report.findings if each.location == FIELD]


def check(run_config: Build, settings: Settings, base: Path, data: dict[str, Any], *tokens: str) -> Report:
    model = {"source": f"file://{base}", "maxSequenceLength": 128, "newTokens": list(tokens)}
    return run_preflight(run_config(model=model, dataset=data, export={"merged": "BF16", "gguf": ["F16"]}), settings)[0]


def test_a_good_list_says_what_trains_and_what_grows(
    run_config: Build, settings: Settings, tiny_base: Path, tmp_path: Path
) -> None:
    report = check(run_config, settings, tiny_base, rows(tmp_path, "<note>yes", "no<end>"), "<note>", "<end>")
    assert not report.errors()
    assert said(report) == []
    assert report.new_tokens == (
        "rows 512 to 513 of embedding and head train beside the adapter; the vocabulary grows from 512 to 576 rows"
    )


def test_tokens_that_nothing_uses_are_named(
    run_config: Build, settings: Settings, tiny_base: Path, tmp_path: Path
) -> None:
    report = check(run_config, settings, tiny_base, rows(tmp_path, "<note>yes"), "<note>", "<never>", "<nowhere>")
    ((_, message),) = said(report)
    assert message.startswith("<never>, <nowhere> occur in no row and not in the chat template")
    assert not report.errors()


def test_a_text_that_is_one_token_already_is_refused(
    run_config: Build, settings: Settings, tiny_base: Path, tmp_path: Path
) -> None:
    report = check(run_config, settings, tiny_base, rows(tmp_path, "<note>"), "<note>", "<|im_end|>", "a")
    ((_, message),) = said(report)
    assert "already has '<|im_end|>' (id 2), 'a' (id " in message
    assert [error.location for error in report.errors()] == [FIELD]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<a>", "<a>"], "each new token once"),
        ([""], "at least 1 character"),
        (["  "], "without spaces at its ends"),
        (["<a> "], "without spaces at its ends"),
        (["a\nb"], "of one line"),
        (["x" * 129], "at most 128"),
        ([f"<{number}>" for number in range(513)], "at most 512"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused_where_they_are_written(tokens: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec(source="hf://a/b", new_tokens=tuple(tokens))


def test_models_whose_vocabulary_is_more_than_embedding_and_head_are_refused() -> None:
    usual = {"model.embed_tokens.weight", "lm_head.weight"}
    check_growable({}, usual)
    check_growable({}, None)
    for config, names, problem in (
        ({"hidden_size_per_layer_input": 256}, usual, "in each of its layers"),
        ({}, {"transformer.wte.weight"}, "under another name"),
        ({}, usual | {"lm_head.bias"}, "a bias for every token"),
    ):
        with pytest.raises(TrainerError, match=problem):
            check_growable(config, names)


def test_ids_that_would_overlap_are_refused(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", texts=["one two three"])
    description = json.loads((base / "tokenizer.json").read_text())
    vocabulary = description["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] = len(vocabulary) + 3  # a gap of ids
    (base / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [f"<{number}>" for number in range(8)]
    with pytest.raises(TrainerError, match="have gaps"):
        add_new_tokens(tokenizer, texts)


def test_rows_grow_to_multiples_of_64_and_only_if_they_must() -> None:
    assert grown_rows(100, []) == 100
    assert grown_rows(100, [98, 99]) == 100
    assert grown_rows(100, [99, 100]) == 128
    assert grown_rows(128_256, range(128_256, 128_259)) == 128_320


def test_the_memory_plan_counts_the_rows() -> None:
    llama = AutoConfig.for_model("llama", tie_word_embeddings=False)
    without, having = (
        Plans.of(minimal_run(model={"newTokens": tokens}), llama, Parallelism.REPLICATED)
        for tokens in ([], ["<a>", "<b>", "<c>"])
    )
    assert without is not None
    assert having is not None
    rows = 2 * 3 * llama.hidden_size
    assert having.shape.adapter_parameters - without.shape.adapter_parameters == rows
    assert (without.shape.movable_bytes > 0, having.shape.movable_bytes) == (True, 0)


def test_a_base_model_that_gets_the_markers_of_its_template_is_not_warned_of(
    run_config: Build, settings: Settings, tmp_path: Path, texts: list[str]
) -> None:
    base = make_family_model("llama-linear", tmp_path / "pt", texts)  # no marker of ChatML is a token
    settings_file = base / "tokenizer_config.json"
    described = json.loads(settings_file.read_text())
    described.pop("chat_template")
    settings_file.write_text(json.dumps(described))
    data = rows(tmp_path, *(f"<note>answer {number}" for number in range(8)))

    def warned(template: str, *tokens: str) -> bool:
        model = {"source": f"file://{base}", "chatTemplateName": template, "maxSequenceLength": 128}
        config = run_config(model=model | {"newTokens": list(tokens)}, dataset=data)
        report = run_preflight(config, settings)[0]
        assert not report.errors()
        return any("looks like a base model" in each.message for each in report.findings)

    assert warned("Vicuna", "<note>"), "a token that the template does not write"
    assert not warned("ChatML", "<|im_start|>", "<|im_end|>", "<note>")
