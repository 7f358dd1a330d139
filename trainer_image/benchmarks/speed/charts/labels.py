"""Names of systems and rows as people read them, and the runs that are shown. Pure."""

from collections.abc import Sequence

from speed.results import COMPLETE, Result, Summary, newest
from speed.rows import LONGEST, ROWS

LABELS = {
    "ours": "this project",
    "ours-no-graphs": "this project, no CUDA graphs",
    "ours-fp8": "this project, FP8",
    "ours-balanced": "this project, Balanced",
    "ours-smallest": "this project, Smallest",
    "ours-smallest-fp8": "this project, Smallest in FP8",
    "unsloth-max": "Unsloth, KEEP_LAYERS=max",
    "unsloth": "Unsloth, default",
    "liger": "HF + TRL + Liger",
    "hf-no-checkpointing": "HF + TRL, no recomputing",
    "hf": "HF + TRL",
}
"""Label of each system, in the order of tables and charts."""
MODELS = {
    "llama-8b": "Llama 8B",
    "llama-1b": "Llama 1B",
    "llama-70b": "Llama 70B",
    "qwen3-8b": "Qwen3 8B",
    "ministral3-8b": "Ministral 3 8B",
    "granite3-8b": "Granite 3 8B",
    "gemma4": "Gemma 4 text, 30 layers",
    "qwen3.5-9b": "Qwen3.5 9B",
    "qwen3-30b-a3b": "Qwen3 30B-A3B",
    "gpt-oss-20b": "gpt-oss 20B",
    "gemma4-26b-a4b": "Gemma 4 26B-A4B",
    "qwen3-a3b-8-layers": "8 layers of Qwen3 30B-A3B",
    "gpt-oss-6-layers": "6 layers of gpt-oss 20B",
}

USUAL_MEAN = 500
"""Mean length of the documents of conversations."""


def title(row: str) -> str:
    """Model, length and batch of a row."""
    shape = ROWS[row]
    kind = "long documents" if shape.mean > USUAL_MEAN else "mixed lengths"
    length = f"{kind} packed to {shape.length:,}" if shape.mean else f"{shape.length:,} tokens"
    return f"{MODELS[shape.model]}, {length}, batch {shape.batch} x {shape.accumulation}"


def in_order(summaries: Sequence[Summary]) -> list[Summary]:
    """Summaries in the order of `LABELS`: this project first, then the peers."""
    return sorted(summaries, key=lambda one: list(LABELS).index(one.system))


def shown_runs(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Newest run of each row that holds this project and Unsloth at its fastest, without systems of earlier times."""
    found = newest([one for one in results if one.system in LABELS], COMPLETE)
    return {row: of_run for row, of_run in found.items() if row not in LONGEST}
