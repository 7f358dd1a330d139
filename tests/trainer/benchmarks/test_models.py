"""The benchmark's NF4 checkpoints are those that bitsandbytes and transformers would write."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, Qwen3ForCausalLM

from speed.models.checkpoint import write

SHAPE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320,
}  # fmt: skip


def shape(*, qwen: bool, tied: bool) -> dict[str, Any]:
    return SHAPE | {"tie_word_embeddings": tied, "model_type": "qwen3" if qwen else "llama"}


def quantised_by_transformers(kind: Any, config: Any, folder: Path) -> dict[str, torch.Tensor]:
    """A model of that configuration, drawn, saved, loaded in 4 bits and saved again: the long way."""
    config.quantization_config = None
    kind(config).to(torch.bfloat16).save_pretrained(folder / "plain")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    loaded = kind.from_pretrained(folder / "plain", quantization_config=nf4, dtype=torch.bfloat16)
    loaded.save_pretrained(folder / "long")
    return load_file(folder / "long/model.safetensors")


@pytest.mark.parametrize(("qwen", "tied"), [(False, False), (False, True), (True, False)])
def test_a_checkpoint_made_weight_by_weight_is_like_one_made_the_long_way(
    qwen: bool, tied: bool, tmp_path: Path
) -> None:
    write(shape(qwen=qwen, tied=tied), tmp_path / "made", "cpu")
    made = load_file(tmp_path / "made/model.safetensors")
    config = AutoConfig.from_pretrained(tmp_path / "made")
    wanted = quantised_by_transformers(Qwen3ForCausalLM if qwen else LlamaForCausalLM, config, tmp_path)
    assert made.keys() == wanted.keys()
    differing = [
        name for name in made
        if (made[name].shape, made[name].dtype) != (wanted[name].shape, wanted[name].dtype)
        and "quant_state" not in name  # JSON, as long as the numbers in it
    ]  # fmt: skip
    assert not differing


@pytest.mark.parametrize(("qwen", "tied"), [(False, True), (True, False)])
def test_transformers_loads_it_in_four_bits(qwen: bool, tied: bool, tmp_path: Path) -> None:
    write(shape(qwen=qwen, tied=tied), tmp_path / "made", "cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.bfloat16)
    assert ("Qwen3" if qwen else "Llama") in type(model).__name__
    quantised = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert len(quantised) == 7 * SHAPE["num_hidden_layers"]
    assert "lm_head" not in quantised
    weight = model.model.layers[0].mlp.up_proj.weight
    decoded = dequantize_4bit(weight.data, weight.quant_state)
    assert decoded.shape == (256, 128)
    assert decoded.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert weight.quant_state.nested
