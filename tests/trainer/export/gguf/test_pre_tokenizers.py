"""llama.cpp splits words as tokenizer.json does, under the name that a file gives it: both encode the same texts.

The vocabulary's merges cross words, so that every other split gives other ids: an ordinary vocabulary, trained on split
words, would hide most wrong splits. No published vocabulary is at hand for Jais 2, Seed-OSS, DeepSeek V3, Hunyuan,
Qwen 3.5 and K-EXAONE: their patterns are partly written from memory, and llama.cpp judges the names of these patterns
here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from finetune_test_models.family_models import make_family_model
from finetune_test_models.tiny_tokenizers import KINDS, ByteLevelKind, pre_tokenizer_of
from finetune_test_programs.reference_tokenizer import tokenize
from finetune_trainer.export.gguf import tokenizer as gguf_tokenizer
from finetune_trainer.export.gguf.pre_tokenizers import find_pre_tokenizer

TEXTS = (
    "It's we've I'LL they'Re 'tis don't", "1 12 123 1234 12345 3.14159 x86 4x4 ٣٤٥ ½", "foo/bar//baz -a --b !hello ?no",
    "line\n\n  two\r\n\tthree \n four   ", "cafe\u0301 nai\u0308ve हिन्दी ภาษาไทย", "日本語ひらカタカナabc中文 한국",
    "camelCase HTMLParser XMLHttp ÉCOLE", "a  b   c\u00a0d …“quoted” — dash", "🙂🙂 e-mail@x.org #tag $5 100%",
    "\n/\n//x\r\n", "end.\nNew line; tab\there", "{[()]}<>=== !== ->",
)  # fmt: skip
BYTE_LEVEL = {name: kind for name, kind in KINDS.items() if isinstance(kind, ByteLevelKind)}
SIZE = 700
CASED, APPROXIMATE = ("tekken", "gpt-4o"), [TEXTS[4], TEXTS[6]]
"""llama.cpp itself takes every letter beyond ASCII for upper and lower case at once in these two patterns, so accents
beside capitals are split otherwise; its converter gives the same names."""
Encoded = dict[str, tuple[list[list[int]], list[list[int]]]]
"""Ids of every text by the tokenizers package and by llama.cpp, by kind."""


def crossing_tokenizer(kind: ByteLevelKind, texts: list[str]) -> Tokenizer:
    """A tokenizer of `kind` whose merges were made before words were split."""
    bpe = Tokenizer(models.BPE(ignore_merges=kind.ignore_merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE - 10, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    bpe.pre_tokenizer = pre_tokenizer_of(kind)
    return bpe


@pytest.fixture(scope="module")
def encode(
    tmp_path_factory: pytest.TempPathFactory, export_gguf: Callable[..., dict[str, Path]], texts: list[str]
) -> Callable[[], Encoded]:
    folder = tmp_path_factory.mktemp("words")
    base = make_family_model("llama-linear", folder / "base", texts, vocab_size=SIZE)
    parts = [text[start : start + 24] for text in TEXTS for start in range(0, len(text), 5)]

    def run() -> Encoded:
        ours, files = [], []
        for name, kind in BYTE_LEVEL.items():
            made = crossing_tokenizer(kind, parts)
            made.save(str(base / "tokenizer.json"))
            files.append(export_gguf(base, folder / name, "Q8_0")["Q8_0"])
            ours.append([made.encode(text, add_special_tokens=False).ids for text in TEXTS])
        return dict(zip(BYTE_LEVEL, zip(ours, tokenize(files, TEXTS), strict=True), strict=True))

    return run


def test_llama_cpp_encodes_as_every_tokenizer_does(encode: Callable[[], Encoded]) -> None:
    wrong = {
        name: [text for text, *ids in zip(TEXTS, ours, theirs, strict=True) if ids[0] != ids[1]]
        for name, (ours, theirs) in encode().items()
    }
    assert wrong == {name: APPROXIMATE if BYTE_LEVEL[name].name in CASED else [] for name in BYTE_LEVEL}


def test_a_wrong_name_is_seen_for_every_kind(encode: Callable[[], Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is given the name of another way to split."""
    others = {"tekken": "gpt-2"}
    monkeypatch.setattr(
        gguf_tokenizer,
        "find_pre_tokenizer",
        lambda description: others.get(find_pre_tokenizer(description), "tekken"),
    )
    assert [name for name, (ours, theirs) in encode().items() if ours == theirs] == []


def test_line_ends_may_be_characters_or_escapes(tmp_path: Path, texts: list[str]) -> None:
    made = crossing_tokenizer(BYTE_LEVEL["deepseek-3"], texts)
    made.save(str(tmp_path / "tokenizer.json"))
    description: dict[str, Any] = json.loads((tmp_path / "tokenizer.json").read_text())
    assert "\r\n" in description["pre_tokenizer"]["pretokenizers"][2]["pattern"]["Regex"]
    assert find_pre_tokenizer(description) == "deepseek-v3"
    split = description["pre_tokenizer"]["pretokenizers"][2]["pattern"]
    split["Regex"] = split["Regex"].replace("\r", r"\r").replace("\n", r"\n")
    assert find_pre_tokenizer(description) == "deepseek-v3"
