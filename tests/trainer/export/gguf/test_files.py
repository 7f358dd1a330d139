"""Contents of GGUF files, read back by the `gguf` package: every tensor's values, and metadata that loaders need."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_test_models.family_models import make_family_model
from finetune_test_models.tiny_model import CHAT_TEMPLATE, make_tiny_model
from finetune_test_programs.file_differences import different_tensors
from finetune_trainer.export.errors import ExportError
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.export.gguf.tensors import interleave_heads

HEADS, KV_HEADS = 4, 2
KINDS = ("F32", "F16", "BF16", "Q8_0")


def read(base: Path, output: Path, *kinds: str) -> dict[str, gguf.GGUFReader]:
    request = ExportRequest(base=base, adapter=None, output=output, merged=None, gguf=kinds, name="model")
    files = export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
    return {file.type: gguf.GGUFReader(file.path) for file in files}


@pytest.fixture(scope="module")
def readers(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, gguf.GGUFReader]:
    return read(tiny_base, tmp_path_factory.mktemp("files"), *KINDS)


def tensor(reader: gguf.GGUFReader, name: str) -> Any:
    return next(tensor for tensor in reader.tensors if tensor.name == name)


def value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.fields[key]
    return field.contents()


SOURCES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "token_embd.weight": ("model.embed_tokens.weight", lambda weights: weights),
    "output.weight": ("lm_head.weight", lambda weights: weights),
    "blk.1.attn_q.weight": ("model.layers.1.self_attn.q_proj.weight", lambda w: interleave_heads(w, HEADS)),
    "blk.0.attn_k.weight": ("model.layers.0.self_attn.k_proj.weight", lambda w: interleave_heads(w, KV_HEADS)),
    "blk.0.attn_v.weight": ("model.layers.0.self_attn.v_proj.weight", lambda weights: weights),
    "blk.1.ffn_down.weight": ("model.layers.1.mlp.down_proj.weight", lambda weights: weights),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_type_holds_the_rounded_weights(readers: dict[str, gguf.GGUFReader], tiny_base: Path, name: str) -> None:
    source, arrange = SOURCES[name]
    weights = arrange(load_file(tiny_base / "model.safetensors")[source].float())
    rounded = {"F32": weights, "F16": weights.half().float(), "BF16": weights.bfloat16().float()}
    for kind, expected in rounded.items():
        found = tensor(readers[kind], name)
        values = gguf.quants.dequantize(found.data, found.tensor_type).reshape(weights.shape)
        assert np.array_equal(values, expected.numpy()), kind
    found = tensor(readers["Q8_0"], name)
    reference = gguf.quants.quantize(weights.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(found.data.reshape(reference.shape), reference)


def test_norms_stay_in_f32(readers: dict[str, gguf.GGUFReader]) -> None:
    for reader in readers.values():
        norms = [each for each in reader.tensors if "norm" in each.name]
        assert len(norms) == 5
        assert all(each.tensor_type == gguf.GGMLQuantizationType.F32 for each in norms)


def test_metadata_says_what_loaders_need(readers: dict[str, gguf.GGUFReader]) -> None:
    reader = readers["Q8_0"]

    expected = {
        "general.architecture": "llama",
        "llama.context_length": 2048,
        "llama.embedding_length": 256,
        "llama.block_count": 2,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q8_0),
        "tokenizer.chat_template": CHAT_TEMPLATE,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert {key: value(reader, key) for key in expected} == expected
    assert len(value(reader, "tokenizer.ggml.tokens")) == 512


def test_llama_3_scaling_has_its_factors(tmp_path: Path, texts: list[str]) -> None:
    scaling = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
    }  # fmt: skip
    base = make_tiny_model(tmp_path / "base", texts=texts, rope_parameters=scaling)
    reader = read(base, tmp_path / "out", "F16")["F16"]
    factors = tensor(reader, "rope_freqs.weight").data
    assert factors.shape == (32,)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0


def test_tied_embeddings_are_written_once(tmp_path: Path, texts: list[str]) -> None:
    base = make_tiny_model(tmp_path / "base", texts=texts, tie_word_embeddings=True)
    names = [each.name for each in read(base, tmp_path / "out", "F16")["F16"].tensors]
    assert "output.weight" not in names


def test_an_unknown_architecture_is_refused_before_anything_is_written(tmp_path: Path, tiny_base: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for path in tiny_base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace("LlamaForCausalLM", "NoSuchForCausalLM").replace('"llama"', '"nosuch"')
    )
    with pytest.raises(ExportError) as refusal:
        read(folder, tmp_path / "out", "F16")
    assert refusal.value.reason == "UnsupportedArchitecture"
    assert not list((tmp_path / "out").rglob("*.gguf"))


def test_stacks_of_experts_are_the_same_file_as_a_matrix_for_each(tmp_path: Path, texts: list[str]) -> None:
    """Qwen 3.5's mixtures are published with stacks, and saved by transformers without; their config.json need not have
    the width of an MLP that no layer has."""
    base = make_family_model("qwen3.5-moe", tmp_path / "base", texts, num_hidden_layers=4)
    weights = load_file(base / "model.safetensors")
    single = read(base, tmp_path / "single", "F16")["F16"]
    for layer in range(4):
        block = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: torch.stack([weights.pop(f"{block}.{expert}.{part}_proj.weight") for expert in range(4)])
            for part in ("gate", "up", "down")
        }
        weights[f"{block}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        weights[f"{block}.down_proj"] = parts["down"]
    assert not [name for name in weights if ".experts.0." in name]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    assert config.pop("intermediate_size")
    (base / "config.json").write_text(json.dumps(config))

    stacked = read(base, tmp_path / "stacked", "F16")["F16"]
    assert different_tensors((stacked, single)) == []
    assert "blk.3.ffn_down_exps.weight" in {each.name for each in stacked.tensors}
    assert single.fields.keys() - stacked.fields.keys() == {"qwen35moe.feed_forward_length"}
