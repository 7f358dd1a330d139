"""Options of `finetune export`: checked before anything heavy is imported, with all errors reported together.

argparse alone stops at the first error, so here it only splits words, and the checks are ours.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.spec.sources import SOURCE_PATTERN, stays_inside
from finetune_api.vocabulary import GgufType, MergedType

DEVICES = ("auto", "cpu", "cuda")
MERGED_TYPES = tuple(kind.value for kind in MergedType if kind is not MergedType.NONE)
GGUF_TYPES = tuple(kind.value for kind in GgufType)
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_SOURCES = "a folder, s3://bucket/prefix/ or hf://org/name"


class InvalidArgumentsError(Exception):
    """All errors in the arguments, one line each."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = tuple(errors)


@dataclass(frozen=True)
class ExportArguments:
    """Checked arguments: what to export, from where and to where."""

    base: str
    """Source URI."""
    revision: str | None
    adapter: str | None
    """Source URI."""
    output: Path
    merged: str | None
    """Type of the merged weights, if they are wanted."""
    gguf: tuple[str, ...]
    name: str
    device: str
    credentials: Path | None
    """Folder like a mounted Secret."""
    endpoint_url: str | None
    region: str | None
    rows: Path | None
    """Data file to judge the files on."""


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; none is required and none has choices, so that `check_export_arguments` sees every error."""

    def option(name: str, metavar: str, text: str, **settings: str) -> None:
        parser.add_argument(name, nargs="?", const="", metavar=metavar, help=text, **settings)  # type: ignore[arg-type]  # argparse's overloads

    option("--base", "SRC", f"base model: {_SOURCES}")
    option("--revision", "REV", "branch, tag or commit of an hf:// base (default: main)")
    option("--adapter", "SRC", f"peft adapter to merge: {_SOURCES} (default: export the base as it is)")
    option("--output", "DIR", "folder for merged/ and gguf/; files of the same names are replaced")
    option("--merged", "TYPE", f"merged safetensors: {' or '.join(MERGED_TYPES)}")
    option("--gguf", "TYPE", f"a GGUF file, may be repeated: {', '.join(GGUF_TYPES)}", action="append")
    option("--name", "NAME", "stem of the GGUF files (default: the job of the adapter, else the base's name)")
    option("--rows", "FILE", "rows of the evaluation data, to measure what each file keeps of the training")
    option("--device", "DEVICE", f"where to merge and quantise: {', '.join(DEVICES)} (default: auto)", default="auto")
    option("--credentials", "DIR", "folder with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or HF_TOKEN, as files")
    option("--endpoint-url", "URL", "S3 store that is not AWS")
    option("--region", "REGION", "region of the S3 store")


def check_export_arguments(found: argparse.Namespace, unknown: Sequence[str]) -> ExportArguments:
    """Returns the arguments if they make sense; `unknown` are the words that are no option.

    Raises InvalidArgumentsError with everything that is wrong.
    """
    errors = [f"{word}: no such argument" for word in unknown]
    # An option without a value is the empty string here (see `option` above).
    given = {name: value for name, value in vars(found).items() if value is not None}
    errors += [f"--{name.replace('_', '-')}: needs a value" for name, value in given.items() if value in ("", [""])]

    types = tuple(given.get("gguf", ()))
    errors += _check_types(given.get("merged"), types)

    base = _check_source("--base", given.get("base"), errors, required=True)
    adapter = _check_source("--adapter", given.get("adapter"), errors, required=False)
    if given.get("revision") and base is not None and not base.startswith("hf://"):
        errors.append("--revision: only an hf:// base has revisions")

    output, credentials = _check_folders(given, errors)
    if given["device"] not in ("", *DEVICES):
        errors.append(f"--device: found {given['device']!r}: choose among {', '.join(DEVICES)}")
    if given.get("rows") and not Path(given["rows"]).is_file():
        errors.append(f"--rows: there is no file {given['rows']}")
    # The base's own name may be unfit for a file, so a default is checked as well.
    name = given.get("name") or _job_of(adapter) or _last_part(base)
    if not NAME_PATTERN.fullmatch(name):
        errors.append(f"--name: found {name!r}: write letters, digits, '.', '_' and '-', at most 96")

    if errors or base is None or output is None:
        raise InvalidArgumentsError(errors)
    return ExportArguments(
        base=base,
        revision=given.get("revision"),
        adapter=adapter,
        output=output,
        merged=given.get("merged"),
        gguf=types,
        name=name,
        device=given["device"],
        credentials=credentials,
        endpoint_url=given.get("endpoint_url"),
        region=given.get("region"),
        rows=Path(given["rows"]) if given.get("rows") else None,
    )


def _job_of(adapter: str | None) -> str | None:
    """Name of the job that made an adapter, by the layout of its results; None if it lies elsewhere.

    A result is PLACE/JOB/attempts/ID/adapter, in a folder also JOB/adapter beside JOB/manifest.json.
    """
    if adapter is None:
        return None
    parts = adapter.rstrip("/").split("/")
    if len(parts) >= 4 and parts[-3] == "attempts":
        return parts[-4]

    folder = Path(adapter).absolute().parent
    return folder.name if "://" not in adapter and (folder / "manifest.json").is_file() else None


def _check_folders(given: Mapping[str, str], errors: list[str]) -> tuple[Path | None, Path | None]:
    """Output and credentials; what is wrong with them is added to `errors`."""
    output = Path(given["output"]) if given.get("output") else None
    if output is None:
        errors.append("--output is required: give a folder")
    elif output.exists() and not output.is_dir():
        errors.append(f"--output: {output} is a file: give a folder")

    credentials = Path(given["credentials"]) if given.get("credentials") else None
    if credentials is not None and not credentials.is_dir():
        errors.append(f"--credentials: there is no folder {credentials}")
    return output, credentials


def _check_types(merged: str | None, types: tuple[str, ...]) -> list[str]:
    """Errors in the types to write."""
    errors = []
    if merged and merged not in MERGED_TYPES:
        errors.append(f"--merged: found {merged!r}: choose {' or '.join(MERGED_TYPES)}")

    unknown = [kind for kind in types if kind and kind not in GGUF_TYPES]
    errors += [f"--gguf: found {kind!r}: choose among {', '.join(GGUF_TYPES)}" for kind in unknown]
    errors += [f"--gguf: {kind} is given twice" for kind in GGUF_TYPES if types.count(kind) > 1]
    if merged is None and not types:
        errors.append("nothing to export: ask for --merged, for --gguf, or both")
    return errors


def _check_source(option: str, text: str | None, errors: list[str], *, required: bool) -> str | None:
    """Returns the source as a URI; None if none is given, or if an error was added to `errors`."""
    if not text:
        if required:
            errors.append(f"{option} is required: give {_SOURCES}")
        return None

    # A plain path is the common case, so it needs no file://.
    if "://" not in text:
        if Path(text).is_dir():
            return f"file://{Path(text).resolve()}"
        errors.append(f"{option}: there is no folder {text}: give {_SOURCES}")
        return None

    # A claim is mounted in pods only.
    if text.startswith("pvc://") or not re.fullmatch(SOURCE_PATTERN, text) or not stays_inside(text):
        errors.append(f"{option}: found {text!r}: give {_SOURCES}")
        return None
    return text


def _last_part(uri: str | None) -> str:
    """Name of the GGUF files if none is given: the last part of the base's URI."""
    return uri.rstrip("/").rpartition("/")[2] if uri else "model"
