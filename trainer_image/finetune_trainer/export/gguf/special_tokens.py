"""Special token ids, the switches that add them to a prompt, and the chat templates, as GGUF metadata.

Encoding a text with the tokenizer itself shows if a beginning token is added: its post-processor may be built in many
ways, but it can be run. The model's generation_config.json names the tokens at which generation stops besides the end
of sequence; llama.cpp guesses them from the tokens' texts, and knows only the usual ones.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter
from tokenizers import Tokenizer

from finetune_trainer.export.base_model.ends import find_ends, ids_in, template_end
from finetune_trainer.export.base_model.tokenizer_files import DEFAULT_TEMPLATE, TokenizerFiles, id_of

KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")
TURN_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|eot|>",
    "<|user|>",
    "<turn|>",
)
MESSAGE_ENDS = ("<|eom_id|>", "<|observation|>")  # pauses for a tool's answer, of Llama 3.1 and GLM
_GENERATION_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True)
class SpecialTokens:
    """The part of `tokenizer.*` that is not vocabulary."""

    ids: Mapping[str, int]
    """By kind: those of KINDS, and `eot` and `eom` for the end of a turn and of a message."""
    adds_bos: bool
    adds_eos: bool
    chat_templates: Mapping[str, str]
    """By name; the one that is used without a name is called `default`."""

    @property
    def chat_template(self) -> str | None:
        """The template that is used without a name."""
        return self.chat_templates.get(DEFAULT_TEMPLATE)

    def add_to(self, writer: GGUFWriter) -> None:
        """Write ids, templates and the two switches (always: llama.cpp's defaults differ by tokenizer)."""
        for kind, index in self.ids.items():
            getattr(writer, f"add_{kind}_token_id")(index)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_templates:
            writer.add_chat_template([{"name": name, "template": text} for name, text in self.chat_templates.items()])


def find_special_tokens(
    files: TokenizerFiles, config: Mapping[str, Any], *, generation: Mapping[str, Any] | None = None
) -> SpecialTokens:
    """Find the special tokens of a tokenizer.

    Ids that its settings do not name are taken from the model's `config`; the ends of a turn also from its
    `generation` config.
    """
    tokenizer, settings = files.tokenizer, files.settings

    ids: dict[str, int] = {}
    for kind in KINDS:
        index = id_of(settings.get(f"{kind}_token"), tokenizer)
        if index is None:
            index = next(iter(ids_in(config.get(f"{kind}_token_id"))), None)
        if index is not None:
            ids[kind] = index

    ends = [*ids_in(ids.get("eos")), *find_ends(files, config, generation or {})]
    ids |= _turn_ends(list(dict.fromkeys(ends)), tokenizer)
    # llama.cpp finds the usual ends by their texts. The template's own is what training taught: it must not miss that.
    taught = template_end(files)
    if taught is not None and taught not in (ids.get("eos"), ids.get("eom")):
        ids["eot"] = taught

    # Any text shows which tokens the post-processor adds.
    encoded = tokenizer.encode("a").ids
    return SpecialTokens(
        ids=ids,
        adds_bos=_is_added(settings.get("add_bos_token"), ids.get("bos"), encoded[:1]),
        adds_eos=_is_added(settings.get("add_eos_token"), ids.get("eos"), encoded[-1:]),
        chat_templates={name: _without_generation_marks(text) for name, text in files.chat_templates.items()},
    )


def _turn_ends(ends: list[int], tokenizer: Tokenizer) -> dict[str, int]:
    """Find the ids that end a turn (`eot`) and a message within a turn (`eom`).

    `ends` are the ids at which generation stops, the end of sequence first.
    """
    texts = {index: tokenizer.id_to_token(index) for index in ends}
    pauses = [index for index, text in texts.items() if text in MESSAGE_ENDS]

    # A usual text comes before any other token that is not the end of sequence.
    usual = [index for index, text in texts.items() if text in TURN_ENDS]
    others = [index for index in ends[1:] if texts[index] is not None and index not in pauses]

    found = {"eot": [*usual, *others], "eom": pauses}
    return {kind: indices[0] for kind, indices in found.items() if indices}


def _is_added(setting: object, index: int | None, found: list[int]) -> bool:
    """True if the token is added to a prompt; tokenizer_config.json's switch wins over tokenizer.json's steps."""
    if index is None:
        return False
    return setting if isinstance(setting, bool) else found == [index]


def _without_generation_marks(template: str) -> str:
    """Make `{% generation %}`, a training-only tag that llama.cpp does not parse, a block that is always taken."""
    return _GENERATION_MARK.sub(lambda mark: f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}", template)
