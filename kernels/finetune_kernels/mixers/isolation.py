"""Keeps packed documents apart in the mixers of a hybrid, whatever runs its layers: fused layers, single modules, or
plain PyTorch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from finetune_kernels.mixers.documents import BatchesOfPass
from finetune_kernels.mixers.linear_attention import takes_ends, use_kernels
from finetune_kernels.planning.families import family_of
from finetune_kernels.primitives.attention.inputs import PackedSequences


def isolate_documents(causal: Any) -> int:
    """Makes every mixer of a transformers model that the family's row names run packed documents apart; returns their
    number. Calls without ends of documents, and with a cache, run as before; a second call changes nothing. Linear
    attention of any model gets its kernels."""
    use_kernels(causal)
    family = family_of(causal)
    if family is None or family.mixer is None:
        return 0

    shared, kind = BatchesOfPass(), family.mixer_class
    mixers = [module for module in causal.modules() if type(module).__name__ == kind]
    for module in mixers:
        if not isinstance(module.forward, _DocumentsApart):
            module.forward = _DocumentsApart(module, shared)
    return len(mixers)


class _DocumentsApart:
    """Stands in for the `forward` of a mixer."""

    def __init__(self, mixer: Any, shared: BatchesOfPass) -> None:
        self._mixer, self._original, self._shared = mixer, mixer.forward, shared

    def __call__(self, hidden_states: torch.Tensor, **options: Any) -> Any:
        """hidden_states [B, T, hidden] -> the same shape; B is 1 if documents are packed."""
        ends = options.get("cu_seq_lens_q")
        with _projections_as_modules(self._mixer):
            if ends is None:
                return self._original(hidden_states, **options)
            if takes_ends(self._mixer, hidden_states):
                return self._original(hidden_states, cu_seq_lens_q=ends)

            # Packed rows have no padding, so there is no mask to pass on, and no cache while a model trains.
            rows = hidden_states.flatten(0, 1)
            sequences = PackedSequences(ends, int(options["max_length_q"]), rows.shape[0])
            return self._shared.of(sequences).run(self._original, rows).view(hidden_states.shape)


@contextmanager
def _projections_as_modules(mixer: Any) -> Iterator[None]:
    """Keeps a Mamba mixer from handing the weight of its output projection to the kernel of mamba-ssm, which it does
    only while it trains: the weight may be packed in NF4, and an adapter's share would be left out. Nothing else in a
    mixer asks whether it trains; its adapters' dropout has a state of its own."""
    trains, mixer.training = mixer.training, False
    try:
        yield
    finally:
        mixer.training = trains
