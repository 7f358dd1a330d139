"""The output head: the embedding once more, or weights of its own. The weights decide, whatever config.json says.

Merging a full copy of a head (`modules_to_save`) gives folders whose config ties a head that is no longer the
embedding. transformers computes with the stored head then, so training and every exported file must too.
"""

from collections.abc import Sequence

import torch

from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor

TIES = "tie_word_embeddings"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HEAD_IS_MISSING = (
    f"config.json says {TIES}: false, but the weight files have no {HEAD}: get the files again, or write {TIES}: true "
    "if the model shares its embedding"
)
PIECE = 1 << 24
"""Bytes that are compared at a time."""


def is_head_tied(stated: bool | None, tensors: Sequence[StoredTensor]) -> bool:
    """True if the head is the embedding: the config ties it, and no other head is stored.

    `stated` is what the config says; None: nothing. Raises InvalidBaseError if it says that the head is of its own and
    none is stored: transformers would take random numbers.
    """
    named = {tensor.name: tensor for tensor in tensors}
    if HEAD not in named:
        if stated is False and EMBEDDING in named:
            raise InvalidBaseError(HEAD_IS_MISSING)
        return stated is not False
    return bool(stated) and EMBEDDING in named and _hold_the_same(named[HEAD], named[EMBEDDING])


def _hold_the_same(head: StoredTensor, embedding: StoredTensor) -> bool:
    """True if both tensors have the same values."""
    if head.shape != embedding.shape:
        return False
    if type(head) is not StoredTensor or type(embedding) is not StoredTensor or head.dtype != embedding.dtype:
        return torch.equal(head.read().float(), embedding.read().float())

    # Piece by piece: each of the two may have gigabytes, and the first piece tells most pairs apart.
    with head.path.open("rb") as ours, embedding.path.open("rb") as theirs:
        ours.seek(head.offset)
        theirs.seek(embedding.offset)
        sizes = (min(PIECE, head.size - done) for done in range(0, head.size, PIECE))
        return all(ours.read(size) == theirs.read(size) for size in sizes)
