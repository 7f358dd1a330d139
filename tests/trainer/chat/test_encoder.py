"""Which tokens carry loss, shown by decoding exactly those."""

from itertools import groupby
from pathlib import Path
from typing import Any, cast

import pytest
import trl
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from finetune_api.vocabulary import TrainOn
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.chat.labels import IGNORED, Encoded
from finetune_trainer.chat.sandbox.process import SHARED, LimitError, TemplateSetup
from finetune_trainer.data.layouts import Conversation, PlainText
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.errors import TrainerError

CHAT = Conversation(
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "And 3 + 3?"},
        {"role": "assistant", "content": "Six."},
    ]
)
PLAIN_LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML = PLAIN_LOOP + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}"
)
FORGETTING = "{% for m in messages %}{{ m.role }}{{ m.content if loop.last else 'x' }}{% endfor %}"
SCRAMBLING = "{% for m in messages %}{{ messages | length }}{{ m.content | reverse }}{% endfor %}"
HARMLESS = {"role": "assistant", "content": "Four.", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def supervised_texts(tokenizer: Any, encoded: Encoded) -> list[str]:
    """The runs of tokens that carry loss, decoded."""
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in run]) for on, run in runs if on]


TEMPLATES = {
    "without marks": (CHATML, ["Four.<|im_end|>", "Six.<|im_end|>"]),
    "by marks": (MARKED, ["Four.<|im_end|>", "Six.<|im_end|>"]),
}


@pytest.mark.parametrize(("template", "expected"), TEMPLATES.values(), ids=TEMPLATES)
def test_answers_and_their_end_of_turn_carry_loss(tokenizer: Any, template: str, expected: list[str]) -> None:
    tokenizer.chat_template = template
    encoded = ChatEncoder(tokenizer, TrainOn.RESPONSES).encode(CHAT)
    assert supervised_texts(tokenizer, encoded) == expected
    assert all(label in (token, IGNORED) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))


def test_the_models_own_template_supervises_answers_only(tokenizer: Any) -> None:
    texts = supervised_texts(tokenizer, ChatEncoder(tokenizer, TrainOn.RESPONSES).encode(CHAT))
    assert [text.partition("<|im_end|>")[0].strip() for text in texts] == ["Four.", "Six."]
    assert all("<|im_end|>" in text for text in texts), "without it the model never learns to stop"


def test_all_means_every_token(tokenizer: Any) -> None:
    encoded = ChatEncoder(tokenizer, TrainOn.ALL).encode(CHAT)
    assert encoded.labels == encoded.input_ids
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(CHAT.messages, tokenize=False)


def test_a_template_whose_answers_cannot_be_told_apart_is_refused_with_a_way_out(tokenizer: Any) -> None:
    tokenizer.chat_template = SCRAMBLING
    encoder = ChatEncoder(tokenizer, TrainOn.RESPONSES)
    with pytest.raises(BadRowError, match=r"\{% generation %\}.*trainOn: All"):
        encoder.encode(CHAT)
    assert encoder.find_problem().startswith("the chat template takes none of the rows; of the first it says")
    assert ChatEncoder(tokenizer, TrainOn.ALL).encode(CHAT).supervised


def test_an_answer_that_the_template_leaves_out_is_a_bad_row(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETTING
    with pytest.raises(BadRowError, match=r"leaves out the text of messages\[2\]"):
        ChatEncoder(tokenizer, TrainOn.RESPONSES).encode(CHAT)
    tokenizer.chat_template = CHATML
    with pytest.raises(BadRowError, match=r"leaves out the tool calls of messages\[1\]"):
        ChatEncoder(tokenizer, TrainOn.RESPONSES).encode(Conversation([CHAT.messages[1], HARMLESS]))


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["without marks", "by marks"])
def test_answers_of_weight_zero_are_context(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    chat = Conversation(CHAT.messages, context=frozenset({2}))
    responses = ChatEncoder(tokenizer, TrainOn.RESPONSES).encode(chat)
    assert supervised_texts(tokenizer, responses) == ["Six.<|im_end|>"]
    assert tokenizer.decode(responses.input_ids) == tokenizer.apply_chat_template(CHAT.messages, tokenize=False)
    everything = "".join(supervised_texts(tokenizer, ChatEncoder(tokenizer, TrainOn.ALL).encode(chat)))
    assert "Four." not in everything
    assert {"And 3 + 3?", "Six.<|im_end|>"} <= {part for part in ("And 3 + 3?", "Six.<|im_end|>") if part in everything}


def test_a_row_that_the_template_refuses_is_a_bad_row(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(BadRowError, match="no system turns"):
        ChatEncoder(tokenizer, TrainOn.ALL).encode(CHAT)


def test_text_is_supervised_whole_and_ends_with_the_end_token(tokenizer: Any) -> None:
    encoded = ChatEncoder(tokenizer, TrainOn.RESPONSES).encode(PlainText("Once upon a time"))
    assert encoded.labels == encoded.input_ids
    assert encoded.input_ids[-1] == tokenizer.eos_token_id


def test_without_a_template_a_prompt_and_its_completion_are_joined(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    messages = [{"role": "user", "content": "Q: "}, {"role": "assistant", "content": "A"}]
    encoded = ChatEncoder(tokenizer, TrainOn.RESPONSES).encode(Conversation(messages, is_continuation=True))
    assert supervised_texts(tokenizer, encoded) == ["A" + tokenizer.eos_token]


ONE_EXCHANGE = Conversation([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}])
WITH_SYSTEM = Conversation([{"role": "system", "content": "S"}, *ONE_EXCHANGE.messages], is_continuation=True)


@pytest.mark.parametrize("chat", [ONE_EXCHANGE, CHAT, WITH_SYSTEM], ids=["one exchange", "several", "system column"])
def test_without_a_template_a_conversation_is_refused(tokenizer: Any, chat: Conversation) -> None:
    tokenizer.chat_template = None
    with pytest.raises(TrainerError, match=r"has no chat template: set spec\.model\.chatTemplateName") as refusal:
        ChatEncoder(tokenizer, TrainOn.RESPONSES).encode(chat)
    assert refusal.value.reason == "ChatTemplateMissing"


MARK_ALONE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role != 'assistant' %}{{ m.content }}{% else %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}\n{% endfor %}"
)
OPEN = {
    "text behind the words": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "Six.\n"),
    "a mark before white space": (MARK_ALONE, "Six."),
    "GLM 4": ((Path(trl.__file__).parent / "chat_templates/glm4moe.jinja").read_text(), "\nSix."),
}


@pytest.mark.parametrize(("template", "last"), OPEN.values(), ids=OPEN)
def test_an_answer_that_nothing_ends_is_followed_by_the_end_of_sequence(
    tokenizer: Any, template: str, last: str
) -> None:
    tokenizer.chat_template = template
    encoder = ChatEncoder(tokenizer, TrainOn.RESPONSES)
    learned = supervised_texts(tokenizer, encoder.encode(CHAT))
    assert learned[-1].endswith(last + tokenizer.eos_token)
    assert tokenizer.eos_token not in "".join(learned[:-1])
    assert encoder.answers_without_end == 1
    context = Conversation(CHAT.messages, context=frozenset({4}))
    assert tokenizer.eos_token_id not in encoder.encode(context).labels, "an answer without loss ends nothing"
    everything = ChatEncoder(tokenizer, TrainOn.ALL).encode(CHAT)
    assert everything.labels[-1] == tokenizer.eos_token_id
    tokenizer.chat_template = CHATML
    assert ChatEncoder(tokenizer, TrainOn.RESPONSES).encode(CHAT).input_ids.count(tokenizer.eos_token_id) == 5, (
        "control"
    )


def test_a_first_token_is_never_counted_as_supervised() -> None:
    assert Encoded([5, 6, 7], [5, 6, IGNORED]).supervised == 1
    assert Encoded([5, 6, 7], [5, 6, 7]).truncated(1).supervised == 0


BEGINNINGS = {"one token": ("<s>",), "two tokens": ("[gMASK]", "<sop>"), "none": ()}


@pytest.mark.parametrize("tokens", BEGINNINGS.values(), ids=BEGINNINGS)
def test_a_text_has_one_beginning_whether_it_is_written_or_not(tokenizer: Any, tokens: tuple[str, ...]) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*tokens, "$A"], special_tokens=list(ids.items())
    )
    encoder = ChatEncoder(tokenizer, TrainOn.RESPONSES)
    begun = encoder.encode(PlainText("".join(tokens) + "once upon")).input_ids
    assert begun == encoder.encode(PlainText("once upon")).input_ids
    assert begun[: len(tokens)] == list(ids.values())

    tokenizer.chat_template = None
    joined = [
        encoder.encode(
            Conversation(
                [{"role": "user", "content": text}, {"role": "assistant", "content": "A"}], is_continuation=True
            )
        ).input_ids
        for text in ("Q: ", "".join(tokens) + "Q: ")
    ]
    assert joined[0] == joined[1]

    tokenizer.chat_template = "".join(tokens) + CHATML
    chat = encoder.encode(CHAT).input_ids
    assert [chat.count(number) for number in ids.values()] == [1] * len(tokens), "the template's own, and no second one"


class Overwhelmed:
    """A sandbox that some rows are too much for."""

    def ask(self, setup: TemplateSetup, request: dict[str, Any]) -> dict[str, Any]:
        if request["messages"][0]["content"] == "huge":
            raise LimitError("rendering one row takes more than 20 s of CPU time or 2048 MiB")
        return SHARED.ask(setup, request)


def test_rows_over_the_limits_are_bad_rows_until_three_follow_each_other(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    encoder = ChatEncoder(tokenizer, TrainOn.RESPONSES, cast(Any, Overwhelmed()))
    huge = Conversation([{"role": "user", "content": "huge"}, {"role": "assistant", "content": "A"}])
    for row in (huge, huge, CHAT, huge, huge, CHAT, huge, huge):
        if row is CHAT:
            assert encoder.encode(row).supervised
            continue
        with pytest.raises(BadRowError, match="more than 20 s"):
            encoder.encode(row)
    with pytest.raises(TrainerError, match="more than 20 s") as refusal:
        encoder.encode(huge)
    assert refusal.value.reason == "InvalidChatTemplate"
