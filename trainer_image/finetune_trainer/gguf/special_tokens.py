"""Special token ids, whether they are added to a prompt, and the chat template, as GGUF metadata.

Whether a beginning token is added is found by encoding a text with the tokenizer itself: its post-processor may be
built in many ways, but it can be run.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from tokenizers import Tokenizer

KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")
_GENERATION_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True)
class SpecialTokens:
    """What `tokenizer.ggml.*` says beyond the vocabulary."""

    ids: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None

    def add_to(self, writer: GGUFWriter) -> None:
        """Write ids, the two switches (always: llama.cpp's defaults differ by tokenizer) and the template."""
        for kind, index in self.ids.items():
            getattr(writer, f"add_{kind}_token_id")(index)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def find_special_tokens(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> SpecialTokens:
    """Read the tokenizer's settings in `folder`; ids it does not name are taken from the model's `config`."""
    settings = _read_json(folder / "tokenizer_config.json")
    ids: dict[str, int] = {}
    for kind in KINDS:
        index = _id_of(settings.get(f"{kind}_token"), tokenizer)
        if index is None:
            index = _first_id(config.get(f"{kind}_token_id"))
        if index is not None:
            ids[kind] = index
    encoded = tokenizer.encode("a").ids
    return SpecialTokens(
        ids=ids,
        adds_bos=_is_added(settings.get("add_bos_token"), ids.get("bos"), encoded[:1]),
        adds_eos=_is_added(settings.get("add_eos_token"), ids.get("eos"), encoded[-1:]),
        chat_template=_load_chat_template(folder, settings),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _id_of(token: object, tokenizer: Tokenizer) -> int | None:
    """`token` is the text, or (in older files) a mapping with the text as `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def _first_id(value: object) -> int | None:
    """A config names one id, or a list of which the first is the model's own."""
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, int) else None


def _is_added(setting: object, index: int | None, found: list[int]) -> bool:
    """tokenizer_config.json's switch wins over what tokenizer.json does, as in transformers."""
    if index is None:
        return False
    return setting if isinstance(setting, bool) else found == [index]


def _load_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The default template: its own file since transformers 4.50, tokenizer_config.json before."""
    path = folder / "chat_template.jinja"
    template: object = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return _without_generation_marks(template) if isinstance(template, str) else None


def _without_generation_marks(template: str) -> str:
    """Make `{% generation %}`, a training-only tag that llama.cpp does not parse, a block that is always taken."""
    return _GENERATION_MARK.sub(lambda mark: f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}", template)
