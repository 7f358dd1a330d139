"""Real `finetune-trainer` processes that hang: stacks in the log, exit code 31, and the next one goes on."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import ExitCode
from finetune_api.outcome import Outcome, Result
from finetune_api.pod_ends.stalls import StallLimit
from finetune_api.run_config import RunConfig
from finetune_test_servers.s3_server import S3Server
from finetune_test_servers.tcp_proxy import TcpProxy
from finetune_trainer.artifacts.store import ArtifactStore
from finetune_trainer.job.watchdog import Stall, Watchdog

Builder = Callable[..., RunConfig]
LIMIT = 6  # seconds; importing torch takes nearly as long on a busy machine, and reads files meanwhile
OURS = "finetune_trainer"
TRAINER = f"{OURS}.training.qlora_trainer"


@dataclass
class Ended:
    """A trainer that has ended; `outcome` is None if it wrote none."""

    code: int
    seconds: float
    outcome: Outcome | None
    log: str


class Job:
    """One job that writes to S3; each `run` is an attempt."""

    def __init__(self, config: RunConfig, credentials: Path, folder: Path) -> None:
        (folder / "config.yaml").write_text(config.to_yaml())
        (folder / "secrets").mkdir()
        (folder / "secrets/output").symlink_to(credentials)
        self._folder, self._attempts = folder, 0

    def run(self, *planted: str, when: Callable[[str], object] = str) -> Ended:
        """Runs the trainer to its end; `when` gets each line of its log."""
        self._attempts += 1
        termination = self._folder / f"termination-{self._attempts}"
        environment = os.environ | {
            "FINETUNE_CONFIG": str(self._folder / "config.yaml"),
            "FINETUNE_WORK_DIR": str(self._folder / f"work-{self._attempts}"),
            "FINETUNE_ATTEMPT_ID": f"attempt-{self._attempts}",
            "FINETUNE_CREDENTIALS_DIR": str(self._folder / "secrets"),
            "FINETUNE_TERMINATION_LOG": str(termination),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        program = "hanging_trainer" if planted else "signalled_trainer"
        words = [sys.executable, "-m", f"finetune_test_programs.{program}", *(planted or ("run",))]
        process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None

        lines = []
        with process.stderr as log_lines:
            for line in log_lines:
                lines.append(line)
                when(line)
        code, log = process.wait(), "".join(lines)
        hung = re.search(r"hanging at ([0-9.]+)", log)
        outcome = Outcome.decode(termination.read_text()) if termination.exists() else None
        return Ended(code, time.time() - float(hung[1]) if hung else 0.0, outcome, log)


@pytest.fixture
def proxy(s3_server: S3Server) -> Any:
    with TcpProxy.start(int(s3_server.endpoint_url.rpartition(":")[2])) as started:
        yield started


@pytest.fixture
def job(run_config: Builder, bucket: str, credentials: Path, proxy: TcpProxy, tmp_path: Path) -> Job:
    endpoint = f"http://127.0.0.1:{proxy.port}"
    config = run_config(
        training={"maxSteps": 6, "checkpointSteps": 2, "batchSize": 1, "gradientAccumulation": 2},
        output={"s3": {"bucket": bucket, "prefix": "out", "endpointURL": endpoint}},
        export={"gguf": ["Q8_0"]},
    )
    limits = {"stall": StallLimit(seconds=LIMIT, adapts=False), "output_prefix": "out/default/tiny"}
    return Job(config.model_copy(update=limits), credentials, tmp_path)


def assert_stalled(ended: Ended, stage: str, place: str) -> Outcome:
    """Checks exit code, outcome and stacks; the function in which the trainer hung is among the frames."""
    assert (ended.code, ended.outcome is None) == (ExitCode.STALLED, False), ended.log[-3000:]
    assert ended.outcome is not None
    assert (ended.outcome.result, ended.outcome.reason) == (Result.FAILED, "Stalled")
    assert f"in stage {stage}" in ended.outcome.message, ended.outcome.message
    assert re.search(r"did nothing for \d+ s", ended.outcome.message)
    assert "the stacks of all threads follow" in ended.log
    assert "most recent call first" in ended.log
    assert place in ended.log
    return ended.outcome


def test_a_step_that_never_ends_is_ended_and_the_next_attempt_goes_on_from_the_checkpoint(job: Job) -> None:
    ended = job.run(f"{TRAINER}:collate_and_count", "11", "asleep")
    outcome = assert_stalled(ended, "Training", "hanging_trainer.py")
    assert "after step 4" in outcome.message
    assert "in hang" in outcome.message
    assert outcome.checkpoint_step == 4
    assert LIMIT - 1 < ended.seconds < 3 * LIMIT + 5

    again = job.run()
    assert again.outcome is not None
    assert (again.code, again.outcome.result, again.outcome.resumed_from_step) == (0, Result.SUCCEEDED, 4)


@pytest.mark.stalls
def test_an_upload_over_a_connection_that_is_half_open_is_ended(job: Job, proxy: TcpProxy) -> None:
    ended = job.run(when=lambda line: proxy.hold() if "stage Uploading" in line else None)
    outcome = assert_stalled(ended, "Uploading", "botocore")
    assert outcome.checkpoint_step == 6
    assert outcome.manifest_uri is None


PLACES = {
    "downloading": (f"{OURS}.sources.local:LocalRepository.download", "ModelLoading"),
    "loading the model": (
        "transformers.models.auto.modeling_auto:AutoModelForCausalLM.from_pretrained",
        "ModelLoading",
    ),
    "formatting rows": (f"{OURS}.chat.encoder:ChatEncoder.encode", "DataFormatting"),
    "training a step": (f"{TRAINER}:QloraTrainer.training_step", "Training"),
    "exporting": (f"{OURS}.export.gguf.files:GgufFiles.write", "Saving"),
}


@pytest.mark.stalls
@pytest.mark.parametrize(("function", "stage"), PLACES.values(), ids=PLACES)
def test_a_hang_in_every_stage_is_ended(job: Job, function: str, stage: str) -> None:
    assert_stalled(job.run(function, "1", "asleep"), stage, "in hang")


@pytest.mark.stalls
def test_native_code_that_keeps_every_thread_waiting_is_in_the_log(job: Job) -> None:
    """Nobody can write an outcome then; without an operator that would end the pod, the process ends as a crash."""
    ended = job.run(f"{TRAINER}:QloraTrainer.training_step", "3", "native")
    assert (ended.code, ended.outcome) == (1, None)
    assert "Timeout (" in ended.log
    assert "in hang" in ended.log


SLOW, SLOW_LIMIT = 1_500_000, 1  # bytes a second; seconds


def test_an_upload_that_is_slow_and_moves_is_none_of_its_business(
    open_attempt: Callable[..., ArtifactStore], s3_server: S3Server, tmp_path: Path
) -> None:
    """One request with one answer, over twice the limit."""
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(4 << 20))
    found: list[Stall] = []
    with TcpProxy.start(int(s3_server.endpoint_url.rpartition(":")[2]), SLOW) as slow:
        store = open_attempt(endpointURL=f"http://127.0.0.1:{slow.port}").object_store
        dog = Watchdog(StallLimit(seconds=SLOW_LIMIT, adapts=False), found.append)
        dog.start()
        began = time.monotonic()
        store.put_file("weights", path, lambda _: None)
        took = time.monotonic() - began
        dog.close()
    assert took > 2 * SLOW_LIMIT
    assert found == []
