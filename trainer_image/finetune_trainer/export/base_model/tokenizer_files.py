"""The tokenizer of a model folder: its files, each parsed when it is first asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from finetune_api.base import Json
from finetune_trainer.export.base_model.json_files import load_json, load_json_if_present
from finetune_trainer.export.errors import InvalidBaseError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
NAMED_TEMPLATES = "additional_chat_templates"
"""Folder of chat templates beside the default one; each file is named like its template."""
DEFAULT_TEMPLATE = "default"


@dataclass(frozen=True)
class TokenizerChanges:
    """Changes that training makes to a base's tokenizer."""

    chat_templates: Mapping[str, str]
    """By name, in place of all templates of the base."""
    eos_token: str | None = None
    """Text of the end-of-sequence token, which a named template may choose; None: the base's."""
    new_tokens: Mapping[str, int] = field(default_factory=dict)
    """Ids of added tokens by their text."""


@dataclass(frozen=True)
class TokenizerFiles:
    """A folder with tokenizer files; every property raises InvalidBaseError if its file cannot be used."""

    folder: Path
    changes: TokenizerChanges | None = None
    """Changes of the files' content; None: the files say it all."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """tokenizer.json as the tokenizers package loads it."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise InvalidBaseError(
                f"{self.folder} has no tokenizer.json, from which GGUF export reads the vocabulary: add it"
            )
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise InvalidBaseError(f"{path} is not a tokenizer: {error}") from error

    @cached_property
    def settings(self) -> Json:
        """tokenizer_config.json with the changes; empty if there is none."""
        settings = load_json_if_present(self.folder / "tokenizer_config.json")
        if self.changes is not None and self.changes.eos_token is not None:
            settings["eos_token"] = self.changes.eos_token
        return settings

    @cached_property
    def chat_templates(self) -> Mapping[str, str]:
        """Chat templates (Jinja) by name; the one used without a name is called `default`.

        They are files of their own since transformers 4.50, were in tokenizer_config.json before, and for some
        versions in chat_template.json.
        """
        if self.changes is not None:
            return self.changes.chat_templates

        default = self.folder / "chat_template.jinja"
        if default.is_file():
            others = sorted((self.folder / NAMED_TEMPLATES).glob("*.jinja"))
            files = {DEFAULT_TEMPLATE: default, **{other.stem: other for other in others}}
            return {name: file.read_text(encoding="utf-8") for name, file in files.items()}

        template: object = self.settings.get("chat_template")
        if not template:
            template = load_json_if_present(self.folder / "chat_template.json").get("chat_template")
        if isinstance(template, str):
            return {DEFAULT_TEMPLATE: template}

        # Some repositories list several templates, each with its name.
        entries: list[Any] = template if isinstance(template, list) else []
        return {
            str(entry["name"]): str(entry["template"])
            for entry in entries
            if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
        }

    @property
    def exists(self) -> bool:
        """True if there is a tokenizer.json."""
        return (self.folder / "tokenizer.json").is_file()

    def load_description(self) -> Json:
        """Parse tokenizer.json. Not kept: a large vocabulary takes 100 MB as Python objects."""
        return load_json(self.folder / "tokenizer.json")

    def list_files(self) -> list[str]:
        """Names of all tokenizer files that exist, relative to the folder."""
        templates = [
            path.relative_to(self.folder).as_posix() for path in (self.folder / NAMED_TEMPLATES).glob("*.jinja")
        ]
        return [name for name in (*TOKENIZER_FILES, *templates) if (self.folder / name).is_file()]


def id_of(token: object, tokenizer: Tokenizer) -> int | None:
    """The id of a token in a tokenizer's settings; None if it has none."""
    text = text_of(token)
    return tokenizer.token_to_id(text) if text is not None else None


def text_of(token: object) -> str | None:
    """The text of a token given as its text, or (in older files) as a mapping with the text as `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
