"""Embedding and head in host memory compute what they did, and stay there."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_kernels.primitives.gather_rows import gather_rows
from finetune_kernels.vocabulary import host_vocabulary
from finetune_kernels.vocabulary.host_vocabulary import movable_bytes, move_to_host
from finetune_test_models import chat_data
from finetune_test_models.tiny_model import make_tiny_model


def frozen(folder: Path, family: str, **settings: Any) -> Any:
    texts = [message["content"] for chat in islice(chat_data.conversations(), 20) for message in chat]
    path = make_tiny_model(folder, family=family, texts=texts, **settings)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False)


@pytest.mark.parametrize(("rows", "columns"), [(7, 1), (31, 100), (5, 4097)])
def test_rows_are_gathered(rows: int, columns: int) -> None:
    table = torch.randn(rows, columns)
    ids = torch.randint(0, rows, (2, 9))
    assert torch.equal(gather_rows(table, ids), table[ids])
    assert not torch.equal(gather_rows(table, ids.roll(1)), table[ids])


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_computes_the_same_and_moving_it_leaves_both_on_the_host(tied: bool, tmp_path: Path) -> None:
    model = frozen(tmp_path, "llama", tie_word_embeddings=tied)
    tokens = torch.arange(3, 23).view(2, 10)
    expected, table = model(tokens).logits, model.get_input_embeddings().weight
    assert movable_bytes(model) == table.numel() * 4 * (1 if tied else 2)
    move_to_host(model)
    assert torch.equal(model(tokens).logits, expected)
    assert not [name for name, _ in model.named_parameters() if "embed" in name or "lm_head" in name]
    assert model.to("meta").get_output_embeddings().weight.device.type == "cpu"


def test_the_head_comes_in_blocks_unless_gradients_need_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = frozen(tmp_path, "llama")
    head = model.get_output_embeddings()
    hidden = torch.randn(2, 5, head.in_features)
    expected = head(hidden)
    brought: list[int] = []
    bring = host_vocabulary.on_device

    def bringing(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        brought.append(len(weight))
        return bring(weight, like)

    monkeypatch.setattr(host_vocabulary, "on_device", bringing)
    monkeypatch.setattr(host_vocabulary, "VOCABULARY_BLOCK", 100)
    move_to_host(model)
    assert torch.allclose(head(hidden), expected, rtol=1e-5, atol=1e-6)
    assert brought == [100] * 5 + [12]

    brought.clear()
    trained = hidden.clone().requires_grad_(True)
    assert torch.equal(head(trained), expected)
    assert brought == [512]
    with torch.no_grad():
        assert torch.allclose(head(trained), expected, rtol=1e-5, atol=1e-6)
    assert brought == [512] + [100] * 5 + [12]


def test_an_embedding_that_scales_stays(tmp_path: Path) -> None:
    assert movable_bytes(frozen(tmp_path, "gemma2")) == 0
