"""Companions of published weights and adapters: the tokenizer and generation_config.json."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.base import Json
from finetune_api.spec.inputs import ModelSpec
from finetune_trainer.export.base_model.ends import find_ends, with_ends
from finetune_trainer.export.base_model.full_config import read_full_config
from finetune_trainer.export.base_model.json_files import load_json, load_json_if_present, write_json
from finetune_trainer.export.base_model.published_tokenizer import trained_tokenizer, write_tokenizer
from finetune_trainer.export.base_model.tokenizer_files import TokenizerFiles
from finetune_trainer.model.multimodal import is_multimodal

GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Companions:
    """Everything that weights need to answer and to stop, from the base's folder."""

    path: Path
    """The base's folder."""
    config: Json
    """config.json of the language model."""
    generation_config: Json
    """generation_config.json as written; empty if there is none."""
    tokenizer: TokenizerFiles

    def write(self, target: Path, tokenizer: Any = None) -> list[int]:
        """Write them into `target`; returns the ids of the tokens at which an answer ends.

        A base without a tokenizer.json gets one from `tokenizer`, transformers' own.
        """
        target.mkdir(parents=True, exist_ok=True)
        write_tokenizer(self.tokenizer, target, tokenizer)

        # Without the file, transformers takes the token ids of config.json.
        stated = self.generation_config or {
            key: self.config[key] for key in TOKEN_IDS if self.config.get(key) is not None
        }
        ends = find_ends(TokenizerFiles(target), self.config, self.generation_config)
        generation = with_ends(stated, ends)
        if self.generation_config and generation == self.generation_config:
            shutil.copyfile(self.path / GENERATION, target / GENERATION)
        elif generation:
            write_json(target / GENERATION, generation)
        return ends


def companions_of_training(base: Path, tokenizer: Any, spec: ModelSpec) -> Companions:
    """Companions of an adapter trained on the folder `base` with transformers' `tokenizer`, which has the chat template
    and the new tokens that the job may choose."""
    files = trained_tokenizer(base, tokenizer, has_own_template=spec.has_own_template(), new_tokens=spec.new_tokens)
    written = load_json(base / "config.json")
    config = read_full_config(base) if is_multimodal(written) else written
    return Companions(base, config, load_json_if_present(base / GENERATION), files)
