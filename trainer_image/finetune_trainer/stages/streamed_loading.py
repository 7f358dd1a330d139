"""Base models whose weights leave the GPU as soon as they are loaded: shared out among the ranks, or into host memory.

transformers reads and quantises one tensor after the other, in the order of the layers, and puts each into its module.
torch tells of every parameter that a module gets, so a layer is known to be complete, and it is taken away before the
next one is read: no GPU ever holds the whole base, and of one that is shared out no host does. Embedding and head go
to host memory in the same way, where the memory plan has them there.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedModel, modeling_utils

from finetune_api.failures import FailureReason
from finetune_kernels.experts.replacing import WEIGHTS
from finetune_kernels.streaming.frozen_tensors import nf4_tensors, stack_tensors
from finetune_kernels.streaming.host_layers import HostLayers
from finetune_kernels.streaming.host_tensors import HostTensors, storage_key
from finetune_kernels.streaming.layer_window import LayerWindow
from finetune_kernels.streaming.sharded_tensors import ShardedTensors
from finetune_kernels.vocabulary.host_vocabulary import in_host_memory
from finetune_trainer.errors import TrainerError

READS_ALONG = "HF_DEACTIVATE_ASYNC_LOAD"
"""transformers' variable against threads that bring tensors to the GPU ahead of what is done with them."""


@dataclass(frozen=True)
class Share:
    """A base of which this rank keeps one of `ranks` parts of every layer."""

    rank: int
    ranks: int


@dataclass(frozen=True)
class InHostMemory:
    """A base whose first `layers` layers stream from host memory."""

    layers: int
    vocabulary: bool = False
    """True if embedding and head are in host memory, too."""


Placement = Share | InHostMemory
"""Where a base lies that no GPU holds whole."""


@dataclass
class TakenLayers:
    """Layers whose weights were taken off the GPU, as they came."""

    placement: Placement
    _parents: dict[nn.Module, nn.Module] = field(default_factory=dict)
    _loading: dict[nn.Module, dict[tuple[nn.Module, str], Any]] = field(default_factory=dict)
    """Of each layer that is not complete: the weights that are there, by their module and name."""
    _shards: dict[nn.Module, ShardedTensors] = field(default_factory=dict)
    _in_host_memory: dict[nn.Module, HostTensors] = field(default_factory=dict)
    _vocabulary: list[nn.Parameter] = field(default_factory=list)
    """Embedding and head in host memory."""

    def remember_parent(self, parent: nn.Module, _: str, child: nn.Module | None) -> None:
        """Takes note of a module that another one gets."""
        if child is not None:
            self._parents[child] = parent

    def take(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Takes note of a weight in NF4 that a linear layer or experts get; takes its decoder layer away if it is the
        last. Moves the weight of an embedding or a head to host memory if it is to be there."""
        if self._is_table(parameter, module):
            # It stays the parameter that transformers has marked as loaded: it would draw another one anew.
            before, parameter.data = parameter.data, in_host_memory(parameter)
            self._vocabulary.append(parameter)
            if before.is_cuda:
                before.untyped_storage().resize_(0)  # transformers holds on to it until the next tensor is there
            return
        self._take_from_layer(module, name, parameter)

    def _is_table(self, parameter: nn.Parameter | None, module: nn.Module) -> TypeGuard[nn.Parameter]:
        """True for the loaded weight of an embedding or a head that is to be in host memory, and is not yet."""
        if not isinstance(self.placement, InHostMemory) or not self.placement.vocabulary:
            return False
        if parameter is None or parameter.is_meta or type(module) not in (nn.Embedding, nn.Linear):
            return False

        if any(parameter is taken for taken in self._vocabulary):  # tied, the head gets the embedding's
            return False

        root = module
        while root in self._parents:
            root = self._parents[root]
        model: Any = root if isinstance(root, PreTrainedModel) else None
        return model is not None and module in (model.get_input_embeddings(), model.get_output_embeddings())

    def _take_from_layer(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        layer = self._layer_of(module)
        if layer is None or not _is_loaded(parameter):
            return

        weights = self._loading.setdefault(layer, {})
        weights[module, name] = parameter
        if len(weights) < _count_in_nf4(layer):
            return
        self._take_away(layer, [*self._loading.pop(layer).values()])

    def _take_away(self, layer: nn.Module, weights: Sequence[Any]) -> None:
        stacks = [weight for weight in weights if hasattr(weight, "nf4_stack")]
        tensors = [tensor for weight in weights if not hasattr(weight, "nf4_stack") for tensor in nf4_tensors(weight)]
        tensors += [tensor for weight in stacks for tensor in stack_tensors(weight.nf4_stack)]
        if isinstance(self.placement, Share):
            self._shards[layer] = ShardedTensors(tensors, self.placement.rank, self.placement.ranks)
        elif self._place_of(layer) < self.placement.layers:
            self._in_host_memory[layer] = HostTensors(tensors)
        for weight in stacks:
            weight.data = weight.nf4_stack.codes.data  # the codes lie nowhere else from now on

    def window(self, model: Any) -> LayerWindow | None:
        """Returns the window on the layers of the loaded model that the ranks share, which use it from now on; None if
        they do not share it.

        Raises TrainerError (InvalidConfiguration) if a layer has weights that were not shared out.
        """
        if not isinstance(self.placement, Share):
            return None
        modules = decoder_layers(model)
        _check_taken(model, modules, self._shards, "spec.training.parallelism: Sharded", "write Replicated")
        window = LayerWindow()
        window.attach([self._shards[module] for module in modules], modules)
        return window

    def host_layers(self, model: Any) -> HostLayers:
        """Returns the layers of the loaded model that stream from host memory, from now on.

        Raises TrainerError (InvalidConfiguration) if a layer has weights that cannot.
        """
        streamed = HostLayers(decoder_layers(model))
        if isinstance(self.placement, InHostMemory) and self.placement.layers:
            modules = decoder_layers(model)[: self.placement.layers]
            _check_taken(model, modules, self._in_host_memory, "a base that no GPU holds", "use a larger GPU")
            streamed.adopt([self._in_host_memory[module] for module in modules])
        return streamed

    def content_of(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the content of one of the loaded model's tensors: on the CPU, if it waits in host memory."""
        keys = {layer.storage_key: layer for layer in self._in_host_memory.values()}
        layer = keys.get(storage_key(value))
        return value if layer is None else layer.content_of(value)

    def _layer_of(self, module: nn.Module) -> nn.Module | None:
        """The decoder layer that a module is part of: the outermost one that stands in a list."""
        found, parent = None, self._parents.get(module)
        while parent is not None:
            found = module if isinstance(parent, nn.ModuleList) else found
            module, parent = parent, self._parents.get(parent)
        return found

    def _place_of(self, layer: nn.Module) -> int:
        """The layer's place among its model's."""
        return next(place for place, module in enumerate(self._parents[layer].children()) if module is layer)


@contextmanager
def taking_layers(placement: Placement) -> Iterator[TakenLayers]:
    """Takes the layers of the model that is loaded inside off its GPU, one after the other."""
    layers = TakenLayers(placement)
    hooks = [
        register_module_module_registration_hook(layers.remember_parent),
        register_module_parameter_registration_hook(layers.take),
    ]
    try:
        with _one_by_one():
            yield layers
    finally:
        for hook in hooks:
            hook.remove()


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a transformers model; none if they are not a list of that name."""
    return list(getattr(model.get_decoder(), "layers", ()))


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Keeps transformers from bringing tensors to the GPU ahead of those that are taken away, and from reserving memory
    for the whole model there."""
    variable, warm_up = os.environ.get(READS_ALONG), modeling_utils.caching_allocator_warmup
    os.environ[READS_ALONG] = "1"
    modeling_utils.caching_allocator_warmup = lambda *_: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = warm_up
        del os.environ[READS_ALONG]
        if variable is not None:
            os.environ[READS_ALONG] = variable


def _check_taken(model: Any, modules: Sequence[nn.Module], taken: dict[nn.Module, Any], what: str, remedy: str) -> None:
    """Raises TrainerError (InvalidConfiguration) if a layer was not taken."""
    if missing := [index for index, module in enumerate(modules) if module not in taken]:
        message = f"{what} needs linear layers in NF4, and layer {missing[0]} of {type(model).__name__} has none"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, f"{message}: {remedy}")


def _is_loaded(parameter: Any) -> bool:
    """True for a weight in NF4: a matrix of bitsandbytes', or a stack of experts."""
    if parameter is None or parameter.is_meta:
        return False
    return getattr(parameter, "quant_state", None) is not None or hasattr(parameter, "nf4_stack")


def _count_in_nf4(layer: nn.Module) -> int:
    """Weights of a decoder layer that are in NF4 once it is loaded."""
    linears = sum(isinstance(part, Linear4bit) for part in layer.modules())
    parameters = (each for part in layer.modules() for each in part.named_parameters(recurse=False))
    stacks = sum(name in WEIGHTS and (value.ndim == 3 or hasattr(value, "nf4_stack")) for name, value in parameters)
    return linears + stacks
