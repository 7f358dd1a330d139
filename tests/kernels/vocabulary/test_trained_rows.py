"""Embedding and head with rows of new tokens compute what peft's own layers do, without a copy of the weight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from finetune_kernels.layers.supervised_loss import fused_supervised_loss, has_plain_head
from finetune_kernels.vocabulary.host_vocabulary import movable_bytes
from finetune_kernels.vocabulary.trained_rows import frozen_module, install_trained_rows, trained_rows
from finetune_test_models.tiny_model import make_tiny_model

FIRST, NEW = 290, [290, 291, 292]
TOKENS = torch.tensor([[3, 290, 17, 291, 44, 290, 9, 292, 21, 60]])
POSITIONS = torch.arange(2, 9)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def with_rows(family: str, folder: Path, device: str, dtype: torch.dtype) -> Any:
    """A peft model whose rows are neither those of the weight nor each other's."""
    path = make_tiny_model(folder, family=family, texts=["one two three"], vocab_size=320)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    layers = ["embed_tokens"] if base.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    indices = dict.fromkeys(layers, NEW)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter += 0.02 * torch.randn_like(parameter)
    return model


def rows_of(model: Any) -> dict[str, torch.Tensor]:
    """Gradients of the rows, by name."""
    found = {name: weight.grad for name, weight in model.named_parameters() if "trainable_tokens" in name}
    model.zero_grad()
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found.values())
    return found


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])  # untied; tied; tied, scaled and capped
def test_loss_and_gradients_are_those_of_peft(family: str, device: str, tmp_path: Path) -> None:
    dtype, tolerance = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 0.03)
    model = with_rows(family, tmp_path, device, dtype)
    tokens, positions = TOKENS.to(device), POSITIONS.to(device)

    logits = model(input_ids=tokens).logits[0, POSITIONS].float()
    expected = functional.cross_entropy(logits, tokens[0, POSITIONS + 1])
    expected.backward()  # type: ignore[no-untyped-call]
    gradients = rows_of(model)
    assert len(gradients) == (2 if family == "llama" else 1)

    install_trained_rows(model.get_base_model())
    assert has_plain_head(model)
    found = fused_supervised_loss(model, {"input_ids": tokens}, tokens, positions, None)
    found.backward()  # type: ignore[no-untyped-call]
    ours = rows_of(model)
    assert max(error(ours[name], gradients[name]) for name in gradients) < tolerance
    assert error(found, expected) < tolerance
    assert error(model(input_ids=tokens).logits[0, POSITIONS], logits) < tolerance


def test_rows_of_another_place_are_noticed(tmp_path: Path) -> None:
    model = with_rows("llama", tmp_path, "cpu", torch.float32)
    expected = model(input_ids=TOKENS).logits
    for module in (model.get_base_model().model.embed_tokens, model.get_base_model().lm_head):
        module.token_adapter.token_indices["default"] = [number - 1 for number in NEW]
    install_trained_rows(model.get_base_model())
    assert error(model(input_ids=TOKENS).logits, expected) > 0.1


def test_ids_with_gaps_are_refused(tmp_path: Path) -> None:
    model = with_rows("llama", tmp_path, "cpu", torch.float32)
    embedding = model.get_base_model().model.embed_tokens
    embedding.token_adapter.token_indices["default"] = [290, 292, 293]
    with pytest.raises(AssertionError, match="successive"):
        trained_rows(embedding)


def test_the_weight_stays_frozen_and_is_not_moved_to_the_host(tmp_path: Path) -> None:
    causal = with_rows("llama", tmp_path, "cpu", torch.float32).get_base_model()
    install_trained_rows(causal)
    assert movable_bytes(causal) == 0
    head = frozen_module(causal.lm_head)
    assert type(head) is torch.nn.Linear
    assert not head.weight.requires_grad
    assert frozen_module(head) is head
    assert trained_rows(head) is None
