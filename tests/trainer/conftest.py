"""Fixtures of the trainer's tests: a tiny base model, conversations, runs without a cluster, jobs that write to S3."""

import itertools
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetune_api.run_config import JobIdentity, RunConfig
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_test_kernels.quick_interpreter import hasten_interpreter
from finetune_test_models import chat_data, taught_runs, tiny_runs
from finetune_test_servers.faulty_store import FaultyStore
from finetune_test_servers.s3_server import S3Server
from finetune_trainer.artifacts.store import ArtifactStore, open_store
from finetune_trainer.cli import finetune as console_script
from finetune_trainer.job.logging_setup import OURS

tiny_base, run_config, settings = tiny_runs.tiny_base, tiny_runs.run_config, tiny_runs.settings
taught = taught_runs.taught

hasten_interpreter()


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Runs in the tests' own process install handlers: afterwards all are as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def watchdogs() -> Iterator[None]:
    """A watchdog that a test leaves behind reads stacks, or ends the process, in the midst of a later one."""
    yield
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}, "close the watchdog"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [message["content"] for chat in islice(chat_data.conversations(), 60) for message in chat]


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_data.write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", tiny_runs.ROWS)


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """A command called in this process sets its logging up for a terminal; the next test's caplog would see nothing."""
    root = logging.getLogger()
    kept = root.handlers[:], root.level
    yield
    root.handlers, root.level = kept
    for name in OURS:
        ours = logging.getLogger(name)
        ours.handlers, ours.propagate, ours.level = [], True, logging.NOTSET


_numbers = itertools.count(1)
MakeConfig = Callable[..., RunConfig]
OpenStore = Callable[..., ArtifactStore]


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    name = f"artifacts-{next(_numbers)}"
    s3_server.create_bucket(name)
    return name


@pytest.fixture
def faulty(s3_server: S3Server) -> Iterator[FaultyStore]:
    with FaultyStore.start(s3_server) as started:
        yield started


@pytest.fixture
def credentials(s3_server: S3Server, tmp_path: Path) -> Path:
    """A mounted Secret."""
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "AWS_ACCESS_KEY_ID").write_text(s3_server.access_key)
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(s3_server.secret_key)
    return folder


@pytest.fixture
def make_config(bucket: str, faulty: FaultyStore) -> MakeConfig:
    def make(
        *, uid: str = "uid-1", job: str = "team/job", place: str | None = None, steps: int = 5, **s3: Any
    ) -> RunConfig:
        spec = {
            "model": {"source": "s3://models/tiny/"},
            "dataset": {"source": "s3://models/chat.jsonl"},
            "training": {"maxSteps": steps},
            "output": {"s3": {"bucket": bucket, "prefix": "out", "endpointURL": faulty.endpoint_url, **s3}},
            "runPolicy": {"checkpointsToKeep": 2},
        }
        namespace, name = job.split("/")
        identity = JobIdentity(namespace=namespace, name=name, uid=uid)
        return RunConfig.from_spec(identity, FineTuneJobSpec.model_validate(spec), None, place)

    return make


@pytest.fixture
def open_attempt(make_config: MakeConfig, credentials: Path) -> Iterator[OpenStore]:
    """Opens the store of an attempt, in S3 unless a folder is given."""
    opened: list[ArtifactStore] = []

    def open_it(attempt: str = "attempt-1", folder: Path | None = None, **changes: Any) -> ArtifactStore:
        opened.append(open_store(make_config(**changes), attempt, credentials, folder))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


MakeAdapter = Callable[..., Path]
Finetune = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def make_adapter() -> MakeAdapter:
    """Builder of an adapter with random, not zero, B matrices."""

    def make(base: Path, target: Path, **options: Any) -> Path:
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj", "v_proj"], **options))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        adapted.save_pretrained(target)
        return target

    return make


@pytest.fixture
def finetune() -> Finetune:
    """Runs the console script."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).parent / "finetune"
        words = [str(program), *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)

    return run


@pytest.fixture
def finetune_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Finetune:
    """Runs the console script's own function in this process, which has imported its libraries already; what they say
    stays on the screen."""
    monkeypatch.setattr(console_script, "_quiet_libraries", lambda: None)

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        words = ["finetune", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            console_script.main()
        code, printed = ended.value.code, capsys.readouterr()
        assert isinstance(code, int)
        return subprocess.CompletedProcess(words, code, printed.out, printed.err)

    return run
