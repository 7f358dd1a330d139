"""Every template that TRL ships, with conversations of every kind: loss covers what the template prints for an answer
behind the prompt that asks for it, and the fate of reasoning is known."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
from jinja2 import TemplateError

from finetune_trainer.chat.call_arguments import with_arguments, write_arguments
from finetune_trainer.chat.sandbox.environment import ChatTemplate
from finetune_trainer.chat.sandbox.marks import UnprintedAnswerError
from finetune_trainer.chat.sandbox.reasoning import Fate
from finetune_trainer.chat.sandbox.spans import AnswerFinder, FoundAnswers, UnknownSpansError

TEMPLATES = {
    path.stem: path.read_text() for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = re.compile(r"<\|[^<>|\s]+\|>|<[a-z_]+\|>|<\|[a-z_]+>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|\[/?INST\]|</?s>")

SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "", "parameters": {"type": "object", "properties": {}}},
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, *called: int, **more: Any) -> dict[str, Any]:
    calls = [
        {"type": "function", "id": f"abcdefgh{n}", "function": {"name": "add", "arguments": {"a": n}}} for n in called
    ]
    return {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {}) | more


def result(number: int) -> dict[str, Any]:
    return {"role": "tool", "content": "4", "tool_call_id": f"abcdefgh{number}", "name": "add"}


def inline(reasoning: str, text: str) -> str:
    return f"<think>\n{reasoning}\n</think>\n\n{text}"


Chat = tuple[list[dict[str, Any]], list[Any] | None]
CHATS: dict[str, Chat] = {
    "plain": ([user("Q1"), answer("Four.")], None),
    "turns": ([user("Q1"), answer("Four."), user("Q2"), answer("Six.")], None),
    "system": ([SYSTEM, user("Q1"), answer("Four.")], None),
    "a call": ([user("Q1"), answer("", 7), result(7), answer("Four.")], [TOOL]),
    "parallel calls": ([user("Q1"), answer("", 7, 8), result(7), result(8), answer("Four.")], [TOOL]),
    "a text and a call": ([user("Q1"), answer("Let me see.", 7), result(7), answer("Four.")], [TOOL]),
    "a call last": ([user("Q1"), answer("", 7)], [TOOL]),
    "reasoning": ([user("Q1"), answer("Four.", reasoning_content="R1")], None),
    "reasoning in the text": ([user("Q1"), answer(inline("R1", "Four."))], None),
    "reasoning in turns": (
        [user("Q1"), answer("Four.", reasoning_content="R1"), user("Q2"), answer("Six.", reasoning_content="R2")],
        None,
    ),
    "reasoning in the texts of turns": (
        [user("Q1"), answer(inline("R1", "Four.")), user("Q2"), answer(inline("R2", "Six."))],
        None,
    ),
    "reasoning and a call": (
        [user("Q1"), answer("", 7, reasoning_content="R1"), result(7), answer("Four.", reasoning_content="R2")],
        [TOOL],
    ),
}
REFUSALS = (TemplateError, TypeError, UnprintedAnswerError, UnknownSpansError)


@cache
def compiled(name: str) -> ChatTemplate:
    template = ChatTemplate(TEMPLATES[name], VARIABLES)
    template.freeze_time()
    return template


def find(name: str, chat: Chat) -> tuple[ChatTemplate, FoundAnswers, Chat]:
    """The answers; arguments are text where the template wants them so."""
    template, (messages, tools) = compiled(name), chat
    special = sorted({*SPECIAL.findall(TEMPLATES[name]), *VARIABLES.values()})
    try:
        return template, AnswerFinder(template, special).find(messages, tools), chat
    except TypeError:
        messages = with_arguments(messages, write_arguments)
        return template, AnswerFinder(template, special).find(messages, tools), (messages, tools)


def marked(found: FoundAnswers) -> str:
    """The text behind the first question, with [[...]] around what carries loss."""
    parts, at = [], found.text.index("Q1")
    for start, end, _ in found.spans:
        parts += [found.text[at:start], "[[", found.text[start:end], "]]"]
        at = end
    return "".join([*parts, found.text[at:]]).replace("]][[", "")


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_loss_covers_what_follows_the_prompt_that_asks(name: str, chat: str) -> None:
    try:
        template, found, (messages, tools) = find(name, CHATS[chat])
    except REFUSALS:
        return  # the row is refused with a reason; how many are is the next test's matter

    text, learned = found.text, marked(found)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue

        # Nothing of the answer is outside, nothing of anyone else inside.
        behind = learned.partition("Q1")[2]
        outside = re.sub(r"\[\[.*?\]\]", "", behind, flags=re.DOTALL)
        said = [message["content"].rpartition("</think>")[2].strip()]
        said += [str(call["function"]["name"]) + ".*" + str(call["id"][-1]) for call in message.get("tool_calls") or ()]
        for words in said:
            assert re.search(rf"\[\[[^\]]*{words}", learned, re.DOTALL) or not words, words
            assert not words or words.startswith("add") or words not in outside

        start = _span_start(found, index)
        if start is None or re.search(r"\{%-? generation", TEMPLATES[name]):
            continue  # the template's own marks decide

        # The prompt, up to where the template departs from it: within a tag, to the tag's beginning.
        prompt = template.render(messages[:index], tools, add_generation_prompt=True)
        departs = next(
            (at for at, pair in enumerate(zip(prompt, text, strict=False)) if pair[0] != pair[1]), len(prompt)
        )
        if text.startswith(prompt) or departs >= start:
            assert 0 <= departs - start <= len("<think>\n"), text[start:departs]

    assert "Q2" not in "".join(re.findall(r"\[\[(.*?)\]\]", learned, re.DOTALL))
    assert not re.search(r"(\|>|<end_of_turn>|</s>|<turn\|>)\s+\]\]", learned), "white space is never generated there"


def _span_start(found: FoundAnswers, index: int) -> int | None:
    return next((start for start, _, message in found.spans if message == index), None)


# Share of the templates; those for images take no plain text, and many know no tools.
TAKEN = {"plain": 0.9, "turns": 0.9, "system": 0.85, "a call": 0.6, "parallel calls": 0.55, "reasoning": 0.9}


@pytest.mark.parametrize("chat", TAKEN)
def test_most_templates_take_most_conversations(chat: str) -> None:
    taken = []
    for name in TEMPLATES:
        try:
            find(name, CHATS[chat])
        except REFUSALS:
            continue
        taken.append(name)
    assert len(taken) >= TAKEN[chat] * len(TEMPLATES), sorted(set(TEMPLATES) - set(taken))


P, L, D = Fate.PRINTED, Fate.LEFT_OUT, Fate.DOUBLED

# The fate of reasoning in two turns: under a key, and in the text.
FATES: dict[str, tuple[list[Fate], list[Fate]]] = {
    "cohere": ([L, L], [P, P]),
    "deepseek_r1_distill": ([L, L], [L, L]),
    "deepseekv3": ([L, L], [L, L]),
    "gemma3": ([L, L], [P, P]),
    "glm4moe": ([L, P], [L, P]),
    "gptoss": ([L, P], [P, P]),
    "lfm2_2_5": ([L, P], [L, P]),
    "lfm2_v2": ([L, L], [P, P]),
    "llama3_1": ([L, L], [P, P]),
    "muse_glimmer": ([P, P], [P, P]),
    "nemotron_3_nano": ([L, P], [L, P]),
    "phi3": ([L, L], [P, P]),
    "qwen2_5": ([L, L], [P, P]),
    "qwen3": ([L, P], [L, P]),
    "qwen3_6": ([L, P], [L, P]),
    "qwen3_8": ([P, P], [D, D]),
    "qwen3_vl": ([L, L], [P, P]),
}


@pytest.mark.parametrize("name", FATES)
def test_the_fate_of_reasoning_is_known(name: str) -> None:
    by_key, in_text = FATES[name]
    assert list(find(name, CHATS["reasoning in turns"])[1].reasoning.values()) == by_key
    assert list(find(name, CHATS["reasoning in the texts of turns"])[1].reasoning.values()) == in_text
    assert find(name, CHATS["turns"])[1].reasoning == {}, "control"


TWICE = ["glm4moe", "gptoss", "lfm2_2_5", "muse_glimmer", "nemotron_3_nano", "qwen3", "qwen3_6", "qwen3_8"]


@pytest.mark.parametrize("name", TWICE)
def test_reasoning_that_stands_in_two_places_is_printed_twice(name: str) -> None:
    both = [user("Q1"), answer(inline("R1", "Four."), reasoning_content="R1")]
    assert find(name, (both, None))[1].reasoning == {1: D}


GOLDEN = {
    ("gptoss", "reasoning"): (
        "Q1<|end|><|start|>assistant[[<|channel|>analysis<|message|>R1<|end|><|start|>assistant<|channel|>final"
        "<|message|>Four.<|return|>]]"
    ),
    ("gptoss", "reasoning in turns"): (
        "Q1<|end|><|start|>assistant[[<|channel|>final<|message|>Four.<|end|>]]<|start|>user<|message|>Q2<|end|><|start|>"
        "assistant[[<|channel|>analysis<|message|>R2<|end|><|start|>assistant<|channel|>final<|message|>Six.<|return|>]]"
    ),
    ("gptoss", "a call last"): (
        'Q1<|end|><|start|>assistant[[ to=functions.add<|channel|>commentary json<|message|>{"a": 7}<|call|>]]'
    ),
    ("muse_glimmer", "reasoning"): (
        "Q1<|eot|><|start|>assistant[[ to=self<|message|>R1<|eom|><|start|>assistant to=user<|message|>Four.<|eot|>]]"
    ),
    ("deepseekv3", "a call last"): (
        "Q1<｜Assistant｜>[[<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
        '{"a": 7}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>]]'
    ),
    ("qwen3", "a text and a call"): (
        'Q1<|im_end|>\n<|im_start|>assistant\n[[Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 7}}\n'
        "</tool_call><|im_end|>]]\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\n\n</think>\n\nFour.<|im_end|>]]\n"
    ),
    ("nemotron_3_nano", "reasoning in the text"): (
        "Q1<|im_end|>\n<|im_start|>assistant\n<think>\n[[R1\n</think>\n\nFour.<|im_end|>]]\n"
    ),
    ("qwen3_8", "reasoning"): "Q1<|im_end|>\n<|im_start|>assistant\n<think>\n[[R1\n</think>\n\nFour.<|im_end|>]]\n",
    ("lfm2_2_5", "plain"): "Q1<|im_end|>\n<|im_start|>assistant\n[[Four.<|im_end|>]]\n",
    ("llama3_1", "plain"): ("Q1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[Four.<|eot_id|>]]"),
    ("gemma3", "plain"): "Q1<end_of_turn>\n<start_of_turn>model\n[[Four.<end_of_turn>]]\n",
    ("phi3", "plain"): "Q1<|end|>\n<|assistant|>\n[[Four.<|end|>]]\n</s>",
}


@pytest.mark.parametrize(("name", "chat"), GOLDEN, ids=[f"{name}, {chat}" for name, chat in GOLDEN])
def test_the_text_and_its_loss(name: str, chat: str) -> None:
    assert marked(find(name, CHATS[chat])[1]) == GOLDEN[name, chat]


def test_calls_with_headers_of_their_own_are_one_answer() -> None:
    (learned,) = re.findall(r"\[\[(.*?)\]\]", marked(find("muse_glimmer", CHATS["parallel calls"])[1])[:400], re.DOTALL)
    assert learned.count("<atem:invoke") == 2
    assert learned.endswith("<|eot|>")


def test_a_text_that_is_reasoning_only_and_left_out_is_refused() -> None:
    only = ([user("Q1"), answer("<think>\nR1\n</think>")], None)
    with pytest.raises(UnprintedAnswerError, match=r"the text of messages\[1\]"):
        find("deepseek_r1_distill", only)
    assert find("qwen2_5", only)[1].reasoning == {1: P}, "control"
