"""Options that stand for fields of a manifest. There are few: `--set spec.training.batchSize=4` reaches every other."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml

from finetune_api.base import FieldPath
from finetune_api.job import read_document

SET = "--set"


@dataclass(frozen=True)
class Change:
    """A field's value that an option gives."""

    option: str
    path: FieldPath
    value: Any
    is_entry: bool = False
    """True if the value is one entry of a list, and the option may be repeated."""


@dataclass(frozen=True)
class FieldOption:
    """An option, the field it stands for, and its help."""

    name: str
    field: str
    metavar: str
    help: str
    is_text: bool = True
    is_entry: bool = False


OPTIONS = (
    FieldOption("--model", "spec.model.source", "ORG/NAME", "base model: org/name on the Hub, a folder, or a URI"),
    FieldOption(
        "--data", "spec.dataset.source", "PATH", "training data: a file, a folder, org/name on the Hub, or a URI"
    ),
    FieldOption("--name", "metadata.name", "NAME", "name of the job (default: made of model and data)"),
    FieldOption("--quantization", "spec.model.quantization", "TYPE", "frozen weights: NF4 or None (default: NF4)"),
    FieldOption("--epochs", "spec.training.epochs", "N", "passes over the data (default: 1)", is_text=False),
    FieldOption("--max-steps", "spec.training.maxSteps", "N", "optimiser steps, instead of epochs", is_text=False),
    FieldOption(
        "--learning-rate", "spec.training.learningRate", "RATE", "peak learning rate (default: 2e-4)", is_text=False
    ),
    FieldOption("--rank", "spec.adapter.rank", "N", "rank of the adapter (default: 16)", is_text=False),
    FieldOption(
        "--eval", "spec.dataset.evaluation.fraction", "SHARE", "share of rows held out, such as 0.05", is_text=False
    ),
    FieldOption("--merged", "spec.export.merged", "TYPE", "merged weights: BF16, FP16 or None (default: BF16)"),
    FieldOption("--gguf", "spec.export.gguf", "TYPE", "a GGUF file, may be repeated (default: Q8_0)", is_entry=True),
    FieldOption("--gpus", "spec.resources.gpus", "N", "1, or 0 to train on the CPU", is_text=False),
)


def add_field_options(parser: argparse.ArgumentParser, *, any_field: bool = True) -> None:
    """Adds the options, --set among them if `any_field`; each one given is a Change in `changes` of the result."""
    group = parser.add_argument_group("fields of the job, instead of a manifest or on top of it")
    shared: dict[str, Any] = {"dest": "changes", "action": "append", "default": []}

    for option in OPTIONS:
        group.add_argument(
            option.name, type=partial(_read_option, option), metavar=option.metavar, help=option.help, **shared
        )
    if not any_field:
        return
    text = "any other field, such as spec.training.batchSize=4; the value is YAML; may be repeated"
    group.add_argument(SET, type=_read_assignment, metavar="FIELD=VALUE", help=text, **shared)


def apply_changes(document: dict[str, Any], changes: Sequence[Change]) -> None:
    """Writes the values into the document; of a field that is given twice, the last value counts."""
    for change in changes:
        section = document
        for name in change.path[:-1]:
            # A section that is a word stays, and is refused by the validation.
            below = section.setdefault(str(name), {})
            if not isinstance(below, dict):
                break
            section = below
        else:
            section[str(change.path[-1])] = _value(change, changes)


def option_of(path: FieldPath, changes: Sequence[Change]) -> Change | None:
    """The option that gave a field, or an entry of it; the last one, if it is given twice."""
    return next((each for each in reversed(changes) if path[: len(each.path)] == each.path), None)


def _value(change: Change, changes: Sequence[Change]) -> Any:
    if not change.is_entry:
        return change.value
    return [each.value for each in changes if each.is_entry and each.path == change.path]


def _read_option(option: FieldOption, text: str) -> Change:
    value = text if option.is_text else _read_value(text)
    return Change(option.name, tuple(option.field.split(".")), value, option.is_entry)


def _read_assignment(text: str) -> Change:
    field, equals, value = text.partition("=")
    if not equals or not all(field.split(".")):
        raise argparse.ArgumentTypeError(f"found {text!r}: write FIELD=VALUE, such as spec.training.batchSize=4")
    return Change(SET, tuple(field.split(".")), _read_value(value))


def _read_value(text: str) -> Any:
    try:
        return read_document(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"found {text!r}: {str(error).splitlines()[0]}") from None
