"""Rows of a micro-batch laid end to end, with everything that follows from their lengths.

Document boundaries and supervised positions are found here, on the CPU, in a data loader's time: found on the GPU they
would make the launches of a pass wait for the pass before. TRL's collator was rejected: its versions differ in whether
they give the boundaries, and where they are missing, attention takes a batch for one document.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from finetune_trainer.chat.labels import IGNORED


def collate_packed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`rows`: `input_ids` and `labels`, and `seq_lengths` where a row is packed from several documents.

    Returns `input_ids`, `labels` and `position_ids` [1, T], the documents as transformers' attention takes them
    (`cu_seq_lens_q`, `cu_seq_lens_k` [N + 1], `max_length_q`, `max_length_k`, `seq_idx` [1, T]), and `supervised` [S]:
    the positions p whose next token p + 1 has a label. Nothing is predicted across a boundary.
    """
    lengths = np.concatenate([row.get("seq_lengths", [len(row["input_ids"])]) for row in rows]).astype(np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    labels = np.concatenate([row["labels"] for row in rows])
    labels[starts] = IGNORED
    boundaries = torch.from_numpy(np.append(0, ends).astype(np.int32))
    documents = np.arange(len(lengths), dtype=np.int32).repeat(lengths)
    longest = int(lengths.max())
    return {
        "input_ids": _row(np.concatenate([row["input_ids"] for row in rows])),
        "labels": _row(labels),
        "position_ids": _row(np.arange(ends[-1]) - starts.repeat(lengths)),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.from_numpy(documents).unsqueeze(0),
        "supervised": torch.from_numpy(np.flatnonzero(labels[1:] != IGNORED)),
    }


def _row(values: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64)).unsqueeze(0)
