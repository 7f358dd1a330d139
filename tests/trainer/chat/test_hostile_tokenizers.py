"""Tokenizer files that run code, are damaged or are something else: a reason, and nothing is run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetune_api.spec.inputs import DatasetSpec, ModelSpec
from finetune_api.vocabulary import TrainOn
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.data.layouts import Conversation, PlainText
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.description import embedding_rows, load_configuration, load_tokenizer
from finetune_trainer.preflight.scan import scan_rows

Change = Callable[[Path], object]
SPEC = ModelSpec.model_validate({"source": "s3://models/base/"})
CHAT = Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def configured(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def written(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def with_code(folder: Path) -> None:
    configured(auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")


def with_negative_id(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][0]["id"] = -1
    (folder / "tokenizer.json").write_text(json.dumps(content))


REFUSED: dict[str, tuple[Change, str]] = {
    "code of the repository": (with_code, "contains custom code"),
    "a tokenizer that is no JSON": (written("tokenizer.json", b"{"), "no usable tokenizer"),
    "a tokenizer that is a list": (written("tokenizer.json", b"[]"), "no usable tokenizer"),
    "an empty tokenizer": (written("tokenizer.json", b""), "no usable tokenizer"),
    "a pickle": (written("tokenizer.json", b"\x80\x04\x95"), "no usable tokenizer"),
    "a token with a negative id": (with_negative_id, "no usable tokenizer: invalid value"),
    "a configuration that is a list": (written("tokenizer_config.json", b"[]"), "no usable tokenizer"),
    "a deep configuration": (written("tokenizer_config.json", b"[" * 100_000), "no usable tokenizer"),
    "a special token that is a list": (configured(eos_token=["a"]), "no usable tokenizer"),
    "a template that is no UTF-8": (written("chat_template.jinja", b"\xff\xfe"), "no usable tokenizer"),
    "a template that is a number": (configured(chat_template=7), "chat template"),
    "templates that are no text": (configured(chat_template=[{"name": "default", "template": 7}]), "chat template"),
}


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    skipped = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(tiny_base, tmp_path / "base", ignore=skipped))


@pytest.mark.parametrize(("change", "pattern"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_tokenizer_has_a_reason(folder: Path, change: Change, pattern: str) -> None:
    load_tokenizer(folder, SPEC)
    change(folder)
    with pytest.raises(TrainerError, match=pattern):
        load_tokenizer(folder, SPEC)
    assert not (folder / "ran").exists()


def test_a_tokenizer_with_words_beyond_the_embedding_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    with pytest.raises(TrainerError, match=r"has id 500 and 11 more.*embedding has 500 rows") as refusal:
        load_tokenizer(folder, SPEC)
    assert refusal.value.reason == "InvalidConfiguration"


def test_a_special_token_beyond_the_embedding_matters_only_where_it_is_written(folder: Path, tmp_path: Path) -> None:
    padded = AutoTokenizer.from_pretrained(folder)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    padded.save_pretrained(folder)
    rows = embedding_rows(load_configuration(folder))
    encoder = ChatEncoder(load_tokenizer(folder, SPEC), TrainOn.RESPONSES, embedding_rows=rows)
    encoder.encode(CHAT)
    with pytest.raises(TrainerError, match=r"'\[PAD\]' has id 512, but the model's embedding has 512 rows"):
        encoder.encode(PlainText("a [PAD]"))
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"text": "a"}\n{"text": "a [PAD]"}\n')
    spec = DatasetSpec.model_validate({"source": "file:///rows"})
    scan = scan_rows((lines,), spec, load_tokenizer(folder, SPEC), 64, rows)
    assert scan.stopped is not None
    assert (scan.stopped.location, scan.stopped.reason) == ("rows.jsonl:2", "InvalidConfiguration")
    without = scan_rows((lines,), spec, load_tokenizer(folder, SPEC), 64)
    assert without.stopped is None, "the control"


WRONG_TEMPLATES = {
    "no Jinja": "{% for %}",
    "several, none of them the default": [{"name": "rag", "template": "a"}],
    "one that asks for 10 GB": "{{ 'a' * 10**10 }}",
}


@pytest.mark.parametrize("template", WRONG_TEMPLATES.values(), ids=WRONG_TEMPLATES)
def test_an_own_template_that_is_wrong_fails_with_the_rows(folder: Path, template: object) -> None:
    configured(chat_template=template)(folder)
    encoder = ChatEncoder(load_tokenizer(folder, SPEC), TrainOn.RESPONSES)
    with pytest.raises((TrainerError, ValueError), match="chat template"):
        encoder.encode(CHAT)


def test_a_template_for_tools_is_used_with_tools(folder: Path) -> None:
    marked = "{% generation %}{{ messages[1].content }}{% endgeneration %}"
    named = [{"name": "default", "template": "plain" + marked}, {"name": "tool_use", "template": "tools" + marked}]
    configured(chat_template=named)(folder)
    tokenizer = load_tokenizer(folder, SPEC)
    encoder = ChatEncoder(tokenizer, TrainOn.RESPONSES)
    assert tokenizer.decode(encoder.encode(CHAT).input_ids) == f"plainb{tokenizer.eos_token}"
    assert tokenizer.decode(encoder.encode(Conversation(CHAT.messages, [{"name": "f"}])).input_ids) == (
        f"toolsb{tokenizer.eos_token}"
    )
