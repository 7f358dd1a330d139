"""The mixers of hybrids as they are planned: which layers, how large, and what autograd keeps of the real module."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.families import family_of_config
from finetune_kernels.planning.model_shape import ParameterCounts, build_shape
from finetune_kernels.planning.parts import mixer_shape as planned
from finetune_kernels.planning.parts.mixer_shape import MixerShape, cost_of_missing, missing_packages, mixer_shape

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32,
    "num_hidden_layers": 3, "pad_token_id": 0,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 32, "linear_value_head_dim": 48,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
MAMBA: dict[str, Any] = {
    "layer_types": ["full_attention", "linear_attention", "linear_attention"], "num_local_experts": 0,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 32, "mamba_n_groups": 2, "mamba_chunk_size": 64,
}  # fmt: skip
BAMBA: dict[str, Any] = {
    "attn_layer_indices": [0], **{name: value for name, value in MAMBA.items() if name.startswith("mamba")},
}  # fmt: skip
FALCON: dict[str, Any] = BAMBA | {"mamba_d_ssm": 128, "mamba_rms_norm": True}
NEMOTRON: dict[str, Any] = {
    "layers_block_type": ["linear_attention", "mlp", "linear_attention"], "mamba_num_heads": 8, "mamba_head_dim": 16,
    "ssm_state_size": 32, "n_groups": 2, "chunk_size": 64,
}  # fmt: skip
CASES = [
    ("qwen3_5_text", DELTA, (0, 2), "linear_attn"),
    ("lfm2", {"layer_types": ["full_attention", "conv", "conv"]}, (1, 2), "conv"),
    ("granitemoehybrid", MAMBA, (1, 2), "mamba"),
    ("falcon_h1", FALCON, (0, 1, 2), "mamba"),
    ("bamba", BAMBA, (1, 2), "mamba"),
    ("nemotron_h", NEMOTRON, (0, 2), "mixer"),
]


def kept_bytes(module: Any, tokens: int, hidden: int) -> float:
    """Bytes a token that autograd keeps of a module in bfloat16, weights left out."""
    kept: dict[int, torch.Tensor] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value
        return value

    x = torch.randn(1, tokens, hidden, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        module(x)
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    return sum(value.untyped_storage().nbytes() for place, value in kept.items() if place not in weights) / tokens


@pytest.mark.parametrize(("model_type", "settings", "layers", "name"), CASES, ids=lambda case: str(case)[:12])
def test_the_shape_is_that_of_the_module(
    model_type: str, settings: dict[str, Any], layers: tuple[int, ...], name: str
) -> None:
    config = CONFIG_MAPPING[model_type](**SIZES | settings)
    shape = mixer_shape(config, family_of_config(config))
    assert shape is not None
    assert shape.layers == layers

    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    module = getattr(model.model.layers[layers[0]], name).requires_grad_(False)
    linears = {key: value for key, value in module.named_modules() if isinstance(value, torch.nn.Linear)}
    assert shape.linears == {key: tuple(value.weight.shape) for key, value in linears.items()}
    assert shape.bytes_per_token == pytest.approx(kept_bytes(module, 256, 64), rel=0.05)


def test_models_without_another_mixer_have_no_shape() -> None:
    for model_type, settings in (("llama", {}), ("lfm2", {"layer_types": ["full_attention"] * 3}), ("gpt2", {})):
        config = CONFIG_MAPPING[model_type](**SIZES | settings)
        assert mixer_shape(config, family_of_config(config)) is None


def test_what_is_missing_is_said_with_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG_MAPPING["qwen3_5_text"](**SIZES | DELTA)
    family = family_of_config(config)
    monkeypatch.setattr(planned, "find_spec", lambda name: None)
    assert missing_packages(config, family) == ["fla-core with Triton 3.7.1 or newer"]
    assert cost_of_missing(config, family) == (
        "2 of 3 layers have linear attention, which runs in transformers' plain PyTorch, as fla-core with Triton 3.7.1 "
        "or newer is not installed: these layers take longer, and 23 KiB a token while one works"
    )
    monkeypatch.setattr(planned, "find_spec", lambda name: object())
    assert cost_of_missing(config, family) is None
    llama = CONFIG_MAPPING["llama"](**SIZES)
    assert cost_of_missing(llama, family_of_config(llama)) is None


@pytest.mark.parametrize(
    ("triton", "usable"), [("3.6.0", False), ("3.7.0", False), ("3.7.1", True), ("3.7.1+git1", True), ("3.10.0", True)]
)
def test_fla_is_left_alone_with_a_triton_that_compiles_it_wrongly(
    triton: str, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG_MAPPING["qwen3_5_text"](**SIZES | DELTA)
    family = family_of_config(config)
    in_loops = mixer_shape(config, family)
    monkeypatch.setattr(planned, "find_spec", lambda name: object())
    monkeypatch.setattr(planned, "version", lambda name: triton)
    assert (missing_packages(config, family) == []) == usable
    assert (mixer_shape(config, family) != in_loops) == usable, "kernels need other bytes"


def test_layers_with_another_mixer_save_less_and_recompute_it() -> None:
    config = CONFIG_MAPPING["qwen3_5_text"](**SIZES | DELTA)
    shape = build_shape(config, ParameterCounts(0, 0, quantized=False, movable_bytes=0))
    assert isinstance(shape.mixers, MixerShape)
    attention, mixer = (shape.saved_bytes(ActivationPolicy.RECOMPUTE_MLP, mixer=kind) for kind in (False, True))
    # q and its gate, k, v, attention's output, and fp32 sums
    assert attention - mixer == 2 * ((2 * 4 + 2 * 2 + 4) * shape.head_size + 2 * 4)
    assert shape.saved_by([ActivationPolicy.RECOMPUTE_MLP] * 3) == attention + 2 * mixer
    assert shape.recomputed_by([ActivationPolicy.SAVE_ALL] * 3) == 2 * 2 * shape.mixers.parameters
    assert shape.working_bytes(100, tiled=True) >= 100 * shape.mixers.bytes_per_token


def test_fla_s_graph_stays_where_a_layer_saves_all_and_the_mixer_then_runs_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = CONFIG_MAPPING["qwen3_5_text"](**SIZES | DELTA)
    counts = ParameterCounts(0, 0, quantized=False, movable_bytes=0)
    loops = build_shape(config, counts)
    monkeypatch.setattr(planned, "is_usable", lambda name: True)
    kernels = build_shape(config, counts)
    assert loops.mixers is not None
    assert kernels.mixers is not None

    # Rows of the module's input (64) and the convolution's (2 x 64 + 288), q and k for each of 6 value heads of 32; v,
    # output, gate and normed output of 288; triangles of 64, in 16 bits; 32 bytes a head of single numbers.
    row = 2 * (64 + 416 + 2 * 6 * 32 + 4 * 288 + 6 * 64) + 32 * 6
    assert (loops.mixers.graph_bytes, kernels.mixers.graph_bytes) == (0, row)

    all_saved, mlp_again = ([policy] * 3 for policy in (ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_MLP))
    assert kernels.saved_by(all_saved) == loops.saved_by(all_saved) + 2 * row
    assert kernels.saved_by(mlp_again) == loops.saved_by(mlp_again)
    assert kernels.recomputed_by(all_saved) == 0
    assert kernels.recomputed_by(mlp_again) == loops.recomputed_by(mlp_again)

    both = 2 * kernels.mixers.parameters
    assert [shape.repeated_parameters(all_saved) for shape in (loops, kernels)] == [both, 0]
    assert kernels.repeated_parameters([ActivationPolicy.OFFLOAD, *all_saved[1:]]) == kernels.mixers.parameters
