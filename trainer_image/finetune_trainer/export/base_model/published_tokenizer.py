"""Tokenizer files as they are published: the base's own bytes, with only what training changed written anew.

Saving a tokenizer with transformers writes what this version of transformers makes of it: transformers 5 writes the
class `TokenizersBackend` and where the files were loaded from, and no transformers 4 loads that. The base's files load
wherever the base does.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from finetune_api.base import Json
from finetune_trainer.chat.new_tokens import new_token_ids
from finetune_trainer.export.base_model.json_files import load_json, load_json_if_present, write_json
from finetune_trainer.export.base_model.tokenizer_files import (
    DEFAULT_TEMPLATE,
    NAMED_TEMPLATES,
    TOKENIZER_FILES,
    TokenizerChanges,
    TokenizerFiles,
    text_of,
)

SETTINGS, SPECIAL_TOKENS, DESCRIPTION = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
ADDED = "added_tokens.json"
_ORDINARY = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
"""Settings of a new token, as `chat.new_tokens` adds it."""
OF_THIS_MACHINE = ("local_files_only", "is_local", "backend", "auto_map")
"""Settings that transformers 5 writes about the loading, and the name of code that is never published."""
ONLY_IN_5, IN_BOTH = "TokenizersBackend", "PreTrainedTokenizerFast"
"""Names of one class: transformers 5 knows both."""


def trained_tokenizer(
    base: Path, tokenizer: Any, *, has_own_template: bool, new_tokens: Sequence[str] = ()
) -> TokenizerFiles:
    """The base's files, with template and end of sequence of transformers' `tokenizer` if the job chose them, and with
    the new tokens that it has."""
    added = dict(zip(new_tokens, new_token_ids(tokenizer, new_tokens), strict=True))
    if has_own_template:
        templates = {DEFAULT_TEMPLATE: tokenizer.chat_template}
        return TokenizerFiles(base, TokenizerChanges(templates, tokenizer.eos_token, added))
    files = TokenizerFiles(base)
    return TokenizerFiles(base, TokenizerChanges(files.chat_templates, None, added)) if added else files


def tokenizer_of_adapter(base: Path, adapter: Path | None) -> TokenizerFiles:
    """The tokenizer that an adapter was trained with: the base's files with the adapter's template and end of sequence.

    An adapter with a vocabulary of its own has its own files; one without a tokenizer was trained with the base's.
    """
    found = TokenizerFiles(base)
    if adapter is None or not TokenizerFiles(adapter).exists:
        return found
    own = TokenizerFiles(adapter)
    if not found.exists or not _have_one_vocabulary(own, found):
        return own

    eos = text_of(own.settings.get("eos_token"))
    changed_eos = eos if eos is not None and eos != text_of(found.settings.get("eos_token")) else None
    if own.chat_templates == found.chat_templates and changed_eos is None:
        return found
    return TokenizerFiles(base, TokenizerChanges(own.chat_templates, changed_eos))


def write_tokenizer(files: TokenizerFiles, target: Path, tokenizer: Any = None) -> None:
    """Write the tokenizer's files into `target`, in place of any that are there.

    A base that has only SentencePiece's or GPT-2's files gets a tokenizer.json beside them, from transformers'
    `tokenizer`: GGUF files are made from it.
    """
    for name in TOKENIZER_FILES:
        (target / name).unlink(missing_ok=True)
    shutil.rmtree(target / NAMED_TEMPLATES, ignore_errors=True)

    changes = files.changes
    names = [name for name in files.list_files() if changes is None or not _is_template(name)]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files.folder / name, target / name)
    if tokenizer is not None and DESCRIPTION not in names:
        tokenizer.backend_tokenizer.save(str(target / DESCRIPTION))

    _rewrite(target / SETTINGS, _published_settings(files))
    if changes is None:
        return
    if changes.new_tokens and DESCRIPTION in names:
        _add_tokens(target, changes.new_tokens)
    special = load_json_if_present(files.folder / SPECIAL_TOKENS)
    if special and changes.eos_token is not None:
        _rewrite(target / SPECIAL_TOKENS, special | {"eos_token": changes.eos_token})
    _write_templates(changes, target)


def _have_one_vocabulary(own: TokenizerFiles, other: TokenizerFiles) -> bool:
    """True if both tokenizers have the same tokens; equal files need not be parsed."""
    paths = own.folder / DESCRIPTION, other.folder / DESCRIPTION
    if paths[0].stat().st_size == paths[1].stat().st_size and paths[0].read_bytes() == paths[1].read_bytes():
        return True
    return _vocabulary(own.tokenizer) == _vocabulary(other.tokenizer)


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return tokenizer.get_vocab(with_added_tokens=True)


def _is_template(name: str) -> bool:
    return name in TEMPLATE_FILES or name.startswith(f"{NAMED_TEMPLATES}/")


def _published_settings(files: TokenizerFiles) -> Json:
    """tokenizer_config.json with the changes, in the words that transformers 4 and 5 both read."""
    settings = {key: value for key, value in files.settings.items() if key not in OF_THIS_MACHINE}
    if settings.get("tokenizer_class") == ONLY_IN_5:
        settings["tokenizer_class"] = IN_BOTH
    # transformers 4 knows a mapping by this name, and has the list under the older one.
    if isinstance(settings.get("extra_special_tokens"), list):
        settings.setdefault("additional_special_tokens", settings.pop("extra_special_tokens"))

    if files.changes is not None and "chat_template" in settings:
        # Versions that do not read chat_template.jinja yet must not find the base's template here.
        settings["chat_template"] = files.changes.chat_templates.get(DEFAULT_TEMPLATE)
    return settings


def _add_tokens(target: Path, new_tokens: Mapping[str, int]) -> None:
    """Add tokens to the files of a tokenizer in `target`, to each where it lists those that were added before."""
    description = load_json(target / DESCRIPTION)
    described = [{"id": number, "content": text} | _ORDINARY for text, number in new_tokens.items()]
    write_json(target / DESCRIPTION, description | {"added_tokens": [*description["added_tokens"], *described]})

    settings = load_json_if_present(target / SETTINGS)
    if "added_tokens_decoder" in settings:
        listed = {str(number): {"content": text} | _ORDINARY for text, number in new_tokens.items()}
        write_json(target / SETTINGS, settings | {"added_tokens_decoder": settings["added_tokens_decoder"] | listed})

    # Readers of SentencePiece's file find added tokens here alone.
    if (target / ADDED).is_file() or (target / "tokenizer.model").is_file():
        write_json(target / ADDED, load_json_if_present(target / ADDED) | dict(new_tokens))


def _rewrite(path: Path, wanted: Json) -> None:
    """Write `wanted` to `path` unless the file says so already: then its bytes stay."""
    if wanted and (not path.is_file() or load_json(path) != wanted):
        write_json(path, wanted)


def _write_templates(changes: TokenizerChanges, target: Path) -> None:
    for name, text in changes.chat_templates.items():
        path = (
            target / "chat_template.jinja" if name == DEFAULT_TEMPLATE else target / NAMED_TEMPLATES / f"{name}.jinja"
        )
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
