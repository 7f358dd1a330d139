"""Encoded rows on disk: what is kept, skipped, cut, held out; and documents packed together stay apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.data_utils import pack_dataset

from finetune_api.spec.inputs import DatasetSpec, ModelSpec
from finetune_api.vocabulary import OnBadRow, Precision
from finetune_test_models.tiny_families.settings import TINY_FAMILIES
from finetune_test_models.tiny_model import make_tiny_model
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.architectures import UNPACKED
from finetune_trainer.stages.data_formatting import DatasetFiles, FormattedData, format_data
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.training.collator import collate_packed
from finetune_trainer.training.losses import supervised_loss


def row(answer: str, question: str = "why?") -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages})


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def formatted(tmp_path: Path, tokenizer: Any, lines: list[str], max_length: int = 64, **spec: Any) -> FormattedData:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    settings = DatasetSpec.model_validate({"source": f"file://{path}", **spec})
    files, encoder = DatasetFiles((path,)), ChatEncoder(tokenizer, settings.train_on)
    return format_data(files, settings, encoder, tmp_path / "work", max_length=max_length, seed=1)


def test_rows_are_cut_and_rows_without_supervised_tokens_are_left_out(tmp_path: Path, tokenizer: Any) -> None:
    data = formatted(tmp_path, tokenizer, [row("short"), row("long " * 100), row("never seen", "x " * 200)])
    assert len(data.train) == 2
    assert max(len(ids) for ids in data.train["input_ids"]) == 64
    assert data.supervised_tokens == sum(label != -100 for labels in data.train["labels"] for label in labels[1:])


def test_the_first_ten_bad_rows_are_named_together(tmp_path: Path, tokenizer: Any) -> None:
    lines = [row("fine"), *['{"messages": 1}'] * 12, row("fine")]
    with pytest.raises(TrainerError) as refusal:
        formatted(tmp_path, tokenizer, lines)
    assert refusal.value.reason == "InvalidRow"
    assert all(f"rows.jsonl:{number}:" in refusal.value.message for number in range(2, 12))
    assert "(and 2 more)" in refusal.value.message
    skipped = formatted(tmp_path, tokenizer, lines, onBadRow="Skip")
    assert (len(skipped.train), skipped.skipped_rows) == (2, 12)


GUARDED = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_system(answer: str) -> str:
    return json.dumps({"messages": [{"role": "system", "content": "s"}, *json.loads(row(answer))["messages"]]})


def test_rows_that_the_template_refuses_are_bad_rows_unless_it_refuses_all(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = GUARDED
    refused = [with_system("never")] * 4
    skipped = formatted(tmp_path, tokenizer, [*refused, row("fine")], onBadRow="Skip")
    assert (len(skipped.train), skipped.skipped_rows) == (1, 4)
    with pytest.raises(TrainerError, match=r"rows.jsonl:1: the chat template refuses the row: no system turns") as bad:
        formatted(tmp_path, tokenizer, [*refused, row("fine")])
    assert bad.value.reason == "InvalidRow"

    for on_bad_row in ("Skip", "Fail"):
        with pytest.raises(TrainerError, match=r"takes none of the rows; .*no system turns") as refusal:
            formatted(tmp_path, tokenizer, refused, onBadRow=on_bad_row)
        assert refusal.value.reason == "InvalidChatTemplate"


def test_rows_whose_answers_cannot_be_told_apart_are_bad_rows(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].content == 'odd' %}{% for m in messages %}{{ messages | length }}{{ m.content | reverse }}"
        "{% endfor %}{% else %}" + GUARDED + "{% endif %}"
    )
    lines = [row("fine"), row("lost", "odd"), row("fine")]
    data = formatted(tmp_path, tokenizer, lines, onBadRow="Skip")
    assert (len(data.train), data.skipped_rows) == (2, 1)
    with pytest.raises(TrainerError, match=r"rows.jsonl:2: .*\{% generation %\}") as refusal:
        formatted(tmp_path, tokenizer, lines)
    assert refusal.value.reason == "InvalidRow"


def test_reasoning_that_the_template_leaves_out_is_logged(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    turn = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    line = json.dumps({"messages": [{"role": "user", "content": "why?"}, turn]})
    tokenizer.chat_template = GUARDED
    for train_on in ("Responses", "All"):
        caplog.clear()
        formatted(tmp_path, tokenizer, [line, row("fine")], trainOn=train_on)
        assert "the reasoning of 1 answers is left out by the chat template" in caplog.text
    caplog.clear()
    formatted(tmp_path, tokenizer, [row("fine")])
    assert "reasoning" not in caplog.text, "control"


def test_max_samples_stops_reading_at_the_last_row_needed(tmp_path: Path, tokenizer: Any) -> None:
    data = formatted(tmp_path, tokenizer, [row("a"), row("b"), "not even JSON"], maxSamples=2)
    assert len(data.train) == 2


@pytest.mark.parametrize(
    ("evaluation", "found"),
    [
        (None, None),
        ({"fraction": 0.1}, None),
        ({"split": "validation"}, ("hf://org/data", "validation")),
        ({"source": "hf://org/more"}, ("hf://org/more", "train")),
        ({"source": "hf://org/more", "split": "test"}, ("hf://org/more", "test")),
    ],
)
def test_what_is_evaluated_on(evaluation: dict[str, Any] | None, found: tuple[str, str] | None) -> None:
    spec = DatasetSpec.model_validate({"source": "hf://org/data", "evaluation": evaluation})
    assert spec.evaluation_source() == found


def test_an_evaluation_source_has_its_own_layout_and_all_its_rows(tmp_path: Path, tokenizer: Any) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(json.dumps({"prompt": f"q{n}", "completion": f"a{n}"}) for n in range(3)) + "\n{\n")
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(row(f"answer {n}") for n in range(5)))
    spec = DatasetSpec.model_validate(
        {"source": f"file://{lines}", "evaluation": {"source": f"file://{own}"}, "maxSamples": 2, "onBadRow": "Skip"}
    )
    files, encoder = DatasetFiles((lines,), (own,)), ChatEncoder(tokenizer, spec.train_on)
    data = format_data(files, spec, encoder, tmp_path / "work", max_length=64, seed=1)
    assert data.evaluation is not None
    assert (len(data.train), len(data.evaluation), data.skipped_rows) == (2, 3, 1)
    assert data.format == "Messages"
    strict = spec.model_copy(update={"on_bad_row": OnBadRow.FAIL})
    with pytest.raises(TrainerError, match=r"own.jsonl:4"):
        format_data(files, strict, encoder, tmp_path, max_length=64, seed=1)


def test_held_out_rows_are_chosen_by_the_seed_and_never_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    lines = [row(f"answer {number}") for number in range(20)]
    first = formatted(tmp_path, tokenizer, lines, evaluation={"fraction": 0.1})
    again = formatted(tmp_path, tokenizer, lines, evaluation={"fraction": 0.1})
    assert first.evaluation is not None
    assert len(first.evaluation) == 2
    assert first.evaluation["input_ids"] == again.evaluation["input_ids"]
    held_out = {tuple(ids) for ids in first.evaluation["input_ids"]}
    assert not held_out & {tuple(ids) for ids in first.train["input_ids"]}


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation="sdpa").eval()


def loss_of(model: Any, batch: dict[str, Any]) -> float:
    labels, supervised = batch.pop("labels"), batch.pop("supervised")
    with torch.no_grad():
        return float(supervised_loss(model, batch, labels, supervised, num_items=1))


# Documents are kept apart by our own batches of linear attention, Mamba and short convolutions, and by our attention
# with sinks, which tests/kernels tries; transformers' own refuse packs, or ignore their bounds.
OF_KERNELS = ("qwen3_5", "qwen3_next", "gpt_oss", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "lfm2_moe")
LAYERS = {"gemma3n": 25}
"""Layers of families whose settings are lists of so many."""
PACKED = sorted(
    name
    for name, (model_type, _) in TINY_FAMILIES.items()
    if model_type not in UNPACKED and not model_type.startswith(OF_KERNELS)
)


@pytest.fixture(scope="module", params=PACKED)
def family_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Any:
    layers = {"num_hidden_layers": LAYERS.get(request.param, 2)}
    folder = make_tiny_model(tmp_path_factory.mktemp(request.param), family=request.param, texts=texts, **layers)
    spec = ModelSpec.model_validate({"source": f"file://{folder}", "quantization": "None"})
    return load_model(folder, spec, Precision.FP32, gpus=0).model.eval()


def test_documents_packed_together_do_not_see_each_other(tmp_path: Path, tokenizer: Any, family_model: Any) -> None:
    """The packed loss is the sum of the documents' own losses: fp32 rounding was at most 9e-8 relative over the
    families, and where documents see each other (positions that run on) the sum is off by 3e-4 to 3e-2."""
    model = family_model
    lines = [row(f"answer number {number} is {'very ' * number}long") for number in range(6)]
    data = formatted(tmp_path, tokenizer, lines, max_length=256)
    packed = pack_dataset(data.train, seq_length=256, strategy="bfd")
    assert len(packed) < len(data.train)
    together = sum(loss_of(model, collate_packed([packed[index]])) for index in range(len(packed)))
    apart = sum(loss_of(model, collate_packed([data.train[index]])) for index in range(len(data.train)))
    print("REL", abs(together - apart) / apart)
    assert together == pytest.approx(apart, rel=3e-6)

    leaking = 0.0
    for index in range(len(packed)):
        batch = collate_packed([packed[index]])
        length = batch["input_ids"].shape[1]
        whole = {name: batch[name] for name in ("input_ids", "labels", "supervised")}
        leaking += loss_of(model, whole | {"position_ids": torch.arange(length).unsqueeze(0)})
    print("LEAK", abs(leaking - apart) / apart)
    assert abs(leaking - apart) > 1e-4 * apart


def test_the_loss_is_the_cross_entropy_of_the_supervised_tokens(model: Any) -> None:
    tokens = torch.arange(1, 21).unsqueeze(0)
    labels = tokens.clone()
    labels[0, :10] = -100
    labels[0, 15] = -100
    with torch.no_grad():
        logits = model(tokens).logits[0]
        expected = functional.cross_entropy(logits[:-1], labels[0, 1:], ignore_index=-100)
        positions = (labels[0, 1:] != -100).nonzero().squeeze(1)
        found = supervised_loss(model, {"input_ids": tokens}, labels, positions, num_items=None)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
