"""Passes of one shape as CUDA graphs, where the GPU waits for the host and memory has room for the activations of one
more pass."""

import gc
import logging
from functools import partial

import torch

from finetune_kernels.graphs.host_pace import HostPace
from finetune_kernels.graphs.layer_graphs import LayerGraphs
from finetune_kernels.graphs.recorder import GraphRecorder
from finetune_kernels.graphs.trial import GpuPassTimes
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_trainer.training.memory.room import available_bytes

log = logging.getLogger(__name__)
FILLED = 0.95
"""Share of the memory that recorded passes may fill: the gradients of adapters, which recordings keep, and cuBLAS's
workspaces come on top. With all of it, 5 of 39 emulated cards of 8 to 20 GiB ran out of memory amid a recording."""


def record_passes(layers: FusedLayers, device: torch.device) -> None:
    """Lets `layers`, whose weights stay on `device`, launch passes as graphs."""
    new_recorder, has_room = partial(_new_recorder, device), partial(_has_room, device)
    layers.use_graphs(LayerGraphs(new_recorder, has_room, HostPace(), GpuPassTimes()))


def stop_recording(layers: FusedLayers) -> bool:
    """Gives up graphs after memory ran out, and what they take of it; returns False if there were none."""
    if not layers.drop_graphs():
        return False
    gc.collect()  # cycles of frames may hold tensors of the interrupted pass
    torch.cuda.empty_cache()
    log.warning("out of GPU memory: layers are launched kernel by kernel from now on")
    return True


def _has_room(device: torch.device) -> bool:
    """True if the largest pass so far could be in memory twice; asked between passes."""
    peak = torch.cuda.max_memory_allocated(device)
    return 2 * peak - torch.cuda.memory_allocated(device) <= FILLED * available_bytes(device)


def _new_recorder(device: torch.device) -> GraphRecorder:
    torch.cuda.empty_cache()  # while a pass is recorded, PyTorch gives nothing back of what it does not use
    return GraphRecorder(device)
