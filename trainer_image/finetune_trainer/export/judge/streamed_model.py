"""The loss of a model of any size, of which one layer at a time is in memory.

The model itself is transformers' own, built without weights. Its forward pass runs once for each row with layers that
only note what they are called with: masks, positions and whatever else the architecture gives them. Then each layer is
read once, and all rows go through it. At the end the forward pass runs again, with the finished hidden states in place
of the last layer's, through norm and head.

Rejected: a second whole model beside the one that was trained (16 GB for 8 billion weights); a forward pass of our own,
which would have to know every architecture.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_trainer.chat.labels import IGNORED, Encoded
from finetune_trainer.export.base_model.causal_model import choose_functions
from finetune_trainer.export.base_model.folder import BaseModel
from finetune_trainer.export.judge.parameters import Parameters
from finetune_trainer.export.judge.weights import Weights
from finetune_trainer.stopping import raise_if_requested

HEAD_POSITIONS = 256
"""Positions whose logits are in memory together: 256 MB in fp32 for a vocabulary of 256 000."""
EMBEDDING_DIMENSIONS = 3
PAIRS = ("bamba",)
"""Model types whose decoder takes two values from every layer: hidden states, and attention's weights or None."""
State = dict[str, torch.Tensor]


@dataclass
class _Row:
    """One row on its way through the layers."""

    ids: torch.Tensor
    """[1, T]"""
    positions: torch.Tensor
    """[S]: each predicts the token after it."""
    targets: torch.Tensor
    """[S]"""
    hidden: torch.Tensor | None = None
    """[1, T, hidden] after the layers so far; [streams, 1, T, hidden] of Gemma 3n."""
    given: Any = None
    """What the last of them gave: hidden states, or a tuple that begins with them (Falcon H1)."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """Arguments of each layer, without the hidden states."""

    def as_embeddings(self) -> torch.Tensor:
        """Hidden states in the shape of embeddings, [1, T, hidden]: the first stream of a model with several."""
        assert self.hidden is not None, "embed the row first"
        return self.hidden if self.hidden.dim() == EMBEDDING_DIMENSIONS else self.hidden[0]


class StreamedModel:
    """The architecture of `base`, to be filled with any weights of it."""

    def __init__(self, base: BaseModel, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._model = build_without_weights(base.full_config, device, dtype)
        self._parameters = Parameters(self._model, [name for name, _ in base.shapes])

        self._decoder = decoder = _decoder_of(self._model)
        self._layers = list(decoder.layers)
        names = {id(module): name for name, module in self._model.named_modules()}
        self._prefix = f"{names[id(decoder)]}."
        self._layer_prefixes = [f"{names[id(layer)]}." for layer in self._layers]

    @torch.no_grad()
    def loss(self, weights: Weights, rows: Sequence[Encoded]) -> float:
        """Nats per supervised token over all `rows`, each computed alone; NaN if the weights compute no number.

        Raises InvalidBaseError for a file that ends early, and InterruptedRunError between layers after a signal.
        """
        running = [self._place(row) for row in rows]
        stages = self._stages()
        names = [name for stage in stages for name in stage]

        with closing(weights.read(names, self._parameters, self._device, self._dtype)) as tensors:
            # Each stage takes its own weights from the one reading, which reads ahead meanwhile.
            def take(stage: Sequence[str], prefix: str = "") -> State:
                return {name.removeprefix(prefix): next(tensors)[1] for name in stage}

            self._begin(running, take(stages[0], self._prefix))
            for index, (stage, prefix) in enumerate(zip(stages[1:-1], self._layer_prefixes, strict=True)):
                self._run_layer(index, take(stage, prefix), running)
                raise_if_requested()
            total = self._finish(running, take(stages[-1]))

        return total / sum(row.positions.numel() for row in running)

    def _stages(self) -> list[list[str]]:
        """Names of the parameters before the layers, of each layer, and behind them."""
        names = self._parameters.names
        inside = [[name for name in names if name.startswith(prefix)] for prefix in self._layer_prefixes]
        in_layers = {name for stage in inside for name in stage}

        outer = [name for name in names if name not in in_layers]
        before = [name for name in outer if name.startswith(self._prefix)]
        # The decoder's own forward pass ends with its norm: it is small, and read twice.
        embedding = [name for name in before if ".embed_tokens" in name]
        return [before, *inside, [name for name in outer if name not in embedding]]

    def _place(self, row: Encoded) -> _Row:
        ids = torch.tensor([row.input_ids], device=self._device)
        labels = torch.tensor(row.labels, device=self._device)[1:]
        positions = torch.nonzero(labels != IGNORED).flatten()
        return _Row(ids, positions, labels[positions])

    def _begin(self, rows: Sequence[_Row], state: State) -> None:
        """Embed every row, and note the arguments of its layers."""
        for row in rows:

            def note(hidden: torch.Tensor, *arguments: Any, row: _Row = row, **named: Any) -> Any:
                row.hidden = hidden if row.hidden is None else row.hidden
                row.calls.append((arguments, named))
                return (row.hidden, None) if self._model.config.model_type in PAIRS else row.hidden

            with self._layers_as([note] * len(self._layers)):
                functional_call(self._decoder, state, (), {"input_ids": row.ids, "use_cache": False})

    def _run_layer(self, index: int, state: State, rows: Sequence[_Row]) -> None:
        for row in rows:
            arguments, named = row.calls[index]
            row.given = functional_call(self._layers[index], state, (row.hidden, *arguments), named)
            row.hidden = row.given[0] if isinstance(row.given, tuple) else row.given

    def _finish(self, rows: Sequence[_Row], state: State) -> float:
        """Sum the loss of all rows."""
        total = 0.0
        for row in rows:
            # Hidden states enter as embeddings, which some architectures scale: the layers give them as they are.
            with self._layers_as([lambda *_, row=row, **__: row.given] * len(self._layers)):
                for start in range(0, row.positions.numel(), HEAD_POSITIONS):
                    part = slice(start, start + HEAD_POSITIONS)
                    named = {
                        "inputs_embeds": row.as_embeddings(),
                        "use_cache": False,
                        "logits_to_keep": row.positions[part],
                    }
                    named |= self._unused_inputs(row)

                    logits = functional_call(self._model, state, (), named).logits[0]  # [S, vocabulary]
                    total += functional.cross_entropy(logits.float(), row.targets[part], reduction="sum").item()
        return total

    def _unused_inputs(self, row: _Row) -> dict[str, torch.Tensor]:
        """Each layer's own embedding, which Gemma would look up by the embeddings' values; no layer reads it."""
        width = getattr(self._model.config, "hidden_size_per_layer_input", 0)
        if not width:
            return {}
        shape = (*row.ids.shape, len(self._layers), width)
        return {"per_layer_inputs": torch.zeros(shape, dtype=self._dtype, device=self._device)}

    @contextmanager
    def _layers_as(self, functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """While this lasts, each layer computes its function instead."""
        for layer, function in zip(self._layers, functions, strict=True):
            layer.forward = function
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward


def _decoder_of(model: Any) -> Any:
    """The part of a model with the layers; Llama 4's own `get_decoder` gives the whole model."""
    decoder = model.get_decoder()
    return decoder if hasattr(decoder, "layers") else model.model


def build_without_weights(full_config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' model of a full config, whose parameters have shapes and no values; its buffers are on `device`."""
    config = CONFIG_MAPPING[full_config["model_type"]].from_dict(dict(full_config))
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    choose_functions(model)

    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()
