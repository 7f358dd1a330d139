"""The tokenizer of a model folder: its files, each parsed when it is first asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
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
class TokenizerFiles:
    """A folder with tokenizer files; every property raises InvalidBaseError if its file cannot be used."""

    folder: Path

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
        """tokenizer_config.json; empty if there is none."""
        return load_json_if_present(self.folder / "tokenizer_config.json")

    @cached_property
    def chat_templates(self) -> Mapping[str, str]:
        """Chat templates (Jinja) by name; the one used without a name is called `default`.

        They are files of their own since transformers 4.50, were in tokenizer_config.json before, and for some
        versions in chat_template.json.
        """
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

    def load_description(self) -> Json:
        """Parse tokenizer.json. Not kept: a large vocabulary takes 100 MB as Python objects."""
        return load_json(self.folder / "tokenizer.json")

    def list_files(self) -> list[str]:
        """Names of all tokenizer files that exist, relative to the folder."""
        templates = [
            path.relative_to(self.folder).as_posix() for path in (self.folder / NAMED_TEMPLATES).glob("*.jinja")
        ]
        return [name for name in (*TOKENIZER_FILES, *templates) if (self.folder / name).is_file()]
