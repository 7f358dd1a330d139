"""Vocabularies of published models, which llama.cpp's source carries: our word patterns and scores are theirs.

A vocabulary trained on the spot cannot show that. The converter recognises a pre-tokenizer only by how it splits one
text into the tokens of the published vocabulary, and SentencePiece's scores are those that the model was made with.
"""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from finetune_test_models.tiny_tokenizers import merges_of_pieces
from finetune_test_programs.llama_cpp_converter import recognise, vocabulary
from finetune_trainer.export.gguf.pre_tokenizers import LLAMA3_PATTERN, QWEN2_PATTERN, find_pre_tokenizer
from finetune_trainer.export.gguf.tokenizer import Vocabulary, token_scores

STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BYTE_LEVEL = {"gpt-2": None, "llama-bpe": LLAMA3_PATTERN, "qwen2": QWEN2_PATTERN}


def read(name: str) -> dict[str, Any]:
    """The file's metadata; the gguf package takes 8 s for the 400,000 texts of Llama 3."""
    data = memoryview(vocabulary(name).read_bytes())
    (count,) = struct.unpack_from("<Q", data, 16)
    place, found = 24, {}
    for _ in range(count):
        key, place = _value(data, place, STRING)
        (kind,) = struct.unpack_from("<I", data, place)
        found[key], place = _value(data, place + 4, kind)
    return found


def _value(data: memoryview, place: int, kind: int) -> tuple[Any, int]:
    """A value of the GGUF type at `place`, and where it ends."""
    if kind == STRING:
        (size,) = struct.unpack_from("<Q", data, place)
        return str(data[place + 8 : place + 8 + size], "utf-8"), place + 8 + size
    if kind == ARRAY:
        element, count = struct.unpack_from("<IQ", data, place)
        values, place = [], place + 12
        for _ in range(count):
            value, place = _value(data, place, element)
            values.append(value)
        return values, place
    form = "<" + NUMBERS[kind]
    return struct.unpack_from(form, data, place)[0], place + struct.calcsize(form)


def write_byte_level(folder: Path, name: str, pattern: str | None) -> Path:
    """The tokenizer.json that the published model has, from its GGUF vocabulary and our pattern."""
    metadata = read(name)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    pairs = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    plain = {token: index for index, token in enumerate(tokens) if types[index] == TokenType.NORMAL}
    bpe = Tokenizer(models.BPE(plain, pairs, ignore_merges=name == "llama-bpe"))
    byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    if name == "qwen2":
        bpe.normalizer = normalizers.NFC()

    added = [token for index, token in enumerate(tokens) if types[index] != TokenType.NORMAL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    if name == "llama-bpe":
        begin = ("<|begin_of_text|>", bpe.token_to_id("<|begin_of_text|>"))
        bpe.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    return folder


def test_the_converter_recognises_our_word_patterns_and_no_others(tmp_path: Path) -> None:
    folders = [write_byte_level(tmp_path / name, name, pattern) for name, pattern in BYTE_LEVEL.items()]
    found = [find_pre_tokenizer(json.loads((folder / "tokenizer.json").read_text())) for folder in folders]
    slipped = write_byte_level(tmp_path / "slipped", "llama-bpe", LLAMA3_PATTERN.replace("{1,3}", "{1,2}"))
    assert found == list(BYTE_LEVEL)
    assert recognise([*folders, slipped]) == [*found, None]


@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_scores_are_in_the_order_of_the_sentencepiece_model(name: str) -> None:
    """The numbers are those of the model too, but for runs of spaces: Llama's makers gave them -10^9 by hand, which
    leaves gaps."""
    metadata = read(name)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    published = metadata["tokenizer.ggml.scores"]
    places = {token: index for index, token in enumerate(tokens)}
    of_text = [index for index, kind in enumerate(types) if kind == TokenType.NORMAL]
    merges = merges_of_pieces([(tokens[index], published[index]) for index in of_text], places)
    ours = token_scores({"model": {"merges": merges}}, Vocabulary(tokens, [TokenType(kind) for kind in types]))

    whole = {left + right for left, right in merges}
    made = [index for index in of_text if tokens[index] in whole]
    ordered = sorted((index for index in made if published[index] > -1e8), key=lambda index: -published[index])
    assert len(ordered) > 29_000
    assert sorted(ordered, key=lambda index: -ours[index]) == ordered
    before_gap = [index for index in of_text if -9 < published[index] < 0]
    assert [published[index] - ours[index] for index in before_gap] == [-1.0] * 8
