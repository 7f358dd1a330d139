"""Whole runs over a base that two ranks share out: evaluation, samples, export, judging, another run's checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import RunConfig
from finetune_test_models.stopped_runs import stopped_after
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.settings import Settings

Builder = Callable[..., RunConfig]
EMBEDDING, ROWS = "model.embed_tokens.weight", 512
NEW_TOKENS = ["you know", "I am", "<|never|>"]
"""Two of a few rows each, and one of none."""
# An odd number of rows to evaluate on, and prompts of which one rank has one more than the other.
SECTIONS: dict[str, dict[str, Any]] = {
    "dataset": {"evaluation": {"fraction": 0.275}, "packing": False},
    "training": {
        "maxSteps": 4, "batchSize": 2, "gradientAccumulation": 2, "precision": "FP32", "evaluationSteps": 2,
        "weightDecay": 0.5,
        "keepBest": True, "samples": {"prompts": ["One?", "Two, and a longer one?", "Three?"], "maxTokens": 6},
    },
    "model": {"newTokens": NEW_TOKENS},
    "export": {"merged": "BF16", "gguf": []},
}  # fmt: skip


def run(
    config: RunConfig, folder: Path, attempt: str, ranks: int, stop_after: int | None = None
) -> tuple[Outcome, Any]:
    """Runs an attempt of the job in `folder`, which SIGTERM stops after a step."""
    progress, stop_signal = stopped_after(stop_after)
    settings = Settings(work=folder / attempt, attempt_id=attempt, output_folder=folder / "out", cpu_ranks=ranks)
    return run_job(config, settings, progress, stop_signal, lambda error: None), progress.resolved


def content(outcome: Outcome, kind: str, file: str) -> Path:
    """A file among the artifacts."""
    return next(Path(artifact.uri) for artifact in outcome.artifacts if artifact.type == kind) / file


def test_a_shared_base_gives_the_result_of_whole_ones_and_either_goes_on_from_the_others_checkpoint(
    run_config: Builder, tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def config(parallelism: str) -> RunConfig:
        return run_config(**SECTIONS | {"training": SECTIONS["training"] | {"parallelism": parallelism}})

    whole, resolved = run(config("Auto"), tmp_path / "whole", "a", 2)
    assert whole.result is Result.SUCCEEDED, whole.message
    assert (resolved.parallelism, resolved.world_size) == ("Replicated", 2)
    kept = resolved.base_bytes_per_process

    # Two ranks share the base out, and stop; the one that goes on alone has it whole.
    stopped, resolved = run(config("Sharded"), tmp_path / "shared", "a", 2, stop_after=2)
    assert (stopped.result, stopped.checkpoint_step) == (Result.INTERRUPTED, 2), stopped.message
    assert resolved.parallelism == "Sharded"
    assert resolved.base_bytes_per_process < kept
    alone, resolved = run(config("Sharded"), tmp_path / "shared", "b", 1)
    assert (alone.result, alone.resumed_from_step) == (Result.SUCCEEDED, 2), alone.message
    assert "this run has one process: it keeps the whole base model" in caplog.text

    shared, _ = run(config("Sharded"), tmp_path / "again", "a", 2)
    assert shared.result is Result.SUCCEEDED, shared.message
    assert (shared.best_step, shared.best_eval_loss) == (whole.best_step, whole.best_eval_loss)
    for kind, file in (("Adapter", "adapter_model.safetensors"), ("Merged", "model.safetensors")):
        expected = load_file(content(whole, kind, file))
        for found, exact in (
            (load_file(content(shared, kind, file)), True),
            (load_file(content(alone, kind, file)), False),
        ):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                if exact:
                    assert torch.equal(found[name], value), name
                else:
                    torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4)
    assert content(shared, "Samples", "").read_text() == content(whole, "Samples", "").read_text()
    assert shared.judgement == whole.judgement
    assert shared.judgement is not None
    check_new_rows(shared, tiny_base)


def check_new_rows(outcome: Outcome, base: Path) -> None:
    """Old rows are those of the base, rows of tokens that were read have learned, and the row of the other has not."""
    before, after = load_file(base / "model.safetensors"), load_file(content(outcome, "Merged", "model.safetensors"))
    for name in (EMBEDDING, "lm_head.weight"):
        assert torch.equal(after[name][:ROWS], before[name])

    adapter = load_file(content(outcome, "Adapter", "adapter_model.safetensors"))
    (rows,) = (value for name, value in adapter.items() if "embed_tokens" in name and "trainable_tokens" in name)
    tokenizer = AutoTokenizer.from_pretrained(base)
    starts = [before[EMBEDDING][tokenizer(text)["input_ids"]].float().mean(0) for text in NEW_TOKENS]
    changes = [float((row - start.bfloat16().float()).abs().max()) for row, start in zip(rows, starts, strict=True)]
    assert changes.pop() == 0, "no gradient, and no decay"
    assert min(changes) > 1e-4
