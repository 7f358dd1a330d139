"""An Ollama Modelfile for a GGUF file: TEMPLATE in Ollama's (Go's) template language, and the stop words.

Ollama tokenizes the prompt with the file's own beginning-of-sequence switch, so a beginning token that the file adds
is left out of TEMPLATE.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_trainer.export.base_model.ends import find_ends, ids_in
from finetune_trainer.export.base_model.tokenizer_files import TokenizerFiles
from finetune_trainer.export.chat_turns import ChatTurns, find_chat_turns
from finetune_trainer.export.gguf.special_tokens import find_special_tokens

MODELFILE_SUFFIX = ".Modelfile"


@dataclass(frozen=True)
class OllamaChat:
    """The content of a Modelfile beyond the file's name."""

    turns: ChatTurns | None
    """None: there is no chat template, or it does more than put fixed text between messages."""
    stops: tuple[str, ...]
    has_template: bool
    """True if the tokenizer has a chat template at all."""
    says_date: bool
    """True if the template writes the day's date; in the Modelfile it is the date of the export."""


def read_ollama_chat(files: TokenizerFiles, config: Mapping[str, Any], generation: Mapping[str, Any]) -> OllamaChat:
    """Derive the chat from the tokenizer, from config.json and from generation_config.json."""
    tokenizer = files.tokenizer
    found = find_special_tokens(files, config)
    tokens = {f"{kind}_token": text for kind, index in found.ids.items() if (text := tokenizer.id_to_token(index))}

    turns = find_chat_turns(found.chat_template, tokens) if found.chat_template else None
    if turns is not None and found.adds_bos:  # Ollama adds it, by the file's switch
        turns = _without_beginning(turns, tokens["bos_token"])

    # Stop words: every token at which generation may stop.
    ends = [*ids_in(found.ids.get("eos")), *find_ends(files, config, generation)]
    stops = [text for index in ends if (text := tokenizer.id_to_token(index))]
    if turns is not None:
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        # The token between an answer and the next question, which need not be the one behind the last answer.
        stops += [text for text in special if turns.to_user.lstrip().startswith(text)]

    says_date = "strftime_now" in (found.chat_template or "")
    return OllamaChat(turns, tuple(dict.fromkeys(stops)), bool(found.chat_template), says_date)


def write_modelfile(gguf: str, chat: OllamaChat) -> str:
    """The Modelfile of the GGUF file that lies beside it under the name `gguf`."""
    lines = [f"# ollama create NAME -f {Path(gguf).with_suffix(MODELFILE_SUFFIX).name}", f"FROM ./{gguf}"]

    if chat.turns is not None:
        if chat.turns.before_system is None:
            lines.append("# The model's chat template has no place for a system message: SYSTEM has no effect.")
        if chat.says_date:
            lines.append("# If TEMPLATE contains a date, it is the date of the export.")
        lines.append(f'TEMPLATE """{to_go_template(chat.turns)}"""')
    elif chat.has_template:
        lines.append("# No TEMPLATE: the model's chat template does more than Ollama's template language can express.")
        lines.append("# Ollama uses the template in the GGUF file.")
    else:
        lines.append("# No TEMPLATE: the tokenizer has no chat template. Ollama sends prompts as they are.")

    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in chat.stops]
    return "\n".join(lines) + "\n"


def to_go_template(turns: ChatTurns) -> str:
    """The turns in Go's template language, over Ollama's .System and .Messages.

    White space is part of the prompt, so there are no line breaks of our own and no trim marks. If the last message is
    the beginning of an answer, the model continues it.
    """
    start = _literal(turns.start)
    if turns.before_system is not None:
        before, after = _literal(turns.before_system), _literal(turns.after_system)
        start = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{start}{{{{ end }}}}"

    last = "eq (len (slice $.Messages $i)) 1"
    prompt, to_answer, to_user = map(_literal, (turns.prompt, turns.to_answer, turns.to_user))
    user = f"{{{{ .Content }}}}{{{{ if {last} }}}}{prompt}{{{{ else }}}}{to_answer}{{{{ end }}}}"
    answer = f"{{{{ .Content }}}}{{{{ if not ({last}) }}}}{to_user}{{{{ end }}}}"
    roles = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
    return f"{start}{{{{ range $i, $_ := .Messages }}}}{roles}{{{{ end }}}}"


def _literal(text: str) -> str:
    """Escape text for Go's template language inside a Modelfile.

    A brace may begin an action, and three quotation marks would end the Modelfile's own quotation.
    """
    return text.replace("{", "{{ `{` }}").replace('"""', '{{ `"` }}' * 3)


def _quoted(text: str) -> str:
    """Quote a value for a Modelfile, which has no escapes, only longer quotation marks."""
    return f'"""{text}"""' if '"' in text else f'"{text}"'


def _without_beginning(turns: ChatTurns, beginning: str) -> ChatTurns:
    """The turns without the token that begins a prompt, with or without a system message."""
    before = None if turns.before_system is None else turns.before_system.removeprefix(beginning)
    return replace(turns, start=turns.start.removeprefix(beginning), before_system=before)
