"""The name of the llama.cpp pre-tokenizer that splits text as a tokenizer.json does.

llama.cpp knows word patterns by name only: with a wrong name in a GGUF file every token is subtly wrong. Its own
converter hashes the encoding of a test text, which fails for any retrained vocabulary. The pattern does not change with
the vocabulary, so it is looked up here. Each name is verified against llama.cpp by encoding the same texts with both,
with a vocabulary whose merges cross words, so that a wrong split shows.
"""

from collections.abc import Mapping
from typing import Any

from finetune_trainer.export.errors import UnsupportedTokenizerError

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
_REST = rf"{_SIGNS}|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

LLAMA3_PATTERN = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2_PATTERN = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
TEKKEN_PATTERN = rf"{_CASED_WORDS[0]}|{_CASED_WORDS[1]}|\p{{N}}|{_CASED_REST}"
GPT4O_PATTERN = (
    rf"{_CASED_WORDS[0]}{_CASED_CONTRACTIONS}|{_CASED_WORDS[1]}{_CASED_CONTRACTIONS}|\p{{N}}{{1,3}}|{_CASED_REST}"
)
_RUNS = "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
JAIS2_PATTERN = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_RUNS}|\s{{1}}"
"""As Llama 3's, but white space in runs of such lengths."""
SEED_PATTERN = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN35_PATTERN = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
EXAONE_MOE_PATTERN = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""Words of letters with single spaces between them, so that a token may be several words."""
DEEPSEEK3_PATTERNS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)
"""Of DeepSeek V3 and Hunyuan: numbers first, then Chinese and Japanese, then everything else."""

MAX_SHOWN = 60
"""Characters of a pattern that an error shows."""
GPT2_WORDS, SINGLE_DIGITS = "<GPT-2 words>", "<single digits>"
# The steps of a pre-tokenizer -> llama.cpp's name. A step is a pattern, or one of the two words above.
NAMES: dict[tuple[str, ...], str] = {
    (GPT2_WORDS,): "gpt-2",
    (SINGLE_DIGITS, GPT2_WORDS): "smollm",
    (LLAMA3_PATTERN,): "llama-bpe",
    (QWEN2_PATTERN,): "qwen2",
    (TEKKEN_PATTERN,): "tekken",
    (GPT4O_PATTERN,): "gpt-4o",
    (JAIS2_PATTERN,): "jais-2",
    (SEED_PATTERN,): "seed-coder",
    (QWEN35_PATTERN,): "qwen35",
    (EXAONE_MOE_PATTERN,): "exaone-moe",
    DEEPSEEK3_PATTERNS: "deepseek-v3",
}


def find_pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json.

    Raises UnsupportedTokenizerError if no name is known.
    """
    steps = tuple(_steps(tokenizer["pre_tokenizer"]))
    name = NAMES.get(steps)
    if name is None:
        raise UnsupportedTokenizerError(
            f"llama.cpp is not known to split words as tokenizer.json does ({_describe(steps)}): export without GGUF"
        )

    if name == "llama-bpe" and not tokenizer["model"].get("ignore_merges"):
        return "dbrx"  # the same pattern, for vocabularies (Phi-4) whose whole words must still be merged
    return name


def _describe(steps: tuple[str, ...]) -> str:
    """The steps for people: a kind by its name, a pattern by its beginning."""
    return ", then ".join(step if len(step) <= MAX_SHOWN else f"{step[:MAX_SHOWN]}…" for step in steps) or "not at all"


def _steps(description: Mapping[str, Any]) -> list[str]:
    """The steps of a pre-tokenizer as keys of NAMES are spelt; a step of another kind is spelt out as it is."""
    match description:
        case {"type": "Sequence", "pretokenizers": parts}:
            return [step for part in parts for step in _steps(part)]
        case {"type": "ByteLevel", "add_prefix_space": False, **rest}:
            return [GPT2_WORDS] if rest.get("use_regex", True) else []
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return [_spelt_out(pattern)]
        # Keeping what matches and removing the (empty) rest is the same split, as older files write it.
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Removed", "invert": True}:
            return [_spelt_out(pattern)]
        case {"type": "Digits", "individual_digits": True}:
            return [SINGLE_DIGITS]

    settings = ", ".join(f"{key} {value}" for key, value in description.items() if key != "type" and _is_plain(value))
    return [f"{description.get('type')} with {settings}" if settings else str(description.get("type"))]


def _spelt_out(pattern: str) -> str:
    """A pattern with line ends as escapes: some files hold the characters themselves (DeepSeek V3)."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


def _is_plain(value: object) -> bool:
    """True for settings that a person can read."""
    return isinstance(value, bool | int | float | str)
