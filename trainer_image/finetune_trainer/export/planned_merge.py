"""A merge without its weights: what model type, names and types in the files' headers say against it. Pure, and without
PyTorch: preflight asks.

An adapter is merged into the tensor that has its layer's name. transformers 5 gives some layers another name than the
files have, and lets several layers share one tensor; such an adapter trains, but has no tensor to go into.
"""

import re
from collections.abc import Sequence

from finetune_api.spec.training import ALL_LINEAR
from finetune_trainer.export.errors import InvalidAdapterError, InvalidBaseError
from finetune_trainer.model.adapter_targets import barred_layers
from finetune_trainer.model.layer_weights import layer_weights, linear_names
from finetune_trainer.model.safetensors_header import NF4_STATE, TensorHeader

ADAPTER_ALONE = "to train the adapter alone, write export: {merged: None, gguf: []}"
EXPORTED = ("F32", "F16", "BF16")
"""Types of tensors that can be exported, beside bitsandbytes' NF4."""

UNMERGEABLE: dict[str, frozenset[str]] = {
    model_type: frozenset(names.split())
    for model_type, names in {
        # Renamed when they are loaded.
        "axk2": "q_gate_proj fc1 fc2",
        "bailing_hybrid": "q_proj k_proj v_proj f_proj b_proj o_proj g_proj kv_a_proj_with_mqa kv_b_proj",
        "deepseek_v4": "q_a_proj q_b_proj kv_proj o_a_proj o_b_proj weights_proj",
        "hrm_text": "q_proj k_proj v_proj o_proj gate_proj up_proj",
        "inkling2_text": "q_proj k_proj v_proj r_proj o_proj sink_proj weight_proj",
        "kimi_linear": "f_a_proj f_b_proj",
        "lfm3": "g_proj",
        # One tensor for the blocks of several layers, each of which gets an adapter.
        "zamba": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
        "zamba2": "q_proj k_proj v_proj o_proj gate_up_proj down_proj 0 1",
        # Kept as [in, out].
        "gpt2": "c_attn c_proj c_fc",
        "openai-gpt": "c_attn c_proj c_fc",
    }.items()
}
"""Last parts of the names of layers whose adapters cannot be merged, with transformers 5.23.

`make architectures` asks tiny models of all types; a test asks some.
"""
_WITHOUT_PREFIX = re.compile(r"\w+\.\d+\.")  # all models of transformers keep their layers below a part such as `model`


def check_targets(model_type: str | None, wanted: Sequence[str], headers: Sequence[TensorHeader] | None) -> None:
    """Raise InvalidAdapterError if adapters on `wanted`, as the job writes them, have no tensor to be merged into.

    `headers` are those of the weight files; None: they are not known, or do not name the model's layers.
    """
    weights = layer_weights(headers or (), quantized=False, model_type=model_type)
    bare = next((each.name for each in weights if each.is_linear and _WITHOUT_PREFIX.match(each.name)), None)
    if bare is not None:
        raise InvalidAdapterError(
            f"the weight files name their layers without the model's prefix ({bare}), so that a merge would not find "
            "them: load the model and save it once with transformers' AutoModelForCausalLM, and take the new files; "
            f"{ADAPTER_ALONE}"
        )

    lost = UNMERGEABLE.get(model_type or "", frozenset())
    hit = sorted(lost) if wanted == (ALL_LINEAR,) else [name for name in wanted if name in lost]
    if not hit:
        return

    present = linear_names(weights) - barred_layers(weights, model_type) - lost
    rest = sorted(present) if wanted == (ALL_LINEAR,) else [name for name in wanted if name in present]
    others = f"write targetModules: [{', '.join(rest)}], or " if rest else ""
    raise InvalidAdapterError(
        f"adapters on {', '.join(hit)} of a {model_type} model cannot be merged, as its files hold these layers under "
        f"another name or in another order: {others}{ADAPTER_ALONE}"
    )


def check_stored_types(headers: Sequence[TensorHeader]) -> None:
    """Raise InvalidBaseError for a tensor of a type that cannot be exported, such as the masks of some old files."""
    packed = {header.name.removesuffix(NF4_STATE) for header in headers if header.name.endswith(NF4_STATE)}
    for header in headers:
        head, weight, _ = header.name.partition(".weight")
        if header.dtype not in EXPORTED and not (header.dtype == "U8" and head + weight in packed):
            raise InvalidBaseError(
                f"{header.name} in {header.file} is stored as {header.dtype}, but only F32, F16, BF16 and bitsandbytes "
                f"NF4 weights can be exported: use the original 16-bit model, not a quantised one; {ADAPTER_ALONE}"
            )
