"""`general.*` from the base's card and generation_config.json: all that llama.cpp's converter writes, and nothing of a
form that GGUF cannot hold."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from finetune_test_programs.llama_cpp_converter import Conversion, convert
from finetune_trainer.export.gguf.metadata import MAX_ENTRIES, Origin, Size, read_metadata

CARD = """---
license: llama3.1
license_name: a name
license_link: https://example.org/licence
language:
- en
- no
tags: [chat, "two words"]
pipeline_tag: text-generation
base_model:
- acme/Tiny-1B-v1.5
- https://example.org/models/other
datasets: [acme/questions-v2]
author: Somebody
---
# Not read
"""
GENERATION = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "do_sample": True}


def general(path: Path) -> dict[str, Any]:
    """Key -> type and value of everything that is about the model as such."""
    fields = gguf.GGUFReader(path).fields
    return {key: (field.types, field.contents()) for key, field in fields.items() if key.startswith("general.")}


@pytest.fixture(scope="module")
def described(family_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("described") / "base"
    shutil.copytree(family_base("llama-3.1"), base)
    (base / "README.md").write_text(CARD)
    path = base / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | GENERATION))
    return base


def test_everything_is_said_that_the_converter_says(
    described: Path, export_gguf: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs.gguf"
    convert([Conversion(str(described), str(theirs), "f16", "tiny", "llama-bpe")])
    found = general(export_gguf(described, tmp_path / "ours", "F16")["F16"])
    assert found == general(theirs)

    expected = {
        "general.license": "llama3.1",
        "general.languages": ["en", "no"],
        "general.tags": ["chat", "two words", "text-generation"],
        "general.base_model.count": 2,
        "general.base_model.0.name": "Tiny 1B v1.5",
        "general.base_model.0.organization": "Acme",
        "general.base_model.1.repo_url": "https://example.org/models/other",
        "general.dataset.0.name": "Questions v2",
        "general.author": "Somebody",
        "general.sampling.top_k": 40,
    }
    assert {key: found[key][1] for key in expected} == expected
    assert found["general.sampling.temp"][1] == pytest.approx(0.6)
    assert found["general.sampling.penalty_repeat"][1] == pytest.approx(1.1)


def read(folder: Path, *, base_name: str | None = None, is_trained: bool = False) -> gguf.Metadata:
    return read_metadata(folder, Origin("mine", base_name, is_trained), {}, Size(8_000_000))


def test_a_trained_model_has_the_licence_of_its_base_and_that_as_its_ancestor(described: Path) -> None:
    metadata = read(described, base_name="acme/Tiny-1B-Instruct", is_trained=True)
    assert (metadata.license, metadata.languages, metadata.author, metadata.datasets) == (
        "llama3.1",
        ["en", "no"],
        None,
        None,
    )
    url = "https://huggingface.co/acme/Tiny-1B-Instruct"
    assert metadata.base_models == [{"name": "Tiny 1B Instruct", "organization": "Acme", "repo_url": url}]
    assert read(described, is_trained=True).base_models is None


BOMB = "tags:\n- &a " + "x" * 4000 + "\n" + "- *a\n" * 100_000
CARDS = {
    "no card": (None, {}),
    "no block": ("# A model\nlicense: mit\n", {}),
    "an empty block": ("---\n\n---\n", {}),
    "a list": ("---\n- license\n---\n", {}),
    "no YAML": ("---\nlicense: [mit\n---\n", {}),
    "forms that GGUF cannot hold": (
        "---\nlicense: {a: b}\ntags: [[x], {y: z}, chat]\nauthor:\nbase_model: [{name: A, url: [1]}, [b]]\n---\n",
        {"tags": ["chat"], "base_models": [{"name": "A"}]},
    ),
    "numbers": ("---\nversion: 1.10\nlicense: null\n---\n", {"version": "1.10"}),
    "a tab": ("---\nlanguage:\n\t- en\n---\n", {"languages": ["en"]}),
    "a text of a book's length": (f"---\nlicense: {'x' * 5000}\ntags: [chat]\n---\n", {"tags": ["chat"]}),
    "one text a hundred thousand times": (f"---\n{BOMB}---\n", {"tags": ["x" * 4000] * MAX_ENTRIES}),
}


@pytest.mark.parametrize("case", CARDS)
def test_only_what_has_the_right_form_is_passed_on(case: str, tmp_path: Path) -> None:
    card, expected = CARDS[case]
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    said = {key: value for key, value in vars(read(tmp_path)).items() if value is not None}
    assert said == {"name": "mine", "size_label": "8.0M"} | expected


@pytest.mark.parametrize("given", [True, "0.6", [0.6], float("nan"), float("inf"), 1e300, None])
def test_a_setting_of_sampling_that_is_no_number_is_left_out(given: object, tmp_path: Path) -> None:
    metadata = read_metadata(tmp_path, Origin("mine", None, False), {"temperature": given}, Size(1))
    assert metadata.sampling_temp is None
