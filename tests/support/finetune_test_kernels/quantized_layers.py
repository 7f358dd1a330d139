"""A model of a few small layers whose linears are in NF4, with adapters."""

from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_kernels.streaming.host_layers import HostLayers
from finetune_test_kernels.small_layers import LINEARS
from finetune_test_kernels.tensor_checks import DEVICE


def quantized_model(layers: int, dtype: torch.dtype = torch.float32, hidden: int = 64, **adapter: Any) -> Any:
    """A peft model over a random Llama in double-quantised NF4, on the test's device. `hidden` is a multiple of 64, so
    rows have whole blocks of weights: test_nf4.py says what bitsandbytes makes of others on a CPU. `adapter`:
    LoraConfig's options."""
    sizes: dict[str, Any] = {
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": hidden // 4, "vocab_size": 48, "pad_token_id": 0,
        "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**sizes), dtype=dtype)  # type: ignore[no-untyped-call]
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=1.6 / hidden**0.5)
    quantize_linears(base.model.layers)

    options: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": LINEARS} | adapter
    model: Any = get_peft_model(base, LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(DEVICE)


def quantize_linears(layers: torch.nn.Module) -> None:
    """Puts the linear layers of decoder layers into NF4."""
    for part in list(layers.modules()):
        for name, linear in list(part.named_children()):
            if type(linear) is torch.nn.Linear:
                setattr(part, name, _quantized(linear))


def linears_of(layer: Any) -> list[Any]:
    """The linear layers in NF4 of a decoder layer."""
    return [part for part in layer.modules() if isinstance(part, Linear4bit)]


def stream(model: Any, count: int) -> HostLayers:
    """Moves the first `count` layers of a peft model to host memory, where they stream from."""
    streamed = HostLayers(model.get_base_model().model.layers)
    streamed.stream(count)
    return streamed


def _quantized(linear: torch.nn.Linear) -> Linear4bit:
    found: Linear4bit = Linear4bit(  # type: ignore[no-untyped-call]
        linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype,
        compress_statistics=True, quant_type="nf4",
    )  # fmt: skip
    found.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
    found.support_avx512bf16_for_cpu = False  # it would repack the weights (stages/model_loading.py)
    return found.to(DEVICE)
