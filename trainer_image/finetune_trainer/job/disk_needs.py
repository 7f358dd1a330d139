"""Disk that a whole job needs, item by item, against what there is: known before training instead of hours later. Pure.

Sizes follow from numbers of parameters and tokens. Files beside weights are left out: they are small.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import GgufType, MergedType
from finetune_trainer.storage.sizes import format_size

BITS = {
    GgufType.F32: 32, GgufType.F16: 16, GgufType.BF16: 16, GgufType.Q8_0: 8.5, GgufType.Q6_K: 6.6,
    GgufType.Q5_K_M: 5.7, GgufType.Q5_K_S: 5.5, GgufType.Q5_1: 6.0, GgufType.Q5_0: 5.5,
    GgufType.Q4_K_M: 4.9, GgufType.Q4_K_S: 4.6, GgufType.Q4_1: 5.0, GgufType.Q4_0: 4.5,
    GgufType.IQ4_NL: 4.6, GgufType.IQ4_XS: 4.4, GgufType.MXFP4_MOE: 4.7,
    GgufType.Q3_K_L: 4.3, GgufType.Q3_K_M: 3.9, GgufType.Q3_K_S: 3.5, GgufType.Q2_K: 3.0,
}  # fmt: skip
"""Bits of a weight on disk, on average over a model."""
MERGED_BYTES = 2
ADAPTER_BYTES = 4  # fp32
CHECKPOINT_BYTES = 4 + 8 + 4
"""Bytes of a checkpoint for each trained parameter: adapter, moments (8-bit ones are smaller) and best adapter."""
CHECKPOINTS_ON_DISK = 2  # the newest, and the one that is being written
TOKEN_BYTES = 8  # an id and a label


@dataclass(frozen=True)
class DiskNeed:
    """One thing that lies on the disk until the job ends."""

    name: str
    bytes: int


@dataclass(frozen=True)
class JobSize:
    """Numbers that the sizes of a job's files follow from."""

    parameters: int
    """Of the base model."""
    trained: int
    """Parameters of the adapter."""
    base_bytes: int = 0
    """Weight files that are still to be downloaded; none if they are used in place, or are there."""
    tokens: int = 0
    """Tokens of the rows that are still to be encoded."""
    copied_bytes: int = 0
    """Tensors beside the language model, which merged weights take over unchanged."""


def plan_disk(config: RunConfig, size: JobSize) -> tuple[DiskNeed, ...]:
    """Returns what the job will write; items of no bytes are left out."""
    merged = config.export.merged is not MergedType.NONE
    needs = [
        DiskNeed("base model", size.base_bytes),
        DiskNeed("encoded rows", TOKEN_BYTES * size.tokens),
        DiskNeed("checkpoints", CHECKPOINTS_ON_DISK * CHECKPOINT_BYTES * size.trained),
        DiskNeed("adapter", ADAPTER_BYTES * size.trained),
        DiskNeed(f"merged {config.export.merged}", MERGED_BYTES * size.parameters + size.copied_bytes if merged else 0),
    ]
    needs += [DiskNeed(f"GGUF {kind}", int(size.parameters * BITS[kind] / 8)) for kind in config.export.gguf]
    return tuple(need for need in needs if need.bytes)


def describe_lack(needs: Iterable[DiskNeed], have: int) -> str | None:
    """Returns a sentence if `have` bytes are too few for the needs, the largest first; None if they suffice."""
    listed = tuple(needs)
    if sum(need.bytes for need in listed) <= have:
        return None
    return f"the job needs {describe_needs(listed)}, but has {format_size(have)}"


def describe_needs(needs: Iterable[DiskNeed]) -> str:
    """Returns the sum of the needs and each of them, the largest first, for people."""
    ordered = sorted(needs, key=lambda need: -need.bytes)
    items = ", ".join(f"{need.name} {format_size(need.bytes)}" for need in ordered)
    return f"{format_size(sum(need.bytes for need in ordered))} of disk ({items})"
