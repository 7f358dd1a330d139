"""Compiles our kernels for usual cards and models, so that a pod's first step does not wait for it.

Runs in the builder stage, under the image's finished environment (Triton's keys have digests of its own files), without
a card: the layers of each model in `MODELS` make a pass forward and backward on tensors without values, and Triton
compiles what they start. What another model or rank needs is compiled in the pod, as ever.

Triton's list of a kernel's files names them where they lie in the image, so that a copy of the list finds them there.

    python compile_kernels.py CACHE [CAPABILITY]
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from cardless_driver import SHARED_MEMORY, Compilations, use_cardless_driver

RANK: Final = 16  # the API's default
TOKENS: Final = (4096, 1001)
"""Rows of a pass: Triton compiles for multiples of 16 apart."""

MODELS: Final[dict[str, tuple[str, dict[str, int]]]] = {
    "Llama 3.2 1B": ("llama", {"hidden": 2048, "mlp": 8192, "heads": 32, "kv": 8, "head": 64, "vocab": 128256}),
    "Llama 3.2 3B": ("llama", {"hidden": 3072, "mlp": 8192, "heads": 24, "kv": 8, "head": 128, "vocab": 128256}),
    "Llama 3.1 8B": ("llama", {"hidden": 4096, "mlp": 14336, "heads": 32, "kv": 8, "head": 128, "vocab": 128256}),
    "Llama 3.3 70B": ("llama", {"hidden": 8192, "mlp": 28672, "heads": 64, "kv": 8, "head": 128, "vocab": 128256}),
    "Mistral 7B": ("mistral", {"hidden": 4096, "mlp": 14336, "heads": 32, "kv": 8, "head": 128, "vocab": 32768}),
    "Qwen 2.5 7B": ("qwen2", {"hidden": 3584, "mlp": 18944, "heads": 28, "kv": 4, "head": 128, "vocab": 152064}),
    "Qwen 3 4B": ("qwen3", {"hidden": 2560, "mlp": 9728, "heads": 32, "kv": 8, "head": 128, "vocab": 151936}),
    "Qwen 3 8B": ("qwen3", {"hidden": 4096, "mlp": 12288, "heads": 32, "kv": 8, "head": 128, "vocab": 151936}),
    "Gemma 3 4B": ("gemma3_text", {"hidden": 2560, "mlp": 10240, "heads": 8, "kv": 4, "head": 256, "vocab": 262208}),
    "Phi 4": ("phi3", {"hidden": 5120, "mlp": 17920, "heads": 40, "kv": 10, "head": 128, "vocab": 100352}),
}
"""Type in transformers and sizes of models that people fine-tune most; two layers of each are enough."""

BF16_FROM: Final = 80
FP8_FROM: Final = 89
NOT_NEEDED: Final = (".ttir", ".ttgir", ".llir", ".ptx", ".source")
"""Triton's steps on the way to a kernel, three quarters of what it keeps; it loads kernels without them."""


def compile_for(capability: int, cache: Path, models: dict[str, tuple[str, dict[str, int]]]) -> Compilations:
    """Compiles what some models start on a card of a compute capability, or finds it in `cache`. For a process of its
    own."""
    compilations = use_cardless_driver(capability, cache)
    _give_attention_shapes()
    for kind, sizes in models.values():
        run_layers(kind, sizes, compute_dtype(capability), fp8=capability >= FP8_FROM)
    return compilations


def _give_attention_shapes() -> None:
    """Makes tensors without values pass through the attention of cards before Ampere: PyTorch 2.13 tells the shapes of
    that kernel's gradients for fewer arguments than it has, and so fails."""
    from finetune_kernels.primitives.attention import efficient
    from finetune_kernels.primitives.attention.inputs import Qkv

    def backward(dout: torch.Tensor, qkv: Qkv, *_: Any) -> Qkv:
        return Qkv(*(part.new_empty(part.shape) for part in qkv))

    vars(efficient)["backward"] = backward


def compute_dtype(capability: int) -> torch.dtype:
    """Returns the 16-bit type that a card of a compute capability multiplies."""
    return torch.bfloat16 if capability >= BF16_FROM else torch.float16


def run_layers(kind: str, sizes: dict[str, int], dtype: torch.dtype, *, fp8: bool, device: str = "meta") -> None:
    """Runs two layers of a model on a device as the trainer does: with weights that are kept, or decoded in each pass,
    in `dtype` and in FP8."""
    model = _build(kind, sizes, dtype, device)
    for tokens in TOKENS:
        _make_passes(model, tokens, keep_dequantized=False)
        _make_passes(model, tokens, keep_dequantized=True)
        if fp8:
            _make_passes(model, tokens, keep_dequantized=True, fp8=True)
            _make_passes(model, tokens, keep_dequantized=False, fp8=True)


def keep_binaries(cache: Path) -> None:
    """Deletes from Triton's cache what a kernel that is compiled does not need."""
    for path in cache.glob("*/*"):
        if path.suffix in NOT_NEEDED:
            path.unlink()


def _build(kind: str, sizes: dict[str, int], dtype: torch.dtype, device: str) -> Any:
    """Returns a peft model of two layers, its base in NF4."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, hidden_size=sizes["hidden"], intermediate_size=sizes["mlp"], num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv"], head_dim=sizes["head"], vocab_size=sizes["vocab"], num_hidden_layers=2,
        pad_token_id=0, dtype=dtype,
    )  # fmt: skip
    with torch.device(device):
        model = get_peft_model(
            AutoModelForCausalLM.from_config(config), LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        )
    for module in [part for part in model.modules() if hasattr(part, "lora_A")]:
        _quantize(module.base_layer)

    # Layers are built by the values of an activation's own numbers (xIELU).
    for module in [part for part in model.modules() if hasattr(part, "alpha_p")]:
        module.to_empty(device="cpu")
        for number in [*module.parameters(), *module.buffers()]:
            number.data.fill_(0.5)
    return model


def _quantize(linear: Any) -> None:
    """Gives a linear layer, which may have no values, the form of bitsandbytes' NF4 layers."""
    from bitsandbytes import functional

    # Made once and kept by bitsandbytes, whose code reads values of it.
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    codes, state = functional.quantize_4bit(linear.weight.data, quant_type="nf4", compress_statistics=True)
    linear.weight = torch.nn.Parameter(codes, requires_grad=False)
    linear.weight.quant_state = state


def _make_passes(model: Any, tokens: int, *, keep_dequantized: bool, fp8: bool = False) -> None:
    """Runs a model's layers forward and backward under each activation policy, as the trainer's engine does."""
    from finetune_kernels.layers.fused_layers import FusedLayers
    from finetune_kernels.layers.layer_check import why_not_fused
    from finetune_kernels.layers.patching import patch_model
    from finetune_kernels.layers.supervised_loss import fused_supervised_loss
    from finetune_kernels.planning.activation_policy import ActivationPolicy

    causal = model.get_base_model()
    if (reason := why_not_fused(causal)) is not None:
        raise RuntimeError(f"{causal.config.model_type}: {reason}")
    words = torch.zeros(1, tokens, dtype=torch.long, device=causal.device)
    mask = torch.zeros(1, 1, 1, 1, device=causal.device)  # of this form transformers asks for no values
    kinds = set(getattr(causal.config, "layer_types", None) or ())
    inputs = {"input_ids": words, "position_ids": words, "attention_mask": dict.fromkeys(kinds, mask) or mask}

    layers = FusedLayers(causal, [ActivationPolicy.SAVE_ALL] * 2, causal.dtype, keep_dequantized=keep_dequantized)
    patch_model(model, keep_dequantized=False)
    if fp8:
        layers.use_fp8()

    # The policy that keeps activations in host memory starts no kernel that these do not.
    for policy in (ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.RECOMPUTE_ALL):
        layers.set_policies([policy] * 2)
        fused_supervised_loss(model, inputs, words, words[0, 1:], None).backward()


def main() -> None:
    """Compiles for one capability, or for each in a process of its own."""
    cache = Path(sys.argv[1])
    if len(sys.argv) > 2:
        done = compile_for(int(sys.argv[2]), cache, MODELS)
        print(f"compute capability {sys.argv[2]}: {len(done.compiled)} kernels compiled")
        return

    with ThreadPoolExecutor() as pool:
        commands = [[sys.executable, __file__, str(cache), str(capability)] for capability in SHARED_MEMORY]
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    keep_binaries(cache)


if __name__ == "__main__":
    main()
