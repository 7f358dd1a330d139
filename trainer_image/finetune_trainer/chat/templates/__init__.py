"""Chat templates of known families, by name, with generation marks around each answer and its end of turn.

A family's special tokens must be in the tokenizer, each as one token. Otherwise the end of a turn would be a few
letters that no sampler stops at, and new embeddings are not trained. Families without special tokens end turns with the
tokenizer's own end-of-sequence token.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from finetune_api.failures import FailureReason
from finetune_api.vocabulary import ChatTemplateName
from finetune_trainer.errors import TrainerError

# Special tokens that a template writes; the first ends a turn and, unless empty, becomes the end-of-sequence token.
SPECIAL_TOKENS: dict[ChatTemplateName, tuple[str, ...]] = {
    ChatTemplateName.CHATML: ("<|im_end|>", "<|im_start|>"),
    ChatTemplateName.QWEN: ("<|im_end|>", "<|im_start|>"),
    ChatTemplateName.GEMMA: ("<end_of_turn>", "<start_of_turn>"),
    ChatTemplateName.LLAMA3: ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    ChatTemplateName.PHI3: ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    ChatTemplateName.PHI4: ("<|im_end|>", "<|im_start|>", "<|im_sep|>"),
    ChatTemplateName.MISTRAL: ("", "[INST]", "[/INST]"),
}

# Special tokens that it writes for tools only; a tokenizer may lack them.
TOOL_TOKENS: dict[ChatTemplateName, tuple[str, ...]] = {
    ChatTemplateName.MISTRAL: (
        *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
}
WITHOUT_TOOLS = (
    "{%% for message in messages if tools or message.tool_calls or message.role == 'tool' %%}"
    "{{ raise_exception('template %s does not support tools, as the tokenizer lacks %s; use Qwen') }}{%% endfor %%}"
)


def load_template(name: ChatTemplateName) -> str:
    """The template's Jinja text."""
    return Path(__file__).with_name(f"{name.lower()}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def advise(tokenizer: Any) -> str:
    """Advice on which template to set for a tokenizer that has none."""
    fitting = find_fitting(tokenizer.get_vocab())
    if fitting is not None:
        return f"set spec.model.chatTemplateName: {fitting}, whose control tokens the tokenizer has"
    return (
        "set spec.model.chatTemplateName (Alpaca, Vicuna and Zephyr need no control tokens) or "
        "spec.model.chatTemplate, or write rows of format PromptCompletion, whose completions go on where prompts end"
    )


def find_fitting(vocabulary: Collection[str]) -> ChatTemplateName | None:
    """The one template whose control tokens are all in the vocabulary; None if there is none, or more than one."""
    needed = {name: set(tokens) - {""} for name, tokens in SPECIAL_TOKENS.items()}
    fitting = {name: tokens for name, tokens in needed.items() if tokens <= set(vocabulary)}

    # Phi-4 has ChatML's tokens and one more, so it fits better.
    best = [name for name, tokens in fitting.items() if not any(tokens < others for others in fitting.values())]
    return best[0] if len(best) == 1 else None


def use_named_template(tokenizer: Any, name: ChatTemplateName) -> None:
    """Gives the tokenizer this template, and the template's end of turn as end-of-sequence token.

    Raises TrainerError (InvalidChatTemplate) if the tokenizer lacks a token of the family.
    """
    end, *others = SPECIAL_TOKENS.get(name, ("",))
    vocabulary = tokenizer.get_vocab()

    missing = [token for token in (end, *others) if token and token not in vocabulary]
    if not end and tokenizer.eos_token is None:
        missing.append("an end-of-sequence token")
    if missing:
        message = (
            f"spec.model.chatTemplateName: {name} needs {', '.join(missing)}, which the model's tokenizer lacks; "
            "leave the field out for the tokenizer's own template, or write Alpaca, Vicuna or Zephyr"
        )
        raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, message)

    tokenizer.chat_template = load_template(name)
    if lacking := [token for token in TOOL_TOKENS.get(name, ()) if token not in vocabulary]:
        tokenizer.chat_template = WITHOUT_TOOLS % (name, lacking[0]) + tokenizer.chat_template
    if end:
        tokenizer.eos_token = end
