"""Errors of a manifest in words: one a line, at its own field, with the nearest right word."""

from typing import Any

import pytest
from pydantic import ValidationError

from finetune_api.explain import explain_errors
from finetune_api.job import find_lines, validate_document

MODEL = {"source": "hf://org/model"}
SPEC: dict[str, Any] = {"model": MODEL, "dataset": {"source": "hf://org/data"}}


def explain(**sections: Any) -> list[str]:
    document = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "job"},
        "spec": SPEC | sections,
    }
    with pytest.raises(ValidationError) as found:
        validate_document(document)
    return [str(error) for error in explain_errors(found.value, document)]


NO_FIELD = "there is no such field"
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a field in snake case": (
        {"training": {"batch_size": 2}},
        [f"spec.training.batch_size: {NO_FIELD}; did you mean batchSize?"],
    ),
    "a field in lower case": (
        {"training": {"learningrate": 1}},
        [f"spec.training.learningrate: {NO_FIELD}; did you mean learningRate?"],
    ),
    "a field in the wrong section": (
        {"learning_rate": 1},
        [f"spec.learning_rate: {NO_FIELD} here; did you mean spec.training.learningRate?"],
    ),
    "a field that nothing resembles": ({"training": {"xyz": 1}}, [f"spec.training.xyz: {NO_FIELD}"]),
    "a type in lower case": (
        {"export": {"gguf": ["F16", "q4_k_m"]}},
        ["spec.export.gguf[1]: found 'q4_k_m': write Q4_K_M"],
    ),
    "a type without its underscores": (
        {"export": {"gguf": ["q4km"]}},
        ["spec.export.gguf[0]: found 'q4km': write Q4_K_M"],
    ),
    "an optimiser in the manner of other programs": (
        {"training": {"optimizer": "adamw_8bit"}},
        ["spec.training.optimizer: found 'adamw_8bit': write AdamW8bit"],
    ),
    "a word that nothing resembles": (
        {"model": MODEL | {"quantization": "xyz"}},
        ["spec.model.quantization: found 'xyz': choose among NF4, None"],
    ),
    "a number in quotes": (
        {"adapter": {"rank": "16"}},
        ["spec.adapter.rank: found '16': write a whole number, without quotes"],
    ),
    "a field that takes a number or a text, once": (
        {"resources": {"cpu": {"a": 1}}},
        ["spec.resources.cpu: write a whole number, without quotes"],
    ),
    "a number out of its bounds": (
        {"training": {"maxSteps": 0}},
        ["spec.training.maxSteps: found 0: it should be greater than or equal to 1"],
    ),
    "two rules of one section, each at its own field": (
        {"training": {"epochs": 1, "maxSteps": 2, "precision": "FP8", "parallelism": "Sharded"}},
        [
            "spec.training.epochs and spec.training.maxSteps exclude each other: write one of them",
            "spec.training.parallelism: FP8 keeps all weights on each GPU: write Auto or Replicated, or BF16",
        ],
    ),
    "a key of a map": (
        {"resources": {"nodeSelector": {"a b": "c"}}},
        ["spec.resources.nodeSelector.a b: found 'a b': write a key such as zone or example.com/zone"],
    ),
    "a section that is a word": (
        {"training": "fast"},
        ["spec.training: found 'fast': write the section's fields below it"],
    ),
    "a source that is missing": ({"model": {}}, ["spec.model.source: is required"]),
}


@pytest.mark.parametrize(("sections", "lines"), CASES.values(), ids=CASES)
def test_errors_in_words(sections: dict[str, Any], lines: list[str]) -> None:
    assert explain(**sections) == lines


def test_lines_are_those_of_the_fields_and_else_of_the_section_around_them() -> None:
    text = "kind: X\nspec:\n  export:\n    gguf: [F16,\n      q4]\n  training: {epochs: 1,\n    rank: 2}\n"
    export: tuple[str | int, ...] = ("spec", "export", "gguf", 1)
    rank, absent = ("spec", "training", "rank"), ("spec", "training", "absent")
    assert find_lines(text, [export, rank, absent]) == {export: 5, rank: 7, absent: 6}
    assert find_lines("", [rank]) == {}
