"""Compares the losses of a QLoRA run, step by step: our engine and plain transformers, peft and bitsandbytes, with the
same weights, adapter, batches and seed.

    python -P -m speed.loss_curve --csv curve.csv

The model is random, the data is not: tokens follow a skewed bigram law, so the loss falls while both sides train. Rows
are packed from several documents.
tests/kernels/layers/test_gpu_loss_curve.py runs the same comparison.
"""

import argparse
import csv
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from finetune_api.run_config import RunConfig
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.training_configuration import configure_training
from finetune_trainer.training.callback import RunCallback
from finetune_trainer.training.checkpointed_state import CheckpointedState
from finetune_trainer.training.engine import Engine, prepare_engine
from finetune_trainer.training.qlora_trainer import QloraTrainer

SEED = 3407
SPECIAL = 3
"""Number of special tokens: 0, 1 and 2 are beginning, end and padding."""
Prepare = Callable[[Any, Any, RunConfig], Engine]


@dataclass(frozen=True)
class Size:
    """Sizes of model, rows and run."""

    hidden: int = 1024
    feed_forward: int = 2816
    layers: int = 4
    heads: int = 8
    vocabulary: int = 4096
    length: int = 1024
    batch: int = 2
    accumulation: int = 2
    steps: int = 200
    gpus: int = 1
    start: float = 0.02
    """Standard deviation of the adapters' B at the start. At 0, bfloat16 itself makes some steps differ: a LoRA delta
    of 1e-4 is lost if it is added to outputs of 1 that are rounded first (docs/lab-notes.md)."""


@dataclass(frozen=True)
class Variant:
    """One side of a comparison."""

    kernels: bool
    """True for our engine, False for plain PyTorch."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Additions to the job's training section."""
    adapter: Mapping[str, Any] = field(default_factory=dict)
    """Additions to the job's adapter section."""
    scale: float = 1.0
    """Factor on every adapter's scaling; any other value is wrong, to see that the comparison notices."""
    prepare: Prepare = prepare_engine


@dataclass(frozen=True)
class Curve:
    """A run's losses and gradient norms, one value for each step."""

    losses: list[float]
    norms: list[float]
    """Gradient norms before clipping."""


def make_model(folder: Path, size: Size) -> Path:
    """Writes a random Llama, and a tokenizer whose words are token numbers."""
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.feed_forward, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=max(1, size.heads // 4), vocab_size=size.vocabulary,
        max_position_embeddings=max(64, size.length), bos_token_id=0, eos_token_id=1, pad_token_id=2,
        initializer_range=size.hidden**-0.5,
    )  # fmt: skip

    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.to(torch.bfloat16).save_pretrained(folder)

    words = Tokenizer(models.WordLevel({str(token): token for token in range(size.vocabulary)}, unk_token="2"))  # noqa: S106
    names = {"bos_token": "0", "eos_token": "1", "pad_token": "2", "unk_token": "2"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)  # type: ignore[no-untyped-call]
    return folder


def make_rows(size: Size) -> Dataset:
    """Documents of an eighth to half a row. Each token is followed by one of four successors; rare tokens are rare."""
    draw = torch.Generator().manual_seed(SEED)
    known = min(size.vocabulary - SPECIAL, 512)
    ranks = torch.arange(1, known + 1, dtype=torch.float64)
    successors = torch.multinomial(1 / ranks, 4 * known, replacement=True, generator=draw).view(known, 4)
    table = (successors + SPECIAL).tolist()

    wanted = size.length * size.batch * size.accumulation * size.steps
    rows, made = [], 0
    while made < wanted + size.length:
        length = int(torch.randint(size.length // 8, size.length // 2, (1,), generator=draw))
        choices = torch.multinomial(torch.tensor([0.6, 0.2, 0.15, 0.05]), length, replacement=True, generator=draw)

        tokens = [SPECIAL + int(torch.randint(known, (1,), generator=draw))]
        for choice in choices[1:].tolist():
            tokens.append(table[tokens[-1] - SPECIAL][choice])

        rows.append({"input_ids": tokens, "labels": [-100, *tokens[1:]]})
        made += length
    return Dataset.from_list(rows)


def configuration(folder: Path, size: Size, variant: Variant) -> RunConfig:
    """Configuration of a job that trains the model in `folder` as `variant` says."""
    return RunConfig.model_validate(
        {
            "job": {"namespace": "curve", "name": "curve", "uid": "curve"},
            "model": {"source": f"file://{folder}", "maxSequenceLength": size.length},
            "dataset": {"source": "file:///none.jsonl", "packing": True},
            "adapter": {"rank": 16, "alpha": 16, **variant.adapter},
            "training": {
                "maxSteps": size.steps, "batchSize": size.batch, "gradientAccumulation": size.accumulation,
                "checkpointSteps": 1_000_000, "seed": SEED, "loggingSteps": 1,
                "precision": "BF16" if size.gpus else "FP32", **variant.training,
            },
            "export": {"merged": "None", "gguf": []}, "output": {"s3": {"bucket": "models"}},
            "outputPrefix": "bench", "checkpointsToKeep": 1,
            "terminationGracePeriodSeconds": 60, "gpus": size.gpus, "kernels": variant.kernels,
        }
    )  # fmt: skip


def train(folder: Path, rows: Dataset, size: Size, variant: Variant) -> Curve:
    """Trains the model in `folder` on `rows`; returns its curve."""
    config = configuration(folder, size, variant)
    loaded = load_model(folder, config.model, config.training.precision, gpus=size.gpus)
    model = inject_adapter(loaded.model, config.adapter, SEED).model
    _fill_adapters(model, size.start, variant.scale)
    engine = variant.prepare(model, loaded, config)

    with tempfile.TemporaryDirectory() as output:
        arguments = configure_training(config, loaded, Path(output), engine, evaluates=False)
        arguments.save_strategy = "no"
        callback = RunCallback(ProgressTracker(), None, StopSignal(), CheckpointedState(), engine)
        trainer = QloraTrainer(
            model=model, engine=engine, args=arguments, train_dataset=rows, processing_class=loaded.tokenizer,
            callback=callback,
        )  # fmt: skip
        trainer.train()

    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Curve([entry["loss"] for entry in logged], [float(entry["grad_norm"]) for entry in logged])


def _fill_adapters(model: Any, start: float, scale: float) -> None:
    """Gives adapters random B, as if they had learned something, and multiplies their scaling by `scale`."""
    draw = torch.Generator().manual_seed(SEED)
    for module in model.modules():
        if hasattr(module, "scaling") and hasattr(module, "lora_A"):
            module.scaling = {name: factor * scale for name, factor in module.scaling.items()}
            for b in module.lora_B.values():
                b.weight.data.copy_(start * torch.randn(b.weight.shape, generator=draw))


def differences(ours: Curve, plain: Curve) -> list[float]:
    """Differences of the losses, relative to the plain ones."""
    return [abs(one - other) / other for one, other in zip(ours.losses, plain.losses, strict=True)]


def write(path: Path, ours: Curve, plain: Curve) -> None:
    """Writes both curves as CSV, one step a line."""
    columns = (plain.losses, ours.losses, differences(ours, plain), plain.norms, ours.norms)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "plain_loss", "our_loss", "relative_difference", "plain_norm", "our_norm"])
        for step, values in enumerate(zip(*columns, strict=True), start=1):
            writer.writerow([step, *(f"{value:.7g}" for value in values)])


def main() -> None:
    """Compares, writes the curves, and fails if they differ by more than the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Size.steps)
    parser.add_argument("--csv", type=Path, default=Path("loss_curve.csv"), help="where both curves go")
    parser.add_argument("--bound", type=float, default=1e-3, help="largest relative difference at any step")
    options = parser.parse_args()

    size = Size(steps=options.steps)
    with tempfile.TemporaryDirectory() as folder:
        model, rows = make_model(Path(folder), size), make_rows(size)
        ours, plain = (train(model, rows, size, Variant(kernels)) for kernels in (True, False))
    write(options.csv, ours, plain)

    worst = max(differences(ours, plain))
    sys.stdout.write(f"loss {plain.losses[0]:.4f} -> {plain.losses[-1]:.4f}, largest difference {worst:.2e}\n")
    if worst > options.bound or not min(ours.norms + plain.norms) > 0:
        sys.exit(f"the curves differ by more than {options.bound:g}, or nothing was learned")


if __name__ == "__main__":
    main()
