"""No document sees another: the project's own batches give each document the loss that it has alone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from finetune_api.failures import FailureReason
from finetune_api.vocabulary import Batching, Precision
from finetune_kernels.planning.micro_batch import MicroBatch
from finetune_test_models.tiny_architectures import VOCABULARY, tiny_architecture
from finetune_trainer.errors import TrainerError
from finetune_trainer.training.batching import isolation
from finetune_trainer.training.batching.isolation import choose_batching
from finetune_trainer.training.collator import COLLATORS, collate_packed
from finetune_trainer.training.engine import Engine
from finetune_trainer.training.loaded_model import LoadedModel
from finetune_trainer.training.losses import supervised_loss

PACKED = (
    "llama", "gemma3_text", "gemma4_text", "qwen3_moe", "gpt2", "qwen3_5_text", "qwen3_next", "lfm2", "falcon_h1",
    "nemotron_h",
)  # fmt: skip
PADDED = ("gpt_oss", "granitemoehybrid", "falcon", "mamba2", "minimax")
DENSE_GRANITE_4 = {"layer_types": ["attention"] * 4}


def choose(model: Any) -> isolation.BatchingChoice:
    device = torch.device("cpu")
    return choose_batching(model, LoadedModel(model, None, type(model).__name__, Precision.FP32, device))


def documents(*lengths: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": list(row)} for row in rows]


def loss(model: Any, kind: Batching, rows: Sequence[dict[str, Any]]) -> float:
    batch = COLLATORS[kind](rows)
    labels, positions = batch.pop("labels"), batch.pop("supervised")
    with torch.no_grad():
        return supervised_loss(model, batch, labels, positions, 1).item()


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [(name, Batching.PACKED) for name in PACKED] + [(name, Batching.PADDED) for name in PADDED],
)
def test_a_batch_has_the_loss_of_its_documents(model_type: str, expected: Batching) -> None:
    model = tiny_architecture(model_type)
    choice = choose(model)
    assert choice.kind is expected
    rows = documents(20, 33, 40, 27)
    together, apart = loss(model, choice.kind, rows), sum(loss(model, Batching.SINGLE, [row]) for row in rows)
    assert abs(together - apart) < 0.01


def test_dense_granite_4_is_padded() -> None:
    choice = choose(tiny_architecture("granitemoehybrid", **DENSE_GRANITE_4))
    assert choice.kind is Batching.PADDED
    assert "see each other" in str(choice.reason)


def test_packed_documents_of_gpt_oss_have_another_loss() -> None:
    model = tiny_architecture("gpt_oss")
    rows = documents(20, 33, 40, 27)
    apart = sum(loss(model, Batching.SINGLE, [row]) for row in rows)
    assert abs(loss(model, Batching.PACKED, rows) - apart) > 1, "the control: with these batches it trained before"


def test_a_collator_without_positions_of_each_document_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def continued(rows: Any) -> dict[str, Any]:
        batch = collate_packed(rows)
        return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1]).unsqueeze(0)}

    monkeypatch.setitem(COLLATORS, Batching.PACKED, continued)
    assert choose(tiny_architecture("llama")).kind is Batching.PADDED
    assert choose(tiny_architecture("gpt2")).kind is Batching.PADDED


def mix_rows(model: Any, _: Any, inputs: dict[str, Any], output: Any) -> None:
    """Moves every logit by the first tokens of the batch's other rows."""
    first = inputs["input_ids"][:, 0].float()
    pattern = torch.linspace(-1, 1, output.logits.shape[-1])
    output.logits = output.logits + pattern * (first.sum() - first)[:, None, None]


def test_rows_that_see_each_other_are_computed_one_by_one() -> None:
    model = tiny_architecture("gpt_oss")
    assert choose(model).kind is Batching.PADDED, "the control"
    model.register_forward_hook(mix_rows, with_kwargs=True)
    choice = choose(model)
    assert choice.kind is Batching.SINGLE
    engine = Engine(False, supervised_loss, MicroBatch(2, 4))
    engine.use_batching(choice)
    assert engine.batch == MicroBatch(1, 8), "a step has as many rows as before"


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_a_model_that_sees_later_tokens_is_refused(model_type: str) -> None:
    with pytest.raises(TrainerError, match="no causal language model") as failure:
        choose(tiny_architecture(model_type))
    assert failure.value.reason is FailureReason.UNSUPPORTED_ARCHITECTURE


def test_a_model_that_cannot_be_computed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_architecture("llama")
    monkeypatch.setattr(model.model.layers[0].mlp, "forward", lambda *_: 1 / 0)
    with pytest.raises(TrainerError, match="LlamaForCausalLM cannot be trained here: ZeroDivisionError") as failure:
        choose(model)
    assert failure.value.reason is FailureReason.UNSUPPORTED_ARCHITECTURE


def test_lack_of_memory_is_no_fault_of_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_architecture("llama")

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model.model.layers[0].mlp, "forward", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        choose(model)


def test_logits_that_are_no_numbers_have_a_reason_of_their_own() -> None:
    model = tiny_architecture("llama")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(TrainerError, match="no numbers") as failure:
        choose(model)
    assert failure.value.reason is FailureReason.NON_FINITE_LOSS


def test_mode_and_random_numbers_are_left_as_they_were() -> None:
    model = tiny_architecture("llama").train()
    state = torch.get_rng_state()
    choose(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
