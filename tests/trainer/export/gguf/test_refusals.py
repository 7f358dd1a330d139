"""Models that cannot become GGUF are refused before they train: every setting that a row of GGUF_FAMILIES says
llama.cpp hard-codes, changed alone, is an error that names the setting and the way on."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from finetune_test_models.family_models import FAMILY_MODELS
from finetune_test_models.tiny_families.family_model import HIDDEN_SIZE
from finetune_test_models.tiny_families.settings import TINY_FAMILIES
from finetune_test_models.tiny_model import tiny_config
from finetune_test_models.tiny_tokenizers import write_tokenizer
from finetune_trainer.export.base_model.tokenizer_files import TokenizerFiles
from finetune_trainer.export.errors import ExportError, UnsupportedTokenizerError, UnsupportedTypeError
from finetune_trainer.export.gguf.conversion import WAY_ON, check_conversion
from finetune_trainer.export.gguf.families.table import GGUF_FAMILIES
from finetune_trainer.export.gguf.family_row import GgufFamily
from finetune_trainer.export.gguf.layers.experts import DENSE, LAST, LAYER_KINDS

Config = dict[str, Any]
Check = Callable[[Config], str | None]
SIZE = 700  # rows of the embedding
FULL, WINDOWED = "full_attention", "sliding_attention"


def config_of(model: str, **changes: Any) -> Config:
    """The full config of a tiny model, without its weights."""
    tiny = FAMILY_MODELS[model]
    settings = {"num_hidden_layers": 2, "vocab_size": SIZE, "hidden_size": HIDDEN_SIZE} | dict(tiny.settings)
    config = tiny_config(tiny.family, **settings)
    return config.to_dict() | {"num_hidden_layers": config.num_hidden_layers} | changes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> TokenizerFiles:
    folder = tmp_path_factory.mktemp("tokenizer")
    assert write_tokenizer("gpt-2", folder, texts, chat_template="") <= SIZE
    return TokenizerFiles(folder)


@pytest.fixture(scope="module")
def refusal(tokenizer: TokenizerFiles) -> Check:
    """The words with which a config is refused; None: it is not."""

    def check(config: Config) -> str | None:
        found: ExportError | None = None
        try:
            check_conversion(["Q8_0"], config, tokenizer, {}, None)
        except ExportError as error:
            found = error
        if found is None:
            return None

        assert found.reason == "UnsupportedArchitecture"
        assert found.message.startswith("spec.export.gguf: ")
        assert found.message.endswith(f"; {WAY_ON}")
        return found.message.removeprefix("spec.export.gguf: ").removesuffix(f"; {WAY_ON}")

    return check


def another(value: object) -> object:
    """A value that is not `value`, of the same kind."""
    if isinstance(value, bool):
        return not value
    return {"greedy": "group_limited_greedy", "silu": "gelu"}.get(str(value), [0] if value == [] else 7)


def with_rope(config: Config, **changes: Any) -> Config:
    """`config` with other RoPE parameters, in its full-attention layers where they differ."""
    rope = config["rope_parameters"]
    if FULL in rope:
        return config | {"rope_parameters": rope | {FULL: rope[FULL] | changes}}
    return config | {"rope_parameters": rope | changes}


def wrong_settings(model_type: str, config: Config) -> Iterator[tuple[Config, str]]:
    """Configs that differ from `config` in one setting that llama.cpp has no equal of, each with words of the error."""
    family = GGUF_FAMILIES[model_type]
    yield config | {"hidden_activation": "gelu", "hidden_act": "gelu"}, "but config.json asks for 'gelu'"
    for key, value in family.fixed.items():
        yield config | {key: another(value)}, f"but config.json has {key} {another(value)!r}"

    for key, other in family.same.items():
        yield config | {key: config[other] // 2}, f"takes {key} and {other} of this architecture to be equal"
    yield from wrong_experts(config)

    if not config.get("rope_parameters"):
        return
    yield with_rope(config, rope_type="axial", factor=2.0), "'axial'"
    if not family.rope_tensors:
        yield with_rope(config, rope_type="llama3"), "no RoPE scaling 'llama3' for this architecture"
    if not family.scaled_rope:
        yield with_rope(config, rope_type="linear", factor=2.0), "does not scale RoPE in this architecture"
    elif not family.layer_sizes:
        yield with_rope(config, rope_type="yarn", factor=2.0, beta_fast=16.0), "YaRN with beta_fast 32, beta_slow 1"
    else:
        yield from wrong_layer_sizes(config)
    if family.latent_heads:
        yield (
            with_rope(config, rope_type="yarn", factor=2.0, mscale_all_dim=1.0),
            "mscale_all_dim 1.0 in rope_parameters",
        )
    yield from wrong_layers(family, config)


def wrong_layers(family: GgufFamily, config: Config) -> Iterator[tuple[Config, str]]:
    """As `wrong_settings`, of what llama.cpp computes in some layers only."""
    if family.no_rope_period is not None:
        everywhere = [1] * config["num_hidden_layers"]
        yield config | {"no_rope_layers": everywhere}, f"out of every {family.no_rope_period}th layer"
    if family.fixed_scale_layers is not None:
        yield config | {"query_pre_attn_scalar": 100}, "asks for query_pre_attn_scalar 100"
    if family.normed_heads_from is not None:
        yield config | {"use_qk_norm": not config["use_qk_norm"]}, f"with {family.normed_heads_from} layers or more"
    if family.sparse_layers is not None:
        yield config | {"activation_sparsity_pattern": [0.0] * config["num_hidden_layers"]}, "in the first 10 layers"
    if family.own_kv_layers is not None:
        yield config | {"num_kv_shared_layers": 0}, "keys and values in the first 20 layers"
    if family.windowed_layers is not None:
        yield config | {"layer_types": [WINDOWED] * config["num_hidden_layers"]}, f"{family.windowed_layers} layers"
    elif family.window_period is not None:
        yield config | {"layer_types": [FULL] * config["num_hidden_layers"]}, f"every {family.window_period}th layer"


def wrong_experts(config: Config) -> Iterator[tuple[Config, str]]:
    """Yields the same of layers that have no experts."""
    if config.get(LAST) is not None:
        yield config | {LAST: config["num_hidden_layers"] - 2}, f"but config.json has {LAST}"
    kinds = config.get(LAYER_KINDS)
    if kinds is not None:
        yield config | {LAYER_KINDS: [*kinds[:-1], DENSE]}, f"but config.json has {LAYER_KINDS}"


def wrong_layer_sizes(config: Config) -> Iterator[tuple[Config, str]]:
    """As `wrong_settings`, of models whose full and windowed layers differ."""
    yield with_rope(config, rope_type="yarn", factor=2.0), "proportional RoPE in the full_attention layers"
    yield with_rope(config, factor=2.0), "does not slow the proportional RoPE of this architecture"
    rope = config["rope_parameters"] | {WINDOWED: {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}
    yield config | {"rope_parameters": rope}, "default RoPE in the sliding_attention layers"
    yield config | {"use_bidirectional_attention": "all"}, "config.json has use_bidirectional_attention 'all'"
    small = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 8}
    yield config | small, "vocab_size_per_layer_input 8 and vocab_size 700"


@pytest.mark.parametrize("model_type", GGUF_FAMILIES)
def test_every_setting_that_llama_cpp_hard_codes_is_refused_by_its_name(model_type: str, refusal: Check) -> None:
    model = next(name for name, tiny in FAMILY_MODELS.items() if TINY_FAMILIES[tiny.family][0] == model_type)
    config = config_of(model)
    assert refusal(config) is None, "as it is, nothing speaks against it"

    missed = []
    for changed, words in wrong_settings(model_type, config):
        said = refusal(changed)
        if said is None or words not in said:
            missed.append((words, said))
    assert missed == []


def test_another_number_of_experts_in_each_layer_is_refused(refusal: Check) -> None:
    said = str(refusal(config_of("hunyuan-a13b", moe_topk=[2, 1])))
    assert "as many experts in every layer, but config.json has moe_topk [2, 1]" in said


def test_two_weights_of_yarn_in_latent_attention_are_refused(refusal: Check) -> None:
    for changes in ({"mscale_all_dim": 0.5}, {"mscale": None, "mscale_all_dim": None}, {"attention_factor": 1.5}):
        said = str(refusal(with_rope(config_of("deepseek-v3"), **changes)))
        assert "with mscale and mscale_all_dim alike and no attention_factor, but config.json asks for" in said


def test_queries_without_a_low_rank_are_refused_in_other_sizes_than_the_published_one(refusal: Check) -> None:
    assert refusal(config_of("deepseek-v2-lite")) is None
    said = str(refusal(config_of("deepseek-v2", q_lora_rank=None)))
    assert "without q_lora_rank only if they have 26 or 27 layers, but config.json has 2" in said


def test_factors_that_weights_cannot_have_inside_are_refused(refusal: Check) -> None:
    config = config_of("falcon-h1-34b")
    assert refusal(config | {"mamba_norm_before_gate": True}) == (
        "llama.cpp computes the gate of Mamba 2 before its norm, but config.json has mamba_norm_before_gate True"
    )
    assert refusal(config | {"mamba_norm_before_gate": True, "mamba_rms_norm": False}) is None
    assert "multiplies .k_proj.weight by 0," in str(refusal(config | {"key_multiplier": 0.0}))

    tied = config | {"tie_word_embeddings": True, "embedding_multiplier": 3.0}
    assert "multiplies the embedding by [3.0] and the head by [0.6]" in str(refusal(tied))
    assert refusal(tied | {"lm_head_multiplier": 3.0}) is None


def test_what_llama_cpp_always_computes_is_no_null(refusal: Check) -> None:
    assert refusal(config_of("gemma-3n")) is None
    said = str(refusal(config_of("gemma-3n", final_logit_softcapping=None)))
    assert "with final_logit_softcapping 30.0, but config.json has final_logit_softcapping None" in said
    assert refusal(config_of("command-r", attention_bias=None)) is None, "false, or left out, is the same"


def test_experts_in_some_mlps_only_are_refused(refusal: Check) -> None:
    config = config_of("nemotron-3-nano", layers_block_type=["linear_attention", "moe", "mlp"], num_hidden_layers=3)
    assert refusal(config) == (
        "llama.cpp has experts in every MLP of this architecture or in none, but config.json has layers of both kinds, "
        "mlp and moe, in layers_block_type"
    )
    assert refusal(config | {"layers_block_type": ["linear_attention", "moe", "moe"]}) is None


def test_windows_in_the_wrong_size_of_exaone_are_refused(refusal: Check) -> None:
    large = config_of("exaone-4-32b")
    assert refusal(large | {"layer_types": [FULL] * 64}) is not None
    shifted = [*large["layer_types"][1:], WINDOWED]
    assert "every 4th layer" in str(refusal(large | {"layer_types": shifted}))


def test_layers_without_the_keys_that_llama_cpp_wants_and_does_not_read_are_refused(tokenizer: TokenizerFiles) -> None:
    config = config_of("gemma-3n")
    shapes = [
        (f"model.layers.{layer}.self_attn.{part}.weight", (1,))
        for layer in range(25)
        for part in ("q_proj", "k_proj", "v_proj", "k_norm")
    ]
    check_conversion(["Q8_0"], config, tokenizer, {}, shapes)
    with pytest.raises(ExportError, match=r"have no model\.layers\.24\.self_attn\.v_proj\.weight: use the model's"):
        check_conversion(["Q8_0"], config, tokenizer, {}, [each for each in shapes if "24.self_attn.v" not in each[0]])


def test_a_width_may_be_repeated_for_each_layer_but_not_differ(tokenizer: TokenizerFiles) -> None:
    config = config_of("gemma-3n")
    assert config["intermediate_size"] == [2048] * 25
    with pytest.raises(ExportError, match=r"a whole number from 1 to \d+ for intermediate_size: \[1024, 2048"):
        check_conversion(["Q8_0"], config | {"intermediate_size": [1024] + [2048] * 24}, tokenizer, {}, None)


def test_a_family_without_a_row_is_refused_with_the_list_of_those_that_have_one(refusal: Check) -> None:
    said = str(refusal(config_of("llama-2") | {"model_type": "helium"}))
    assert "model_type 'helium' in config.json has no GGUF conversion: use llama, mistral" in said


def test_a_difference_that_everyone_accepts_is_a_warning(refusal: Check, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert refusal(config_of("mistral", sliding_window=64)) is None
        assert refusal(with_rope(config_of("gpt-oss"), truncate=False)) is None
        assert refusal(config_of("internlm-3")) is None
        assert refusal(config_of("nemotron-3-nano")) is None
        assert "time_step_min" not in caplog.text
        assert refusal(config_of("nemotron-3-nano", time_step_min=0.001)) is None
    assert "does not raise the steps of Mamba 2 to time_step_min 0.001" in caplog.text
    assert "no sliding window for this architecture: beyond 64 tokens" in caplog.text
    assert "slow RoPE by the length of a text: beyond 2048 tokens" in caplog.text
    assert "llama.cpp rounds the range of frequencies" in caplog.text
    assert refusal(with_rope(config_of("qwen2.5-yarn"), truncate=False)) is not None


def test_a_tokenizer_of_another_kind_is_refused(tokenizer: TokenizerFiles, tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedTokenizerError, match=r"is WordLevel, but GGUF export knows only BPE.*; to train"):
        check_conversion(["Q8_0"], config_of("llama-2"), TokenizerFiles(tmp_path), {}, None)
    check_conversion(["Q8_0"], config_of("llama-2"), tokenizer, {}, None)


def test_a_type_of_experts_is_refused_for_a_model_that_has_none(tokenizer: TokenizerFiles) -> None:
    with pytest.raises(UnsupportedTypeError, match=r"MXFP4_MOE has the experts.*choose Q8_0.*; to train"):
        check_conversion(["Q8_0", "MXFP4_MOE"], config_of("llama-2"), tokenizer, {}, None)
    check_conversion(["MXFP4_MOE"], config_of("gpt-oss"), tokenizer, {}, None)
