"""Collates a micro-batch: rows end to end with document boundaries, or padded with a mask; and supervised positions.

All of it is found here, on the CPU, in the data loader's time: found on the GPU, they would make the launches of a pass
wait for the pass before. TRL's collator was rejected: its versions differ in whether they give the boundaries, and
where these are missing, attention takes a batch for one document.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from finetune_api.vocabulary import Batching
from finetune_trainer.chat.labels import IGNORED


def collate_packed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lays rows of N documents end to end, T tokens in all, of which S are supervised.

    A row has `input_ids` and `labels`, and `seq_lengths` if it is packed from several documents. Returns:

        input_ids, labels, position_ids     [1, T]
        cu_seq_lens_q, cu_seq_lens_k        [N + 1], document boundaries as transformers' attention takes them
        max_length_q, max_length_k          length of the longest document
        seq_idx                             [1, T], each token's document
        supervised                          [S], the positions p whose next token p + 1 has a label

    Nothing is predicted across a boundary.
    """
    lengths = np.concatenate([row.get("seq_lengths", [len(row["input_ids"])]) for row in rows]).astype(np.int64)  # [N]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    longest = int(lengths.max())
    boundaries = torch.from_numpy(np.append(0, ends).astype(np.int32))
    documents = np.arange(len(lengths), dtype=np.int32).repeat(lengths)  # [T]

    # A document's first token follows another document, so nothing is to predict it.
    labels = np.concatenate([row["labels"] for row in rows])  # [T]
    labels[starts] = IGNORED

    return {
        "input_ids": _one_row(np.concatenate([row["input_ids"] for row in rows])),
        "labels": _one_row(labels),
        "position_ids": _one_row(np.arange(ends[-1]) - starts.repeat(lengths)),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.from_numpy(documents).unsqueeze(0),
        "supervised": torch.from_numpy(np.flatnonzero(labels[1:] != IGNORED)),
    }


def collate_padded(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pads B rows of one document each on the right, to the longest, T tokens. Returns:

        input_ids, labels, attention_mask   [B, T]
        supervised                          [S], the positions p of the flattened batch whose next token has a label

    Positions are left to the model, which counts them from the row's beginning.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    size = (len(rows), max(lengths))
    ids, mask = np.zeros(size, np.int64), np.zeros(size, np.int64)
    labels = np.full(size, IGNORED, np.int64)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[index, :length], mask[index, :length] = row["input_ids"], 1
        labels[index, 1:length] = row["labels"][1:]  # nothing predicts a document's first token

    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "attention_mask": torch.from_numpy(mask),
        "supervised": torch.from_numpy(np.flatnonzero(labels.ravel()[1:] != IGNORED)),
    }


Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
COLLATORS: dict[Batching, Collator] = {
    Batching.PACKED: collate_packed,
    Batching.PADDED: collate_padded,
    Batching.SINGLE: collate_padded,  # of one row, there is no padding
}


def collate_and_count(collate: Collator, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collates the rows; `tokens` is their number of tokens, padding left out, counted before the GPU has them."""
    return collate(rows) | {"tokens": sum(len(row["input_ids"]) for row in rows)}


def _one_row(values: np.ndarray[Any, Any]) -> torch.Tensor:
    """[T] as int64 [1, T]."""
    return torch.from_numpy(values.astype(np.int64)).unsqueeze(0)
