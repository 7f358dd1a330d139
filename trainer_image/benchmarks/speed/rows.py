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
LONGEST = {
    "8b-longest-8g": 2_972, "8b-longest-12g": 21_848, "8b-longest-16g": 40_724, "8b-longest-24g": 78_475,
    "70b-longest-48g": 12_106, "70b-longest-80g": 89_389,
}  # fmt: skip
"""Rows that search for the longest sequence on a smaller card, and what Unsloth publishes for Llama 3.1 8B and 3.3 70B
there."""
MAX_POSITIONS = 131_072
"""Number of positions of the models, and the limit of the search for the longest sequence."""
SYSTEMS = (
    "ours", "ours-no-graphs", "ours-fp8", "ours-balanced", "ours-smallest", "ours-smallest-fp8",
    "hf", "hf-no-checkpointing", "liger", "unsloth", "unsloth-max",
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
    """Memory of the emulated card; the row's `length` is then where the search for the longest begins; it goes on
    with three times that, a little less than the plan says would fit, or `planned`."""
    planned: int = MAX_POSITIONS
    """Tokens that the plan of a search is made for, which are the most it tries."""
    mean: int = 0
    """Mean length of documents that are packed into rows of `length`; 0: every row has the full length."""
    gpus: int = 1
    """GPUs of one machine; each has a model of its own, and `batch` x `accumulation` rows of a step."""
    on_device: bool = False
    """True if the weights are drawn in NF4 where they are used, as the 16-bit model is too large to be written."""

    @property
    def tokens(self) -> int:
        """Tokens per optimiser step, if no pack leaves room."""
        return self.length * self.batch * self.accumulation * self.gpus

    @property
    def systems(self) -> tuple[str, ...]:
        """Systems that can be measured on this row."""
        if self.gpus > 1:
            return tuple(system for system in SYSTEMS if not system.startswith("ours"))
        if self.card_gib is not None:
            return ("ours-smallest",)
        if self.on_device:
            return ("ours", "ours-no-graphs", "ours-balanced", "ours-smallest", "ours-smallest-fp8")
        if self.model in IN_16_BITS:
            return ("ours", "ours-no-graphs", "unsloth", "unsloth-max")
        return SYSTEMS


ROWS = {
    "8b-2048-bs2-ga4": Row("llama-8b", 2048, 2, 4),
    "8b-8192-bs1-ga2": Row("llama-8b", 8192, 1, 2),
    "1b-2048-bs4-ga2": Row("llama-1b", 2048, 4, 2),
    "8b-packed-2048": Row("llama-8b", 2048, 2, 4, mean=500),
    "8b-packed-8192": Row("llama-8b", 8192, 1, 2, mean=500),
    "8b-long-packed-8192": Row("llama-8b", 8192, 1, 2, mean=3000),
    "1b-packed-2048": Row("llama-1b", 2048, 4, 2, mean=500),
    "qwen3-8b-2048-bs2-ga4": Row("qwen3-8b", 2048, 2, 4),
    "ministral3-8b-2048-bs2-ga4": Row("ministral3-8b", 2048, 2, 4),
    "granite3-8b-2048-bs2-ga4": Row("granite3-8b", 2048, 2, 4),
    "gemma4-2048-bs2-ga4": Row("gemma4", 2048, 2, 4),
    "qwen3.5-9b-2048-bs2-ga4": Row("qwen3.5-9b", 2048, 2, 4),
    "qwen3.5-9b-packed-2048": Row("qwen3.5-9b", 2048, 2, 4, mean=500),
    "qwen3-30b-a3b-2048-bs1": Row("qwen3-30b-a3b", 2048, 1, 1, on_device=True),
    "qwen3-30b-a3b-packed-2048-bs1-ga4": Row("qwen3-30b-a3b", 2048, 1, 4, mean=500, on_device=True),
    "qwen3-30b-a3b-2048-bs4": Row("qwen3-30b-a3b", 2048, 4, 1, on_device=True),
    "qwen3.5-35b-a3b-2048-bs1": Row("qwen3.5-35b-a3b", 2048, 1, 1, on_device=True),
    "gpt-oss-20b-2048-bs1": Row("gpt-oss-20b", 2048, 1, 1, on_device=True),
    "gemma4-26b-a4b-2048-bs1": Row("gemma4-26b-a4b", 2048, 1, 1, on_device=True),
    "qwen3-a3b-8-layers-2048-bs1": Row("qwen3-a3b-8-layers", 2048, 1, 1),
    "gpt-oss-6-layers-2048-bs1": Row("gpt-oss-6-layers", 2048, 1, 1),
    "8b-longest-8g": Row("llama-8b", 19456, 1, 1, card_gib=8.0),
    "8b-longest-12g": Row("llama-8b", 31744, 1, 1, card_gib=12.0),
    "8b-longest-16g": Row("llama-8b", 40960, 1, 1, card_gib=16.0),
    "8b-longest-24g": Row("llama-8b", 8192, 1, 1, card_gib=24.0),
    "70b-longest-48g": Row("llama-70b", 5120, 1, 1, card_gib=48.0, planned=32_768, on_device=True),
    "70b-longest-80g": Row("llama-70b", 92160, 1, 1, card_gib=80.0, planned=98_304, on_device=True),
    "8b-2048-bs2-ga4-gpus2": Row("llama-8b", 2048, 2, 4, gpus=2),
    "8b-2048-bs2-ga4-gpus4": Row("llama-8b", 2048, 2, 4, gpus=4),
}
ON_ONE_GPU = tuple(name for name, row in ROWS.items() if row.gpus == 1)
IN_16_BITS = ("qwen3-a3b-8-layers", "gpt-oss-6-layers")
"""Models that are written as published, in 16 bits: nobody's NF4 checkpoint of stacked experts is everybody's."""
_GROUPED: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8}
_QWEN3_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_local_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
}  # fmt: skip
_GPT_OSS_20B: dict[str, Any] = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": _GROUPED | {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "vocab_size": 128256, "rope_theta": 500000.0},
    "llama-1b": _GROUPED | {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "vocab_size": 128256, "head_dim": 64, "tie_word_embeddings": True, "rope_theta": 500000.0},
    "qwen3-8b": _GROUPED | {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "vocab_size": 151936, "head_dim": 128, "rope_theta": 500000.0},
    "granite3-8b": _GROUPED | {
        "model_type": "granite", "hidden_size": 4096, "intermediate_size": 12800, "num_hidden_layers": 40,
        "vocab_size": 49155, "tie_word_embeddings": True, "embedding_multiplier": 12.0, "logits_scaling": 16.0,
        "residual_multiplier": 0.22, "attention_multiplier": 0.0078125},
    "llama-70b": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0},
    "tiny": {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "rope_theta": 500000.0},
    # The sizes of these four are those that transformers' configuration has by itself.
    "ministral3-8b": {"model_type": "ministral3", "max_position_embeddings": 262144},
    "gemma4": {"model_type": "gemma4_text"},
    "qwen3.5-9b": {"model_type": "qwen3_5_text"},
    "qwen3.5-35b-a3b": {"model_type": "qwen3_5_moe_text"},
    "qwen3-30b-a3b": _QWEN3_A3B | {"num_hidden_layers": 48},
    "gpt-oss-20b": _GPT_OSS_20B | {"num_hidden_layers": 24},
    "gemma4-26b-a4b": {
        "model_type": "gemma4_text", "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
        "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 128,
        "top_k_experts": 8, "moe_intermediate_size": 704},
    "qwen3-a3b-8-layers": _QWEN3_A3B | {"num_hidden_layers": 8},
    "gpt-oss-6-layers": _GPT_OSS_20B | {"num_hidden_layers": 6},
}  # fmt: skip
"""Fields of each model's configuration."""


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
