"""Mixtures whose layers stream from host memory with their experts: to the bit what resident ones compute, from loading
to the merged model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import RunConfig
from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import Precision
from finetune_kernels.experts.replacing import stacked_experts
from finetune_kernels.planning.streamed_weights import streamed_bytes, window_bytes
from finetune_kernels.streaming.host_tensors import HostTensors
from finetune_test_models.minimal_run import minimal_run
from finetune_test_models.stopped_runs import stopped_after
from finetune_test_models.tiny_architectures import make_mixture
from finetune_trainer import pipeline
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.settings import Settings
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.streamed_loading import InHostMemory
from finetune_trainer.training.loaded_model import LoadedModel
from finetune_trainer.training.memory.loaded_shape import loaded_shape

Builder = Callable[..., RunConfig]
KINDS = ("qwen3_moe", "gpt_oss", "glm4_moe", "gemma4_text")
"""A matrix for each expert in the files; stacks with biases; a first layer with an MLP, and a shared expert;
experts beside an MLP in layers of two sizes."""
IDS = torch.arange(3, 40).unsqueeze(0)


@pytest.fixture(scope="module", params=KINDS)
def mixture(request: pytest.FixtureRequest, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("mixture"), request.param, texts)


def load(folder: Path, layers: int) -> tuple[LoadedModel, Any]:
    """The base with so many layers in host memory, and a peft model over it with random adapters."""
    spec = ModelSpec.model_validate({"source": f"file://{folder}", "maxSequenceLength": 128})
    placement = InHostMemory(layers) if layers else None
    loaded = load_model(folder, spec, Precision.FP32, gpus=0, placement=placement)
    model = inject_adapter(loaded.model, minimal_run(None).adapter, 0).model
    draw = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=draw)
    return loaded, model


def one_pass(model: Any) -> list[torch.Tensor]:
    """Logits, and the adapters' gradients."""
    logits = model(input_ids=IDS).logits
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
    return [logits.detach(), *torch.autograd.grad((logits * weights).sum(), trained)]


def are_equal(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def depth(loaded: LoadedModel) -> int:
    return int(loaded.model.config.num_hidden_layers)


def test_a_loaded_mixture_computes_the_same_bits_whichever_layers_stream(mixture: Path) -> None:
    resident, plain = load(mixture, 0)
    expected, count = one_pass(plain), depth(resident)
    assert any(gradient.abs().max() > 0 for gradient in expected[1:])
    for layers in (count - 1, count):
        _, moving = load(mixture, layers)
        stacks = [weight for _, part in stacked_experts(moving) for weight in (part.gate_up, part.down)]
        there = sum(weight.stack().codes.untyped_storage().nbytes() > 0 for weight in stacks)
        assert there == 2 * (count - layers), "the others were loaded into host memory"
        for _ in range(2):
            assert are_equal(one_pass(moving), expected)
            with torch.no_grad():
                assert torch.equal(moving(input_ids=IDS).logits, expected[0])


def test_the_plan_counts_the_bytes_that_stream(mixture: Path) -> None:
    resident, _ = load(mixture, 0)
    count = depth(resident)
    streamed, model = load(mixture, count)
    shape = loaded_shape(model, streamed, double_quantized=True)
    host = streamed.streamed

    # Tiny layers have many small tensors, each of which begins at a multiple of 256 bytes.
    slack = 256 * max(len(layer._tensors) for layer in host._layers)
    assert len(shape.streamable_bytes) == count
    assert streamed_bytes(shape, count) == pytest.approx(host.host_bytes, rel=0.1, abs=slack * count)
    for layers in range(1, count):
        first = sum(layer.kept_bytes for layer in host._layers[:layers])
        assert streamed_bytes(shape, layers) == pytest.approx(first, rel=0.1, abs=slack * layers), "of the first layers"
    assert window_bytes(shape) == pytest.approx(host.slot_bytes, rel=0.1, abs=2 * slack)
    assert streamed.base_bytes == pytest.approx(resident.base_bytes, abs=slack * count)


def test_layers_stream_from_the_middle_of_a_run_on(mixture: Path) -> None:
    """As when memory runs out: layers that were loaded whole leave the device with their experts."""
    resident, plain = load(mixture, 0)
    expected = one_pass(plain)
    resident.streamed.stream(depth(resident))
    assert are_equal(one_pass(plain), expected)
    codes = [part.down.stack().codes for _, part in stacked_experts(plain)]
    resident.streamed.close()
    assert not any(each.untyped_storage().nbytes() for each in codes)


def run(config: RunConfig, folder: Path, attempt: str, stop_after: int | None = None) -> Outcome:
    progress, stop_signal = stopped_after(stop_after)
    settings = Settings(work=folder / attempt, attempt_id=attempt, output_folder=folder / "out")
    return run_job(config, settings, progress, stop_signal)


def test_a_whole_run_of_a_streamed_mixture_gives_the_result_of_a_resident_one(
    run_config: Builder, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_mixture(tmp_path / "base", "gpt_oss", texts)
    config = run_config(
        model={"source": f"file://{base}", "maxSequenceLength": 128},
        training={"maxSteps": 2, "batchSize": 1, "gradientAccumulation": 2, "precision": "FP32", "learningRate": 5e-3},
        export={"merged": "BF16", "gguf": []},
    )
    resident = run(config, tmp_path / "resident", "a")
    assert resident.result is Result.SUCCEEDED, resident.message

    monkeypatch.setattr(pipeline, "placement_of", lambda *_: InHostMemory(2))
    uses: set[int] = set()
    wait = HostTensors.wait
    monkeypatch.setattr(HostTensors, "wait", lambda self: (uses.add(id(self)), wait(self)))
    stopped = run(config, tmp_path / "streamed", "a", stop_after=1)
    assert (stopped.result, stopped.checkpoint_step) == (Result.INTERRUPTED, 1), stopped.message
    assert len(uses) == 2
    streamed = run(config, tmp_path / "streamed", "b")
    assert (streamed.result, streamed.resumed_from_step) == (Result.SUCCEEDED, 1), streamed.message

    for kind in ("Adapter", "Merged"):
        found, expected = (_tensors(outcome, kind) for outcome in (streamed, resident))
        assert found.keys() == expected.keys()
        assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    assert any("experts" in name and "lora_B" in name for name in _tensors(streamed, "Adapter"))
    assert streamed.judgement == resident.judgement


def _tensors(outcome: Outcome, kind: str) -> dict[str, torch.Tensor]:
    folder = next(Path(artifact.uri) for artifact in outcome.artifacts if artifact.type == kind)
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
