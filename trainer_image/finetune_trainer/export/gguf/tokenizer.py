"""The tokenizer part of a GGUF file's metadata, from a Hugging Face tokenizer folder.

Two kinds exist for the families here: byte-level BPE (llama.cpp's `gpt2`: tokens, merges and the name of a
pre-tokenizer) and SentencePiece-like BPE with byte fallback (`llama`: tokens with scores; the pair with the best
score is merged first).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from finetune_trainer.export.base_model.folder import load_json
from finetune_trainer.export.errors import InvalidBaseError, UnsupportedTokenizerError
from finetune_trainer.export.gguf.pre_tokenizers import find_pre_tokenizer
from finetune_trainer.export.gguf.special_tokens import find_special_tokens

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Marked as ordinary in some repositories although text must never produce them.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused\d+>|<(pad|mask|eos|bos|unk)>|\[@BOS@\]")


ADDED_SCORE = -1000.0
FIXED_SCORES = {TokenType.BYTE: 0.0, TokenType.UNUSED: -10000.0}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids, as long as the model's embedding has rows, with their types."""

    tokens: list[str]
    types: list[TokenType]


def add_tokenizer(writer: GGUFWriter, folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
    """Write all `tokenizer.*` keys for the tokenizer in `folder`; `config` gives vocabulary size and fallback ids,
    `generation` (of generation_config.json) what ends a turn."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InvalidBaseError(f"{folder} has no tokenizer.json, which GGUF export reads the vocabulary from")
    try:
        coder = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InvalidBaseError(f"{path} is not a tokenizer: {error}") from error
    description = load_json(path)
    kind = _kind(description)
    vocabulary = _load_vocabulary(description, kind, size=config["vocab_size"])

    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(find_pre_tokenizer(description) if kind == "gpt2" else "default")
    writer.add_token_list(vocabulary.tokens)
    if kind == "llama":
        writer.add_token_scores(token_scores(description, vocabulary))
        writer.add_add_space_prefix(_adds_space_prefix(description))
    writer.add_token_types(vocabulary.types)
    if kind == "gpt2":
        writer.add_token_merges([" ".join(_escape_space(part) for part in pair) for pair in _merges(description)])
    find_special_tokens(folder, config, coder, generation=generation).add_to(writer)


def _kind(description: Mapping[str, Any]) -> str:
    """llama.cpp's tokenizer model: `gpt2` or `llama`."""
    model = description["model"]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "llama"
    if model["type"] == "BPE" and "ByteLevel" in json.dumps(description["pre_tokenizer"]):
        return "gpt2"
    raise UnsupportedTokenizerError(
        f"a tokenizer of type {model['type']} without byte-level or byte-fallback BPE has no GGUF form here; "
        "export without GGUF"
    )


def _load_vocabulary(description: Mapping[str, Any], kind: str, *, size: int) -> Vocabulary:
    model, added = description["model"], {token["id"]: token for token in description["added_tokens"]}
    texts = {index: text for text, index in model["vocab"].items()} | {
        i: token["content"] for i, token in added.items()
    }
    if max(texts) >= size:
        raise InvalidBaseError(
            f"the tokenizer has ids up to {max(texts)}, but the model's embedding has {size} rows: "
            "they do not belong together"
        )
    types = {index: _token_type(text, kind, model) for index, text in texts.items()}
    for index, token in added.items():
        special = token["special"] or _LOOKS_SPECIAL.fullmatch(token["content"])
        types[index] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    return Vocabulary(
        tokens=[_spell(texts.get(i), i, user_defined=types.get(i) is TokenType.USER_DEFINED) for i in range(size)],
        types=[types.get(i, TokenType.UNUSED) for i in range(size)],
    )


def _spell(text: str | None, index: int, *, user_defined: bool) -> str:
    """A token's text in the file; rows of the embedding beyond the tokenizer get a name that no text contains."""
    if text is None:
        return f"[PAD{index}]"
    return text.replace("▁", " ") if user_defined else text


def _token_type(text: str, kind: str, model: Mapping[str, Any]) -> TokenType:
    if kind == "llama" and text == model.get("unk_token"):
        return TokenType.UNKNOWN
    if kind == "llama" and _BYTE_TOKEN.fullmatch(text):
        return TokenType.BYTE
    return TokenType.NORMAL


def _merges(description: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs in order of rank; older files write them as one string."""
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in description["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _escape_space(part: str) -> str:
    """Merges are stored as 'left right': a space inside a part is written as byte-level BPE spells it."""
    return part.replace(" ", "Ġ")


def token_scores(description: Mapping[str, Any], vocabulary: Vocabulary) -> list[float]:
    """Minus the place among all tokens that merges make, by the rank of the first such merge; the rest come after.

    Best-score-first is then the same as lowest-rank-first, and the numbers are those of a SentencePiece model whose
    merges these are. Tokens that are no text have SentencePiece's own scores.
    """
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(_merges(description)):
        rank.setdefault(left + right, index)
    texts = [
        (rank.get(text, len(rank) + len(description["model"]["merges"])), index)
        for index, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind is TokenType.NORMAL
    ]
    scores = [FIXED_SCORES.get(kind, ADDED_SCORE) for kind in vocabulary.types]
    for place, (_, index) in enumerate(sorted(texts)):
        scores[index] = -float(place)
    return scores


def _adds_space_prefix(description: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text, which Llama 2 does and Gemma does not."""
    steps = json.dumps([description.get("normalizer"), description.get("pre_tokenizer")])
    return '"Prepend"' in steps or ('"Metaspace"' in steps and '"prepend_scheme": "never"' not in steps)
