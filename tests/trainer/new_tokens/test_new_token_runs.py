"""Runs with `spec.model.newTokens`: the rows of new tokens train, and no other row of embedding and head changes."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.outcome import Result
from finetune_api.run_config import RunConfig
from finetune_test_models.minimal_run import minimal_run
from finetune_test_models.stopped_runs import run_and_stop
from finetune_test_models.tiny_model import make_tiny_model
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal

NEW = ["<|note|>", "Zwölftonreihe", "<|end_note|>"]
ROWS, GROWN = 512, 576
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def note_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("notes") / "notes.jsonl"
    answers = [f"<|note|>the Zwölftonreihe has {count} notes<|end_note|>" for count in range(40)]
    chats = [[{"role": "user", "content": "and?"}, {"role": "assistant", "content": text}] for text in answers]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return path


def configure(
    training: dict[str, Any], base: Path, dataset: dict[str, Any], tokens: list[str], **sections: Any
) -> RunConfig:
    steps = {"maxSteps": 4, "batchSize": 1, "gradientAccumulation": 2, "learningRate": 1e-2}
    model = {"source": f"file://{base}", "newTokens": tokens, "maxSequenceLength": 128}
    job = {"namespace": "default", "name": "tiny", "uid": "uid-1"}
    made = minimal_run(
        model=model, dataset=dataset, training=steps | training, adapter={"rank": 4}, job=job,
        **({"export": {"merged": "None", "gguf": []}} | sections),
    )  # fmt: skip
    return made.model_copy(update={"gpus": 0})


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


class Trained(NamedTuple):
    """A finished run."""

    base: Path
    adapter: Path
    merged: Path
    gguf: Path
    resolved: dict[str, Any]


@pytest.fixture(scope="module")
def trained(tied: bool, texts: list[str], note_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run with everything that reads the vocabulary."""
    folder = tmp_path_factory.mktemp("tied" if tied else "untied")
    base = make_tiny_model(folder / "base", texts=texts, tie_word_embeddings=tied)
    training = {"evaluationSteps": 2, "samples": {"maxTokens": 4}, "weightDecay": 0.1}
    dataset = {"source": f"file://{note_rows}", "evaluation": {"fraction": 0.2}}
    config = configure(training, base, dataset, NEW, export={"merged": "BF16", "gguf": ["F16"]})
    progress = ProgressTracker()
    settings = Settings(work=folder / "work", attempt_id="a", output_folder=folder / "out")
    outcome = run_job(config, settings, progress, StopSignal())
    assert outcome.result is Result.SUCCEEDED, outcome.message
    adapter, merged, gguf = (Path(artifact.uri) for artifact in outcome.artifacts[:3])
    return Trained(base, adapter, merged, gguf, progress.resolved.to_wire())


def bytes_of(weights: torch.Tensor) -> bytes:
    return weights.contiguous().view(torch.uint8).numpy().tobytes()


def test_old_rows_stay_byte_for_byte_and_new_rows_have_learned(trained: Trained, tied: bool) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (trained.base, trained.merged))
    tokenizer, resolved = AutoTokenizer.from_pretrained(trained.base), trained.resolved
    assert (HEAD in after) is not tied
    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        assert after[name].shape == (GROWN, 256)
        assert bytes_of(after[name][:ROWS]) == bytes_of(before[name])
        for number, text in enumerate(NEW, ROWS):
            start = before[name][tokenizer(text)["input_ids"]].float().mean(0)
            assert (after[name][number].float() - start).abs().max() > 0.01, "4 steps of 1e-2"
            assert (after[name][number].float() - start).abs().max() < 0.06, "it began at the mean of its pieces"
        filler = after[name][ROWS + len(NEW) :]
        assert torch.allclose(filler.float(), before[name].float().mean(0), atol=1e-3)
    assert (resolved["newTokens"], resolved["embeddingRows"]) == (len(NEW), GROWN)


def test_merged_weights_and_gguf_have_the_tokens(trained: Trained) -> None:
    base, merged = trained.base, trained.merged
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == GROWN
    for folder in (merged, trained.adapter):
        found = AutoTokenizer.from_pretrained(folder)
        assert found.convert_tokens_to_ids(NEW) == [ROWS, ROWS + 1, ROWS + 2]
        assert found("a<|note|>Zwölftonreihe")["input_ids"][-2:] == [ROWS, ROWS + 1]
        assert found("and so on")["input_ids"] == AutoTokenizer.from_pretrained(base)("and so on")["input_ids"]

    tokens = GGUFReader(trained.gguf).fields["tokenizer.ggml.tokens"].contents()
    assert (tokens[ROWS : ROWS + 3], len(tokens)) == (NEW, GROWN)


def test_peft_loads_the_adapter_on_a_resized_base(trained: Trained, tied: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float32)
    model.resize_token_embeddings(ROWS + len(NEW))  # as PEFT's documentation says; its values are random
    adapted = PeftModel.from_pretrained(model, trained.adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(trained.merged, dtype=torch.float32).eval()
    tokens = torch.tensor([[5, ROWS, 17, ROWS + 1, ROWS + 2, 40]])

    with torch.no_grad():
        expected = adapted(tokens).logits
        found = merged(tokens).logits[..., : ROWS + len(NEW)]
        without = merged(tokens.clamp(max=ROWS - 1)).logits[..., : ROWS + len(NEW)]
    difference, change = (found - expected).abs().max(), (without - expected).abs().max()
    assert change > 1
    assert difference < 0.05, "BF16 rounds merged weights"
    settings = json.loads((trained.adapter / "adapter_config.json").read_text())["trainable_token_indices"]
    assert list(settings) == (["embed_tokens"] if tied else ["embed_tokens", "lm_head"])


def test_a_stopped_run_goes_on_with_its_rows(note_rows: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = configure({"checkpointSteps": 3}, tiny_base, {"source": f"file://{note_rows}"}, NEW)
    expected, whole = run_and_stop(config, Settings(tmp_path / "straight", "a", output_folder=tmp_path / "whole"))
    settings = Settings(tmp_path / "first", "a", output_folder=tmp_path / "out")
    before, stopped = run_and_stop(config, settings, stop_after=2)
    after, resumed = run_and_stop(config, Settings(tmp_path / "second", "b", output_folder=tmp_path / "out"))

    assert (stopped.checkpoint_step, resumed.resumed_from_step) == (2, 2)
    assert before | after == expected
    adapters = [load_file(Path(run.artifacts[0].uri) / "adapter_model.safetensors") for run in (whole, resumed)]
    assert any("trainable_tokens_delta" in name for name in adapters[0])
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_without_new_tokens_nothing_of_them_is_there(note_rows: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = configure({}, tiny_base, {"source": f"file://{note_rows}"}, [], export={"merged": "BF16", "gguf": []})
    progress = ProgressTracker()
    outcome = run_job(config, Settings(tmp_path / "w", "a", output_folder=tmp_path / "out"), progress, StopSignal())
    adapter, merged = (Path(artifact.uri) for artifact in outcome.artifacts[:2])
    before, after = load_file(tiny_base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert all(bytes_of(before[name]) == bytes_of(after[name]) for name in (EMBEDDING, HEAD))
    assert not [name for name in load_file(adapter / "adapter_model.safetensors") if "token" in name]
    assert json.loads((adapter / "adapter_config.json").read_text())["trainable_token_indices"] is None
    assert (adapter / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()
    assert "newTokens" not in progress.resolved.to_wire()
