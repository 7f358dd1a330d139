"""Rows of the Gemma families: norms that multiply by 1 + weight, and windows in some layers."""

from typing import Any

from gguf import MODEL_ARCH

from finetune_trainer.export.gguf.families.common import TANH_GELU
from finetune_trainer.export.gguf.family_row import GgufFamily

_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "activation": TANH_GELU}
GEMMA: dict[str, GgufFamily] = {
    "gemma": GgufFamily(MODEL_ARCH.GEMMA, fixed={"tie_word_embeddings": True}, **_GEMMA),
    "gemma2": GgufFamily(MODEL_ARCH.GEMMA2, sliding_window=True, fixed_scale_layers=46, window_period=2, **_GEMMA),
    "gemma3_text": GgufFamily(MODEL_ARCH.GEMMA3, sliding_window=True, fixed_scale_layers=62, window_period=6, **_GEMMA),
    "gemma4_text": GgufFamily(
        MODEL_ARCH.GEMMA4,
        activation=TANH_GELU,
        window_pattern=True,
        rope_tensors=True,
        layer_sizes=True,
        tokenizer="gemma4",
        settings={"moe_intermediate_size": "expert_feed_forward_length"},
        fixed={"attention_bias": False},
    ),
}
