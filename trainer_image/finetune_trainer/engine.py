"""How the model computes: our kernels on a GPU in bfloat16, plain PyTorch elsewhere; what stays in memory, what not.

The choice is made once, from the model's shape and the free memory, and said in the log.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Precision
from finetune_kernels.memory_plan import ModelShape, plan_memory
from finetune_kernels.packed_attention import use_packed_attention
from finetune_kernels.patching import patch_model
from finetune_kernels.supervised_loss import causal_model, has_plain_head
from finetune_kernels.supervised_loss import supervised_loss as fused_loss
from finetune_trainer.losses import supervised_loss
from finetune_trainer.model_loading import LoadedModel

log = logging.getLogger(__name__)
Loss = Callable[[Any, Mapping[str, Any], torch.Tensor, torch.Tensor | int | None], torch.Tensor]


@dataclass(frozen=True)
class Engine:
    """What was chosen."""

    recompute_activations: bool
    loss: Loss


def prepare_engine(model: Any, loaded: LoadedModel, config: RunConfig) -> Engine:
    """Choose, and put the kernels into the model (a peft model)."""
    on_gpu = loaded.device.type == "cuda"
    if not (on_gpu and loaded.precision is Precision.BF16 and config.kernels):
        log.info("engine: plain PyTorch%s", ", activations recomputed" if on_gpu else "")
        return Engine(on_gpu, supervised_loss)
    tokens = config.training.batch_size * config.model.max_sequence_length
    plan = plan_memory(_shape(model), tokens, torch.cuda.mem_get_info(loaded.device)[0])
    log.info("%s", plan)
    log.info("%s", patch_model(model, resident=plan.resident_weights))
    reason = use_packed_attention(causal_model(model))
    log.info("attention: %s", f"as it was ({reason})" if reason else "packed, by variable lengths")
    if not has_plain_head(model):
        log.warning("%s trains with the plain head: all supervised logits are in memory at once", loaded.architecture)
        return Engine(not plan.keep_activations, supervised_loss)
    return Engine(not plan.keep_activations, fused_loss)


def _shape(model: Any) -> ModelShape:
    config = causal_model(model).config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    states = (getattr(weight, "quant_state", None) for weight in model.parameters())
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        key_value=head * config.num_key_value_heads,
        feed_forward=config.intermediate_size,
        vocabulary=config.vocab_size,
        linear_parameters=sum(math.prod(state.shape) for state in states if state is not None),
    )
