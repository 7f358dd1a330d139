"""A tiny base model, real conversations, and a builder of runs that need no cluster."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from finetune_api.run_config import RunConfig
from finetune_devcluster import chat_data
from finetune_devcluster.tiny_model import make_tiny_model
from finetune_trainer.settings import Settings

ROWS = 40


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [message["content"] for chat in islice(chat_data.conversations(), 60) for message in chat]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A two-layer Llama with random weights."""
    return make_tiny_model(tmp_path_factory.mktemp("llama"), texts=texts)


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_data.write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", ROWS)


@pytest.fixture
def run_config(tiny_base: Path, chat_file: Path) -> Callable[..., RunConfig]:
    """Builder: keyword arguments are merged into the sections."""

    def build(**sections: dict[str, Any]) -> RunConfig:
        document: dict[str, Any] = {
            "job": {"namespace": "default", "name": "tiny", "uid": "uid-1"},
            "model": {"source": f"file://{tiny_base}", "maxSequenceLength": 128},
            "dataset": {"source": f"file://{chat_file}"},
            "adapter": {"rank": 4},
            "training": {"maxSteps": 3, "batchSize": 1, "gradientAccumulation": 2, "learningRate": 1e-3},
            "export": {"merged": "None", "gguf": []},
            "output": {"s3": {"bucket": "models"}},
            "checkpointsToKeep": 2,
            "terminationGracePeriodSeconds": 60,
            "gpus": 0,
        }
        for section, fields in sections.items():
            document[section] = document[section] | fields
        return RunConfig.model_validate(document)

    return build


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(work=tmp_path / "work", attempt_id="attempt-1", output_folder=tmp_path / "out")
