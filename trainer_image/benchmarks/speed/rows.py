"""Rows and systems of the benchmark. Pure.

A row is a shape of model and batch; models have random weights and are prepared once for all systems. A system is one
way to train: this project in its modes, and the peers. On several GPUs the peers alone: several_gpus.py and
whole_runs.py have this project.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM_UP, STEPS, SEED = 3, 6, 3407
"""Steps before the timed ones (compilation, autotuning, allocator), timed steps, and the seed."""
LONGEST = "8b-longest-24g"
MAX_POSITIONS = 131_072
"""Number of positions of the models, and the limit of the search for the longest sequence."""
UNSLOTH_24G_TOKENS = 78_475
"""Unsloth's published longest sequence for Llama 8B on a 24 GB card."""
SYSTEMS = (
    "ours", "ours-fp8", "ours-balanced", "ours-smallest", "hf", "hf-no-checkpointing", "liger", "unsloth",
    "unsloth-max",
)  # fmt: skip
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Row:
    """A shape of model and batch."""

    model: str
    length: int
    batch: int
    accumulation: int
    card_gib: float | None = None
    """Memory of the emulated card; the row's `length` is then where the search for the longest begins."""
    gpus: int = 1
    """GPUs of one machine; each has a model of its own, and `batch` x `accumulation` rows of a step."""

    @property
    def tokens(self) -> int:
        """Tokens per optimiser step."""
        return self.length * self.batch * self.accumulation * self.gpus

    @property
    def systems(self) -> tuple[str, ...]:
        """Systems that can be measured on this row."""
        if self.gpus > 1:
            return tuple(system for system in SYSTEMS if not system.startswith("ours"))
        return SYSTEMS if self.card_gib is None else ("ours-smallest",)


ROWS = {
    "8b-2048-bs2-ga4": Row("llama-8b", 2048, 2, 4),
    "8b-8192-bs1-ga2": Row("llama-8b", 8192, 1, 2),
    "1b-2048-bs4-ga2": Row("llama-1b", 2048, 4, 2),
    "qwen3-8b-2048-bs2-ga4": Row("qwen3-8b", 2048, 2, 4),
    LONGEST: Row("llama-8b", 8192, 1, 1, card_gib=24.0),
    "8b-2048-bs2-ga4-gpus2": Row("llama-8b", 2048, 2, 4, gpus=2),
}
ON_ONE_GPU = tuple(name for name, row in ROWS.items() if row.gpus == 1)
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 64, "tie_word_embeddings": True},
    "qwen3-8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 151936, "head_dim": 128},
}  # fmt: skip


def working_folder() -> Path:
    """Returns the folder of models and logs.

    It is $FINETUNE_BENCH_FOLDER if set; else /dev/shm if 40 GiB are free there; else below the temporary folder.
    """
    chosen = os.environ.get("FINETUNE_BENCH_FOLDER")
    if chosen:
        return Path(chosen)

    memory = Path("/dev/shm")  # noqa: S108  # 6 GB are written and read there in seconds
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 40 * 2**30
    return (memory if roomy else Path(tempfile.gettempdir())) / "finetune-bench"


def model_folder(model: str) -> Path:
    """Returns the folder of a model."""
    return working_folder() / model
