"""Special token ids, whether they are added to a prompt, and the chat templates, as GGUF metadata.

Whether a beginning token is added is found by encoding a text with the tokenizer itself: its post-processor may be
built in many ways, but it can be run. What generation stops at besides the end of sequence stands in the model's
generation_config.json; llama.cpp guesses it from the token's text, and only knows the usual ones.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from tokenizers import Tokenizer

from finetune_trainer.export.base_model.folder import MORE_TEMPLATES, load_json

KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|eot|>")
MESSAGE_END = "<|eom_id|>"  # Llama 3.1's pause for a tool's answer
DEFAULT_TEMPLATE = "default"
_GENERATION_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True)
class SpecialTokens:
    """What `tokenizer.ggml.*` says beyond the vocabulary."""

    ids: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_templates: Mapping[str, str]
    """By name; the one that is used by default is called so."""

    @property
    def chat_template(self) -> str | None:
        """The template that is used where none is named."""
        return self.chat_templates.get(DEFAULT_TEMPLATE)

    def add_to(self, writer: GGUFWriter) -> None:
        """Write ids, the two switches (always: llama.cpp's defaults differ by tokenizer) and the templates."""
        for kind, index in self.ids.items():
            getattr(writer, f"add_{kind}_token_id")(index)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_templates:
            writer.add_chat_template([{"name": name, "template": text} for name, text in self.chat_templates.items()])


def find_special_tokens(
    folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer, *, generation: Mapping[str, Any] | None = None
) -> SpecialTokens:
    """Read the tokenizer's settings in `folder`; ids it does not name are taken from the model's `config`, and what
    ends a turn from its `generation` config."""
    settings = _read_json(folder / "tokenizer_config.json")
    ids: dict[str, int] = {}
    for kind in KINDS:
        index = _id_of(settings.get(f"{kind}_token"), tokenizer)
        if index is None:
            index = next(iter(_ids(config.get(f"{kind}_token_id"))), None)
        if index is not None:
            ids[kind] = index
    ends = [*_ids(ids.get("eos")), *_ids((generation or {}).get("eos_token_id")), *_ids(config.get("eos_token_id"))]
    ids |= _turn_ends(list(dict.fromkeys(ends)), tokenizer)
    encoded = tokenizer.encode("a").ids
    return SpecialTokens(
        ids=ids,
        adds_bos=_is_added(settings.get("add_bos_token"), ids.get("bos"), encoded[:1]),
        adds_eos=_is_added(settings.get("add_eos_token"), ids.get("eos"), encoded[-1:]),
        chat_templates=_load_chat_templates(folder, settings),
    )


def _read_json(path: Path) -> dict[str, Any]:
    return load_json(path) if path.is_file() else {}


def _id_of(token: object, tokenizer: Tokenizer) -> int | None:
    """`token` is the text, or (in older files) a mapping with the text as `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def _ids(value: object) -> list[int]:
    """A config names one id, or a list of which the first is the model's own."""
    return [index for index in (value if isinstance(value, list) else [value]) if type(index) is int]


def _turn_ends(ends: list[int], tokenizer: Tokenizer) -> dict[str, int]:
    """Which of the ids that generation stops at ends a turn, and which a message within one. `ends` begins with the
    end of sequence."""
    texts = {index: tokenizer.id_to_token(index) for index in ends}
    pauses = [index for index, text in texts.items() if text == MESSAGE_END]
    usual = [index for index, text in texts.items() if text in TURN_ENDS]
    others = [index for index in ends[1:] if texts[index] is not None and index not in pauses]
    found = {"eot": [*usual, *others], "eom": pauses}
    return {kind: indices[0] for kind, indices in found.items() if indices}


def _is_added(setting: object, index: int | None, found: list[int]) -> bool:
    """tokenizer_config.json's switch wins over what tokenizer.json does, as in transformers."""
    if index is None:
        return False
    return setting if isinstance(setting, bool) else found == [index]


def _load_chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """By name: files of their own since transformers 4.50, tokenizer_config.json before, chat_template.json between."""
    path = folder / "chat_template.jinja"
    template: object = settings.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if path.is_file():
        named = {
            DEFAULT_TEMPLATE: path,
            **{other.stem: other for other in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))},
        }
        template = [{"name": name, "template": file.read_text(encoding="utf-8")} for name, file in named.items()]
    if isinstance(template, str):
        template = [{"name": DEFAULT_TEMPLATE, "template": template}]
    entries: list[Any] = template if isinstance(template, list) else []
    return {
        str(entry["name"]): _without_generation_marks(str(entry["template"]))
        for entry in entries
        if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
    }


def _without_generation_marks(template: str) -> str:
    """Make `{% generation %}`, a training-only tag that llama.cpp does not parse, a block that is always taken."""
    return _GENERATION_MARK.sub(lambda mark: f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}", template)
