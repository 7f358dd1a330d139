"""SIGTERM in every stage of a real `finetune-trainer` process: it ends in time, and exit code, outcome and stored
checkpoint agree.

`make test` has a sample of them, `make stalls` all. At the end of the module the table is printed (`pytest -s`), for
docs/lab-notes.md.
"""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import ExitCode
from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import RunConfig
from finetune_test_servers.faulty_store import Fault, FaultyStore
from finetune_test_servers.hub import Hub, HubRepo
from finetune_test_servers.s3_server import S3Server

Builder = Callable[..., RunConfig]
GRACE = 24  # what is stuck is ended after 18 s
STUCK = "60"  # seconds for which a library swallows everything
STEPS = 6
OURS = "finetune_trainer"
TRAINER = f"{OURS}.training.qlora_trainer:QloraTrainer"


@dataclass(frozen=True)
class Case:
    """A place for the signal, and the end that is right for it."""

    planted: tuple[str, ...] = ()
    """Function of the trainer, number of its call, and seconds for which it is stuck."""
    request: tuple[str, str] | None = None
    """Method and part of the path of the request to storage during which the signal arrives."""
    silent: bool = False
    """Storage never answers that request, nor any after it."""
    checkpoint: int | None = None
    verb: str = "run"
    source: str = "s3"
    succeeds: bool = False


TABLE = {
    "fetching the model from a volume": Case((f"{OURS}.storage.digests:sha256_file", "2", "0"), source="file"),
    "fetching the model, S3 silent": Case(request=("GET", "/model/model.safetensors"), silent=True),
    "fetching the model, hub in the middle of a file": Case(source="hub", request=("GET", "model.safetensors")),
    "importing torch": Case(("torch", "0", "0.5")),
    "importing jinja2": Case(("jinja2", "0", "0.5")),
    "loading the model, stuck": Case(
        ("transformers.models.auto.modeling_auto:AutoModelForCausalLM.from_pretrained", "1", STUCK)
    ),
    "injecting the adapter": Case((f"{OURS}.stages.adapter_injection:get_peft_model", "1", "0")),
    "formatting rows": Case((f"{OURS}.chat.encoder:ChatEncoder.encode", "5", "0")),
    "training, in the middle of a step": Case((f"{TRAINER}.training_step", "9", "0"), checkpoint=5),
    "training, a step is stuck": Case((f"{TRAINER}.training_step", "9", STUCK), checkpoint=4),
    "training, in the last step": Case((f"{TRAINER}.training_step", "12", "0"), checkpoint=6),
    "evaluating": Case((f"{TRAINER}.prediction_step", "2", "0"), checkpoint=3),
    "taking samples": Case((f"{OURS}.training.samples:generate_tokens", "2", "0"), checkpoint=3),
    "storing a checkpoint": Case(request=("PUT", "step-00000002"), checkpoint=2),
    "storing a checkpoint, S3 silent": Case(request=("PUT", "step-00000004"), silent=True, checkpoint=2),
    "saving, merging": Case((f"{OURS}.export.adapter:LoraWeights.merge", "3", "0"), checkpoint=6),
    "saving, GGUF": Case((f"{OURS}.export.gguf.files:GgufFiles.write", "3", "0"), checkpoint=6),
    "saving, GGUF, stuck": Case((f"{OURS}.export.gguf.files:GgufFiles.write", "3", STUCK), checkpoint=6),
    "writing documents": Case((f"{OURS}.documents.write:render_loss_plot", "1", "0"), checkpoint=6),
    "uploading": Case(request=("PUT", "/attempts/"), checkpoint=6),
    "uploading, S3 silent": Case(request=("PUT", "/attempts/"), silent=True, checkpoint=6),
    "committing": Case(request=("PUT", "manifest.json"), checkpoint=6, succeeds=True),
    "after the commit": Case(
        (f"{OURS}.artifacts.store:ArtifactStore._remove_leftovers", "1", "0"), checkpoint=6, succeeds=True
    ),
    "preflight, S3 silent": Case(request=("GET", "/model/config.json"), silent=True, verb="preflight"),
    "preflight, reading rows": Case((f"{OURS}.data.json_rows:_decode", "5", "0"), verb="preflight"),
}

SAMPLE = {
    "importing torch",
    "fetching the model, S3 silent",
    "training, in the middle of a step",
    "training, a step is stuck",
    "saving, GGUF",
    "committing",
    "preflight, S3 silent",
    "preflight, reading rows",
}
assert set(TABLE) >= SAMPLE


@dataclass
class Ended:
    """A trainer that has ended."""

    code: int
    seconds: float
    outcome: Outcome
    log: str


@dataclass
class Stage:
    """The world of one case: storage with model and data, and what happens to the trainer's process."""

    case: Case
    folder: Path
    faulty: FaultyStore
    hub: Hub
    environment: dict[str, str]
    signalled: float = 0.0
    over: threading.Event = field(default_factory=threading.Event)
    process: subprocess.Popen[str] | None = None

    def signal(self) -> None:
        """Sends SIGTERM, once."""
        if not self.signalled and self.process is not None:
            self.signalled = time.time()
            self.process.terminate()
        if self.case.silent:
            self.over.wait(2 * GRACE)

    def signal_within(self, path: str) -> None:
        """Sends SIGTERM after the first half of the weights; the second half comes when the trainer has ended."""
        if path.endswith("model.safetensors"):
            self.signal()
            self.over.wait(2 * GRACE)

    def run(self) -> Ended:
        """Runs the trainer until it ends, or for the whole grace period."""
        if self.case.request is not None and self.case.source != "hub":
            method, part = self.case.request
            self.faulty.faults = [Fault(method, part, forwards=not self.case.silent, then=self.signal)]
            if self.case.silent:
                self.faulty.faults[0].times = 10_000
        words = [sys.executable, "-m", "finetune_test_programs.signalled_trainer", self.case.verb, *self.case.planted]
        self.process = subprocess.Popen(words, env=self.environment, stderr=subprocess.PIPE, text=True)
        try:
            _, log = self.process.communicate(timeout=400)
        finally:
            self.over.set()
            self.process.kill()

        ended = time.time()
        if (found := re.search(r"signal at ([0-9.]+)", log)) is not None:
            self.signalled = float(found[1])
        assert self.signalled, f"the signal was never sent:\n{log[-3000:]}"
        outcome = Outcome.decode((self.folder / "termination").read_text())
        return Ended(self.process.returncode, ended - self.signalled, outcome, log)


@pytest.fixture
def start(
    run_config: Builder, tiny_base: Path, chat_file: Path, s3_server: S3Server, faulty: FaultyStore,
    bucket: str, credentials: Path, tmp_path: Path,
) -> Iterator[Callable[[Case], Stage]]:  # fmt: skip
    stages: list[Stage] = []
    with Hub.start() as hub:

        def build(case: Case) -> Stage:
            for path in tiny_base.iterdir():
                s3_server.client().upload_file(str(path), bucket, f"model/{path.name}")
            hub.repos["models/acme/tiny"] = HubRepo({path.name: path.read_bytes() for path in tiny_base.iterdir()})
            source = {"s3": f"s3://{bucket}/model/", "file": f"file://{tiny_base}", "hub": "hf://acme/tiny"}
            config = run_config(
                model={"source": source[case.source]},
                dataset={"evaluation": {"fraction": 0.2}},
                training={
                    "maxSteps": STEPS,
                    "checkpointSteps": 2,
                    "evaluationSteps": 3,
                    "samples": {"maxTokens": 8},
                },
                export={"merged": "BF16", "gguf": ["Q8_0"]},
                output={"s3": {"bucket": bucket, "prefix": "out", "endpointURL": faulty.endpoint_url}},
            ).model_copy(update={"termination_grace_period_seconds": GRACE, "output_prefix": "out/default/tiny"})
            (tmp_path / "config.yaml").write_text(config.to_yaml())
            secrets = tmp_path / "secrets"
            secrets.mkdir()
            for use in ("output", "model"):
                (secrets / use).symlink_to(credentials)
            environment = os.environ | {
                "FINETUNE_CONFIG": str(tmp_path / "config.yaml"),
                "FINETUNE_WORK_DIR": str(tmp_path / "work"),
                "FINETUNE_ATTEMPT_ID": "attempt-1",
                "FINETUNE_CREDENTIALS_DIR": str(secrets),
                "FINETUNE_TERMINATION_LOG": str(tmp_path / "termination"),
                "PYTHONPATH": os.pathsep.join(sys.path),
                "HF_ENDPOINT": hub.url,
                "HF_HUB_DISABLE_XET": "1",
            }
            stage = Stage(case, tmp_path, faulty, hub, environment)
            if case.source == "hub":
                hub.halfway = stage.signal_within
            stages.append(stage)
            return stage

        yield build
        for stage in stages:
            stage.over.set()


@pytest.fixture(scope="module")
def lines() -> Iterator[list[str]]:
    """The table's lines, printed at the end."""
    found: list[str] = []
    yield found
    print("\n| stage | seconds to exit | exit code | outcome | checkpoint |\n|---|---|---|---|---|")
    print("\n".join(found))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.stalls) for name in TABLE]
)
def test_a_signal_ends_the_trainer_in_order(
    name: str, start: Callable[[Case], Stage], s3_server: S3Server, bucket: str, lines: list[str]
) -> None:
    case = TABLE[name]
    ended = start(case).run()
    outcome = ended.outcome
    lines.append(
        f"| {name} | {ended.seconds:.1f} | {ended.code} | {outcome.result} | {outcome.checkpoint_step or '-'} |"
    )

    wanted = (ExitCode.SUCCESS, Result.SUCCEEDED) if case.succeeds else (ExitCode.INTERRUPTED, Result.INTERRUPTED)
    assert (ended.code, outcome.result) == wanted, ended.log[-3000:]
    assert outcome.exit_code == ended.code
    assert ended.seconds < GRACE, ended.log[-3000:]

    keys = [entry["Key"] for entry in list_objects(s3_server, bucket)]
    stored = [int(match[1]) for key in keys if (match := re.search(r"step-(\d+)/checkpoint.json", key))]
    assert (outcome.checkpoint_step, max(stored, default=None)) == (case.checkpoint, case.checkpoint)
    assert any(key.endswith("manifest.json") for key in keys) == case.succeeds
    if not case.silent and not case.succeeds:
        assert not [key for key in keys if "/attempts/" in key], "an attempt that was stopped cleans up"
        assert not s3_server.client().list_multipart_uploads(Bucket=bucket).get("Uploads")


def list_objects(server: S3Server, bucket: str) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = server.client().list_objects_v2(Bucket=bucket, Prefix="out/").get("Contents", [])
    return listed
