"""The parameters of transformers' model, each made of the tensors of the files: renamed, or several joined into one.

transformers 5 keeps the experts of a layer in one parameter where files hold a matrix for each, and calls some modules
otherwise than files do. Its own table of conversions says how; here one parameter is made at a time, when it is wanted.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from finetune_trainer.export.base_model.output_head import HEAD
from finetune_trainer.export.errors import InvalidBaseError


class Parameters:
    """The parameters of one model, and its buffers that files hold, by the names of the files' tensors."""

    def __init__(self, model: Any, stored: Iterable[str]) -> None:
        """`stored` are the names of all tensors in the files.

        Raises InvalidBaseError if one of `model`'s parameters is made of none of them.
        """
        self._model = model
        rules: list[Any] = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

        self._state: dict[str, torch.Tensor] = model.state_dict()
        self._buffers = {name for name, _ in model.named_buffers()}
        self._sources: dict[str, list[str]] = {}
        self._patterns: dict[str, str | None] = {}
        for name in sorted(stored, key=dot_natural_key):  # experts in their order
            target, pattern = self._target(name)
            if target in self._state:
                self._sources.setdefault(target, []).append(name)
                self._patterns[name] = pattern

        missing = sorted(self._state.keys() - self._sources.keys() - {HEAD})
        if missing:
            raise InvalidBaseError(f"no tensor of the files becomes {missing[0]}, so the model cannot be computed here")

    @property
    def names(self) -> list[str]:
        """Every parameter, in the order of the model's modules."""
        return list(self._state)

    def sources(self, name: str) -> Sequence[str]:
        """The tensors of the files that a parameter is made of; a head that no file holds is its own."""
        return self._sources.get(name, [name])

    def dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The type that a parameter has in a model of `dtype`: buffers, which choose experts, are fp32, as transformers
        loads them."""
        return torch.float32 if name in self._buffers else dtype

    def make(self, name: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parameter, of the values of its sources."""
        sources = self.sources(name)
        pattern = self._patterns.get(sources[0])
        if pattern is None:
            return values[0]

        rule: Any = deepcopy(next(rule for rule in self._converters if pattern in rule.source_patterns))
        for source, value in zip(sources, values, strict=True):
            rule.add_tensor(name, source, str(self._patterns[source]), value)
        made = rule.convert(name, model=self._model, config=self._model.config)[name]
        parameter: torch.Tensor = made[0] if isinstance(made, list) else made
        return parameter

    def _target(self, name: str) -> tuple[str, str | None]:
        """The parameter that a tensor of the files becomes a part of, and the rule's pattern; None: it is all of it."""
        prefix = self._model.base_model_prefix
        found = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if found[0] not in self._state and name in self._state:
            return name, None
        return found[0], found[1]
