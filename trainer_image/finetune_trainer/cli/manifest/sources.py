"""Sources as people write them on their own machine: org/name, ./rows.jsonl, ~/models/x.

A job holds URIs only. So these are completed here, at the local door: on a cluster there is no working directory, and
`org/name` would be one more spelling in every rule that asks for a source's kind.
"""

import os
import re
from pathlib import Path
from typing import Any

from finetune_api.base import FieldPath
from finetune_api.explain import FieldError, format_path

SOURCES: tuple[FieldPath, ...] = (
    ("spec", "model", "source"),
    ("spec", "dataset", "source"),
    ("spec", "dataset", "evaluation", "source"),
)
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
DATA_FILE = re.compile(r".+\.(jsonl?|csv|tsv|parquet|arrow|txt)(\.(gz|zst))?", re.IGNORECASE)
FILE_SCHEME = "file://"


def complete_sources(document: dict[str, Any], folder: Path) -> tuple[list[str], list[FieldError]]:
    """Writes URIs in place of what people write; paths are relative to `folder`.

    Returns what a cluster would want instead, and the errors.
    """
    notes, errors = [], []
    for path in SOURCES:
        section: Any = document
        for name in path[:-1]:
            section = section.get(name) if isinstance(section, dict) else None
        text = section.get("source") if isinstance(section, dict) else None
        if not isinstance(text, str):
            continue

        uri = complete_source(text, folder, is_model=path[1] == "model")
        section["source"] = uri
        if uri.startswith(FILE_SCHEME):
            notes.append(f"{format_path(path)}: {text} is on this machine; a cluster needs hf://, s3:// or pvc://")
            errors += [] if uri == text else _check_file(path, uri, text)  # of URIs, preflight and the run tell
        elif uri != text:
            notes.append(f"{format_path(path)}: {text} is read as {uri}; a cluster needs it written so")
    return notes, errors


def complete_source(text: str, folder: Path, *, is_model: bool) -> str:
    """Returns the URI of a source; a text that is neither path nor org/name comes back as it is.

    A path that exists comes before a repository of the same name, as in transformers.
    """
    if "://" in text:
        return text

    path = folder / Path(text).expanduser()
    looks_local = text.startswith(("/", "~", "./", "../")) or text in (".", "..")
    looks_like_data = not is_model and DATA_FILE.fullmatch(text) is not None
    if looks_local or looks_like_data or path.exists():
        return f"{FILE_SCHEME}{os.path.abspath(path)}{'/' if text.endswith('/') else ''}"  # noqa: PTH100 (keeps links)
    return f"hf://{text}" if HUB_NAME.fullmatch(text) else text


def shorten_source(uri: str) -> str:
    """Returns a source as people write it: org/name, or a path from the working directory if that is shorter."""
    if not uri.startswith(FILE_SCHEME):
        return uri.removeprefix("hf://")
    path = uri.removeprefix(FILE_SCHEME)
    return min(os.path.relpath(path), path, key=len)


def _check_file(path: FieldPath, uri: str, text: str) -> list[FieldError]:
    found = Path(uri.removeprefix(FILE_SCHEME))
    if found.exists():
        return []
    kind = "folder" if path[1] == "model" else "file or folder"
    where = f" ({found})" if str(found) != text else ""
    return [FieldError(path, f"found {text!r}: there is no such {kind} on this machine{where}")]
