"""JSON objects from files that others wrote."""

import json
from pathlib import Path

from finetune_api.base import Json
from finetune_trainer.export.errors import InvalidBaseError


def load_json(path: Path) -> Json:
    """Read a JSON object; raises InvalidBaseError if the file holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidBaseError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidBaseError(f"{path} holds no JSON object, but {type(content).__name__}: expected {{...}}")
    return content


def load_json_if_present(path: Path) -> Json:
    """Read a JSON object; empty if there is no such file."""
    return load_json(path) if path.is_file() else {}
