"""Signs that a model is a base model: one that continues texts, and was never trained on conversations."""

import json
import re
from pathlib import Path

from finetune_api.spec.sources import Source

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
BASE_NAME = re.compile(r"(^|[-_.])(base|pt|pretrain|pretrained)($|[-_.])", re.IGNORECASE)
"""Parts of a name by which publishers tell their base models: Qwen3-8B-Base, gemma-3-1b-pt."""


def find_base_model_sign(folder: Path, source: str) -> str | None:
    """Returns why the model below `folder`, of the URI `source`, looks like a base model; None if it does not.

    A tokenizer with a chat template is no sign of the opposite: some base models have their family's.
    """
    if not has_own_template(folder):
        return "its tokenizer has no chat template of its own"

    parsed = Source.parse(source)
    name = (parsed.path or parsed.location).rstrip("/").rpartition("/")[2]
    return f"by its name, {name}" if BASE_NAME.search(name) else None


def has_own_template(folder: Path) -> bool:
    """True if the tokenizer below `folder` comes with a chat template."""
    if any((folder / name).exists() for name in TEMPLATE_FILES):
        return True

    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):  # whoever loads the tokenizer says what is wrong with the file
        return False
