"""FP8 is tried on the first batch and again later: kept where loss and gradient stay, given up where they do not, and
said in the status. Whole runs on the CPU with layers that only pretend; byte_products/test_gpu_fp8.py has real ones."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from finetune_api.failures import FailureReason
from finetune_api.outcome import Result
from finetune_api.progress import Resolved
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import MemoryMode, Precision
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.planning.memory_plan import MemoryPlan, plan_memory
from finetune_kernels.planning.micro_batch import MicroBatch
from finetune_kernels.planning.model_shape import ModelShape
from finetune_trainer import pipeline
from finetune_trainer.cli.pod import run_job
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.stages.model_loading import resolve_precision
from finetune_trainer.training import fp8_gate
from finetune_trainer.training.engine import NO_WEIGHTS, OTHERS_REFUSE, Engine
from finetune_trainer.training.fp8_gate import Measured, decide, measure, next_look
from finetune_trainer.training.losses import supervised_loss
from finetune_trainer.training.memory.loaded_shape import model_shape

Builder = Callable[..., RunConfig]
GIB = 2**30


@dataclass(frozen=True)
class Wrong:
    """What FP8 makes of a batch."""

    loss: float = 0.0
    """Relative change of the loss; the gradient's norm changes along."""
    norm: float = 0.0
    """Relative change of the gradient's norm alone."""
    turn: float = 0.0
    """Length of what is added at a right angle to the gradient, relative to it."""

    def plant(self, loss: torch.Tensor, model: Any) -> torch.Tensor:
        """Returns a loss with this change, whose gradient is changed as well."""
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        length = torch.cat([part.flatten() for part in gradients]).norm()

        draw = torch.Generator().manual_seed(0)
        noise = [torch.randn(part.shape, generator=draw) for part in gradients]
        turn = self.turn * length / torch.cat([part.flatten() for part in noise]).norm()
        added = [self.norm * part + turn * chance for part, chance in zip(gradients, noise, strict=True)]
        extra = torch.stack([(part * weight).sum() for part, weight in zip(added, weights, strict=True)]).sum()
        return loss * (1 + self.loss) + extra - extra.detach()


class Layers:
    """Layers that are `wrong` while they compute in FP8, from their pass number `since` on."""

    def __init__(self, wrong: Wrong, since: int = 0, share: float = 1) -> None:
        self.wrong, self.since, self.share = wrong, since, share
        self.fp8, self.modes, self.kept = False, list[bool](), list[int]()

    def use_fp8(self) -> float:
        self.fp8 = self.share > 0
        return self.share

    def use_compute_dtype(self) -> None:
        self.fp8 = False

    def keep_weights(self, count: int) -> None:
        self.kept.append(count)

    def set_policies(self, policies: Any) -> None:
        pass

    def move_vocabulary(self) -> None:
        pass

    def drop_graphs(self) -> bool:
        return False

    def loss(self, model: Any, *arguments: Any) -> torch.Tensor:
        self.modes.append(self.fp8)
        found = supervised_loss(model, *arguments)
        return self.wrong.plant(found, model) if self.fp8 and len(self.modes) > self.since else found


def plan_for(model: Any, mode: MemoryMode, most: int = 8 * GIB) -> MemoryPlan:
    return plan_memory(model_shape(model), 256, base_bytes=GIB, total_bytes=min(8 * GIB, most), mode=mode)


@pytest.fixture
def run(
    run_config: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Layers], tuple[Resolved, float | None]]:
    """A run of two steps: what it resolved, and its last loss."""

    def start(layers: Layers, mode: MemoryMode = MemoryMode.FASTEST, runs_out_at: int | None = None) -> Any:
        def loss(*arguments: Any) -> torch.Tensor:
            found = layers.loss(*arguments)
            if len(layers.modes) == runs_out_at:
                raise torch.OutOfMemoryError("no memory")
            return found

        def prepare(model: Any, *_: Any) -> Engine:
            return Engine(
                False, loss, MicroBatch(2, 1), plan_for(model, mode), cast(FusedLayers, layers),
                lambda smaller, most: plan_for(model, smaller, most), next_fp8_look=0,
            )  # fmt: skip

        monkeypatch.setattr(pipeline, "prepare_engine", prepare)
        progress, folder = ProgressTracker(), tmp_path / str(id(layers))
        config = run_config(training={"maxSteps": 2, "batchSize": 2, "gradientAccumulation": 1})
        outcome = run_job(config, Settings(folder / "work", "a", output_folder=folder / "out"), progress, StopSignal())
        assert outcome.result is Result.SUCCEEDED, outcome.message
        return progress.resolved, progress.value("loss")

    return start


def test_a_loss_that_stays_keeps_fp8(run: Any) -> None:
    layers = Layers(Wrong(loss=0.009))
    resolved, _ = run(layers)
    assert resolved.precision == "FP8"
    assert "loss of the first batch by 0.90%" in resolved.precision_reason
    assert layers.modes == [False, True, True, True], "tried in both, then two steps"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Wrong(loss=0.011), "first batch by 1.10%"),
        (Wrong(loss=float("nan")), "first batch by nan%"),
        (Wrong(norm=0.035), "norm by 3."),  # rounded to bfloat16: 0.03 gave 2.9 and 3.0 on two machines
        (Wrong(turn=0.15), "cosine is 0.98"),
    ],
)
def test_a_batch_that_changes_returns_to_bf16(run: Any, wrong: Wrong, said: str) -> None:
    layers = Layers(wrong)
    resolved, loss = run(layers)
    assert resolved.precision == "BF16"
    assert said in resolved.precision_reason
    assert layers.modes == [False, True, False, False]
    assert loss == run(Layers(Wrong()))[1], "the look left a trace"


def test_a_change_that_comes_later_ends_fp8_with_a_warning(
    run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fp8_gate, "EARLY_LOOK", 1)
    stays, changes = Layers(Wrong()), Layers(Wrong(turn=0.15), since=3)
    resolved, _ = run(stays)
    assert (resolved.precision, stays.modes) == ("FP8", [False, True, True, False, True, True])
    assert "a batch after step 1" in resolved.precision_reason, "the newest look is what the status shows"
    assert not [record for record in caplog.records if "multiplied in BF16" in record.message]

    resolved, _ = run(changes)
    assert (resolved.precision, changes.modes) == ("BF16", [False, True, True, False, True, False])
    assert resolved.precision_reason.startswith(
        "FP8 until step 1: FP8 changes the loss of a batch after step 1 by 0.00%"
    )
    assert [record.levelname for record in caplog.records if "multiplied in BF16" in record.message] == ["WARNING"]


def a_batch(loss: float, gradient: list[float]) -> Measured:
    return Measured(loss, torch.tensor(gradient, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("loss", "gradient", "accepted"),
    [
        (2.0, [3.0, 4.0], True),
        (2.019, [3.0, 4.0], True),
        (2.021, [3.0, 4.0], False),
        (2.0, [3.0625, 4.0625], True),  # 1.8 % longer
        (2.0, [3.09375, 4.125], False),  # 3.1 % longer
        (2.0, [3.5, 3.5625], True),  # cosine 0.9923
        (2.0, [3.5625, 3.5], False),  # cosine 0.9893
        (2.0, [0.0, 0.0], False),
        (2.0, [3.0, float("nan")], False),
        (2.0, [-3.0, -4.0], False),
    ],
)
def test_loss_direction_and_length_each_decide(loss: float, gradient: list[float], accepted: bool) -> None:
    decision = decide(220, a_batch(2.0, [3.0, 4.0]), a_batch(loss, gradient))
    assert decision.is_fp8 is accepted
    assert len(f"FP8 until step {10**9}: {decision.reason}") <= 256, "the status takes no more"


def test_a_look_draws_nothing_and_leaves_nothing() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    model[0].requires_grad_(False)
    x, state = torch.randn(4, 8), torch.get_rng_state()
    one, other = (measure(model, lambda: model(x).square().sum()) for _ in range(2))
    assert torch.equal(one.gradient, other.gradient)
    assert one.gradient.shape == (9,), "of what trains"
    assert float(one.gradient.norm()) > 0
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_looks_are_early_and_then_far_apart() -> None:
    looks, step = [0], 0
    while step < 600:
        step = next_look(step)
        looks.append(step)
    assert looks == [0, 20, 200, 400, 600]
    assert next_look(130) == 200, "a run that goes on from a checkpoint"


class OneRefuses:
    """A world of two, whose other rank refuses FP8 in its look number `refusal`."""

    def __init__(self, refusal: int) -> None:
        self.refusal, self.looks = refusal, 0

    def gather_numbers(self, own: float) -> list[list[float]]:
        """Returns this rank's number and the other's."""
        self.looks += 1
        return [[own], [float(self.looks != self.refusal)]]


@pytest.mark.parametrize("refusal", [1, 2])
def test_what_one_rank_refuses_none_uses(refusal: int) -> None:
    shape = ModelShape(16, 2048, 32, 8, 64, 8192, 128256, 973_078_528, 11_272_192, quantized=True)
    plan = plan_memory(shape, 256, base_bytes=GIB, total_bytes=80 * GIB, mode=MemoryMode.FASTEST)
    layers = Layers(Wrong())
    engine = Engine(False, layers.loss, MicroBatch(1, 1), plan, cast(FusedLayers, layers), next_fp8_look=0)
    engine.world = cast(World, OneRefuses(refusal))
    for step in (0, 20)[:refusal]:
        assert engine.is_fp8_look_due(step)
        engine.look_at_fp8(step, lambda: a_batch(2.0, [3.0, 4.0]))

    assert engine.fp8_decision is not None
    assert engine.fp8_decision.precision is Precision.BF16
    assert engine.fp8_decision.reason == (OTHERS_REFUSE if refusal == 1 else f"FP8 until step 20: {OTHERS_REFUSE}")
    assert not layers.fp8
    assert not engine.is_fp8_look_due(10**6), "and none asks again"


@pytest.mark.parametrize("mode", [MemoryMode.BALANCED, MemoryMode.SMALLEST])
def test_weights_need_not_be_kept(run: Any, mode: MemoryMode) -> None:
    layers = Layers(Wrong())
    resolved, _ = run(layers, mode)
    assert resolved.precision == "FP8"
    assert layers.modes == [False, True, True, True]


def test_weights_that_fp8_does_not_take_are_told(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    resolved, _ = run(Layers(Wrong(), share=0.75))
    assert resolved.precision == "FP8"
    assert "25% of the layers' weights stay in 16 bits" in caplog.text
    layers = Layers(Wrong(), share=0)
    resolved, _ = run(layers)
    assert (resolved.precision, resolved.precision_reason) == ("BF16", NO_WEIGHTS)
    assert layers.modes == [False, False, False]


@pytest.mark.parametrize(
    ("pass_number", "modes"),
    [
        (1, [False, False, True, True, True]),  # of the first look
        (2, [False, True, True, True, True]),
        (3, [False, True, True, True, True]),  # of the first step
    ],
)
def test_memory_that_runs_out_leaves_fp8_to_the_look(run: Any, pass_number: int, modes: list[bool]) -> None:
    layers = Layers(Wrong())
    resolved, _ = run(layers, MemoryMode.FASTEST, pass_number)
    assert resolved.precision == "FP8"
    assert layers.kept == [0], "a smaller plan took over"
    assert layers.modes == modes


def test_devices_without_the_type_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(device: str) -> str:
        with pytest.raises(TrainerError) as caught:
            resolve_precision(Precision.FP8, torch.device(device))
        assert caught.value.reason is FailureReason.INVALID_CONFIGURATION
        return str(caught.value)

    assert "FP8 trains on GPUs only" in refused("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert "this GPU has no FP8" in refused("cuda")
    for capability in ((8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, known=capability: known)
        assert resolve_precision(Precision.FP8, torch.device("cuda")) is Precision.BF16
