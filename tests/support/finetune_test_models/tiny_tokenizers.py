"""Small tokenizers of the kinds that published models have, written as files of a model repository.

These are tokenizer.json and tokenizer_config.json, and tokenizer.model if the family was published with one. Word
patterns, special tokens and post-processors are those of the families; only the vocabularies are small, and trained on
the spot.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from finetune_test_programs.llama_cpp_converter import train_sentencepiece

# Published word patterns. Written out again on purpose: a slip in the product's table must not slip in here too.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_JAIS2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)"
    r"|\s{1,2}(?!\S)|\s{1}"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_EXAONE_MOE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_DEEPSEEK3_REST = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# With line ends as characters, as the published file has them.
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    _DEEPSEEK3_REST.replace(r"\r", "\r").replace(r"\n", "\n"),
)


@dataclass(frozen=True)
class ByteLevelKind:
    """A byte-level BPE. `bos`, `eos` and `pad` name the special tokens that begin, end and pad."""

    name: str
    """llama.cpp's name of the pre-tokenizer."""
    pattern: str | tuple[str, ...] | None
    """Several split one after the other; None: GPT-2's own."""
    tokenizer_class: str
    special: tuple[str, ...]
    eos: str
    pad: str | None = None
    bos: str | None = None
    adds_bos: bool = False
    ignore_merges: bool = False
    nfc: bool = False
    digits: bool = False
    plain: tuple[str, ...] = ()
    """Added tokens that are not special: Qwen3's <think>, for example."""


@dataclass(frozen=True)
class SentencePieceKind:
    """A SentencePiece BPE with byte fallback."""

    special: tuple[str, ...]
    """The first pieces, by id."""
    bos: str
    eos: str
    prefixed: bool
    """A space is put before the text."""
    tokenizer_class: str = "LlamaTokenizer"
    pad: str | None = None
    plain: tuple[str, ...] = ()
    """Pieces that are user-defined symbols, added but not special."""
    appended: tuple[str, ...] = ()
    """Special tokens after the pieces."""
    has_model: bool = True
    """tokenizer.model is published."""


KINDS: dict[str, ByteLevelKind | SentencePieceKind] = {
    "gpt-2": ByteLevelKind("gpt-2", None, "GPT2Tokenizer", ("<|endoftext|>",), "<|endoftext|>", bos="<|endoftext|>"),
    "smollm": ByteLevelKind(
        "smollm", None, "GPT2Tokenizer", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>",
        pad="<|im_end|>", bos="<|im_start|>", digits=True,
    ),
    "llama-3": ByteLevelKind(
        "llama-bpe", _CL100K, "PreTrainedTokenizerFast",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
         "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
        "<|eot_id|>", pad="<|finetune_right_pad_id|>", bos="<|begin_of_text|>", adds_bos=True, ignore_merges=True,
    ),
    "qwen": ByteLevelKind(
        "qwen2", _QWEN, "Qwen2Tokenizer", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>",
        pad="<|endoftext|>", nfc=True, plain=("<tool_call>", "<think>", "</think>"),
    ),
    "phi-4": ByteLevelKind(
        "dbrx", _CL100K, "GPT2Tokenizer", ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"), "<|im_end|>",
        pad="<|endoftext|>", bos="<|endoftext|>",
    ),
    "phi-4-mini": ByteLevelKind(
        "gpt-4o", _O200K, "GPT2Tokenizer", ("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"),
        "<|endoftext|>", pad="<|endoftext|>", bos="<|endoftext|>",
    ),
    "tekken": ByteLevelKind(
        "tekken", _TEKKEN, "PreTrainedTokenizerFast", ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), "</s>",
        bos="<s>", adds_bos=True, ignore_merges=True,
    ),
    "glm-4": ByteLevelKind(
        "dbrx", _CL100K, "PreTrainedTokenizerFast",
        ("<|endoftext|>", "[gMASK]", "<|user|>", "<|assistant|>", "<|observation|>"), "<|endoftext|>",
        pad="<|endoftext|>",
    ),
    "solar": ByteLevelKind(
        "qwen2", _QWEN, "PreTrainedTokenizerFast",
        ("<unk>", "<|startoftext|>", "<|endoftext|>", "<|im:end|>"), "<|endoftext|>", pad="<|endoftext|>",
        bos="<|startoftext|>",
    ),
    "seed": ByteLevelKind(
        "seed-coder", _SEED, "PreTrainedTokenizerFast", ("<seed:bos>", "<seed:pad>", "<seed:eos>"), "<seed:eos>",
        pad="<seed:pad>", bos="<seed:bos>",
    ),
    "jais-2": ByteLevelKind(
        "jais-2", _JAIS2, "PreTrainedTokenizerFast",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|eot_id|>"), "<|eot_id|>", pad="<|pad|>",
        bos="<|begin_of_text|>",
    ),
    "qwen-3.5": ByteLevelKind(
        "qwen35", _QWEN35, "Qwen2Tokenizer", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>",
        pad="<|endoftext|>", plain=("<tool_call>", "<think>", "</think>"),
    ),
    "k-exaone": ByteLevelKind(
        "exaone-moe", _EXAONE_MOE, "PreTrainedTokenizerFast", ("[PAD]", "[BOS]", "[EOS]", "<|endofturn|>"),
        "<|endofturn|>", pad="[PAD]", bos="[BOS]", nfc=True,
    ),
    "deepseek-3": ByteLevelKind(
        "deepseek-v3", _DEEPSEEK3, "PreTrainedTokenizerFast",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"), "<｜end▁of▁sentence｜>",
        pad="<｜▁pad▁｜>", bos="<｜begin▁of▁sentence｜>", adds_bos=True,
    ),
    "llama-2": SentencePieceKind(("<unk>", "<s>", "</s>"), "<s>", "</s>", prefixed=True),
    "phi-3": SentencePieceKind(
        ("<unk>", "<s>", "</s>"), "<s>", "<|endoftext|>", prefixed=True, pad="<|endoftext|>",
        appended=("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>"),
    ),
    "gemma": SentencePieceKind(
        ("<pad>", "<eos>", "<bos>", "<unk>"), "<bos>", "<eos>", prefixed=False, tokenizer_class="GemmaTokenizer",
        pad="<pad>", plain=("<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>", "\n\n", "▁▁"),
    ),
    "gemma-4": SentencePieceKind(
        ("<pad>", "<eos>", "<bos>", "<unk>"), "<bos>", "<eos>", prefixed=False, tokenizer_class="GemmaTokenizer",
        pad="<pad>", plain=("<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "\n\n", "▁▁"), has_model=False,
    ),
}  # fmt: skip


def write_tokenizer(kind: str, folder: Path, texts: Sequence[str], *, chat_template: Any, size: int = 640) -> int:
    """Train a tokenizer of `kind` and write its files; returns the number of its tokens.

    `chat_template` is a text, or a list of entries with name and template, as some repositories have it.
    """
    chosen, bos, eos = KINDS[kind], KINDS[kind].bos, KINDS[kind].eos
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(chosen, ByteLevelKind):
        tokenizer = _train_byte_level(chosen, texts, size)
        extra: dict[str, Any] = {"add_bos_token": True} if chosen.adds_bos else {}
    else:
        tokenizer = _train_sentencepiece(chosen, folder, texts, size)
        if not chosen.has_model:
            (folder / "tokenizer.model").unlink()
        extra = {"add_bos_token": True, "add_eos_token": False, "unk_token": "<unk>", "sp_model_kwargs": {}}
    tokenizer.save(str(folder / "tokenizer.json"))

    added = {
        str(index): {**token.__getstate__(), "content": token.content}
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    settings = {
        "added_tokens_decoder": added,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": chosen.pad,
        "tokenizer_class": chosen.tokenizer_class,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": chat_template,
        **extra,
    }

    written = {key: value for key, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(written, indent=2, ensure_ascii=False), encoding="utf-8")
    return int(tokenizer.get_vocab_size())


def pre_tokenizer_of(kind: ByteLevelKind) -> Any:
    """The pre-tokenizer of a kind, as the tokenizers package builds it."""
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if kind.digits else []
    patterns = (kind.pattern,) if isinstance(kind.pattern, str) else kind.pattern or ()
    steps += [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns))
    return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


def _train_byte_level(kind: ByteLevelKind, texts: Sequence[str], size: int) -> Tokenizer:
    bpe = Tokenizer(models.BPE(ignore_merges=kind.ignore_merges))
    bpe.pre_tokenizer = pre_tokenizer_of(kind)
    if kind.nfc:
        bpe.normalizer = normalizers.NFC()
    bpe.decoder = decoders.ByteLevel()

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in kind.special])
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in kind.plain])

    byte_level = processors.ByteLevel(trim_offsets=False)
    if kind.adds_bos:
        assert kind.bos is not None
        ids = [(kind.bos, bpe.token_to_id(kind.bos))]
        single, pair = f"{kind.bos} $A", f"{kind.bos} $A {kind.bos} $B"
        begin = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
        bpe.post_processor = processors.Sequence([byte_level, begin])
    else:
        bpe.post_processor = byte_level
    return bpe


def _train_sentencepiece(kind: SentencePieceKind, folder: Path, texts: Sequence[str], size: int) -> Tokenizer:
    ids = {f"{role}_id": kind.special.index(token) if token in kind.special else -1
           for role, token in (("pad", "<pad>"), ("unk", "<unk>"), ("bos", kind.bos),
                               ("eos", "</s>" if "</s>" in kind.special else kind.eos))}  # fmt: skip
    names = {"bos_piece": kind.bos, "eos_piece": "</s>" if "</s>" in kind.special else kind.eos}
    options = {"vocab_size": size, "add_dummy_prefix": kind.prefixed, "remove_extra_whitespaces": False,
               "normalization_rule_name": "identity", "user_defined_symbols": list(kind.plain)}  # fmt: skip

    # SentencePiece's own trainer gives the pieces; the same model is then built for the tokenizers package.
    pieces = train_sentencepiece(texts, folder, **options, **ids, **names)
    vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
    bpe = Tokenizer(
        models.BPE(
            vocabulary, merges_of_pieces(pieces, vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )

    space = normalizers.Replace(" ", "▁")
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if kind.prefixed else space
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])

    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in kind.special + kind.appended])
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in kind.plain])
    begin = [(kind.bos, vocabulary[kind.bos])]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{kind.bos} $A", pair=f"{kind.bos} $A {kind.bos}:1 $B:1", special_tokens=begin
    )
    return bpe


def merges_of_pieces(pieces: Sequence[tuple[str, float]], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """List every pair of pieces that makes a piece, the best score first.

    SentencePiece merges any two pieces that make the best piece; BPE merges only pairs that it lists.
    """
    found = []
    for piece, score in pieces:
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
        found += [(-score, vocabulary[left], vocabulary[right], (left, right)) for left, right in pairs]
    return [pair for *_, pair in sorted(found)]
