"""The tokenizer part of a GGUF file's metadata, from a Hugging Face tokenizer.

Three kinds exist for the families here: byte-level BPE (llama.cpp's `gpt2`: tokens, merges and the name of a
pre-tokenizer) and SentencePiece-like BPE with byte fallback (`llama`: tokens with scores; the pair with the best
score is merged first; `gemma4`: tokens and merges).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from finetune_trainer.export.base_model.tokenizer_files import TokenizerFiles
from finetune_trainer.export.errors import InvalidBaseError, UnsupportedTokenizerError
from finetune_trainer.export.gguf.pre_tokenizers import find_pre_tokenizer
from finetune_trainer.export.gguf.special_tokens import SpecialTokens, find_special_tokens

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Marked as ordinary in some repositories although text must never produce them.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused\d+>|<(pad|mask|eos|bos|unk)>|\[@BOS@\]")

GEMMA4 = "gemma4"
GEMMA4_SHOWN = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)

# Scores of tokens that no merge makes, as SentencePiece gives them.
ADDED_SCORE = -1000.0
FIXED_SCORES = {TokenType.BYTE: 0.0, TokenType.UNUSED: -10000.0}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids, as many as the model's embedding has rows, with their types."""

    tokens: list[str]
    types: list[TokenType]


@dataclass(frozen=True)
class GgufTokenizer:
    """Everything that `tokenizer.*` says; read once, then added to each file."""

    model: str
    """llama.cpp's tokenizer model: `gpt2`, `llama` or `gemma4`."""
    pre_tokenizer: str | None
    """None: `model` says it."""
    vocabulary: Vocabulary
    scores: list[float]
    """One for each token, which `gemma4` does not read; empty for `gpt2`."""
    adds_space_prefix: bool
    """True if a space is put before the text; read for `llama` only."""
    merges: list[str]
    """Pairs in the order of their rank, as "left right"; empty for `llama`."""
    special: SpecialTokens

    def add_to(self, writer: GGUFWriter) -> None:
        """Write all `tokenizer.*` keys."""
        writer.add_tokenizer_model(self.model)
        if self.pre_tokenizer is not None:
            writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(self.vocabulary.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.adds_space_prefix)
        writer.add_token_types(self.vocabulary.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        self.special.add_to(writer)


def read_tokenizer(
    files: TokenizerFiles, config: Mapping[str, Any], generation: Mapping[str, Any], fallback_model: str = "llama"
) -> GgufTokenizer:
    """Read a tokenizer; the full `config` gives the vocabulary's size and the ids that the tokenizer lacks.

    `fallback_model`: llama.cpp's model of a BPE with byte fallback, `llama` or `gemma4`.

    Raises InvalidBaseError if its files cannot be used, UnsupportedTokenizerError if llama.cpp has no equal of it.
    """
    special = find_special_tokens(files, config, generation=generation)

    description = files.load_description()
    model = _model(description, fallback_model)
    vocabulary = _load_vocabulary(description, model, size=config["vocab_size"])
    has_merges = model != "llama"
    pre_tokenizers = {"llama": "default", GEMMA4: None}

    return GgufTokenizer(
        model=model,
        pre_tokenizer=pre_tokenizers[model] if model in pre_tokenizers else find_pre_tokenizer(description),
        vocabulary=vocabulary,
        scores=_scores(description, vocabulary, model),
        adds_space_prefix=_adds_space_prefix(description),
        merges=[" ".join(_escape_space(part) for part in pair) for pair in _merges(description)] if has_merges else [],
        special=special,
    )


def _scores(description: Mapping[str, Any], vocabulary: Vocabulary, model: str) -> list[float]:
    """Scores as the tokenizer model reads them; for `gemma4`, which does not, as the converter writes them."""
    if model == GEMMA4:
        return [ADDED_SCORE] * len(vocabulary.tokens)
    return token_scores(description, vocabulary) if model == "llama" else []


def _model(description: Mapping[str, Any], fallback_model: str) -> str:
    """llama.cpp's tokenizer model: `gpt2`, or `fallback_model` with byte fallback."""
    model = description["model"]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return fallback_model
    if model["type"] == "BPE" and "ByteLevel" in json.dumps(description["pre_tokenizer"]):
        return "gpt2"
    raise UnsupportedTokenizerError(
        f"the tokenizer is {model['type']}, but GGUF export knows only BPE at the level of bytes or with byte "
        "fallback: export without GGUF"
    )


def _load_vocabulary(description: Mapping[str, Any], model: str, *, size: int) -> Vocabulary:
    """The vocabulary of a parsed tokenizer.json, filled up to the `size` rows of the model's embedding."""
    added = {token["id"]: token for token in description["added_tokens"]}
    texts = {index: text for text, index in description["model"]["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    if max(texts) >= size:
        raise InvalidBaseError(
            f"the tokenizer has ids up to {max(texts)}, but the model's embedding has {size} rows: "
            "they do not belong together"
        )

    types = {index: _token_type(text, model, description["model"]) for index, text in texts.items()}
    # Added tokens are never plain text, whatever the vocabulary calls them.
    for index, token in added.items():
        special = token["special"] or _LOOKS_SPECIAL.fullmatch(token["content"])
        types[index] = TokenType.CONTROL if special else TokenType.USER_DEFINED
        if model == GEMMA4:
            types[index] = _gemma4_type(
                token, types[index], is_added=token["content"] not in description["model"]["vocab"]
            )

    plain = types if model != GEMMA4 else {}
    return Vocabulary(
        tokens=[_spell(texts.get(i), i, user_defined=plain.get(i) is TokenType.USER_DEFINED) for i in range(size)],
        types=[types.get(i, TokenType.UNUSED) for i in range(size)],
    )


def _gemma4_type(token: Mapping[str, Any], kind: TokenType, *, is_added: bool) -> TokenType:
    """Marks of thoughts and tools are shown, for the chat's parser; plain pieces of the vocabulary are merged."""
    if token["content"] in GEMMA4_SHOWN:
        return TokenType.USER_DEFINED
    return TokenType.NORMAL if kind is TokenType.USER_DEFINED and not is_added else kind


def _spell(text: str | None, index: int, *, user_defined: bool) -> str:
    """A token's text in the file; rows of the embedding beyond the tokenizer get a name that no text contains."""
    if text is None:
        return f"[PAD{index}]"
    return text.replace("▁", " ") if user_defined else text


def _token_type(text: str, model: str, bpe: Mapping[str, Any]) -> TokenType:
    if model == "llama" and text == bpe.get("unk_token"):
        return TokenType.UNKNOWN
    if model != "gpt2" and _BYTE_TOKEN.fullmatch(text):
        return TokenType.BYTE
    return TokenType.NORMAL


def _merges(description: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs in order of rank; older files write them as one string."""
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in description["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _escape_space(part: str) -> str:
    """Write a space inside a part as byte-level BPE spells it: merges are stored as "left right"."""
    return part.replace(" ", "Ġ")


def token_scores(description: Mapping[str, Any], vocabulary: Vocabulary) -> list[float]:
    """Score of each token: minus its position among all tokens, in the order in which merges make them.

    A token that several merges make counts by the first; tokens that no merge makes come after. Best-score-first is
    then the same as lowest-rank-first, and the numbers are those of a SentencePiece model with these merges. Tokens
    that are no text have SentencePiece's own scores.
    """
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(_merges(description)):
        rank.setdefault(left + right, index)

    # Larger than every rank: tokens that no merge makes come last.
    after_all = len(rank) + len(description["model"]["merges"])
    texts = [
        (rank.get(text, after_all), index)
        for index, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind is TokenType.NORMAL
    ]

    scores = [FIXED_SCORES.get(kind, ADDED_SCORE) for kind in vocabulary.types]
    for position, (_, index) in enumerate(sorted(texts)):
        scores[index] = -float(position)
    return scores


def _adds_space_prefix(description: Mapping[str, Any]) -> bool:
    """True if a space is put before the text, which Llama 2 does and Gemma does not."""
    steps = json.dumps([description.get("normalizer"), description.get("pre_tokenizer")])
    return '"Prepend"' in steps or ('"Metaspace"' in steps and '"prepend_scheme": "never"' not in steps)
