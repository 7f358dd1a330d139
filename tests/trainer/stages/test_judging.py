"""Judging never costs a finished training: what cannot be judged is published, and said."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune_api.vocabulary import ArtifactType
from finetune_trainer.artifacts.store import LocalArtifact
from finetune_trainer.errors import InterruptedRunError
from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.stages import judging

ROWS: Any = SimpleNamespace(evaluation=None, train=[{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
TRAINED: Any = SimpleNamespace(device=torch.device("cpu"), loss=None, engine=SimpleNamespace(window=None))


def judge(base: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> judging.Judged:
    def fail(*_: object) -> float:
        raise error

    monkeypatch.setattr(judging, "loss_in_memory", fail)
    return judging.judge_artifacts([LocalArtifact(ArtifactType.MERGED, base, "safetensors")], base, ROWS, TRAINED)


@pytest.mark.parametrize(
    "error", [RuntimeError("a shape"), torch.OutOfMemoryError("no room"), InvalidBaseError("a file ended")], ids=repr
)
def test_what_fails_is_said_and_the_artifacts_stay(
    tiny_base: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = judge(tiny_base, error, monkeypatch)
    assert found.judgement is None
    assert [artifact.loss for artifact in found.artifacts] == [None]
    assert "not judged" in caplog.text


def test_a_request_to_stop_is_not_swallowed(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InterruptedRunError):
        judge(tiny_base, InterruptedRunError("stopped by SIGTERM"), monkeypatch)
