"""Arguments of `finetune export`: checked before anything heavy is imported, and all errors said together.

argparse alone stops at the first one; here it only splits words, and the checks are ours.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.spec.sources import SOURCE_PATTERN, stays_inside
from finetune_api.vocabulary import MergedType
from finetune_trainer.export.quantization.file_types import FILE_TYPES
from finetune_trainer.sources.repository import SourceAccess

DEVICES = ("auto", "cpu", "cuda")
MERGED_TYPES = tuple(kind.value for kind in MergedType if kind is not MergedType.NONE)
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_PLACE = "a folder, s3://bucket/prefix/ or hf://org/name"


class InvalidArgumentsError(Exception):
    """What is wrong with the arguments, one line each."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = tuple(errors)


@dataclass(frozen=True)
class ExportArguments:
    """What to export, from where and to where."""

    base: str
    """Source URI."""
    revision: str | None
    adapter: str | None
    """Source URI."""
    output: Path
    merged: str | None
    gguf: tuple[str, ...]
    name: str
    device: str
    access: SourceAccess


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb; none is required and none has choices, so that `check` sees every mistake."""

    def option(name: str, metavar: str, text: str, **settings: str) -> None:
        parser.add_argument(name, nargs="?", const="", metavar=metavar, help=text, **settings)  # type: ignore[arg-type]  # argparse's overloads

    option("--base", "SRC", f"base model: {_PLACE}")
    option("--revision", "REV", "branch, tag or commit of an hf:// base (default: main)")
    option("--adapter", "SRC", f"peft adapter to merge: {_PLACE} (default: export the base as it is)")
    option("--output", "DIR", "folder for merged/ and gguf/; files of the same names are replaced")
    option("--merged", "TYPE", f"merged safetensors: {' or '.join(MERGED_TYPES)}")
    option("--gguf", "TYPE", f"a GGUF file, may be repeated: {', '.join(FILE_TYPES)}", action="append")
    option("--name", "NAME", "stem of the GGUF files (default: the base's name)")
    option("--device", "DEVICE", f"where to merge and quantise: {', '.join(DEVICES)} (default: auto)", default="auto")
    option("--credentials", "DIR", "folder with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or HF_TOKEN, as files")
    option("--endpoint-url", "URL", "S3 store that is not AWS")
    option("--region", "REGION", "region of the S3 store")


def check_export_arguments(found: argparse.Namespace, unknown: Sequence[str]) -> ExportArguments:
    """The arguments, if they make sense; raises InvalidArgumentsError with everything that does not."""
    errors = [f"{word}: no such argument" for word in unknown]
    given = {name: value for name, value in vars(found).items() if value is not None}
    errors += [f"--{name.replace('_', '-')}: needs a value" for name, value in given.items() if value in ("", [""])]
    types = tuple(given.get("gguf", ()))
    errors += _check_types(given.get("merged"), types)
    base = _check_source("--base", given.get("base"), errors, required=True)
    adapter = _check_source("--adapter", given.get("adapter"), errors, required=False)
    if given.get("revision") and base is not None and not base.startswith("hf://"):
        errors.append("--revision: only goes with an hf:// base")
    output = Path(given["output"]) if given.get("output") else None
    if output is None:
        errors.append("--output: is missing: name a folder")
    elif output.exists() and not output.is_dir():
        errors.append(f"--output: {output} is a file, a folder is needed")
    credentials = Path(given["credentials"]) if given.get("credentials") else None
    if credentials is not None and not credentials.is_dir():
        errors.append(f"--credentials: {credentials} is no folder")
    if given["device"] not in ("", *DEVICES):
        errors.append(f"--device: found {given['device']!r}: choose among {', '.join(DEVICES)}")
    name = given.get("name") or _last_part(base)
    if not NAME_PATTERN.fullmatch(name):
        errors.append(f"--name: found {name!r}: write letters, digits, '.', '_' and '-', at most 96")
    if errors or base is None or output is None:
        raise InvalidArgumentsError(errors)
    access = SourceAccess(credentials, given.get("endpoint_url"), given.get("region"))
    return ExportArguments(
        base, given.get("revision"), adapter, output, given.get("merged"), types, name, given["device"], access
    )


def _check_types(merged: str | None, types: tuple[str, ...]) -> list[str]:
    errors = []
    if merged and merged not in MERGED_TYPES:
        errors.append(f"--merged: found {merged!r}: choose {' or '.join(MERGED_TYPES)}")
    unknown = [kind for kind in types if kind and kind not in FILE_TYPES]
    errors += [f"--gguf: found {kind!r}: choose among {', '.join(FILE_TYPES)}" for kind in unknown]
    errors += [f"--gguf: {kind} is written twice" for kind in FILE_TYPES if types.count(kind) > 1]
    if merged is None and not types:
        errors.append("nothing to export: ask for --merged, for --gguf, or both")
    return errors


def _check_source(option: str, text: str | None, errors: list[str], *, required: bool) -> str | None:
    """The source as a URI; None where there is none, or an error was added."""
    if not text:
        if required:
            errors.append(f"{option}: is missing: name {_PLACE}")
        return None
    if "://" not in text:
        if Path(text).is_dir():
            return f"file://{Path(text).resolve()}"
        errors.append(f"{option}: {text} is no folder; name {_PLACE}")
        return None
    if text.startswith("pvc://") or not re.fullmatch(SOURCE_PATTERN, text) or not stays_inside(text):
        errors.append(f"{option}: found {text!r}: name {_PLACE}")
        return None
    return text


def _last_part(uri: str | None) -> str:
    return uri.rstrip("/").rpartition("/")[2] if uri else "model"
