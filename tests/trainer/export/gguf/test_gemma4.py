"""Gemma 4's own: types of tensors that no other family has, a tokenizer model of its own, and RoPE that stops.

Bytes, metadata and answers are judged beside those of all families.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer

from finetune_test_models.references.greedy_answers import said_by_transformers
from finetune_test_programs.generation import complete
from finetune_test_programs.reference_quantizer import quantize_files
from finetune_test_programs.reference_tokenizer import tokenize
from finetune_trainer.export.gguf.rope import factors

pytestmark = pytest.mark.gguf
FamilyBase = Callable[[str], Path]
ExportGguf = Callable[..., dict[str, Path]]
MODELS = ("gemma-4-31b", "gemma-4-e2b", "gemma-4-26b-a4b")
OF_OWN_TYPES = (*MODELS, "gemma-3n")  # whose embedding of each layer and matrices between streams are like theirs
MIXES = ("Q2_K", "Q3_K_L", "Q4_K_M", "Q5_K_M", "Q6_K")
TEXTS = (
    "a line\nanother", "two  spaces   three", "word.Word, (word)!", "naïve Zwölfton", "日本語 한국", "tab\there",
    "🙂 x", "1 12 123", "a\n\nb\n\n\nc", " leading", "trailing ", "\n\n",
)  # fmt: skip


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("name", OF_OWN_TYPES)
def test_every_tensor_of_a_mix_is_of_llama_cpps_type(
    name: str, family_base: FamilyBase, export_gguf: ExportGguf, tmp_path: Path
) -> None:
    ours = export_gguf(family_base(name), tmp_path, "F32", *MIXES)
    theirs = {kind: tmp_path / f"theirs-{kind}.gguf" for kind in MIXES}
    quantize_files(ours["F32"], theirs)
    for kind in MIXES:
        assert types_of(ours[kind]) == types_of(theirs[kind]), kind


def test_llama_cpp_cuts_texts_as_the_tokenizer_does(
    family_base: FamilyBase, export_gguf: ExportGguf, tmp_path: Path
) -> None:
    base = family_base("gemma-4-31b")
    made = Tokenizer.from_file(str(base / "tokenizer.json"))
    (found,) = tokenize([export_gguf(base, tmp_path, "Q8_0")["Q8_0"]], TEXTS)
    expected = [made.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert [text for text, a, b in zip(TEXTS, found, expected, strict=True) if a != b] == []


def test_dimensions_that_turn_although_they_should_not_are_heard(
    family_base: FamilyBase, export_gguf: ExportGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, prompts = family_base("gemma-4-31b"), [list(range(3 + start, 93 + start)) for start in range(4)]
    expected = said_by_transformers(base, prompts, tokens=8)
    monkeypatch.setattr(factors, "STOPPED", 1.0)
    file = export_gguf(base, tmp_path, "F32")["F32"]
    found = complete(file, prompts, tokens=8, banned=expected.banned, context=512)
    assert found != expected.answers
