"""The tokens at which a model's answer ends: one list for config.json, generation_config.json and GGUF files.

A base's files name some of them, its tokenizer another, and a chat template may end answers with a token that none of
them names: a Gemma base trained with Gemma's template answers until `<end_of_turn>`, and its files say `<eos>`. A model
whose list lacks one does not stop there.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from finetune_trainer.export.base_model.tokenizer_files import DEFAULT_TEMPLATE, TokenizerFiles, id_of, text_of
from finetune_trainer.export.chat_turns import answer_end

EOS = "eos_token_id"


def find_ends(files: TokenizerFiles, config: Mapping[str, Any], generation: Mapping[str, Any]) -> list[int]:
    """Ids of all ends, each once: those of generation_config.json, config.json, the tokenizer, the template."""
    found = [*ids_in(generation.get(EOS)), *ids_in(config.get(EOS))]
    if not files.exists:
        return list(dict.fromkeys(found))

    found += ids_in(id_of(files.settings.get("eos_token"), files.tokenizer))
    found += ids_in(template_end(files))
    return list(dict.fromkeys(found))


def template_end(files: TokenizerFiles) -> int | None:
    """The token that the chat template writes behind the last answer; None if it writes none."""
    template = files.chat_templates.get(DEFAULT_TEMPLATE)
    if not template:
        return None

    names = {f"{kind}_token": text_of(files.settings.get(f"{kind}_token")) for kind in ("bos", "eos", "unk", "pad")}
    behind = answer_end(template, {name: text for name, text in names.items() if text is not None})
    if behind is None:
        return None
    added = {token.content: index for index, token in files.tokenizer.get_added_tokens_decoder().items()}
    # The longest: one token's text may begin another's.
    matching = [text for text in added if text.strip() and behind.lstrip().startswith(text)]
    return added[max(matching, key=len)] if matching else None


def with_ends(config: Mapping[str, Any], ends: list[int]) -> dict[str, Any]:
    """The config with these ends: a number if it is one, a list if they are several."""
    if not ends or ids_in(config.get(EOS)) == ends:
        return dict(config)
    return {**config, EOS: ends[0] if len(ends) == 1 else ends}


def ids_in(value: object) -> list[int]:
    """The ids in a config's value, which is one id or a list of which the first is the model's own."""
    values: Iterable[object] = value if isinstance(value, list) else [value]
    return [index for index in values if type(index) is int]
