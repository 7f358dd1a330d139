"""llama.cpp's own converter judges: from the same folder it writes the same tensors, byte for byte, and the same
metadata but for the keys listed here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from finetune_test_models.family_models import FAMILY_MODELS, SAMPLE, family_params, pre_tokenizer_of
from finetune_test_programs.file_differences import Pair, different_tensors
from finetune_test_programs.llama_cpp_converter import Conversion, convert

TYPES = ("F16", "Q8_0")
ABSENT = "absent"
# Keys that may stand in one file only, each with the value that the other file's reader would assume or find itself.
OURS_ONLY = {
    "vocab_size": "the converter writes it for Llama only; llama.cpp otherwise counts the tokens, which are as many",
    "rope.freq_base": "the converter leaves it out for Gemma 2, whose models all have llama.cpp's default, 10000",
    "add_space_prefix": "the converter leaves llama.cpp's default, true, unsaid",
    "eot_token_id": "the converter leaves it to llama.cpp to guess from the token's text; generation_config.json says",
    "eom_token_id": "as eot_token_id",
}
THEIRS_ONLY = {
    "add_sep_token": "read for BERT only; the converter writes false wherever a post-processor is a template"
}
GLM = {
    "bos_token_id": "the converter repeats the end of text, which the tokenizer does not put before texts",
    "unknown_token_id": "as bos_token_id",
}
DEEPSEEK_V2 = {
    "expert_gating_func": "the converter leaves it out where config.json does, and llama.cpp guesses by the size",
    "expert_weights_norm": "false, as llama.cpp takes a file without it",
}
STRETCHED = {
    "rope.scaling.factor": "one, as llama.cpp takes a file without it",
    "rope.scaling.original_context_length": "256k, which nothing reads where RoPE is not scaled",
}
NO_MIXTURE = (
    "the converter reads transformers' defaults, which have experts, and takes a dense Nemotron H for a mixture with "
    "MLPs of no width; test_llama_cpp.py judges the file alone"
)
EXPERT_KEYS = ("count", "used_count", "group_count", "group_used_count", "feed_forward_length", "weights_norm",
               "shared_count", "shared_feed_forward_length", "weights_scale")  # fmt: skip
OF_ONE_FAMILY = {
    "gemma": {"eot_token_id": "the converter writes CodeGemma's, 107, whatever the vocabulary has there"},
    "glm": {
        "context_length": "the converter takes it from ChatGLM's name for it, and else writes the hidden size",
        "attention.layer_norm_rms_epsilon": "the converter takes it from ChatGLM's name for it, and else writes 1e-5",
        "attention.key_length": "the converter leaves it out; llama.cpp then divides the hidden size by the heads",
        "attention.value_length": "as attention.key_length",
        "unknown_token_id": "the converter repeats the end of text",
    },
    "glm-4": GLM,
    "glm-4.5": GLM | {"nextn_predict_layers": "zero, as llama.cpp takes a file without it"},
    "minicpm-3": {
        "attention.value_length": "the converter leaves it out; llama.cpp then divides the hidden size by the heads",
        "rope.scaling.original_context_length": "the converter leaves it out; llama.cpp then takes the context length",
        "rope.scaling.attn_factor": "1, as llama.cpp takes a file without it",
    },
    "nemotron": {
        "padding_token_id": "the converter writes 0, whatever the tokenizer has there",
        "unknown_token_id": "the converter writes 1, whatever the tokenizer has there",
    },
    "deepseek-v2": DEEPSEEK_V2,
    "deepseek-v2-lite": DEEPSEEK_V2,
    "nemotron-h-8b": dict.fromkeys(
        ("architecture", "feed_forward_length", *(f"expert_{key}" for key in EXPERT_KEYS)), NO_MIXTURE
    ),
    "deepseek-v3": {"expert_gating_func": "as deepseek-v2"},
    "glm-4.7-flash": GLM | {"expert_gating_func": "as deepseek-v2"},
    "dots.llm1": {"expert_gating_func": "as deepseek-v2"},
    "solar-open": {
        "eot_token_id": "the converter repeats the end of text",
        "unknown_token_id": "the converter names it, which the tokenizer's settings do not",
    },
    "hunyuan": STRETCHED,
    "hunyuan-a13b": STRETCHED,
    "k-exaone": {
        "expert_gating_func": "as deepseek-v2",
        "nextn_predict_layers": "zero, as llama.cpp takes a file without it",
    },
}
"""Keys with another value, or none, in one of the files of one family."""
OTHER_TENSORS = {"bamba-9b": ["blk.1.attn_k.weight", "blk.1.attn_q.weight"]}
"""Tensors with other bytes: the converter reorders whole heads for a RoPE that turns the first half of each."""
DEFAULTS = {"rope.freq_base": 10000.0, "add_space_prefix": True, "add_sep_token": False}


@pytest.fixture(scope="module")
def theirs(
    family_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], gguf.GGUFReader]:
    """The converter's file, by family and type; one process writes the files of the sample, another all others."""
    folder = tmp_path_factory.mktemp("theirs")

    def place(name: str, kind: str) -> Path:
        return folder / f"{name}-{kind}.gguf"

    def find(name: str, kind: str) -> gguf.GGUFReader:
        if not place(name, kind).exists():
            names = [each for each in FAMILY_MODELS if (each in SAMPLE) == (name in SAMPLE)]
            convert([_conversion(each, of, family_base(each), place(each, of)) for each in names for of in TYPES])
        return gguf.GGUFReader(place(name, kind))

    return find


def _conversion(name: str, kind: str, base: Path, output: Path) -> Conversion:
    return Conversion(str(base), str(output), kind.lower(), "tiny", pre_tokenizer_of(name))


@pytest.fixture(scope="module", params=family_params())
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pairs(
    family: str,
    theirs: Callable[[str, str], gguf.GGUFReader],
    family_base: Callable[[str], Path],
    export_gguf: Callable[..., dict[str, Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Pair]:
    """Our reader and theirs, by type."""
    ours = export_gguf(family_base(family), tmp_path_factory.mktemp("ours"), *TYPES)
    return {kind: (gguf.GGUFReader(ours[kind]), theirs(family, kind)) for kind in TYPES}


def metadata(reader: gguf.GGUFReader) -> dict[str, tuple[Any, Any]]:
    """Key -> (types, value), by any architecture's name; the counts at the file's head are no metadata."""
    architecture = f"{reader.fields['general.architecture'].contents()}."
    fields = {
        f"architecture.{key.removeprefix(architecture)}" if key.startswith(architecture) else key: field
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    return {key: (list(field.types), field.contents()) for key, field in fields.items()}


def different_keys(pair: Pair) -> dict[str, tuple[Any, Any]]:
    """Key without the architecture's name -> both values, where they differ."""
    ours, theirs = map(metadata, pair)
    return {
        key.split(".", 1)[1].removeprefix("ggml."): (
            ours.get(key, (None, ABSENT))[1],
            theirs.get(key, (None, ABSENT))[1],
        )
        for key in ours.keys() | theirs.keys()
        if ours.get(key) != theirs.get(key)
    }


def test_tensors_are_the_same_bytes(family: str, pairs: dict[str, Pair]) -> None:
    for kind, pair in pairs.items():
        assert len(pair[0].tensors) >= 15
        assert sorted(different_tensors(pair)) == OTHER_TENSORS.get(family, []), kind


def test_metadata_is_the_same_but_for_the_listed_keys(family: str, pairs: dict[str, Pair]) -> None:
    own = OF_ONE_FAMILY.get(family, {})
    for pair in pairs.values():
        differing = different_keys(pair)
        assert own.keys() <= differing.keys(), "a listed difference is gone"
        for key, (ours, theirs) in differing.items():
            if key in own:
                continue
            if theirs == ABSENT:
                assert key in OURS_ONLY
                assert ours == DEFAULTS.get(key, ours), key
            else:
                assert ours == ABSENT, f"{key}: {ours} is not {theirs}"
                assert key in THEIRS_ONLY
                assert theirs == DEFAULTS[key]


def test_every_listed_key_is_needed(
    theirs: Callable[[str, str], gguf.GGUFReader],
    family_base: Callable[[str], Path],
    export_gguf: Callable[..., dict[str, Path]],
    tmp_path: Path,
) -> None:
    found: set[str] = set()
    for name in ("llama-2", "llama-3.1", "gemma-2"):
        ours = gguf.GGUFReader(export_gguf(family_base(name), tmp_path / name, "F16")["F16"])
        found |= different_keys((ours, theirs(name, "F16"))).keys()
    assert found == OURS_ONLY.keys() | THEIRS_ONLY.keys()


def test_what_generation_stops_at_is_named(
    family_base: Callable[[str], Path], export_gguf: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    expected = {
        "llama-3.1": ("<|eot_id|>", "<|eom_id|>"),
        "gemma-3": ("<end_of_turn>", None),
        "phi-3": ("<|end|>", None),
    }
    for name, words in expected.items():
        reader = gguf.GGUFReader(export_gguf(family_base(name), tmp_path / name, "F16")["F16"])
        tokens = reader.fields["tokenizer.ggml.tokens"].contents()
        fields = (reader.fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eot", "eom"))
        assert tuple(tokens[field.contents()] if field else None for field in fields) == words


SPOILED = {
    "q and k in Hugging Face's order": (
        "mistral-nemo",
        {"blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.1.attn_q.weight", "blk.1.attn_k.weight"},
    ),
    "norms around zero": (
        "gemma-3",
        {"output_norm.weight", "blk.0.attn_norm.weight", "blk.5.post_ffw_norm.weight", "blk.3.attn_k_norm.weight"},
    ),
    "no divisors of RoPE": ("llama-3.1", {"rope_freqs.weight"}),
    "long and short divisors swapped": ("phi-4-mini", {"rope_factors_long.weight", "rope_factors_short.weight"}),
}


@pytest.mark.parametrize("way", SPOILED)
def test_a_wrong_conversion_is_seen(
    theirs: Callable[[str, str], gguf.GGUFReader],
    family_base: Callable[[str], Path],
    export_gguf: Callable[..., dict[str, Path]],
    spoil: Callable[[str], None],
    tmp_path: Path,
    way: str,
) -> None:
    name, wrong = SPOILED[way]
    spoil(way)
    ours = gguf.GGUFReader(export_gguf(family_base(name), tmp_path, "F16")["F16"])
    found = different_tensors((ours, theirs(name, "F16")))
    assert wrong <= set(found)
    assert len(found) <= len(ours.tensors) / 2
