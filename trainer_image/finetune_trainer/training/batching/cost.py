"""Cost of padded and single documents for the rows of a run, told where packed documents would see each other."""

import logging
from typing import Any

from datasets import Dataset

from finetune_api.vocabulary import Batching
from finetune_kernels.planning.micro_batch import MicroBatch
from finetune_trainer.data.length_grouping import group_by_length, padding_share
from finetune_trainer.training.batching.isolation import BatchingChoice
from finetune_trainer.training.batching.length_grouping import row_lengths

log = logging.getLogger(__name__)


def describe_batching(choice: BatchingChoice, batch: MicroBatch, rows: Dataset, seed: int) -> dict[str, Any]:
    """Returns what a run resolves about its batching, and logs what it costs; `rows` are encoded, not packed."""
    if choice.kind is Batching.PACKED:
        return {"batching": choice.kind}

    lengths = row_lengths(rows)
    order = group_by_length(lengths, batch.sequences, seed)
    share = padding_share([lengths[number] for number in order], batch.size)
    cost = {
        Batching.PADDED: f"rows are padded, sorted by length: {share:.1%} of the tokens computed are padding",
        Batching.SINGLE: "rows are computed one by one",
    }[choice.kind]

    tokens = round(sum(lengths) / len(lengths) * batch.sequences)
    log.warning("%s; %s. A step has %d rows, about %d tokens", choice.reason, cost, batch.sequences, tokens)
    return {
        "batching": choice.kind,
        "batching_reason": f"{str(choice.reason)[: 250 - len(cost)]}; {cost}",
        "padding_share": round(share, 4),
    }
