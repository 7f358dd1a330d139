"""Arguments of calls reach a template in the form that it takes, which is found by trying it."""

from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer

from finetune_api.vocabulary import TrainOn
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.chat.labels import IGNORED
from finetune_trainer.data.layouts import Conversation
from finetune_trainer.data.messages import Arguments, BadRowError

LOOP = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "ARGUMENTS{% endfor %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "as JSON": ("{{ c.function.arguments | tojson }}", '{"city": "Paris é"}'),
    "joined to a text": ("{{ ' ' + c.function.arguments }}", ' {"city":"Paris é"}'),
    "printed as they are": ("{{ c.function.arguments }}", '{"city":"Paris é"}'),
    "text or JSON": (
        "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
        '{"city": "Paris é"}',
    ),
    "by their names": ("{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}", "city=Paris é"),
}


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def calling(arguments: dict[str, Any], written: str | None) -> Conversation:
    found = Arguments(arguments)
    found.written = written
    call = {"type": "function", "function": {"name": "weather", "arguments": found}}
    return Conversation([{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}])


def learned(tokenizer: Any, encoder: ChatEncoder, row: Conversation) -> str:
    encoded = encoder.encode(row)
    return str(tokenizer.decode([label for label in encoded.labels if label != IGNORED]))


@pytest.mark.parametrize(("printing", "expected"), TEMPLATES.values(), ids=TEMPLATES)
def test_arguments_are_what_the_template_takes(tokenizer: Any, printing: str, expected: str) -> None:
    tokenizer.chat_template = LOOP.replace("ARGUMENTS", printing)
    encoder = ChatEncoder(tokenizer, TrainOn.RESPONSES)
    row = calling({"city": "Paris é"}, '{"city":"Paris é"}')
    assert learned(tokenizer, encoder, row) == f"weather{expected}<|im_end|>", "the data's own text, where it is text"
    as_object = expected.replace('":"', '": "')
    assert learned(tokenizer, encoder, calling({"city": "Paris é"}, None)) == f"weather{as_object}<|im_end|>"
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris é"}, "the row stays"


def test_deepseek_gets_text_and_learns_the_call(tokenizer: Any) -> None:
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates/deepseekv3.jinja").read_text()
    found = learned(tokenizer, ChatEncoder(tokenizer, TrainOn.RESPONSES), calling({"a": 1}, '{"a":1}'))
    assert '```json\n{"a":1}\n```' in found


def test_a_row_that_no_form_suits_is_refused_and_the_next_one_decides(tokenizer: Any) -> None:
    guard = "{% if messages[0].content == 'no' %}{{ raise_exception('not this one') }}{% endif %}"
    tokenizer.chat_template = guard + LOOP.replace("ARGUMENTS", "{{ ' ' + c.function.arguments }}")
    encoder = ChatEncoder(tokenizer, TrainOn.RESPONSES)
    row = calling({"a": 1}, None)
    refused = Conversation([{"role": "user", "content": "no"}, *row.messages[1:]])
    with pytest.raises(BadRowError, match="not this one"):
        encoder.encode(refused)
    assert learned(tokenizer, encoder, row) == 'weather {"a": 1}<|im_end|>'
    with pytest.raises(BadRowError, match="not this one"):
        encoder.encode(refused)


def test_control_tokens_in_arguments_stay_text_in_either_form(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for printing in ("{{ c.function.arguments | tojson }}", "{{ ' ' + c.function.arguments }}"):
        tokenizer.chat_template = LOOP.replace("ARGUMENTS", printing)
        row = calling({"a": "<|im_end|>"}, '{"a": "<|im_end|>"}')
        encoded = ChatEncoder(tokenizer, TrainOn.RESPONSES).encode(row)
        assert encoded.input_ids.count(end) == 2
