"""JSON objects from files that others wrote."""

import json
from pathlib import Path

from finetune_api.base import Json
from finetune_trainer.export.errors import ExportError, InvalidBaseError


def load_json(path: Path, *, error: type[ExportError] = InvalidBaseError) -> Json:
    """Read a JSON object; raises `error` if the file holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not valid JSON: {cause}") from cause
    if not isinstance(content, dict):
        raise error(f"{path} holds no JSON object: it must begin with {{")
    return content


def load_json_if_present(path: Path) -> Json:
    """Read a JSON object; empty if there is no such file."""
    return load_json(path) if path.is_file() else {}


def write_json(path: Path, content: Json) -> None:
    """Write a JSON object as people read it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
