"""The errors of a manifest in words: one a line, at its own field, with the nearest right word where there is one.

Field names and values come from the same schema as the CRD, so a hint never names what the API server would refuse.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from finetune_api import API_VERSION, KIND
from finetune_api.base import FieldPath
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.structural import Schema, structural_schema

CLOSE = 0.6  # similarity from which on a word is suggested, as difflib counts it
WANTED = {
    "missing": "is required",
    "int_type": "write a whole number, without quotes",
    "int_parsing": "write a whole number, without quotes",
    "int_from_float": "write a whole number",
    "float_type": "write a number, without quotes",
    "float_parsing": "write a number, without quotes",
    "string_type": "write text, in quotes",
    "bool_type": "write true or false",
    "bool_parsing": "write true or false",
    "model_type": "write the section's fields below it",
    "model_attributes_type": "write the section's fields below it",
    "dict_type": "write names and values below it",
    "tuple_type": "write a list, such as [a, b]",
}
"""Words for pydantic's types of error, `_parsing` where it reads leniently, as the operator does.

Its own text, with the bounds in it, serves for the others.
"""


@dataclass(frozen=True)
class FieldError:
    """One error: the field, and what is wrong with it."""

    path: FieldPath
    message: str

    def __str__(self) -> str:
        # The message of a rule names its fields itself.
        names_field = not self.path or self.message.startswith("spec.")
        return self.message if names_field else f"{format_path(self.path)}: {self.message}"


def format_path(path: FieldPath) -> str:
    """Write a field's place as spec.export.gguf[0]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def explain_errors(error: ValidationError, document: Any) -> list[FieldError]:
    """Return the errors of a manifest, each at its own field, none twice; `document` is what was validated."""
    schema = _manifest_schema()
    found = (each for entry in error.errors(include_url=False) for each in _explain(entry, document, schema))

    # A field that takes a number or a text is refused once for each.
    kept: dict[tuple[FieldPath, str], FieldError] = {}
    for each in found:
        kept.setdefault((each.path, each.message if each.message.startswith("spec.") else ""), each)
    return list(kept.values())


def _explain(entry: Any, document: Any, schema: Schema) -> Iterator[FieldError]:
    """Errors of one entry of pydantic's list: several where several rules of a section are broken."""
    path = _written_path(entry["loc"], document, is_missing=entry["type"] == "missing")
    text: str = entry["msg"].removeprefix("Value error, ")

    if entry["type"] == "value_error" and text.startswith("spec."):
        for message in re.split(r"; (?=spec\.)", text):
            field = re.match(r"spec(\.\w+)*", message)
            assert field is not None
            yield FieldError(tuple(field[0].split(".")), message)
        return

    if entry["type"] == "extra_forbidden":
        yield FieldError(path, _suggest_field(path, schema))
        return

    value = entry["input"]
    shown = f"found {value!r}: " if isinstance(value, str | int | float | bool) else ""
    if entry["type"] in ("enum", "literal_error"):
        yield FieldError(path, shown + _suggest_value(value, _descend(schema, path).get("enum", [])))
    else:
        yield FieldError(path, shown + WANTED.get(entry["type"], text.replace("Input should", "it should")))


def _written_path(location: FieldPath, document: Any, *, is_missing: bool) -> FieldPath:
    """The part of pydantic's location that the user wrote: branches of a union and marks of keys are left out."""
    path: list[str | int] = []
    node = document
    for index, part in enumerate(location):
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and isinstance(part, int)
        if not inside:
            return (*path, part) if is_missing and index == len(location) - 1 else tuple(path)
        path.append(part)
        node = node[part]
    return tuple(path)


def _suggest_field(path: FieldPath, schema: Schema) -> str:
    """Words for a field that does not exist: the nearest one of its section, else the section that has it."""
    name = str(path[-1])
    if (near := _nearest(name, _descend(schema, path[:-1]).get("properties", ()))) is not None:
        return f"there is no such field; did you mean {near}?"

    elsewhere = [place for place in _all_fields(schema, ()) if place[-1] == to_camel(name)]
    if elsewhere:
        return f"there is no such field here; did you mean {format_path(elsewhere[0])}?"
    return "there is no such field"


def _suggest_value(value: Any, choices: list[str]) -> str:
    near = _nearest(value, choices) if isinstance(value, str) else None
    return f"write {near}" if near is not None else f"choose among {', '.join(choices)}"


def _nearest(word: str, choices: Any) -> str | None:
    """The choice that is nearest to the word, whatever its case and its underscores."""
    folded = {re.sub(r"[-_]", "", choice).lower(): choice for choice in choices}
    plain = re.sub(r"[-_]", "", word).lower()
    close = difflib.get_close_matches(plain, folded, n=1, cutoff=CLOSE)
    return folded[close[0]] if close else None


def _manifest_schema() -> Schema:
    metadata: Schema = {name: {} for name in ("name", "namespace", "labels", "annotations")}
    return {
        "properties": {
            "apiVersion": {"enum": [API_VERSION]},
            "kind": {"enum": [KIND]},
            "metadata": {"properties": metadata},
            "spec": structural_schema(FineTuneJobSpec),
        }
    }


def _descend(schema: Schema, path: FieldPath) -> Schema:
    """The schema of a field; empty where there is none."""
    for part in path:
        schema = schema.get("items", {}) if isinstance(part, int) else schema.get("properties", {}).get(part, {})
    return schema


def _all_fields(schema: Schema, path: FieldPath) -> Iterator[FieldPath]:
    for name, below in schema.get("properties", {}).items():
        yield (*path, name)
        yield from _all_fields(below, (*path, name))
