"""Fixtures of whole runs that need no cluster: a tiny base model, conversations, and a builder of configurations.

`tests/trainer/conftest.py` takes its builder from here. GPU tests take every fixture from here, by name, and the
conversations are made up: so they run on a machine that has only PyTorch and the trainer's packages, by pytest
--noconftest with crds, trainer_image, kernels and tests/support in PYTHONPATH.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.run_config import RunConfig
from finetune_test_models.tiny_model import make_tiny_model
from finetune_trainer.job.settings import Settings

Builder = Callable[..., RunConfig]
ROWS = 40
SYLLABLES = ["ba", "dren", "fi", "gol", "hu", "kast", "li", "mor", "ne", "pul", "ri", "sten", "to", "vel", "wi", "zan"]
WORDS = [first + second for first, second in itertools.product(SYLLABLES, SYLLABLES)]


def conversations(count: int, *, words: int = 12, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """Yield random conversations of two exchanges, of sentences up to `words` long; the same for the same arguments."""
    chance = random.Random(seed)
    for _ in range(count):
        said = [" ".join(chance.choices(WORDS, k=chance.randint(words // 2, words))) for _ in range(4)]
        yield [{"role": ("user", "assistant")[i % 2], "content": f"{text}."} for i, text in enumerate(said)]


def write_rows(path: Path, chats: Iterator[list[dict[str, str]]]) -> Path:
    """Write {"messages": [...]} lines."""
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Texts on which the tokenizer is trained."""
    return [message["content"] for chat in conversations(60) for message in chat]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A two-layer Llama with random weights."""
    return make_tiny_model(tmp_path_factory.mktemp("llama"), texts=texts)


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data to train on."""
    return write_rows(tmp_path_factory.mktemp("data") / "chat.jsonl", conversations(ROWS))


@pytest.fixture
def run_config(tiny_base: Path, chat_file: Path) -> Builder:
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
            "outputPrefix": "default/tiny",
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
    """A run's folders."""
    return Settings(work=tmp_path / "work", attempt_id="attempt-1", output_folder=tmp_path / "out")
