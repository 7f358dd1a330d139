"""Every named template: exactly the answers and their ends of turn carry loss, and known originals render alike."""

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer

from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import ChatTemplateName, TrainOn
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.chat.labels import IGNORED
from finetune_trainer.chat.templates import SPECIAL_TOKENS, TOOL_TOKENS, find_fitting, use_named_template
from finetune_trainer.data.layouts import Conversation
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.description import load_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "Six."},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "é"}}}
EVERY_TOKEN = sorted(
    {token for tokens in (*SPECIAL_TOKENS.values(), *TOOL_TOKENS.values()) for token in tokens if token}
)
ENDS = {
    ChatTemplateName.ALPACA: "</s>",
    ChatTemplateName.CHATML: "<|im_end|>",
    ChatTemplateName.GEMMA: "<end_of_turn>",
    ChatTemplateName.LLAMA3: "<|eot_id|>",
    ChatTemplateName.MISTRAL: "</s>",
    ChatTemplateName.PHI3: "<|end|>",
    ChatTemplateName.PHI4: "<|im_end|>",
    ChatTemplateName.QWEN: "<|im_end|>",
    ChatTemplateName.VICUNA: "</s>",
    ChatTemplateName.ZEPHYR: "</s>",
}
ORIGINALS = {"Llama3": "llama3", "Gemma": "gemma", "Phi3": "phi3", "Qwen": "qwen3_instruct_2507"}


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    """A tokenizer with the special tokens of every family."""
    found = AutoTokenizer.from_pretrained(tiny_base)
    found.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": EVERY_TOKEN})
    return found


def supervised(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> list[str]:
    encoded = ChatEncoder(tokenizer, TrainOn.RESPONSES).encode(Conversation(messages, tools))
    runs = groupby(zip(encoded.input_ids, encoded.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in run]) for on, run in runs if on]


@pytest.mark.parametrize("name", ChatTemplateName)
@pytest.mark.parametrize("messages", [TURNS, [SYSTEM, *TURNS]], ids=["turns", "with a system turn"])
def test_exactly_answers_and_their_ends_carry_loss(
    tokenizer: Any, name: ChatTemplateName, messages: list[dict[str, Any]]
) -> None:
    use_named_template(tokenizer, name)
    space = " " if name in (ChatTemplateName.MISTRAL, ChatTemplateName.VICUNA) else ""
    assert supervised(tokenizer, messages) == [f"{space}Four.{ENDS[name]}", f"{space}Six.{ENDS[name]}"]
    assert tokenizer.eos_token == ENDS[name]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert messages[0]["content"] in text
    assert text.count("<s>") <= 1
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt), "an answer is asked for as it was trained"


@pytest.mark.parametrize(("name", "original"), ORIGINALS.items(), ids=ORIGINALS)
def test_a_template_renders_like_its_familys_original(tokenizer: Any, name: str, original: str) -> None:
    """TRL ships the originals; Phi-3's adds the end of sequence after the last turn, which is never generated."""
    template = (Path(trl.__file__).parent / f"chat_templates/{original}.jinja").read_text()
    use_named_template(tokenizer, ChatTemplateName(name))
    ours = tokenizer.apply_chat_template(TURNS, tokenize=False)
    theirs = tokenizer.apply_chat_template(TURNS, tokenize=False, chat_template=template)
    assert ours == (theirs.removesuffix(tokenizer.eos_token) if name == "Phi3" else theirs)


def test_qwen_writes_tools_like_its_original_and_learns_the_calls(tokenizer: Any) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    answers = [{"role": "tool", "content": "4"}, {"role": "tool", "content": "5"}]
    messages = [SYSTEM, TURNS[0], call, *answers, TURNS[1]]
    template = (Path(trl.__file__).parent / "chat_templates/qwen3_instruct_2507.jinja").read_text()
    use_named_template(tokenizer, ChatTemplateName.QWEN)
    theirs = tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False, chat_template=template)
    assert tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False) == theirs
    first, last = supervised(tokenizer, messages, [TOOL])
    assert first.count("<tool_call>") == 2
    assert last == "Four.<|im_end|>"


CALLING = [
    TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "abcdefghi"}]},
    {"role": "tool", "content": "4", "tool_call_id": "abcdefghi"},
    TURNS[1],
    *TURNS,
]


@pytest.mark.parametrize("tools", [None, [TOOL], [TOOL, TOOL]], ids=["calls only", "a tool", "two tools"])
@pytest.mark.parametrize("before", [[], [SYSTEM]], ids=["turns", "with a system turn"])
def test_llama_writes_tools_like_llama_3_1_and_learns_the_calls(
    tokenizer: Any, before: list[dict[str, Any]], tools: list[Any] | None
) -> None:
    template = (Path(trl.__file__).parent / "chat_templates/llama3_1.jinja").read_text()
    use_named_template(tokenizer, ChatTemplateName.LLAMA3)
    messages = [*before, *CALLING]
    theirs = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, chat_template=template)
    assert tokenizer.apply_chat_template(messages, tools=tools, tokenize=False) == theirs
    learned = supervised(tokenizer, messages, tools)
    assert learned[0] == '{"name": "add", "parameters": {"a": "é"}}<|eot_id|>'
    assert learned[1:] == ["Four.<|eot_id|>"] * 2 + ["Six.<|eot_id|>"]
    two = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}]
    with pytest.raises(BadRowError, match="only one tool call in a turn"):
        supervised(tokenizer, two, tools)


def test_mistral_writes_tools_as_its_tokenizers_do_and_learns_the_calls(tokenizer: Any) -> None:
    """The form of mistral-common's third version: tools in front of the last user's turn, calls with ids."""
    use_named_template(tokenizer, ChatTemplateName.MISTRAL)
    text = tokenizer.apply_chat_template([SYSTEM, *CALLING[:4]], tools=[TOOL], tokenize=False)
    assert text == (
        '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]'
        "[/AVAILABLE_TOOLS][INST] Be brief.\n\nWhat is 2 + 2?[/INST]"
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": "é"}, "id": "abcdefghi"}]</s>'
        '[TOOL_RESULTS] {"content": 4, "call_id": "abcdefghi"}[/TOOL_RESULTS] Four.</s>'
    )
    learned = supervised(tokenizer, CALLING, [TOOL])
    assert learned[0] == '[TOOL_CALLS] [{"name": "add", "arguments": {"a": "é"}, "id": "abcdefghi"}]</s>'
    assert learned[1:] == [" Four.</s>", " Four.</s>", " Six.</s>"]
    asked = tokenizer.apply_chat_template([TURNS[0], TURNS[1], TURNS[0]], tools=[TOOL], tokenize=False)
    assert asked.index("[AVAILABLE_TOOLS]") > asked.index("Four."), "the last of two turns that are alike"
    without_id = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    with pytest.raises(BadRowError, match="an id of nine letters and digits"):
        supervised(tokenizer, without_id)


def test_mistral_without_tool_tokens_refuses_tools(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["[INST]", "[/INST]"]})
    use_named_template(tokenizer, ChatTemplateName.MISTRAL)
    assert supervised(tokenizer, TURNS) == [f" {words}{tokenizer.eos_token}" for words in ("Four.", "Six.")]
    for messages, tools in ((TURNS, [TOOL]), (CALLING, None)):
        with pytest.raises(BadRowError, match=r"lacks \[AVAILABLE_TOOLS\]; use Qwen"):
            supervised(tokenizer, messages, tools)


WITH_TOOLS = {ChatTemplateName.QWEN, ChatTemplateName.LLAMA3, ChatTemplateName.MISTRAL}


@pytest.mark.parametrize("name", sorted(set(ChatTemplateName) - WITH_TOOLS))
def test_templates_without_tools_refuse_them(tokenizer: Any, name: ChatTemplateName) -> None:
    use_named_template(tokenizer, name)
    with pytest.raises(BadRowError, match="does not support tools; use Qwen"):
        supervised(tokenizer, TURNS, [TOOL])


def test_a_tokenizer_without_the_familys_tokens_is_refused(tiny_base: Path) -> None:
    spec = ModelSpec.model_validate({"source": f"file://{tiny_base}", "chatTemplateName": "Llama3"})
    with pytest.raises(TrainerError, match=r"Llama3 needs <\|eot_id\|>.*leave the field out"):
        load_tokenizer(tiny_base, spec)
    named = spec.model_copy(update={"chat_template_name": ChatTemplateName.CHATML})
    assert load_tokenizer(tiny_base, named).eos_token == "<|im_end|>"


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['x'] }}",
    "changing the row": "{{ messages.append(1) }}",
    "a template of another file": "{% include '/etc/passwd' %}",
    "a range without end": "{% for i in range(1000000000) %}{% endfor %}",
    "a wrong type": "{{ messages + 1 }}",
    "a division by zero": "{{ 1 / 0 }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_what_leaves_the_sandbox_is_refused(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(BadRowError, match="the chat template refuses the row"):
        ChatEncoder(tokenizer, TrainOn.ALL).encode(Conversation(TURNS))


FITTING: dict[str, tuple[tuple[str, ...], ChatTemplateName | None]] = {
    "Gemma's": (("<start_of_turn>", "<end_of_turn>"), ChatTemplateName.GEMMA),
    "Llama 3's": (("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"), ChatTemplateName.LLAMA3),
    "Phi-4's, of which ChatML's are a part": (("<|im_end|>", "<|im_start|>", "<|im_sep|>"), ChatTemplateName.PHI4),
    "ChatML's, which are Qwen's as well": (("<|im_end|>", "<|im_start|>"), None),
    "those of two families": (("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"), None),
    "half of a family's": (("<start_of_turn>",), None),
    "none": ((), None),
}


@pytest.mark.parametrize(("tokens", "name"), FITTING.values(), ids=FITTING)
def test_the_template_that_control_tokens_fit_is_named_if_it_is_one(
    tokens: tuple[str, ...], name: ChatTemplateName | None
) -> None:
    assert find_fitting({"the", *tokens}) is name
