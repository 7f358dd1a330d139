"""The type of every tensor, as `llama_model_quantize` chooses it, for all types over architectures and depths.

The judge reads shapes and names only, so the files it gets hold matrices of two rows.
"""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter

from finetune_api.vocabulary import GgufType
from finetune_test_programs.reference_quantizer import quantize_files
from finetune_trainer.export.gguf.families.table import GGUF_FAMILIES
from finetune_trainer.export.quantization import tensor_types
from finetune_trainer.export.quantization.file_types import find_file_type
from finetune_trainer.export.quantization.tensor_types import TensorTypeInputs, choose_tensor_types

Tensors = list[tuple[str, tuple[int, ...]]]
TYPES = [kind.value for kind in GgufType]
SEPARATE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
MIXTURE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
           "ffn_down_shexp")  # fmt: skip
LATENT = (
    "attn_q_a",
    "attn_q_b",
    "attn_kv_a_mqa",
    "attn_k_b",
    "attn_v_b",
    "attn_output",
    "ffn_down_exps",
    "ffn_down_shexp",
)
FUSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
LINEAR_ATTENTION = ("attn_qkv", "attn_gate", "ssm_conv1d", "ssm_alpha", "ssm_beta", "ssm_out")
SHORT_CONVOLUTION = ("shortconv.in_proj", "shortconv.conv", "shortconv.out_proj")
MAMBA = ("ssm_in", "ssm_conv1d", "ssm_out")
NEMOTRON = (MODEL_ARCH.NEMOTRON_H, MODEL_ARCH.NEMOTRON_H_MOE)
"""Every layer has Mamba, attention or an MLP, and nothing else."""
HYBRIDS = (MODEL_ARCH.LFM2, MODEL_ARCH.LFM2MOE, MODEL_ARCH.GRANITE_HYBRID, *NEMOTRON)
"""llama.cpp tells the kinds of layers apart by their heads of keys and values."""
# What stands for attention in three of four layers.
STATE_LAYERS = {
    MODEL_ARCH.QWEN3NEXT: LINEAR_ATTENTION,
    MODEL_ARCH.QWEN35: LINEAR_ATTENTION,
    MODEL_ARCH.QWEN35MOE: LINEAR_ATTENTION,
    MODEL_ARCH.LFM2: SHORT_CONVOLUTION,
    MODEL_ARCH.GRANITE_HYBRID: MAMBA,
    MODEL_ARCH.LFM2MOE: SHORT_CONVOLUTION,
    MODEL_ARCH.NEMOTRON_H: MAMBA,
    MODEL_ARCH.NEMOTRON_H_MOE: MAMBA,
}
# architecture, layers, heads, key and value heads, tied: every condition of the rules is met and missed.
MODELS = [
    (MODEL_ARCH.LLAMA, 1, 4, 2, False),
    (MODEL_ARCH.LLAMA, 2, 4, 1, True),
    (MODEL_ARCH.LLAMA, 12, 8, 2, False),  # tenth layer by number is third by name
    (MODEL_ARCH.LLAMA, 32, 8, 8, False),
    (MODEL_ARCH.LLAMA, 80, 8, 1, False),
    (MODEL_ARCH.LLAMA, 80, 8, 8, False),
    (MODEL_ARCH.QWEN2, 28, 4, 2, True),
    (MODEL_ARCH.QWEN2, 80, 8, 1, False),
    (MODEL_ARCH.QWEN3, 36, 8, 2, False),
    (MODEL_ARCH.PHI3, 32, 4, 4, False),
    (MODEL_ARCH.PHI3, 80, 4, 1, False),
    (MODEL_ARCH.GEMMA2, 42, 4, 2, True),
    (MODEL_ARCH.GEMMA3, 26, 4, 1, True),
    # Architectures that no rule names, over depths and groups that the rules tell apart.
    (MODEL_ARCH.MISTRAL3, 8, 8, 2, False),
    (MODEL_ARCH.SMOLLM3, 8, 8, 2, True),
    (MODEL_ARCH.GRANITE, 8, 8, 2, True),
    (MODEL_ARCH.ARCEE, 8, 8, 4, False),
    (MODEL_ARCH.SEED_OSS, 8, 8, 1, False),
    (MODEL_ARCH.OLMO2, 16, 8, 8, False),
    (MODEL_ARCH.EXAONE4, 8, 8, 2, False),
    (MODEL_ARCH.ERNIE4_5, 3, 8, 1, True),
    (MODEL_ARCH.HUNYUAN_DENSE, 8, 8, 2, True),
    (MODEL_ARCH.GLM4, 8, 8, 1, False),
    (MODEL_ARCH.CHATGLM, 8, 8, 1, False),
    (MODEL_ARCH.COMMAND_R, 16, 8, 8, True),
    (MODEL_ARCH.MINICPM3, 8, 8, 8, True),
    (MODEL_ARCH.OLMO, 8, 8, 8, False),
    (MODEL_ARCH.NEMOTRON, 8, 8, 2, False),
    (MODEL_ARCH.JAIS2, 8, 8, 8, False),
    (MODEL_ARCH.COHERE2, 8, 8, 2, True),
    (MODEL_ARCH.STARCODER2, 3, 8, 2, False),
    (MODEL_ARCH.APERTUS, 8, 8, 2, False),
    (MODEL_ARCH.PHI2, 8, 8, 8, False),
    (MODEL_ARCH.STABLELM, 8, 8, 8, False),
    (MODEL_ARCH.GEMMA, 3, 8, 1, True),
    (MODEL_ARCH.GEMMA3N, 8, 8, 2, True),
    (MODEL_ARCH.GEMMA4, 16, 8, 2, True),
    (MODEL_ARCH.QWEN35, 16, 8, 2, False),
    (MODEL_ARCH.LFM2, 16, 8, 2, True),
    (MODEL_ARCH.GRANITE_HYBRID, 16, 8, 2, True),
    (MODEL_ARCH.FALCON_H1, 16, 8, 2, False),
    (MODEL_ARCH.NEMOTRON_H, 16, 8, 2, False),
]
# The same of mixtures, with the number of experts.
MIXTURES = [
    (MODEL_ARCH.LLAMA, 32, 8, 2, 8),
    (MODEL_ARCH.LLAMA, 24, 8, 8, 4),
    (MODEL_ARCH.QWEN3MOE, 24, 8, 1, 12),
    (MODEL_ARCH.GPT_OSS, 24, 8, 1, 6),
    (MODEL_ARCH.DEEPSEEK2, 24, 8, 8, 6),
    (MODEL_ARCH.QWEN2MOE, 8, 8, 8, 4),
    (MODEL_ARCH.OLMOE, 8, 8, 8, 4),
    (MODEL_ARCH.GRANITE_MOE, 8, 8, 2, 4),
    (MODEL_ARCH.LLAMA4, 8, 8, 1, 4),
    (MODEL_ARCH.GLM4_MOE, 8, 8, 1, 4),
    (MODEL_ARCH.QWEN3NEXT, 8, 8, 1, 4),
    (MODEL_ARCH.DOTS1, 8, 8, 8, 4),
    (MODEL_ARCH.ERNIE4_5_MOE, 8, 8, 2, 4),
    (MODEL_ARCH.HUNYUAN_MOE, 8, 8, 2, 4),
    (MODEL_ARCH.EXAONE_MOE, 8, 8, 1, 4),
    (MODEL_ARCH.MINIMAXM2, 8, 8, 1, 4),
    (MODEL_ARCH.LFM2MOE, 8, 8, 2, 4),
    (MODEL_ARCH.QWEN35MOE, 8, 8, 2, 4),
    (MODEL_ARCH.GRANITE_HYBRID, 8, 8, 2, 4),
    (MODEL_ARCH.NEMOTRON_H_MOE, 16, 8, 2, 4),
]
DEEP, INTERVAL = 80, 4


def make_tensors(architecture: MODEL_ARCH, layers: int, *, tied: bool, experts: int = 0) -> Tensors:
    """GGUF names and shapes in the order of safetensors files, by name: layer 10 comes before layer 2.

    Rows of two layers of three divide into super-blocks, those of the others only into blocks of 32.
    """
    parts = FUSED if architecture is MODEL_ARCH.PHI3 else SEPARATE
    if experts:
        parts = LATENT if architecture is MODEL_ARCH.DEEPSEEK2 else MIXTURE
    if layers == DEEP:
        parts = tuple(part for part in parts if part in ("attn_v", "attn_qkv"))  # depth alone decides only this one
    inner: Tensors = []
    for layer in sorted(range(layers), key=str):
        width = 288 if layer % 3 == 1 else 512
        inner += [(f"blk.{layer}.attn_norm.weight", (width,)), (f"blk.{layer}.attn_q.bias", (width,))]
        inner += [
            (f"blk.{layer}.{part}.weight", (experts, 2, width) if part.endswith("_exps") else (2, width))
            for part in parts_of_layer(architecture, layer, parts)
        ]
    width = 288 if layers % 3 == 1 else 512
    outer: Tensors = [("token_embd.weight", (2, width)), ("output_norm.weight", (width,))]
    return outer + inner + ([] if tied else [("output.weight", (2, width))])


def parts_of_layer(architecture: MODEL_ARCH, layer: int, parts: tuple[str, ...]) -> tuple[str, ...]:
    """`parts`, with those of a layer that keeps a state in place of attention's, or beside them."""
    if architecture is MODEL_ARCH.FALCON_H1:
        return *parts, *MAMBA
    if architecture in NEMOTRON:
        without_gates = ("attn_", "ffn_gate.", "ffn_gate_exps")
        mlp = tuple(part for part in parts if not f"{part}.".startswith(without_gates))
        return {1: mlp, INTERVAL - 1: parts[:4]}.get(layer % INTERVAL, MAMBA)
    if architecture not in STATE_LAYERS or (layer + 1) % INTERVAL == 0:
        return parts
    return (*STATE_LAYERS[architecture], *(part for part in parts if part.startswith("ffn_")))


def first_kv_heads(architecture: MODEL_ARCH, kv_heads: int) -> int:
    """Heads of keys and values of the first layer, which llama.cpp's rules look at."""
    return 0 if architecture in HYBRIDS else kv_heads


def write_file(
    path: Path, architecture: MODEL_ARCH, layers: int, heads: int, kv_heads: int, tensors: Tensors, experts: int = 0
) -> Path:
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(512)
    widths = [512 if layer % INTERVAL == 1 else 0 for layer in range(layers)]
    writer.add_feed_forward_length(widths if architecture in NEMOTRON else 512)
    writer.add_head_count(heads)
    counts = [kv_heads if (layer + 1) % INTERVAL == 0 else 0 for layer in range(layers)]
    writer.add_head_count_kv(counts if architecture in HYBRIDS else kv_heads)
    writer.add_full_attention_interval(INTERVAL)
    if architecture is MODEL_ARCH.GEMMA4:
        writer.add_sliding_window_pattern([(layer + 1) % INTERVAL != 0 for layer in range(layers)])
        for add in ("embedding_length_per_layer_input", "shared_kv_layers"):
            getattr(writer, f"add_{add}")(0)
        for add in ("key_length", "value_length", "rope_dimension_count"):
            getattr(writer, f"add_{add}_swa")(512 // heads)
    writer.add_shortconv_l_cache(3)
    writer.add_rope_dimension_sections([8, 8, 8, 0])
    for size in ("conv_kernel", "state_size", "group_count", "time_step_rank", "inner_size"):
        getattr(writer, f"add_ssm_{size}")(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(32)
    writer.add_vocab_size(2)
    writer.add_rope_dimension_count(512 // heads)
    writer.add_layer_norm_eps(1e-6)
    writer.add_logit_scale(1.0)
    for kind in ("alpha_n", "alpha_p", "beta", "eps"):
        getattr(writer, f"add_xielu_{kind}")([0.5] * layers)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(512)
        writer.add_expert_shared_feed_forward_length(512)
        writer.add_interleave_moe_layer_step(1)
        writer.add_leading_dense_block_count(0)
        writer.add_expert_shared_count(1)
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    if architecture in (MODEL_ARCH.DEEPSEEK2, MODEL_ARCH.MINICPM3):
        writer.add_kv_lora_rank(64)
        writer.add_q_lora_rank(64)

    for name, shape in tensors:
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_architecture_that_files_are_written_for_is_judged() -> None:
    judged = {architecture for architecture, *_ in (*MODELS, *MIXTURES)}
    rows = GGUF_FAMILIES.values()
    of_forms = {each.differences.get("architecture") for family in rows for each in family.forms} - {None}
    assert {family.architecture for family in rows} | of_forms == judged


def types_in(path: Path) -> dict[str, GGMLQuantizationType]:
    return {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}


def chosen_by_llama_cpp(source: Path) -> dict[str, dict[str, GGMLQuantizationType]]:
    targets = {kind: source.with_name(f"{kind}.gguf") for kind in TYPES if kind != "F32"}
    quantize_files(source, targets)
    return {kind: types_in(target) for kind, target in targets.items()} | {"F32": types_in(source)}


@pytest.mark.parametrize(("architecture", "layers", "heads", "kv_heads", "tied"), MODELS)
def test_every_tensor_has_the_type_that_llama_cpp_gives_it(
    tmp_path: Path, architecture: MODEL_ARCH, layers: int, heads: int, kv_heads: int, tied: bool
) -> None:
    tensors = make_tensors(architecture, layers, tied=tied)
    expected = chosen_by_llama_cpp(write_file(tmp_path / "F32.gguf", architecture, layers, heads, kv_heads, tensors))
    shape = TensorTypeInputs(architecture, layers, heads, first_kv_heads(architecture, kv_heads))
    for kind in TYPES:
        found = choose_tensor_types(find_file_type(kind), shape, tensors)
        differing = {
            name: (found[name].name, theirs.name) for name, theirs in expected[kind].items() if found[name] != theirs
        }
        assert not differing, kind


@pytest.mark.parametrize(("architecture", "layers", "heads", "kv_heads", "experts"), MIXTURES)
def test_every_tensor_of_a_mixture_has_the_type_that_llama_cpp_gives_it(
    tmp_path: Path, architecture: MODEL_ARCH, layers: int, heads: int, kv_heads: int, experts: int
) -> None:
    tensors = make_tensors(architecture, layers, tied=False, experts=experts)
    source = write_file(tmp_path / "F32.gguf", architecture, layers, heads, kv_heads, tensors, experts)
    expected = chosen_by_llama_cpp(source)
    shape = TensorTypeInputs(architecture, layers, heads, first_kv_heads(architecture, kv_heads), experts)
    for kind in TYPES:
        found = choose_tensor_types(find_file_type(kind), shape, tensors)
        differing = {
            name: (found[name].name, theirs.name) for name, theirs in expected[kind].items() if found[name] != theirs
        }
        assert not differing, kind


def test_each_rule_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule removed alone makes some file of the table above differ from llama.cpp's."""
    cases = [(make_tensors(MODEL_ARCH.LLAMA, 32, tied=False), TensorTypeInputs(MODEL_ARCH.LLAMA, 32, 8, 2))]
    for key, rule in list(tensor_types._RULES.items()):
        kind = find_file_type(key[0])
        with monkeypatch.context() as patched:
            before = [choose_tensor_types(kind, shape, tensors) for tensors, shape in cases]
            patched.setitem(tensor_types._RULES, key, lambda position: None)
            assert [choose_tensor_types(kind, shape, tensors) for tensors, shape in cases] != before, (key, rule)


@pytest.mark.parametrize("kind", TYPES)
def test_rows_that_no_block_fits_stay_readable(kind: str) -> None:
    """llama.cpp refuses a row of 33 for the simple types and takes F16 for the others; a file here is always made."""
    tensors: Tensors = [("blk.0.ffn_down.weight", (4, 33)), ("blk.0.attn_k.weight", (1, 64))]
    chosen = choose_tensor_types(find_file_type(kind), TensorTypeInputs(MODEL_ARCH.LLAMA, 1, 4, 4), tensors)
    plain = kind if kind in ("F32", "BF16") else "F16"
    assert chosen["blk.0.ffn_down.weight"] is GGMLQuantizationType[plain]
    assert chosen["blk.0.attn_k.weight"] is GGMLQuantizationType.F32
