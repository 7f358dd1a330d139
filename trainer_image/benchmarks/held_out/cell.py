"""One run of the comparison: trained, merged into the original 16-bit weights, loaded anew and evaluated."""

import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from held_out.job import Rows, finished, job
from open_gate import open_fp8_gate

VARIANTS = {"bf16": "BF16", "fp8": "FP8", "fp32": "FP32"}
"""Name -> the job's precision. fp32 is for a CPU, which computes neither bfloat16 nor FP8 as a GPU does."""
ROWS_AT_ONCE = 8
EVALUATION_ROWS = Path("encoded") / "evaluation.arrow"


@dataclass(frozen=True)
class Base:
    """A base model in 16 bits, as a Hugging Face folder."""

    name: str
    folder: Path
    template: str


@dataclass(frozen=True)
class Cell:
    """One run: which model, how long, in which precision and with which seed."""

    base: Base
    rows: Rows
    variant: str
    seed: int
    steps: int
    learning_rate: float


def measure(cell: Cell) -> dict[str, Any]:
    """Returns a row of the table. FP8 is taken whatever the gate would say: what it would refuse is measured, too.

    Raises RuntimeError if the job fails or computes in another precision.
    """
    if cell.variant == "fp8":
        open_fp8_gate()
    training = {
        "maxSteps": cell.steps,
        "learningRate": cell.learning_rate,
        "loggingSteps": 50,
        "checkpointSteps": cell.steps,
        "precision": VARIANTS[cell.variant],
        "seed": cell.seed,
    }
    config = job(cell.base.folder, cell.base.template, cell.rows, training, merged="BF16")

    begun = time.monotonic()
    with finished(config) as run:
        seconds, chosen = time.monotonic() - begun, run.resolved
        if chosen.precision != VARIANTS[cell.variant]:
            raise RuntimeError(f"{cell.variant} was computed in {chosen.precision}: {chosen.precision_reason}")
        rows = Dataset.from_file(str(run.work / EVALUATION_ROWS))
        _forget()
        exported, base = (supervised_loss(folder, rows) for folder in (run.results / "merged", cell.base.folder))
        return {
            "model": cell.base.name,
            "variant": cell.variant,
            "seed": cell.seed,
            "steps": cell.steps,
            "learning_rate": cell.learning_rate,
            "base_loss": round(base, 6),
            "training_loss": round(run.held_out_loss, 6),
            "exported_loss": round(exported, 6),
            "precision": chosen.precision,
            "precision_reason": chosen.precision_reason,
            "seconds": round(seconds, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
            "torch": torch.__version__,
        }


def _forget() -> None:
    """Lets go of the trained model, which callbacks and trainer hold in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def supervised_loss(folder: Path, rows: Dataset) -> float:
    """Loss of the model in `folder` in nats a supervised token, by transformers in bfloat16 (fp32 on a CPU).

    `rows` have input_ids and labels, which are those of the job's own evaluation.
    """
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device).eval()

    total, count = 0.0, 0
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
    for first in range(0, len(by_length), ROWS_AT_ONCE):
        batch = by_length[first : first + ROWS_AT_ONCE]
        tokens, mask, labels = (value.to(device) for value in _padded(batch))
        logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]  # [B, T - 1, V]

        wanted = labels[:, 1:]
        found = logits[wanted != -100].float()  # [S, V]
        total += torch.nn.functional.cross_entropy(found, wanted[wanted != -100], reduction="sum").item()
        count += len(found)
    return total / count


def _padded(batch: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels, each [B, T], padded on the right."""
    width = max(len(row["input_ids"]) for row in batch)

    def fill(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[filler] * (width - len(row[name]))] for row in batch])

    labels = fill("labels", -100)
    mask = torch.tensor([[place < len(row["input_ids"]) for place in range(width)] for row in batch])
    return fill("input_ids", 0), mask.long(), labels
