"""fp16 on a GPU that has bfloat16: `torch.cuda.get_device_capability` says 7.5, so that no bfloat16, no FlashAttention
and no cuDNN are taken. What a Turing card does beside (its registers, its tensor cores) the compiler says only: see
tests/images/test_turing_kernels.py."""

import json
from typing import Any

import pytest
import torch

from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import RunConfig
from finetune_kernels.ops import attention
from finetune_kernels.primitives.attention import batched, flash
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_test_kernels.tensor_checks import root_error
from finetune_test_models import tiny_runs
from finetune_trainer import pipeline
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.training.engine import Engine

pytestmark = pytest.mark.gpu
texts, tiny_base, chat_file = tiny_runs.texts, tiny_runs.tiny_base, tiny_runs.chat_file
run_config, settings = tiny_runs.run_config, tiny_runs.settings
Builder = tiny_runs.Builder
LENGTHS = (300, 1, 70, 512, 33)


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that says it is older than Ampere; what Turing has not, fails."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a Turing card has no such kernel")

    for module, name in ((flash, "forward"), (flash, "backward"), (batched, "takes")):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "size"), [((8, 2), 128), ((4, 4), 64), ((4, 2), 256), ((4, 1), 80)], ids=str)
@pytest.mark.usefixtures("turing")
def test_packed_attention_is_as_exact_as_fp16_is(heads: tuple[int, int], size: int, window: int | None) -> None:
    rows = sum(LENGTHS)
    ends = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).to(torch.int32)
    sequences, params = PackedSequences(ends, max(LENGTHS), rows), AttentionParams(size**-0.5, window)
    shapes = [(rows, count, size) for count in (heads[0], heads[1], heads[1])]
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = Qkv(*(torch.randn(*shape, device="cuda", dtype=torch.float16, generator=generator) for shape in shapes))
    dout = torch.randn(*shapes[0], device="cuda", dtype=torch.float16, generator=generator)

    def gradients(dtype: torch.dtype, compute: Any) -> list[torch.Tensor]:
        leaves = [part.to(dtype).requires_grad_() for part in qkv]
        out = compute(Qkv(*leaves), sequences, params)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    exact = gradients(torch.float64, attention.reference)
    ours = gradients(torch.float16, attention.attention)
    errors = [root_error(found, true) for found, true in zip(ours, exact, strict=True)]
    print(heads, size, window, [f"{error:.1e}" for error in errors])
    assert max(errors) < 2e-3, "fp16 itself rounds by 2.8e-4 on average"

    steeper = AttentionParams(1.1 * params.scale, window)
    wrong = gradients(torch.float64, lambda qkv, sequences, _: attention.reference(qkv, sequences, steeper))
    assert max(root_error(found, true) for found, true in zip(ours, wrong, strict=True)) > 1e-2


def run(config: RunConfig, settings: Settings, attempt: str) -> Outcome:
    own = Settings(work=settings.work / attempt, attempt_id=attempt, output_folder=settings.output_folder)
    job = config.job.model_copy(update={"name": attempt})
    return run_job(config.model_copy(update={"gpus": 1, "job": job}), own, ProgressTracker(), StopSignal())


def losses(settings: Settings, attempt: str) -> list[float]:
    assert settings.output_folder is not None
    (path,) = (settings.output_folder / attempt).rglob("attempts/*/metrics/metrics.jsonl")
    return [line["loss"] for line in map(json.loads, path.read_text().splitlines()) if "loss" in line]


def test_a_run_is_fused_in_fp16_and_follows_bfloat16(
    run_config: Builder, settings: Settings, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    engines = list[Engine]()
    original = pipeline.prepare_engine

    def prepare(*arguments: Any) -> Engine:
        engines.append(original(*arguments))
        return engines[-1]

    monkeypatch.setattr(pipeline, "prepare_engine", prepare)
    config = run_config(training={"maxSteps": 40, "loggingSteps": 1, "batchSize": 2, "gradientAccumulation": 2})
    assert run(config, settings, "bf16").result is Result.SUCCEEDED
    request.getfixturevalue("turing")
    outcome = run(config, settings, "fp16")
    assert outcome.result is Result.SUCCEEDED, outcome.message

    before, now = engines
    assert before.loss_scale is None
    assert now.loss_scale is not None
    assert now.layers is not None, "layers are fused"
    assert {group.dtype for layer in now.layers.layers for group in layer.groups} == {torch.float16}
    theirs, ours = losses(settings, "bf16"), losses(settings, "fp16")
    print("scale", now.loss_scale.value, "losses", theirs[-3:], ours[-3:])
    assert len(ours) == len(theirs) == 40
    assert sum(ours[-10:]) == pytest.approx(sum(theirs[-10:]), rel=0.05), "but for steps that the scale has left out"
