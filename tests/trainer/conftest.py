"""A tiny base model, real conversations, and a builder of runs that need no cluster."""

from itertools import islice
from pathlib import Path

import pytest

from finetune_devcluster import chat_data, tiny_runs

tiny_base, run_config, settings = tiny_runs.tiny_base, tiny_runs.run_config, tiny_runs.settings


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [message["content"] for chat in islice(chat_data.conversations(), 60) for message in chat]


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_data.write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", tiny_runs.ROWS)
